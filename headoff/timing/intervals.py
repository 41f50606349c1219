"""The median of noisy measurements, with an interval that holds under noise which comes in bursts.

Timings of one machine are not independent: another process, a change of the clock, a collection of garbage slows many
rounds in a row. An interval that counts every round as evidence of its own would be too narrow. So the rounds are cut
into blocks of neighbours. The medians of the blocks are nearly independent as soon as a block is longer than a burst,
and nothing else is asked of them, no normal distribution and no finite variance: how many of them fall below the true
median is then binomial, and the interval is from the r-th smallest to the r-th largest, with r so that the binomial
distribution guarantees the confidence. (David, Nagaraja, "Order Statistics", 3rd edition, section 7.1; blocks are the
"batch means" of simulation output, with medians for means.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headoff.errors import SettingError

CONFIDENCE = 0.99
"""Of every interval. A suite makes some thirty: at 0.95 it would call one or two of them faster or slower by luck."""

MOST_BLOCKS = 16
"""More of them are shorter, and shorter than a burst of noise; the interval would gain little by it."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it: low <= estimate <= high."""

    estimate: float
    low: float
    high: float


def fewest_values(confidence: float = CONFIDENCE) -> int:
    """How many values there must be for any interval to have this confidence: 8 for 0.99."""
    count = 1
    while _confidence_of(count, 1) < confidence:
        count += 1
    return count


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of `values`, in the order in which they were measured, and an interval for the true one.

    Raises SettingError where there are fewer than `fewest_values(confidence)`.
    """
    if not 0 < confidence < 1:
        raise SettingError(f"a confidence of {confidence} cannot be: use a number between 0 and 1, like 0.99")
    fewest = fewest_values(confidence)
    if len(values) < fewest:
        raise SettingError(
            f"{len(values)} measurements give no interval of confidence {confidence}: make at least {fewest}"
        )
    blocks = np.array_split(np.asarray(values, np.float64), min(len(values), max(MOST_BLOCKS, fewest)))
    medians = sorted(float(np.median(block)) for block in blocks)
    rank = 1
    while _confidence_of(len(medians), rank + 1) >= confidence:
        rank += 1
    return Interval(float(np.median(medians)), medians[rank - 1], medians[-rank])


def _confidence_of(count: int, rank: int) -> float:
    """That the median lies between the `rank`-th smallest and the `rank`-th largest of `count` values."""
    if 2 * rank > count + 1:
        return 0.0
    outside = sum(math.comb(count, below) for below in range(rank)) / 2**count
    return 1 - 2 * outside
