"""The result of timing two implementations in turns: a ratio, an interval that holds under bursts of noise, a verdict.

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
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

from headoff.errors import SettingError
from headoff.wording import format_seconds

CONFIDENCE = 0.99
"""Of every interval. A run has some thirty intervals: at 0.95, one or two of them would be wrong by chance."""

FEWEST_VALUES = 8
"""Fewer give no interval of this confidence: all lie on one side of the median with a probability of 2 / 2**8."""

MOST_BLOCKS = 16
"""More blocks would be shorter than a burst of noise, and make the interval hardly narrower."""

MAX_SLOWDOWN = 1.10
"""A patch may take this many times the baseline's time, by default."""


class Verdict(StrEnum):
    """What the interval of a ratio says."""

    FASTER = "faster"
    """The whole interval is below 1."""
    NO_SLOWER = "no slower"
    """No part of it is above the largest slowdown allowed, but it is not all below 1."""
    INCONCLUSIVE = "inconclusive"
    """It contains the largest slowdown allowed."""
    SLOWER = "slower"
    """The whole interval is above the largest slowdown allowed."""


class Interval(NamedTuple):
    """An estimate, and the interval around it: low <= estimate <= high."""

    estimate: float
    low: float
    high: float


def median_interval(values: Sequence[float]) -> Interval:
    """The median of `values`, given in the order of measurement, and an interval for the true median.

    Raises:
        SettingError: there are fewer than `FEWEST_VALUES` values.
    """
    if len(values) < FEWEST_VALUES:
        raise SettingError(f"{len(values)} measurements give no interval: make at least {FEWEST_VALUES}")
    blocks = np.array_split(np.asarray(values, np.float64), min(len(values), MOST_BLOCKS))
    medians = sorted(float(np.median(block)) for block in blocks)
    rank = 1
    while _coverage(len(medians), rank + 1) >= CONFIDENCE:
        rank += 1
    return Interval(float(np.median(medians)), medians[rank - 1], medians[-rank])


def _coverage(count: int, rank: int) -> float:
    """Probability that the median lies between the `rank`-th smallest and the `rank`-th largest of `count` values."""
    return 1 - 2 * sum(math.comb(count, below) for below in range(rank)) / 2**count


@dataclass(frozen=True)
class SpeedComparison:
    """Time of a patch relative to a baseline, from interleaved rounds in one process.

    Attributes:
        ratio: time of the patch divided by time of the baseline.
        low, high: the interval of the ratio, of `CONFIDENCE`.
        patch_rounds, baseline_rounds: seconds of each round. Rounds with the same index were neighbours in time.
    """

    ratio: float
    low: float
    high: float
    patch_rounds: tuple[float, ...]
    baseline_rounds: tuple[float, ...]

    @classmethod
    def of(cls, patch_rounds: Sequence[float], baseline_rounds: Sequence[float]) -> SpeedComparison:
        """From rounds of alternating order: patch second in rounds 0, 2, ..., first in rounds 1, 3, ...

        Two rounds (baseline, patch, patch, baseline) make one value, the geometric mean of their ratios: a drift of
        the machine's speed and any advantage of the second call cancel in it. The estimate is the median of these
        values. Where calls take so long that there are too few rounds for that, every round is a value of its own, and
        what does not cancel makes the interval wider.

        Raises:
            SettingError: the numbers of rounds cannot be paired, or are too few for an interval.
        """
        if len(patch_rounds) != len(baseline_rounds) or len(patch_rounds) % 2:
            raise SettingError(
                f"{len(patch_rounds)} rounds of the patch and {len(baseline_rounds)} of the baseline cannot be "
                "paired: measure the same even number of both"
            )
        if min((*patch_rounds, *baseline_rounds), default=1.0) <= 0:
            raise SettingError("a call that takes no time cannot be compared: use a larger input")
        logs = [
            math.log(patch / baseline) for patch, baseline in zip(patch_rounds, baseline_rounds, strict=True)
        ]
        if len(logs) >= 2 * FEWEST_VALUES:
            logs = [(one + two) / 2 for one, two in zip(logs[::2], logs[1::2], strict=True)]
        ratio, low, high = map(math.exp, median_interval(logs))
        return cls(ratio, low, high, tuple(patch_rounds), tuple(baseline_rounds))

    def verdict(self, max_slowdown: float = MAX_SLOWDOWN) -> Verdict:
        """Whether the patch is fast enough, given the largest ratio allowed.

        Raises:
            SettingError: `max_slowdown` is not a positive number.
        """
        if not 0 < max_slowdown < math.inf:
            raise SettingError(
                f"a largest slowdown of {max_slowdown} is not possible: use a number like 1.10"
            )
        if self.low > max_slowdown:
            return Verdict.SLOWER
        if self.high < min(1.0, max_slowdown):
            return Verdict.FASTER
        return Verdict.NO_SLOWER if self.high <= max_slowdown else Verdict.INCONCLUSIVE

    @property
    def patch_seconds(self) -> float:
        """Median of the patch's rounds."""
        return statistics.median(self.patch_rounds)

    @property
    def baseline_seconds(self) -> float:
        """Median of the baseline's rounds."""
        return statistics.median(self.baseline_rounds)

    def sentence(self, patch: str, baseline: str, max_slowdown: float = MAX_SLOWDOWN) -> str:
        """The verdict with its numbers, as text."""
        conclusion = {
            Verdict.FASTER: "faster",
            Verdict.NO_SLOWER: f"within the {max_slowdown:g} allowed",
            Verdict.INCONCLUSIVE: f"inconclusive, because the interval contains the {max_slowdown:g} allowed: measure "
            "longer, or on a quieter machine",
            Verdict.SLOWER: f"slower than the {max_slowdown:g} allowed",
        }[self.verdict(max_slowdown)]
        return (
            f"{patch} takes {self.ratio:.3f} times the time of {baseline} ({self.low:.3f} to {self.high:.3f} at "
            f"{CONFIDENCE:.0%} confidence; {format_seconds(self.patch_seconds)} and "
            f"{format_seconds(self.baseline_seconds)}, {len(self.patch_rounds)} rounds): {conclusion}"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON types, without the single rounds."""
        return {
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "confidence": CONFIDENCE,
            "rounds": len(self.patch_rounds),
            "patch_seconds": self.patch_seconds,
            "baseline_seconds": self.baseline_seconds,
        }
