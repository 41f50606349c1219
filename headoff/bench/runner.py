"""How the providers of a case are checked and timed, and how a whole run goes."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from headoff.bench.results import Measurement, Report, Status
from headoff.bench.roofline import Peaks, RooflinePoint, Work, measured_peaks
from headoff.timing import Clock, TimedCall, clock_of, compare, describe_machine, torch_threads

TRIAL_ROUNDS = 5
"""Calls of each possible reference, in turns; the fastest becomes the reference."""


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        parts: calls, and how many of each make up the whole. What takes minutes is not timed as a whole: the notebooks'
            way for 9 configurations is 9 times its way for one.
        check: what is wrong with its result, in one sentence; None where it is right. Raises what the call raises.
        note: a remark for the tables.
    """

    name: str
    parts: tuple[tuple[TimedCall, int], ...]
    check: Callable[[], str | None]
    note: str = ""

    @classmethod
    def of(cls, name: str, call: TimedCall, check: Callable[[Any], str | None], note: str = "") -> Provider:
        """A provider of one call, whose result `check` is given."""
        return cls(name, ((call, 1),), lambda: check(call()), note)

    @property
    def is_extrapolated(self) -> bool:
        return len(self.parts) > 1 or self.parts[0][1] > 1


@dataclass(frozen=True)
class RelativeTime:
    """Time of a provider relative to the reference, with the seconds and peak bytes of both."""

    ratio: float
    low: float
    high: float
    seconds: float
    memory: int | None
    reference_seconds: float
    reference_memory: int | None


@dataclass(frozen=True)
class Case:
    """A case that has not been run yet; `name` is for the progress messages."""

    name: str
    run: Callable[[], list[Measurement]]


@dataclass(frozen=True)
class Runner:
    """Times providers on one device, in one dtype; `seconds` is about the time of one comparison."""

    device: torch.device
    dtype: torch.dtype
    clock: Clock
    seconds: float
    peaks: Peaks
    threads: int = 1

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def measure(
        self,
        suite: str,
        case: str,
        providers: Sequence[Provider],
        references: Collection[str],
        work: Work | None = None,
    ) -> list[Measurement]:
        """Check all providers and time those that are right.

        Ratios refer to the fastest right provider among `references`, or to the first right one where there is none.
        """
        failures = {provider.name: self._failure(provider) for provider in providers}
        right = [provider for provider in providers if failures[provider.name] is None]
        reference: Provider | None = None
        times: dict[str, RelativeTime] = {}
        if right:
            candidates = [provider for provider in right if provider.name in references] or right[:1]
            reference = self._fastest(candidates)
            times = self._times(right, reference)
            faster = [one for one in candidates if one is not reference and times[one.name].high < 1]
            if faster:  # the trial was too short to tell
                reference = min(faster, key=lambda one: times[one.name].ratio)
                times = self._times(right, reference)

        def measurement(provider: Provider) -> Measurement:
            base: dict[str, Any] = {"suite": suite, "case": case, "dtype": self.dtype_name}
            if (failure := failures[provider.name]) is not None or reference is None:
                status, note = failure or ("unsupported", "")
                return Measurement(provider=provider.name, status=status, note=note, **base)
            base |= {"provider": provider.name, "reference": reference.name, "note": provider.note}
            if provider is reference:
                other = next(iter(times.values()))
                seconds, memory, status = other.reference_seconds, other.reference_memory, "reference"
                interval: dict[str, Any] = {"ratio": 1.0}
            else:
                found = times[provider.name]
                seconds, memory, status = found.seconds, found.memory, "timed"
                interval = {"ratio": found.ratio, "low": found.low, "high": found.high}
            point = None if work is None else RooflinePoint.of(work, seconds, self.peaks)
            return Measurement(
                status=status, seconds=seconds, memory=memory, roofline=point, **base, **interval
            )

        return [measurement(provider) for provider in providers]

    def _times(self, providers: Sequence[Provider], reference: Provider) -> dict[str, RelativeTime]:
        # A reference that is alone is compared with itself, for its time and memory.
        others = [provider for provider in providers if provider is not reference] or [reference]
        return {provider.name: self.relative_time(provider, reference) for provider in others}

    def relative_time(self, provider: Provider, reference: Provider) -> RelativeTime:
        """Provider and reference timed in turns; at most one of them is extrapolated.

        The ratio of an extrapolated whole grows with the ratio of each of its parts, so its interval is where the
        intervals of all parts hold (98% for two of 99%).
        """

        def compared(call: TimedCall, other: TimedCall) -> Any:
            return compare(
                call, other, self.device, seconds=self.seconds, clock=self.clock, threads=self.threads
            )

        if provider is not reference and provider.is_extrapolated and reference.is_extrapolated:
            raise ValueError("of two extrapolated providers no part can be compared")
        counts = [count for _, count in (reference if reference.is_extrapolated else provider).parts]
        if reference.is_extrapolated:
            whole = reference.parts[0][0] if provider is reference else provider.parts[0][0]
            parts = [compared(whole, part) for part, _ in reference.parts]

            def total(ratios: list[float]) -> float:
                return 1 / sum(count / ratio for count, ratio in zip(counts, ratios, strict=True))

        else:
            parts = [compared(part, reference.parts[0][0]) for part, _ in provider.parts]

            def total(ratios: list[float]) -> float:
                return sum(count * ratio for count, ratio in zip(counts, ratios, strict=True))

        def seconds_of(one: Provider, seconds: list[float]) -> float:
            return (
                sum(n * s for n, s in zip(counts, seconds, strict=True))
                if one.is_extrapolated
                else seconds[0]
            )

        def peak(bytes_of_parts: list[int | None]) -> int | None:
            known = [size for size in bytes_of_parts if size is not None]
            return max(known) if len(known) == len(bytes_of_parts) else None

        return RelativeTime(
            total([part.ratio for part in parts]),
            total([part.low for part in parts]),
            total([part.high for part in parts]),
            seconds_of(provider, [part.patch_seconds for part in parts]),
            peak([part.patch_memory for part in parts]),
            seconds_of(reference, [part.baseline_seconds for part in parts]),
            peak([part.baseline_memory for part in parts]),
        )

    def _fastest(self, candidates: Sequence[Provider]) -> Provider:
        if len(candidates) == 1:
            return candidates[0]
        least = dict.fromkeys(range(len(candidates)), float("inf"))
        for _ in range(TRIAL_ROUNDS):
            for index, provider in enumerate(candidates):
                least[index] = min(least[index], provider.parts[0][0].seconds(self.clock))
        return candidates[min(least, key=least.__getitem__)]

    @staticmethod
    def _failure(provider: Provider) -> tuple[Status, str] | None:
        """(status, reason) of a provider that must not be timed."""
        try:
            problem = provider.check()
        except Exception as error:  # compilers and backends have exceptions of their own
            return "unsupported", first_sentence(error)
        return None if problem is None else ("wrong", problem)


def first_sentence(error: Exception) -> str:
    """The first sentence of an error message, for a table."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    sentence = line.partition(". ")[0].rstrip(".")
    return sentence if len(sentence) <= 160 else f"{sentence[:157]}..."


@dataclass(frozen=True)
class Plan:
    """What the command line asks for; `sizes` are those of `headoff.bench.models`."""

    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[Any, ...]
    suites: tuple[str, ...]
    seconds: float
    threads: int = 1


def run(plan: Plan, command: str, progress: Callable[[str], None]) -> Report:
    """Run all suites of the plan. `progress` is called with the name of each case before it is run.

    Raises:
        SettingError: nothing can be timed on the device.
    """
    clock = clock_of(plan.device)
    measurements: list[Measurement] = []
    peaks: dict[str, Peaks] = {}
    with torch_threads(plan.threads):
        machine = describe_machine(plan.device)
        for dtype in plan.dtypes:
            progress(f"a copy and a matrix product in {dtype}")
            peaks_of_dtype = measured_peaks(plan.device, dtype, clock)
            runner = Runner(plan.device, dtype, clock, plan.seconds, peaks_of_dtype, plan.threads)
            peaks[runner.dtype_name] = runner.peaks
            for case in _cases(plan, runner):
                progress(f"{runner.dtype_name}: {case.name}")
                measurements += case.run()
    return Report(tuple(measurements), _made_with(command), machine, peaks)


def _cases(plan: Plan, runner: Runner) -> Iterator[Case]:
    from headoff.bench.models import benchmark_model
    from headoff.bench.suites import ATTENTION_SUITES, MODEL_SUITES

    for size in plan.sizes:
        for name in plan.suites:
            if name in ATTENTION_SUITES:
                yield from ATTENTION_SUITES[name](runner, size)
        names = [name for name in plan.suites if name in MODEL_SUITES]
        if names:
            model = benchmark_model(size, plan.device, runner.dtype)
            for name in names:
                yield from MODEL_SUITES[name](runner, size, model)


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
