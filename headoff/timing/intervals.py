"""The median of noisy measurements, with an interval that stays valid when noise comes in bursts.

Times measured on one machine are not independent: another process, a clock change or a garbage collection slows many
rounds in a row. An interval that counts every round as independent would be too narrow. So rounds are grouped into
blocks of neighbours. The medians of the blocks are nearly independent once a block is longer than a burst; nothing
else is assumed, neither a normal distribution nor a finite variance. The number of block medians below the true median
is then binomial, and the interval reaches from the r-th smallest to the r-th largest, with r chosen so that the
binomial distribution guarantees the confidence (David and Nagaraja, "Order Statistics", 3rd edition, section 7.1; the
blocks are the "batch means" of simulation output analysis, with medians instead of means).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from headoff.errors import SettingError

CONFIDENCE = 0.99
"""Of every interval. A run has some thirty intervals: at 0.95, one or two of them would be wrong by chance."""

MOST_BLOCKS = 16
"""More blocks would be shorter than a burst of noise, and make the interval hardly narrower."""


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval around it: low <= estimate <= high."""

    estimate: float
    low: float
    high: float


def fewest_values(confidence: float = CONFIDENCE) -> int:
    """The smallest number of values that gives an interval of this confidence: 8 for 0.99."""
    count = 1
    while _confidence_of(count, 1) < confidence:
        count += 1
    return count


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of `values`, given in the order of measurement, and an interval for the true median.

    Raises:
        SettingError: there are fewer than `fewest_values(confidence)` values.
    """
    if not 0 < confidence < 1:
        raise SettingError(
            f"a confidence of {confidence} is not possible: use a number between 0 and 1, like 0.99"
        )
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
    """Probability that the median lies between the `rank`-th smallest and the `rank`-th largest of `count` values."""
    if 2 * rank > count + 1:
        return 0.0
    outside = sum(math.comb(count, below) for below in range(rank)) / 2**count
    return 1 - 2 * outside
