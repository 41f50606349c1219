"""Benchmarks under pytest-benchmark: patch and baseline in turns, outputs checked, a verdict."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from headoff.bench.models import SIZES, BenchmarkModel, benchmark_model, loaded_model
from headoff.bench.timed_outputs import TimedOutputs
from headoff.bench.workloads import Workload
from headoff.errors import SettingError
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, WrongAttention, fail_on
from headoff.harness.originals import Originals
from headoff.harness.plugin.benchmark_hooks import RECORDS
from headoff.harness.plugin.patch import Patch
from headoff.harness.settings import Settings
from headoff.harness.torch_settings import as_before, watched_settings
from headoff.scenes.samples import sample_image
from headoff.timing import SpeedComparison, Turns, Verdict, peak_bytes, torch_threads
from headoff.timing.clocks import Clock, clock_of, timer_of

SECONDS = {"cpu": 0.1, "cuda": 1.0}
"""About the time of all rounds of one benchmark. On a CPU benchmarks are part of every run, so they are short."""

SLOW_CALL = 0.03
"""Seconds of a call on a CPU above which its memory is not measured: the profiler would take longer than the rounds."""


def model_for(settings: Settings) -> BenchmarkModel:
    """The detector that the benchmarks run on, of the settings' `bench_size`.

    `model` is the settings' model on the first image, or on a bundled scene where there is none; `r50` and `dc5` are a
    ResNet-50 DETR with random weights; `auto` is `r50` for the bundled model on a GPU, which it is too small for, else
    `model`.

    Raises:
        SettingError: the size is not known.
    """
    size, device = settings.bench_size, torch.device(settings.device)
    if size == "auto":
        size = "r50" if settings.model == "scenes" and device.type == "cuda" else "model"
    if size == "model":
        image = settings.images[0] if settings.images else sample_image(0)
        return loaded_model(settings.model_choice, image, device, settings.torch_dtype)
    if size not in SIZES:
        raise SettingError(f"there is no benchmark of size {size!r}: use auto, model, {' or '.join(SIZES)}")
    return benchmark_model(size, device, settings.torch_dtype, settings.seed)


class BenchmarkRunner:
    """Times the attention under test against the baseline, one workload at a time.

    One for the whole run, so that the buffer that flushes a GPU's cache is made once.
    """

    def __init__(self, patch: Patch, config: pytest.Config, seconds: float | None = None) -> None:
        self.patch = patch
        self.baseline = patch.settings.of_contract.resolve(patch.settings.baseline)
        self.seconds = SECONDS[patch.device.type] if seconds is None else seconds
        self._config = config

    @functools.cached_property
    def clock(self) -> Clock:
        return clock_of(self.patch.device)

    def mark(self, item: pytest.Item) -> None:
        """Have pytest-benchmark use the device's clock for `item`. To be called before its fixture is made."""
        item.add_marker(pytest.mark.benchmark(timer=timer_of(self.clock)))

    def run(self, benchmark: Any, workload: Workload, *, group: str, heads_off: int | None = None) -> None:
        """Time both, check the patch's outputs, record the results, and fail where one is wrong or it is too slow.

        Args:
            benchmark: pytest-benchmark's fixture. Where it is disabled (`--benchmark-disable`, pytest-xdist), outputs
                are checked and nothing is timed.
            workload: what to compute.
            group: the group in tables and reports.
            heads_off: the number of heads that are off, for the report.
        """
        __tracebackhide__ = True
        benchmark.group = group
        comparison: SpeedComparison | None = None
        record: dict[str, Any] = {}
        with as_before(ORIGINALS.settings), torch_threads(), watched_settings() as changes:
            baseline, patch = workload.timed_call(self.baseline), workload.timed_call(self.patch.uncounted)
            timed = TimedOutputs(workload, (baseline, patch), self.patch.device)
            turns = Turns([baseline, patch], self.clock, timed)
            self.patch.called()
            baseline()
            try:
                if benchmark.disabled:
                    benchmark.pedantic(turns.run, setup=lambda: (turns.before(), {}))
                    turns.after()
                else:
                    comparison, record = self._timed(benchmark, turns)
            except Exception as error:
                message = f"{workload.name}: {self.patch.label} raised {describe_exception(error)}"
                raise WrongAttention([Finding("crash", message, workload.name)]) from error
            findings = replaced_findings(workload.name) or timed.findings(self.patch.uncounted)
        findings += [
            Finding("state", f"{workload.name}: a call that is timed changes {change}", workload.name)
            for change in changes
        ]
        if comparison is not None:
            record |= {"name": workload.name, "group": group, "heads_off": heads_off}
            record["outputs"] = "wrong" if findings else "right"
            # Updated in place: pytest-benchmark keeps the dictionary that was there when the timing began.
            benchmark.extra_info.update(record)
            self._config.stash.setdefault(RECORDS, []).append(record)
            settings = self.patch.settings
            if comparison.verdict(settings.max_slowdown) is Verdict.SLOWER:
                sentence = comparison.sentence(self.patch.label, settings.baseline, settings.max_slowdown)
                message, ratio = f"{workload.name}: {sentence}", comparison.ratio
                findings.append(Finding("time", message, workload.name, ratio, settings.max_slowdown))
        fail_on(findings)

    def _timed(self, benchmark: Any, turns: Turns) -> tuple[SpeedComparison, dict[str, Any]]:
        """The comparison, and its record."""
        baseline, patch = turns.calls
        rounds = turns.warm_up(self.seconds)
        benchmark.pedantic(
            turns.run, setup=lambda: (turns.before(), {}), teardown=lambda *_: turns.after(), rounds=rounds
        )
        comparison = SpeedComparison.of(benchmark.stats.stats.data, turns.rounds[0])
        device, settings = self.patch.device, self.patch.settings
        slow = device.type == "cpu" and comparison.baseline_seconds > SLOW_CALL
        return (
            comparison,
            {
                "patch": self.patch.label,
                "baseline": settings.baseline,
                **comparison.as_dict(),
                "patch_memory": None if slow else peak_bytes(patch, device),
                "baseline_memory": None if slow else peak_bytes(baseline, device),
                "max_slowdown": settings.max_slowdown,
                "verdict": str(comparison.verdict(settings.max_slowdown)),
            },
        )


def replaced_findings(case: str) -> list[Finding]:
    """A finding where functions have been replaced that times and verdicts rest on."""
    names = ORIGINALS.replaced()
    if not names:
        return []
    some = " and ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    message = f"{case}: it has replaced {some}; neither its times nor its results mean anything then"
    return [Finding("timing", message, case)]


ORIGINALS = Originals.now()
"""Of the moment when this module was imported, which is before the attention under test is."""
