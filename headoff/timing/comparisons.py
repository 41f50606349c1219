"""What two ways of computing the same thing cost beside each other, and what is to be said of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from headoff.errors import SettingError
from headoff.timing.intervals import CONFIDENCE, fewest_values, median_interval

MAX_SLOWDOWN = 1.10
"""A patch may take this much of the baseline's time, unless told otherwise."""


class Verdict(StrEnum):
    """What an interval of ratios says."""

    FASTER = "faster"
    """All of it is below 1."""
    NO_SLOWER = "no slower"
    """None of it is above the largest slowdown allowed, and some of it is not below 1."""
    INCONCLUSIVE = "inconclusive"
    """The largest slowdown allowed lies in it: measure for longer, or on a quieter machine."""
    SLOWER = "slower"
    """All of it is above the largest slowdown allowed."""


@dataclass(frozen=True)
class Comparison:
    """Of a patch with a baseline, measured in turns in one run.

    - `ratio`, `low`, `high`: time of the patch by time of the baseline, and its interval of `confidence`
    - `patch_rounds`, `baseline_rounds`: seconds of each; rounds of the same number were neighbours in time
    - `patch_memory`, `baseline_memory`: most bytes that a call held at once, beside what was there before; None where
      that was not measured
    """

    ratio: float
    low: float
    high: float
    confidence: float
    patch_rounds: tuple[float, ...]
    baseline_rounds: tuple[float, ...]
    patch_memory: int | None = None
    baseline_memory: int | None = None

    @classmethod
    def of(
        cls,
        patch_rounds: Sequence[float],
        baseline_rounds: Sequence[float],
        *,
        patch_memory: int | None = None,
        baseline_memory: int | None = None,
        confidence: float = CONFIDENCE,
    ) -> Comparison:
        """Of rounds whose order alternates: patch second in rounds 0, 2, ..., first in rounds 1, 3, ...

        Two rounds, baseline, patch, patch, baseline, make one measurement: the geometric mean of their ratios. A
        drift of the machine's speed and an advantage of whoever comes second cancel in it. Of these measurements
        the median is taken (`headoff.timing.intervals`). Where there are too few rounds for that, because a
        call takes long, each counts by itself; what does not cancel then makes the interval wider.

        Raises SettingError for numbers of rounds that cannot be paired or give no interval.
        """
        if len(patch_rounds) != len(baseline_rounds) or len(patch_rounds) % 2:
            raise SettingError(
                f"{len(patch_rounds)} times of the patch and {len(baseline_rounds)} of the baseline cannot be "
                "paired: give an even number of rounds, the same of both"
            )
        if min((*patch_rounds, *baseline_rounds), default=1.0) <= 0:
            raise SettingError(
                "a call that takes no time cannot be compared: use a finer clock or a larger size"
            )
        logs = [
            math.log(patch / baseline) for patch, baseline in zip(patch_rounds, baseline_rounds, strict=True)
        ]
        if len(logs) >= 2 * fewest_values(confidence):
            logs = [(one + two) / 2 for one, two in zip(logs[::2], logs[1::2], strict=True)]
        found = median_interval(logs, confidence)
        return cls(
            math.exp(found.estimate),
            math.exp(found.low),
            math.exp(found.high),
            confidence,
            tuple(patch_rounds),
            tuple(baseline_rounds),
            patch_memory,
            baseline_memory,
        )

    def verdict(self, max_slowdown: float = MAX_SLOWDOWN) -> Verdict:
        """Whether the patch is fast enough, when it may take `max_slowdown` times the baseline's time.

        Raises SettingError for a `max_slowdown` that is not a positive number.
        """
        if not 0 < max_slowdown < math.inf:
            raise SettingError(
                f"a largest slowdown of {max_slowdown} cannot be: use a positive number, like 1.10"
            )
        if self.low > max_slowdown:
            return Verdict.SLOWER
        if self.high < min(1.0, max_slowdown):
            return Verdict.FASTER
        return Verdict.NO_SLOWER if self.high <= max_slowdown else Verdict.INCONCLUSIVE

    @property
    def patch_seconds(self) -> float:
        """The median of its rounds."""
        return statistics.median(self.patch_rounds)

    @property
    def baseline_seconds(self) -> float:
        """The median of its rounds."""
        return statistics.median(self.baseline_rounds)

    def sentence(self, patch: str, baseline: str, max_slowdown: float = MAX_SLOWDOWN) -> str:
        """The verdict and its numbers, for people."""
        said = {
            Verdict.FASTER: "faster",
            Verdict.NO_SLOWER: f"within the {max_slowdown:g} allowed",
            Verdict.INCONCLUSIVE: f"inconclusive, for the {max_slowdown:g} allowed lies between: measure for longer, "
            "or on a quieter machine",
            Verdict.SLOWER: f"slower than the {max_slowdown:g} allowed",
        }[self.verdict(max_slowdown)]
        return (
            f"{patch} takes {self.ratio:.3f} times the time of {baseline} ({self.low:.3f} to {self.high:.3f} at "
            f"{self.confidence:.0%} confidence; {format_seconds(self.patch_seconds)} and "
            f"{format_seconds(self.baseline_seconds)}, {len(self.patch_rounds)} rounds): {said}"
        )

    def as_dict(self, *, rounds: bool = False) -> dict[str, Any]:
        """Of types that JSON knows; `rounds` adds the seconds of every one."""
        record: dict[str, Any] = {
            "ratio": self.ratio,
            "low": self.low,
            "high": self.high,
            "confidence": self.confidence,
            "rounds": len(self.patch_rounds),
            "patch_seconds": self.patch_seconds,
            "baseline_seconds": self.baseline_seconds,
            "patch_memory": self.patch_memory,
            "baseline_memory": self.baseline_memory,
        }
        if rounds:
            record |= {"patch_rounds": list(self.patch_rounds), "baseline_rounds": list(self.baseline_rounds)}
        return record


def format_seconds(seconds: float) -> str:
    """Three significant digits, in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_bytes(count: int | None) -> str:
    """Three significant digits, in the unit that suits; `-` where it was not measured."""
    if count is None:
        return "-"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count} B"
