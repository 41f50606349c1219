"""Benchmarks under pytest-benchmark: patch and baseline in turns, outputs checked, a verdict."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from headoff.attention import resolve_attention
from headoff.bench.models import BenchmarkModel, benchmark_model, loaded_model
from headoff.bench.outputs import ExpectedOutputs
from headoff.bench.workloads import Workload
from headoff.errors import SettingError
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, WrongAttention, fail_on
from headoff.harness.plugin.patch import Patch
from headoff.harness.settings import Settings
from headoff.scenes.samples import sample_image
from headoff.timing import SpeedComparison, TimedCall, Verdict, peak_bytes, torch_threads
from headoff.timing.clocks import Clock, clock_of, timer_of
from headoff.timing.interleaving import InterleavedRounds
from headoff.wording import format_bytes, format_seconds

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
"""The records of all benchmarks of this run, in order."""

SECONDS = {"cpu": 0.1, "cuda": 1.0}
"""About the time of all rounds of one benchmark. On a CPU benchmarks are part of every run, so they are short."""

SLOW_CALL = 0.03
"""Seconds of a call on a CPU above which its memory is not measured: the profiler would take longer than the rounds."""

BENCH_SIZES = ("auto", "model", "r50", "dc5")


def model_for(settings: Settings, size: str = "auto") -> BenchmarkModel:
    """The detector that the benchmarks run on.

    Args:
        settings: model, image, device, dtype and seed of the run.
        size: `model` is the settings' model on the first image, or on a bundled scene where there is none; `r50` and
            `dc5` are a ResNet-50 DETR with random weights; `auto` is `r50` for the bundled model on a GPU, which it
            is too small for, else `model`.

    Raises:
        SettingError: the size is not known.
    """
    if size not in BENCH_SIZES:
        raise SettingError(f"there is no benchmark of size {size!r}: use one of {', '.join(BENCH_SIZES)}")
    device = torch.device(settings.device)
    if size == "auto":
        size = "r50" if settings.model == "scenes" and device.type == "cuda" else "model"
    if size == "model":
        image = settings.images[0] if settings.images else sample_image(0)
        return loaded_model(settings.model, image, device, settings.torch_dtype)
    return benchmark_model("r50" if size == "r50" else "dc5", device, settings.torch_dtype, settings.seed)


class BenchmarkRunner:
    """Times the attention under test against the baseline, one workload at a time.

    One for the whole run, so that the buffer that flushes a GPU's cache is made once.
    """

    def __init__(self, patch: Patch, config: pytest.Config, seconds: float | None = None) -> None:
        self.patch = patch
        self.baseline = resolve_attention(patch.settings.baseline)
        self.seconds = SECONDS[patch.device.type] if seconds is None else seconds
        self._config = config

    @functools.cached_property
    def clock(self) -> Clock:
        return clock_of(self.patch.device)

    def mark(self, item: pytest.Item) -> None:
        """Have pytest-benchmark use the device's clock for `item`. To be called before its fixture is made."""
        item.add_marker(pytest.mark.benchmark(timer=timer_of(self.clock)))

    def run(self, benchmark: Any, workload: Workload, *, group: str, heads_off: int | None = None) -> None:
        """Time both, check the patch's output, record the results, and fail where it is wrong or too slow.

        Args:
            benchmark: pytest-benchmark's fixture. Where it is disabled (`--benchmark-disable`, pytest-xdist), outputs
                are checked and nothing is timed.
            workload: what to compute.
            group: the group in tables and reports.
            heads_off: the number of heads that are off, for the report.
        """
        __tracebackhide__ = True
        benchmark.group = group
        with torch_threads():
            expected = ExpectedOutputs(workload)
            baseline, patch = workload.timed_call(self.baseline), workload.timed_call(self.patch.uncounted)
            self.patch.called()
            baseline()
            comparison = None
            try:
                if benchmark.disabled:
                    result = benchmark.pedantic(patch.run, setup=lambda: (patch.setup(), {}))
                else:
                    result, comparison = self._compare(benchmark, patch, baseline)
            except Exception as error:
                message = f"{workload.name}: {self.patch.label} raised {describe_exception(error)}"
                raise WrongAttention([Finding("crash", message, workload.name)]) from error
            findings = expected.findings(result, self.patch.uncounted)
        if comparison is not None:
            self._record(benchmark, workload, comparison, findings, group, heads_off)
            findings += self._slow(workload, comparison)
        fail_on(findings)

    def _compare(self, benchmark: Any, patch: TimedCall, baseline: TimedCall) -> tuple[Any, SpeedComparison]:
        pair = InterleavedRounds(patch, baseline, self.clock)
        rounds = pair.warm_up(self.seconds)
        result = benchmark.pedantic(
            patch.run, setup=lambda: (pair.before(), {}), teardown=lambda *_: pair.after(), rounds=rounds
        )
        measured = self.patch.device.type == "cuda" or statistics.median(pair.baseline_rounds) < SLOW_CALL
        patch_memory, baseline_memory = (
            peak_bytes(call, self.patch.device) if measured else None for call in (patch, baseline)
        )
        comparison = SpeedComparison.of(
            benchmark.stats.stats.data,
            pair.baseline_rounds,
            patch_memory=patch_memory,
            baseline_memory=baseline_memory,
        )
        return result, comparison

    def _record(
        self,
        benchmark: Any,
        workload: Workload,
        comparison: SpeedComparison,
        findings: list[Finding],
        group: str,
        heads_off: int | None,
    ) -> None:
        settings = self.patch.settings
        # Updated in place: pytest-benchmark keeps the dictionary that was there when the timing began.
        benchmark.extra_info.update(
            name=workload.name,
            group=group,
            heads_off=heads_off,
            patch=self.patch.label,
            baseline=settings.baseline,
            **comparison.as_dict(),
            max_slowdown=settings.max_slowdown,
            verdict=str(comparison.verdict(settings.max_slowdown)),
            outputs="wrong" if findings else "right",
        )
        self._config.stash.setdefault(RECORDS, []).append(dict(benchmark.extra_info))

    def _slow(self, workload: Workload, comparison: SpeedComparison) -> list[Finding]:
        settings = self.patch.settings
        if comparison.verdict(settings.max_slowdown) is not Verdict.SLOWER:
            return []
        sentence = comparison.sentence(self.patch.label, settings.baseline, settings.max_slowdown)
        message = f"{workload.name}: {sentence}"
        return [Finding("time", message, workload.name, comparison.ratio, settings.max_slowdown)]


HEAD = ("benchmark", "ratio", "interval", "verdict", "patch", "baseline", "memory", "baseline")
"""Columns: times of one call, then peak memory of one call."""


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text: a head, a rule, and one line for each record of a benchmark."""
    rows = [HEAD, *(_cells(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = [
        "  ".join(
            cell.ljust(width) if head in ("benchmark", "verdict") else cell.rjust(width)
            for cell, width, head in zip(row, widths, HEAD, strict=True)
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
    verdict = record["verdict"] if record["outputs"] == "right" else f"{record['verdict']}, and wrong"
    return (
        record["name"],
        f"{record['ratio']:.3f}",
        f"{record['low']:.3f} to {record['high']:.3f}",
        verdict,
        format_seconds(record["patch_seconds"]),
        format_seconds(record["baseline_seconds"]),
        format_bytes(record["patch_memory"]),
        format_bytes(record["baseline_memory"]),
    )
