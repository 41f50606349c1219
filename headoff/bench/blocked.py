"""What relevance maps cost where the encoder's cams are not kept, but made anew tile by tile whenever they are needed.

That is how long grids are explained in little memory: a cam is of tokens x tokens, and each layer and map has its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from headoff.attention import sdpa
from headoff.bench.cases import Scale
from headoff.bench.contests import Bench, Contestant, contest
from headoff.bench.levels import Job, configurations_of
from headoff.bench.models import BenchmarkModel, with_attention
from headoff.bench.outputs import row_errors
from headoff.bench.records import Row
from headoff.bench.workloads import RelevanceWorkload
from headoff.errors import HeadoffError
from headoff.gates import Configuration, none_off
from headoff.relevance import Explanation, RelevanceEngine, explain
from headoff.relevance.engine import Kernels
from headoff.timing.calls import TimedCall
from headoff.wording import format_bytes

TARGET = 4 * 10**9
"""Bytes that blocked relevance of DC5 may hold, beside the model."""

KEPT, LEAST, BLOCKED = "cams kept", "cams kept, least budget", "blocked"


def blocked_jobs(bench: Bench, scale: Scale, subject: BenchmarkModel) -> Iterator[Job]:
    """From the picture to the maps, with cams kept and blocked; by each way back that the device is for."""
    objects = 2 if scale == "quick" else 5
    ways: tuple[Kernels, ...] = ("tiles",) if bench.device.type == "cpu" else ("triton", "torch")
    for name, configurations in configurations_of("relevance", scale).items():
        for kernels in ways:
            case = f"{subject.name}, {name} x {objects} objects, {kernels}"
            yield Job(case, partial(_blocked, bench, subject, configurations, objects, kernels, case))


def budgets_of(subject: BenchmarkModel, kernels: Kernels) -> dict[str, int | None]:
    """Bytes for `RelevanceEngine`, by contestant; None is the device's own budget.

    The least that keep the cams of one map are found to a factor of two; half of it is too little. Where the device's
    own keeps none, the least does for both. Raises SettingError for kernels that cannot be.
    """
    detector = with_attention(subject.detector, sdpa)

    def keeps(budget: int | None) -> bool:
        return RelevanceEngine(detector, subject.features, kernels=kernels, memory_budget=budget).keeps_cams

    least = 2**20
    while not keeps(least):
        least *= 2
    while least > 1 and keeps(least // 2):
        least //= 2
    return {KEPT: None if keeps(None) else least, LEAST: least, BLOCKED: max(1, least // 2)}


def _blocked(
    bench: Bench,
    subject: BenchmarkModel,
    configurations: tuple[Configuration, ...],
    objects: int,
    kernels: Kernels,
    case: str,
) -> list[Row]:
    queries = RelevanceWorkload.of(subject, configurations, objects).queries
    detector = with_attention(subject.detector, sdpa)
    try:
        budgets = budgets_of(subject, kernels)
    except HeadoffError as error:
        row = Row("blocked", case, bench.dtype_name, BLOCKED, "unsupported", note=str(error).rstrip("."))
        return [row]

    def explained(budget: int | None, some: tuple[Configuration, ...]) -> Explanation:
        return explain(detector, subject.picture, some, queries, kernels=kernels, memory_budget=budget)

    # One configuration is decoded alike whatever the budget, and differs in what is judged alone. Of several decoded
    # together, more or fewer at once, rounding differs, and so may the side of a ReLU that is near its kink.
    truth = _rows(explained(budgets[KEPT], (none_off(),)))
    layers = subject.detector.config.encoder_layers
    allowed = 2 * layers * math.sqrt(subject.tokens) * torch.finfo(torch.float32).eps
    differences: dict[str, float] = {}
    of_kept: list[torch.Tensor] = []

    def judge(name: str, found: Explanation) -> str | None:
        if name == KEPT:
            of_kept.append(_rows(found))
            return None
        error = float(row_errors(truth, _rows(explained(budgets[name], (none_off(),)))).amax())
        if of_kept:
            differences[name] = float(row_errors(of_kept[0], _rows(found)).amax())
        if error <= allowed:
            return None
        return f"its maps differ from those of kept cams by {error:.1e} of their peaks, allowed are {allowed:.1e}"

    contestants = [
        Contestant(name, TimedCall(partial(explained, budget, configurations)), partial(judge, name))
        for name, budget in budgets.items()
    ]
    rows = contest(bench, "blocked", case, contestants, {KEPT})
    return [
        replace(row, note=_note(row, budgets, differences.get(row.contestant))) if row.was_timed else row
        for row in rows
    ]


def _rows(found: Explanation) -> torch.Tensor:
    """Maps (maps, tokens)."""
    return found.maps.flatten(0, 2).flatten(1)


def _note(row: Row, budgets: Mapping[str, int | None], difference: float | None) -> str:
    """Of a row that was timed: its budget, what it held, and how its maps differ from those of kept cams."""
    budget = budgets[row.contestant]
    parts = ["the device's own budget" if budget is None else f"a budget of {format_bytes(budget)}"]
    if row.memory is not None:
        target = ""
        if row.contestant == BLOCKED:
            target = f", {'within' if row.memory <= TARGET else 'above'} the target of {TARGET / 1e9:g} GB"
        parts.append(f"{format_bytes(row.memory)} held{target}")
    if difference == 0:
        parts.append("the same maps as of kept cams, to the bit")
    elif difference is not None:
        parts.append(f"maps differ from those of kept cams by at most {difference:.1e} of their peaks")
    return "; ".join(parts)
