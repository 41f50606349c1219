"""A whole run: which cases, on what, in which order."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from headoff.bench.blocked import blocked_jobs
from headoff.bench.cases import Scale
from headoff.bench.ceilings import ceilings_of
from headoff.bench.contests import Bench
from headoff.bench.levels import Job, attention_jobs, decoder_jobs, sweep_jobs
from headoff.bench.maps import relevance_jobs
from headoff.bench.models import BenchmarkModel, Size, benchmark_model
from headoff.bench.records import Level, Report, Row
from headoff.bench.roofline import Ceilings
from headoff.harness.settings import Settings
from headoff.timing.clocks import clock_of
from headoff.timing.machine import describe_machine

SIZES: dict[Scale, tuple[Size, ...]] = {"quick": ("model",), "standard": ("r50",), "full": ("r50", "dc5")}
"""Detectors of each scale: the bundled one, ResNet-50, and the same with 4 times the tokens."""

BLOCKED_SIZES: dict[Scale, tuple[Size, ...]] = {"quick": ("model",), "standard": ("dc5",), "full": ("dc5",)}
"""Of blocked relevance, which shorter grids have no use for."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is asked for. `seconds` is for one comparison, about; `threads` of torch on a CPU."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    scale: Scale
    levels: Sequence[Level]
    seconds: float
    threads: int = 1


def run(plan: Plan, command: str, progress: Progress) -> Report:
    """Run all of it. `progress` is told the name of each case before it is run.

    Raises SettingError for a device that nothing can be timed on.
    """
    clock = clock_of(plan.device)
    rows: list[Row] = []
    ceilings: dict[str, Ceilings] = {}
    with _threads(plan.threads):
        described = describe_machine(plan.device)
        for dtype in plan.dtypes:
            progress(f"a copy and a matrix product in {dtype}")
            bench = Bench(
                plan.device, dtype, clock, plan.seconds, ceilings_of(plan.device, dtype, clock, plan.scale)
            )
            ceilings[bench.dtype_name] = bench.ceilings
            for job in _jobs(plan, bench):
                progress(f"{bench.dtype_name}: {job.name}")
                rows += job.run()
    return Report(tuple(rows), _made_with(command, plan), described, ceilings)


def _jobs(plan: Plan, bench: Bench) -> Iterator[Job]:
    if "attention" in plan.levels:
        yield from attention_jobs(bench, plan.scale)
    of_detector = {"decoder": decoder_jobs, "sweep": sweep_jobs, "relevance": relevance_jobs}
    chosen = [jobs for level, jobs in of_detector.items() if level in plan.levels]
    for size in SIZES[plan.scale] if chosen else ():
        subject = _subject(plan, bench, size)
        for jobs in chosen:
            yield from jobs(bench, plan.scale, subject)
    # Relevance is computed in float32 whatever the weights are in: one dtype will do.
    if "blocked" in plan.levels and bench.dtype == (
        torch.float32 if torch.float32 in plan.dtypes else plan.dtypes[0]
    ):
        for size in BLOCKED_SIZES[plan.scale]:
            yield from blocked_jobs(bench, plan.scale, _subject(plan, bench, size))


def _subject(plan: Plan, bench: Bench, size: Size) -> BenchmarkModel:
    return benchmark_model(Settings(device=str(plan.device), dtype=bench.dtype_name), size)


def _made_with(command: str, plan: Plan) -> dict[str, str]:
    from headoff import __version__

    try:
        of_triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        of_triton = "none"
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "scale": plan.scale,
        "seconds": f"{plan.seconds:g}",
        "headoff": __version__,
        "torch": torch.__version__,
        "triton": of_triton,
        "float32 products": torch.get_float32_matmul_precision(),
    }


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
