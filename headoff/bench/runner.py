"""How the providers of a case are checked and timed, and how a whole run goes."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from headoff.bench.cases import Case, Provider
from headoff.bench.models import benchmark_model, loaded_model
from headoff.bench.report import Measurement, Report, Status
from headoff.bench.suites import SUITES
from headoff.detr.checkpoints import ModelChoice
from headoff.scenes.samples import sample_image
from headoff.timing import (
    Clock,
    SpeedComparison,
    clock_of,
    describe_machine,
    peak_bytes,
    time_in_turns,
    torch_threads,
)
from headoff.timing.turns import FEWEST_ROUNDS
from headoff.wording import counted, format_seconds

PATIENCE = 60.0
"""Seconds that the rounds of an interval may take, if they take longer than was asked for."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Runner:
    """Times providers on one device, in one dtype; `seconds` is about the time for each provider of a case."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    seconds: float

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def measure(self, case: Case, progress: Progress) -> list[Measurement]:
        """Check all providers, and time those that are right in turns."""
        # On a busy machine several threads make the oracle's small operators many times slower.
        with torch_threads():
            providers = case.providers()
        failures: dict[str, tuple[Status, str] | None] = {}
        for provider in providers:
            progress(f"checks {provider.name}")
            failures[provider.name] = self._failure(provider)
        right = [provider for provider in providers if failures[provider.name] is None]
        rounds = self._rounds(right, progress)
        candidates = [name for name in rounds if name in case.references] or [*rounds][:1]
        reference = min(candidates, key=lambda name: statistics.median(rounds[name]), default="")

        def measurement(provider: Provider) -> Measurement:
            base = (case.suite, case.name, self.dtype_name, provider.name)
            if (failure := failures[provider.name]) is not None:
                return Measurement(*base, *failure)
            found = rounds[provider.name]
            progress(f"measures the memory of {provider.name}")
            sizes = [peak_bytes(call, self.device) for call, _ in provider.parts]
            return Measurement(
                *base,
                "reference" if provider.name == reference else "timed",
                provider.note,
                *ratio_of(found, rounds[reference]),
                seconds=statistics.median(found),
                memory=max((size for size in sizes if size is not None), default=None),
                rounds=len(found),
            )

        return [measurement(provider) for provider in providers]

    def _rounds(self, providers: Sequence[Provider], progress: Progress) -> dict[str, list[float]]:
        """The seconds of each provider by round, those of its parts added up."""
        if not providers:
            return {}
        budget = self.seconds * len(providers)
        progress(f"times {counted(len(providers), 'provider')} for about {format_seconds(budget)}")
        parts = [part for provider in providers for part in provider.parts]
        found = time_in_turns([call for call, _ in parts], self.clock, budget, patience=PATIENCE)
        rounds = iter(found)
        return {
            provider.name: [
                sum(seconds * count for seconds, (_, count) in zip(one_round, provider.parts, strict=True))
                for one_round in zip(*islice(rounds, len(provider.parts)), strict=True)
            ]
            for provider in providers
        }

    @staticmethod
    def _failure(provider: Provider) -> tuple[Status, str] | None:
        """(status, reason) of a provider that must not be timed."""
        try:
            problem = provider.check()
        except Exception as error:  # compilers and backends have exceptions of their own
            return "unsupported", first_sentence(error)
        return None if problem is None else ("wrong", problem)


def ratio_of(rounds: Sequence[float], reference: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Time relative to the reference, and its interval where there are enough rounds for one."""
    if len(rounds) >= FEWEST_ROUNDS:
        comparison = SpeedComparison.of(rounds, reference)
        return comparison.ratio, comparison.low, comparison.high
    logs = [math.log(own / other) for own, other in zip(rounds, reference, strict=True)]
    return math.exp(statistics.median(logs)), None, None


def first_sentence(error: Exception) -> str:
    """The first sentence of an error message, for a table."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    sentence = line.partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= 160 else f"{sentence[:157]}..."


@dataclass(frozen=True)
class Plan:
    """What the command line asks for; `sizes` are those of `headoff.bench.models`.

    With `model` that one is timed, on `image` or on a bundled scene, and `sizes` is `("model",)`.
    """

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[Any, ...]
    suites: tuple[str, ...]
    seconds: float
    threads: int = 1
    model: ModelChoice | None = None
    image: Path | None = None


def run(plan: Plan, command: str, progress: Callable[[str, str], None]) -> Report:
    """Run all suites of the plan. `progress` is called with a case and what is done for it, before it is done.

    Raises:
        SettingError: nothing can be timed on the device.
    """
    clock = clock_of(plan.device)
    measurements: list[Measurement] = []
    made_with = _made_with(command)
    with torch_threads(plan.threads):
        machine = describe_machine(plan.device)
        for dtype in plan.dtypes:
            runner = Runner(plan.device, dtype, clock, plan.seconds)
            for case in _cases(plan, dtype, made_with):
                title = f"{case.suite}, {case.name} ({runner.dtype_name})"
                progress(title, "")
                measurements += runner.measure(case, partial(progress, title))
    return Report(tuple(measurements), made_with, machine)


def _cases(plan: Plan, dtype: torch.dtype, made_with: dict[str, str]) -> Iterator[Case]:
    """The cases of a dtype. What is known of a model only when it is loaded is added to `made_with`."""
    for size in plan.sizes:
        if plan.model is None:
            model = benchmark_model(size, plan.device, dtype)
        else:
            model = loaded_model(plan.model, plan.image or sample_image(0), plan.device, dtype)
            made_with["heads"] = f"{model.detector.config.heads} in each layer"
            if model.detector.assumptions:
                made_with["assumed"] = "; ".join(model.detector.assumptions)
        for name in plan.suites:
            yield from SUITES[name](size, model)


def _made_with(command: str) -> dict[str, str]:
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    return {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "headoff": importlib.metadata.version("headoff"),
        "torch": torch.__version__,
        "triton": triton,
        "float32 products": torch.get_float32_matmul_precision(),
    }
