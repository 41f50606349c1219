"""One case: contestants are tried, checked, and, if right, timed in turns with the fastest of the references."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headoff.bench.records import Level, Row, Status
from headoff.bench.roofline import Ceilings, Work, position
from headoff.timing.calls import TimedCall
from headoff.timing.clocks import Clock
from headoff.timing.comparison import SpeedComparison
from headoff.timing.interleaving import compare

HEATS = 5
"""Calls of each reference, in turns, the least of which say who is the fastest. It is only chosen by them: ratios are
measured afterwards, and may have another chosen."""

Judge = Callable[[Any], str | None]
"""Of what a call returned: what is wrong with it, in one sentence; None where it is right."""


@dataclass(frozen=True)
class Contestant:
    """A way to compute a case."""

    name: str
    side: TimedCall
    judge: Judge


@dataclass(frozen=True)
class Bench:
    """Where and for how long things are timed."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    seconds: float
    ceilings: Ceilings

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def contest(
    bench: Bench,
    level: Level,
    case: str,
    contestants: Sequence[Contestant],
    references: Collection[str],
    work: Work | None = None,
) -> list[Row]:
    """A row for each contestant.

    The ratios are to the fastest right one of `references`; where there is none, to the first right contestant.
    """
    base: dict[str, Any] = {"level": level, "case": case, "dtype": bench.dtype_name}
    rows: dict[str, Row] = {}
    right: dict[str, Contestant] = {}
    for each in contestants:
        if (failure := tried(each)) is None:
            right[each.name] = each
        else:
            rows[each.name] = Row(contestant=each.name, status=failure[0], note=failure[1], **base)
    if right:
        among = [name for name in right if name in references] or [*right][:1]
        reference = _fastest([right[name] for name in among], bench.clock)
        comparisons = _compared(bench, right, reference)
        ahead = [name for name in among if name in comparisons and comparisons[name].high < 1]
        if ahead:
            # The heats were too short to tell.
            reference = right[min(ahead, key=lambda name: comparisons[name].ratio)]
            comparisons = _compared(bench, right, reference)
        rows |= _timed_rows(bench, base, reference.name, comparisons, work)
    return [rows[each.name] for each in contestants]


def _compared(
    bench: Bench, right: Mapping[str, Contestant], reference: Contestant
) -> dict[str, SpeedComparison]:
    """Each with the reference; who is alone is compared with itself, for its time and memory."""
    return {
        name: compare(each.side, reference.side, bench.device, seconds=bench.seconds, clock=bench.clock)
        for name, each in right.items()
        if each is not reference or len(right) == 1
    }


def _timed_rows(
    bench: Bench,
    base: Mapping[str, Any],
    reference: str,
    comparisons: Mapping[str, SpeedComparison],
    work: Work | None,
) -> dict[str, Row]:
    def row(name: str, seconds: float, **rest: Any) -> Row:
        place = None if work is None else position(work, seconds, bench.ceilings)
        return Row(contestant=name, reference=reference, seconds=seconds, position=place, **base, **rest)

    rows = {
        name: row(
            name,
            each.patch_seconds,
            status="timed",
            ratio=each.ratio,
            low=each.low,
            high=each.high,
            memory=each.patch_memory,
        )
        for name, each in comparisons.items()
    }
    rounds = [seconds for each in comparisons.values() for seconds in each.baseline_rounds]
    memory = next(iter(comparisons.values())).baseline_memory
    rows[reference] = row(reference, statistics.median(rounds), status="reference", ratio=1.0, memory=memory)
    return rows


def tried(contestant: Contestant) -> tuple[Status, str] | None:
    """(status, why) of a contestant that is not to be timed."""
    try:
        result = contestant.side()
    except Exception as error:  # of any kind: a compiler's, a backend's, too little memory
        return "unsupported", _one_line(error)
    wrong = contestant.judge(result)
    return None if wrong is None else ("wrong", wrong)


def _one_line(error: Exception) -> str:
    """The first sentence of what an error says, for a table."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    sentence = line.partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= 160 else f"{sentence[:157]}..."


def _fastest(contestants: Sequence[Contestant], clock: Clock) -> Contestant:
    if len(contestants) == 1:
        return contestants[0]
    rounds: dict[str, list[float]] = {each.name: [] for each in contestants}
    for _ in range(HEATS):
        for each in contestants:
            rounds[each.name].append(each.side.seconds(clock))
    return min(contestants, key=lambda each: min(rounds[each.name]))
