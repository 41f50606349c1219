"""One benchmark of the suite: patch and baseline in turns under pytest-benchmark, outputs checked, a verdict."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from headoff.attention import resolve_attention
from headoff.bench.outputs import Expected
from headoff.bench.workloads import Workload
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, WrongAttention, fail_on
from headoff.harness.plugin.patch import Patch
from headoff.timing.calls import TimedCall, torch_threads
from headoff.timing.clocks import Clock, clock_of, timer_of
from headoff.timing.comparison import SpeedComparison, Verdict
from headoff.timing.interleaving import InterleavedRounds
from headoff.timing.memory import peak_bytes
from headoff.wording import format_bytes, format_seconds

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
"""What the benchmarks of this run found, in order."""

SECONDS = {"cpu": 0.1, "cuda": 1.0}
"""For all rounds of one benchmark, about: on a CPU they are part of every run of the suites, and are to be quick."""


SLOW_CALL = 0.03
"""Seconds of a call on a CPU from which on its memory is not measured."""


class BenchmarkRunner:
    """Times the attention under test against the baseline, one workload at a time.

    Made once a run: what is read from one workload to the next, and the buffer that flushes a GPU's cache, stay.
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
        """Have pytest-benchmark time `item` by the clock of the device; before the fixture `benchmark` is made."""
        item.add_marker(pytest.mark.benchmark(timer=timer_of(self.clock)))

    def run(self, benchmark: Any, workload: Workload, *, group: str, heads_off: int | None = None) -> None:
        """Time both, check what the patch returned, record all of it, and fail where it is wrong or too slow.

        `benchmark` is pytest-benchmark's fixture. Where that is disabled (`--benchmark-disable`, pytest-xdist),
        outputs are checked and nothing is timed.
        """
        __tracebackhide__ = True
        benchmark.group = group
        with torch_threads():
            expected = Expected(workload)
            baseline, patch = workload.side(self.baseline), workload.side(self.patch.uncounted)
            self.patch.called()
            baseline()
            comparison = None
            try:
                if benchmark.disabled:
                    result = benchmark.pedantic(patch.run, setup=lambda: (patch.setup(), {}))
                else:
                    result, comparison = self._compare(benchmark, patch, baseline)
            except Exception as error:
                said = f"{workload.name}: {self.patch.label} raised {describe_exception(error)}"
                raise WrongAttention([Finding("crash", said, workload.name)]) from error
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
        # On a CPU it takes a profiler: for calls of thousands of operators, longer than all their rounds.
        measured = self.patch.device.type == "cuda" or statistics.median(pair.baseline_rounds) < SLOW_CALL
        patch_memory, baseline_memory = (
            peak_bytes(side, self.patch.device) if measured else None for side in (patch, baseline)
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
        # Changed, never replaced: pytest-benchmark keeps the very object that was there when the timing began.
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
        said = comparison.sentence(self.patch.label, settings.baseline, settings.max_slowdown)
        return [
            Finding(
                "time", f"{workload.name}: {said}", workload.name, comparison.ratio, settings.max_slowdown
            )
        ]


HEAD = ("benchmark", "ratio", "interval", "verdict", "patch", "baseline", "memory", "baseline")
"""Times are of one call; memory is the most that one call held at once."""


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of text: a head, a rule, and one line for each record of a benchmark."""
    rows = [HEAD, *(_row(each) for each in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(_set(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return [lines[0].rstrip(), "-" * max(map(len, lines)), *(line.rstrip() for line in lines[1:])]


def _set(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if HEAD[column] in ("benchmark", "verdict") else cell.rjust(width)


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
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
