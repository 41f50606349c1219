"""Hooks of pytest and pytest-benchmark, as functions for the plugin to export.

They act in runs of the benchmark suite alone: the plugin is loaded wherever headoff is installed, and other benchmarks
must not find headoff in their results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from headoff.errors import HeadoffError
from headoff.harness.plugin.options import settings_from
from headoff.harness.process import is_watched

RECORDS = pytest.StashKey[list[dict[str, Any]]]()
"""The records of all benchmarks of this run, in order."""

PROBLEMS = pytest.StashKey[list[str]]()
"""Why saved runs cannot be compared with this one."""


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Add what was measured on what, and how many of each verdict there are."""
    records = config.stash.get(RECORDS, [])
    if records:
        from headoff.timing import THREADS, describe_machine

        settings = settings_from(config)
        output_json["headoff"] = {
            "machine": describe_machine(settings.device, THREADS),
            "attention": settings.attention,
            "baseline": settings.baseline,
            "dtype": settings.dtype,
            "max_slowdown": settings.max_slowdown,
            "verdicts": dict(Counter(record["verdict"] for record in records)),
        }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, benchmarksession: Any, compared_benchmark: Mapping[str, Any]
) -> None:
    """Say where a saved run (`--benchmark-compare`) was made on another GPU or CPU; do not judge by it."""
    if (saved := compared_benchmark.get("headoff")) is None:
        return
    from headoff.timing import THREADS, describe_machine, processor

    try:
        now, then = (
            processor(describe_machine(settings_from(config).device, THREADS)),
            processor(saved["machine"]),
        )
    except HeadoffError as error:
        raise pytest.UsageError(f"headoff: {error}") from None
    if now == then:
        return
    problem = (
        f"the saved run was timed on {then}, this one runs on {now}: their times cannot be compared, only the ratios "
        "of patch to baseline within each; save a run on this machine"
    )
    if config.getoption("benchmark_compare_fail"):
        raise pytest.UsageError(f"--benchmark-compare-fail cannot be used here: {problem}")
    config.stash.setdefault(PROBLEMS, []).append(problem)
    benchmarksession.logger.warning(problem)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of comparisons."""
    records = terminalreporter.config.stash.get(RECORDS, [])
    # Under `headoff verify`, the process that judges shows the table below its verdict.
    if records and not is_watched():
        from headoff.harness.report.terminal import benchmark_lines

        for line in benchmark_lines(records):
            terminalreporter.write_line(line)
    for problem in terminalreporter.config.stash.get(PROBLEMS, []):
        terminalreporter.write_line(problem, red=True)
