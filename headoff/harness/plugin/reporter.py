"""The part of the pytest plugin that lives as long as a run: it collects, and says at the end what came out."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from headoff.errors import HeadoffError, OutputError
from headoff.files import written_atomically
from headoff.harness.finding import Finding, WrongAttention
from headoff.harness.plugin.options import settings_from, value_of
from headoff.harness.plugin.run import Run

if TYPE_CHECKING:
    from headoff.harness.plugin.patch import Patch

NO_VERDICT = 2
"""Exit code where something failed that is not about the attention."""

NOTHING_NOTED: dict[str, Any] = {
    "unsupported": {},
    "observed": [],
    "cannot_tell": [],
    "calls": {},
    "calls_credited": 0,
    "findings": [],
    "message": "",
}
"""What a phase of a test notes that never had a patch."""

SHOWN = 5
"""Causes that the terminal shows; the report has all of them."""


class Reporter:
    """Registered with pytest for one run; in a worker of pytest-xdist it only adds to the tests' reports."""

    def __init__(self, config: pytest.Config, *, worker: bool) -> None:
        self.config = config
        self.worker = worker
        self.patch: Patch | None = None
        self._calls_before = 0
        chosen = {
            name: str(value_of(config, name)) for name in ("attention", "baseline", "model", "dtype", "seed")
        }
        self.run = Run({**chosen, "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])})
        self.document: dict[str, Any] | None = None

    # In the process that runs tests

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if is_ours(item):
            # An attribute made of plain types survives the way from a worker to the process that reports.
            report.headoff = self._noted(call)  # type: ignore[attr-defined]
        return report

    def _noted(self, call: pytest.CallInfo[None]) -> dict[str, Any]:
        """What the tests of the patch said in the phase that has just ended."""
        error = call.excinfo.value if call.excinfo else None
        findings: tuple[Finding, ...] = ()
        if isinstance(error, WrongAttention):
            findings = error.findings
        elif error is not None and self._comes_from_patch(error):
            from headoff.harness.exceptions import describe_exception

            message = f"it raised {describe_exception(error)}"
            findings = (Finding("crash", message),)
        calls = 0 if self.patch is None else self.patch.calls_credited
        noted = dict(NOTHING_NOTED) if self.patch is None else self.patch.take_notes()
        noted |= {
            "calls_credited": calls - self._calls_before,
            "findings": [each.as_dict() for each in findings],
            "message": "" if error is None else _first_line(error),
        }
        self._calls_before = calls
        return noted

    def _comes_from_patch(self, error: BaseException) -> bool:
        """Whether a call of the attention raised `error` or what it was raised from."""
        raised = None if self.patch is None else self.patch.raised
        seen: BaseException | None = error
        while seen is not None and seen is not raised:
            seen = seen.__cause__ or seen.__context__
        return seen is not None

    # In the process that reports

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        noted = getattr(report, "headoff", None)
        if noted is None and report.failed and Path(report.fspath).name.startswith("test_heads_off_"):
            noted = NOTHING_NOTED | {"message": _last_line(report.longreprtext)}  # its worker crashed
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
        """Find the root of what failed, and what it was run on."""
        import torch

        import headoff
        from headoff.harness.benchmark import RECORDS
        from headoff.harness.plugin.diagnosis import roots_of
        from headoff.timing.calls import THREADS
        from headoff.timing.machine import describe_machine

        settings = settings_from(self.config)
        self.run.benchmarks = self.config.stash.get(RECORDS, [])
        self.run.machine = describe_machine(settings.device, THREADS if self.run.benchmarks else None)
        self.run.about |= {
            "device": settings.device,
            "headoff": headoff.__version__,
            "torch": torch.__version__,
        }
        if settings.device.startswith("cuda"):
            self.run.about["gpu"] = self.run.machine["gpu"]["name"]
        if self.run.verdict == "wrong" and not self.run.interrupted:
            self.run.diagnosis, notes = roots_of(self.run, settings)
            self.run.notes += notes

    def _write(self, path: Path) -> None:
        assert self.document is not None
        text = json.dumps(self.document, indent=1, allow_nan=False)
        try:
            with written_atomically(path.with_suffix(".json")) as file:
                file.write(text.encode())
            if path.suffix == ".html":
                from headoff.harness.report import render

                with written_atomically(path) as file:
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
        """What is said below the headline."""
        assert self.document is not None
        roots = self.document["diagnosis"]
        lines = [f"  cannot tell: {each}" for each in self.document["cannot_tell"][:SHOWN]]
        lines += [f"  {each['property']}: {each['message']}" for each in roots[:SHOWN]]
        if len(roots) > SHOWN:
            lines.append(f"  and {len(roots) - SHOWN} more causes")
        failed = [each for each in self.document["suites"] if each["failed"] or each["errors"]]
        for each in failed:
            total = each["passed"] + each["failed"] + each["errors"]
            lines.append(f"  {each['name']}: {each['failed'] + each['errors']} of {total} checks failed")
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


def is_ours(item: pytest.Item) -> bool:
    """Whether the test belongs to the heads_off suites, here or in a suite of somebody's own."""
    return tests_the_patch(item) or item.path.name.startswith("test_heads_off_")


def tests_the_patch(item: pytest.Item) -> bool:
    """Whether the test is given the attention under test."""
    return "under_test" in getattr(item, "fixturenames", ())


def make_way(path: Path) -> None:
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


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0]
    return line if isinstance(error, (HeadoffError, WrongAttention)) else f"{type(error).__name__}: {line}"
