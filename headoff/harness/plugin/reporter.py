"""The part of the pytest plugin that lives as long as a run: it collects, and says at the end what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from headoff.errors import HeadoffError, OutputError
from headoff.files import atomic_write
from headoff.harness.finding import Finding, WrongAttention
from headoff.harness.plugin.benchmark_hooks import RECORDS
from headoff.harness.plugin.options import all_settings, value_of
from headoff.harness.plugin.run import Run

if TYPE_CHECKING:
    from headoff.harness.plugin.patch import Patch
    from headoff.harness.settings import Settings

NO_VERDICT = 2
"""Exit code where something failed that is not about the attention."""

SHOWN = 5
"""Causes that the terminal shows; the report has all of them."""


class Reporter:
    """Registered with pytest for one run; in a worker of pytest-xdist it only adds to the tests' reports."""

    def __init__(self, config: pytest.Config, *, worker: bool) -> None:
        self.config = config
        self.worker = worker
        self.patches: dict[str, Patch] = {}
        chosen = {name: str(value_of(config, name)) for name in ("attention", "baseline", "model", "seed")}
        self.run = Run({**chosen, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])})
        self.document: dict[str, Any] | None = None

    # In the process that runs tests

    def patch_of(self, settings: Settings) -> Patch:
        """The one patch of each dtype. Raises AttentionError where there is no such attention."""
        from headoff.harness.plugin.patch import Patch

        if settings.dtype not in self.patches:
            self.patches[settings.dtype] = Patch.of(settings)
        return self.patches[settings.dtype]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if "under_test" in getattr(item, "fixturenames", ()) or is_suite(item.path):
            # An attribute made of plain types travels from a worker to the process that reports.
            report.headoff = self._noted(item, call)  # type: ignore[attr-defined]
        return report

    def _noted(self, item: pytest.Item, call: pytest.CallInfo[None]) -> dict[str, Any]:
        """What the phase of a test that has just ended says of the patch."""
        dtype = item.callspec.params.get("under_test") if hasattr(item, "callspec") else None
        patch = self.patches.get(dtype) if dtype else next(iter(self.patches.values()), None)
        noted = {"dtype": None, "calls_credited": 0} if patch is None else patch.take_notes()
        if call.excinfo is not None:
            error = call.excinfo.value
            findings: Sequence[Finding] = ()
            if isinstance(error, WrongAttention):
                findings = error.findings
            elif patch is not None and patch.raised is not None and patch.raised in _causes(error):
                from headoff.harness.exceptions import describe_exception

                findings = [Finding("crash", f"it raised {describe_exception(error)}")]
            noted |= {"findings": [finding.as_dict() for finding in findings], "message": _first_line(error)}
        return noted

    # In the process that reports

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        noted = getattr(report, "headoff", None)
        if noted is None and report.failed and is_suite(Path(report.fspath)):
            noted = {"message": report.longreprtext.strip()}  # its worker crashed
        if noted is not None and not self.worker:
            self.run.add(report.nodeid, report.when or "call", report.outcome, report.duration, noted)

    def pytest_keyboard_interrupt(self) -> None:
        self.run.interrupted = True

    @pytest.hookimpl(trylast=True)  # syrupy combines exit codes bit by bit: 2 for no verdict would become 3
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
        if self.worker or not self.run.tests:
            return
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            session.exitstatus = self._exit_code(exitstatus)
        self._look_closer()
        self.document = self.run.document()
        report = value_of(self.config, "report")
        if report:
            self._write(Path(report))

    def _exit_code(self, exitstatus: int | pytest.ExitCode) -> int | pytest.ExitCode:
        """1 is for a wrong or slow attention, 2 for no verdict; all tests skipped is as good as none collected."""
        if self.run.verdict == "incomplete" and self.run.problems:
            return NO_VERDICT
        return pytest.ExitCode.NO_TESTS_COLLECTED if self.run.all_skipped else exitstatus

    def _look_closer(self) -> None:
        """Diagnose what failed, and describe what it ran on."""
        import torch

        import headoff
        from headoff.harness.plugin.diagnosis import diagnose_run
        from headoff.timing import THREADS, describe_machine

        settings = {one.dtype: one for one in all_settings(self.config)}
        first = next(iter(settings.values()))
        self.run.benchmarks = self.config.stash.get(RECORDS, [])
        self.run.machine = describe_machine(first.device, THREADS if self.run.benchmarks else None)
        self.run.about |= {
            "dtype": ", ".join(settings),
            "device": first.device,
            "headoff": headoff.__version__,
            "torch": torch.__version__,
        }
        if first.device.startswith("cuda"):
            self.run.about["gpu"] = self.run.machine["gpu"]["name"]
        if self.run.verdict == "wrong" and not self.run.interrupted:
            wrong = self.run.wrong[0].dtype
            self.run.diagnosis, notes = diagnose_run(self.run, settings.get(wrong or first.dtype, first))
            self.run.notes += notes

    def _write(self, path: Path) -> None:
        assert self.document is not None
        text = json.dumps(self.document, indent=1, allow_nan=False)
        try:
            with atomic_write(path.with_suffix(".json")) as file:
                file.write(text.encode())
            if path.suffix == ".html":
                from headoff.harness.report import render

                with atomic_write(path) as file:
                    file.write(render(self.document).encode())
        except (OSError, HeadoffError) as error:
            raise pytest.UsageError(f"the report cannot be written: {error}") from error

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None]:
        if self.document is None:
            return (yield)
        right = self.document["verdict"] == "right"
        colour = {"green" if right else "red": True, "bold": True}
        terminalreporter.write_sep("=", "headoff", **colour)
        terminalreporter.write_line(self.document["headline"], **colour)
        for line in self.lines():
            terminalreporter.write_line(line)
        result = yield
        if self.run.failed() and self.config.option.tbstyle != "no":
            # Hundreds of failures may stand between the first lines and the prompt.
            terminalreporter.write_line(self.document["headline"], **colour)
        return result

    def lines(self) -> list[str]:
        """What stands below the headline."""
        assert self.document is not None
        causes = self.document["diagnosis"]
        lines = [f"  accepted although wrong: {answer}" for answer in self.document["cannot_tell"][:SHOWN]]
        lines += [f"  {cause['property']}: {cause['message']}" for cause in causes[:SHOWN]]
        if len(causes) > SHOWN:
            lines.append(f"  and {len(causes) - SHOWN} more causes")
        failed = [suite for suite in self.document["suites"] if suite["failed"] or suite["errors"]]
        for suite in failed:
            total = suite["passed"] + suite["failed"] + suite["errors"]
            lines.append(f"  {suite['name']}: {suite['failed'] + suite['errors']} of {total} checks failed")
        lines += [f"  {note}" for note in self.document["notes"]]
        if calls := self.document["calls"]:
            lines.append(
                "  called in the model: " + ", ".join(f"{site} {count}" for site, count in calls.items())
            )
        if self.document["pictures"]:
            lines.append(f"  pictures of failures are in {value_of(self.config, 'failures')}")
        if report := value_of(self.config, "report"):
            lines.append(f"  report: {report}")
        return lines


def is_suite(path: Path) -> bool:
    """Whether the file is a heads_off suite, here or in somebody's own tests: their files have no other name."""
    return path.name.startswith("test_heads_off_")


def remove_earlier_report(path: Path) -> None:
    """Remove an earlier report, which would be taken for this run's if anything went wrong.

    Raises OutputError, before anything runs, for one that could not be written in the end.
    """
    if path.suffix not in (".html", ".json"):
        raise OutputError(f"a report cannot be written to {path}: give a name that ends in .html or .json")
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"there is no folder {path.absolute().parent} for the report: make it, or name another"
        )
    try:
        for old in (path, path.with_suffix(".json")):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be replaced ({error.strerror}): name another report") from error


def _causes(error: BaseException | None) -> list[BaseException]:
    """The exception, what it was raised from, and so on."""
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if isinstance(error, (HeadoffError, WrongAttention)) else f"{type(error).__name__}: {line}"
