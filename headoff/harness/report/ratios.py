"""Benchmark ratios, and where they are drawn: one logarithmic scale for all, so that 0.5 is as far from 1 as 2 is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from headoff.harness.report.document import BenchmarkRecord
from headoff.harness.report.words import memory, ratio, seconds

LEAST_SPAN = 1.25
"""The scale reaches at least this far from 1 to both sides: two per cent are not to look like a landslide."""

LEAST_GAP = 9.0
"""Per cent of the axis between two round numbers, for both to be read."""

_DECADES = range(-12, 13)
_LADDERS = (
    tuple(step / 20 for step in range(1, 60)),
    tuple(step / 10 for step in range(1, 60)),
    tuple(step / 5 for step in range(1, 60)),
    (*(2.0**step for step in range(-5, 6)),),
    tuple(step * 10.0**decade for decade in _DECADES for step in (1, 2, 5)),
    tuple(10.0**decade for decade in _DECADES),
    tuple(100.0**decade for decade in _DECADES),
)
"""Round numbers, all with 1 among them, from close to far apart."""


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def of(cls, benchmarks: Iterable[BenchmarkRecord]) -> Scale:
        """One that holds all intervals and thresholds, and 1."""
        values = [1 / LEAST_SPAN, LEAST_SPAN]
        for each in benchmarks:
            values += [value for value in (each["low"], each["high"], each["ratio"]) if _drawable(value)]
            values.append(each["max_slowdown"] * 1.05 if _drawable(each["max_slowdown"]) else 1.0)
        span = math.log(max(values) / min(values))
        # Room at both ends, for a dot to be drawn whole.
        return cls(min(values) * math.exp(-0.04 * span), max(values) * math.exp(0.04 * span))

    def at(self, value: float) -> float:
        """Where `value` is, in per cent of the axis from its left end; values beyond an end are at that end."""
        inside = min(max(value, self.low), self.high)
        return round(100 * math.log(inside / self.low) / math.log(self.high / self.low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places of round numbers and how they are written, a few, among them always 1."""
        for ladder in _LADDERS:
            ticks = [(self.at(value), f"{value:g}") for value in ladder if self.low < value < self.high]
            if all(right[0] - left[0] >= LEAST_GAP for left, right in pairwise(ticks)):
                break
        return ticks


@dataclass(frozen=True)
class Row:
    """A benchmark as the page shows it: words, and places in per cent of the scale."""

    record: BenchmarkRecord
    ratio: str
    interval: str
    patch: str
    baseline: str
    patch_memory: str
    baseline_memory: str
    drawn: dict[str, float] | None
    """`ratio`, `low`, `high`, `one` and `threshold`; None where the numbers cannot be drawn."""

    @property
    def spoken(self) -> str:
        """The drawing in words."""
        allowed = f"{self.record['max_slowdown']:g}"
        return f"ratio {self.ratio}, interval {self.interval}, allowed {allowed}: {self.record['verdict']}"

    @property
    def wrong(self) -> bool:
        """Whether what was timed computes something else."""
        return self.record.get("outputs") == "wrong"


def rows(benchmarks: Sequence[BenchmarkRecord]) -> tuple[Scale, list[tuple[str, list[Row]]]]:
    """The scale, and the rows by group, both in the order of the document."""
    scale = Scale.of(benchmarks)
    groups: dict[str, list[Row]] = {}
    for each in benchmarks:
        groups.setdefault(each["group"], []).append(_row(each, scale))
    return scale, list(groups.items())


def tally(benchmarks: Iterable[BenchmarkRecord]) -> dict[str, int]:
    """How many of each verdict there are, the slower ones first; without those that there are none of."""
    counts = dict.fromkeys(("slower", "inconclusive", "no slower", "faster"), 0)
    for each in benchmarks:
        counts[each["verdict"]] += 1
    return {verdict: count for verdict, count in counts.items() if count}


def _row(record: BenchmarkRecord, scale: Scale) -> Row:
    places: dict[str, Any] = {name: record[name] for name in ("ratio", "low", "high")}
    places |= {"one": 1.0, "threshold": record["max_slowdown"]}
    drawable = all(_drawable(value) for value in places.values())
    return Row(
        record=record,
        ratio=ratio(record["ratio"]),
        interval=f"{ratio(record['low'])} to {ratio(record['high'])}",
        patch=seconds(record["patch_seconds"]),
        baseline=seconds(record["baseline_seconds"]),
        patch_memory=memory(record["patch_memory"]),
        baseline_memory=memory(record["baseline_memory"]),
        drawn={name: scale.at(value) for name, value in places.items()} if drawable else None,
    )


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
