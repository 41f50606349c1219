"""The part of the pytest plugin that lives as long as a run: it tells what happens, and at the end what came out."""

from __future__ import annotations

import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from headoff.errors import HeadoffError, OutputError
from headoff.harness.contracts import DEFORMABLE
from headoff.harness.finding import Finding, WrongAttention
from headoff.harness.plugin.benchmark_hooks import RECORDS
from headoff.harness.plugin.options import all_settings, text_of, value_of
from headoff.harness.plugin.run import PASSES, Run
from headoff.harness.process import emit, is_watched, limited
from headoff.harness.settings import Settings

if TYPE_CHECKING:
    from headoff.harness.plugin.patch import Patch

NO_VERDICT = 2
"""Exit code where something failed that is not about the attention."""


class Reporter:
    """Registered with pytest for one run.

    In a worker of pytest-xdist it only adds to the tests' reports. Under `headoff verify` it only tells its parent
    process, which judges.
    """

    def __init__(self, config: pytest.Config, *, worker: bool) -> None:
        self.config = config
        self.worker = worker
        self.patches: dict[str, Patch] = {}
        chosen = {name: str(value_of(config, name)) for name in ("attention", "baseline", "model", "seed")}
        about = about_contract(chosen, value_of(config, "contract"), value_of(config, "forward-only"))
        self.run = Run({**about, "command": command_line()})
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
            elif isinstance(error, SystemExit):  # in the backward pass; nothing else in a test exits
                findings = [Finding("crash", f"it called sys.exit({error.code!r})")]
            elif patch is not None and patch.raised is not None and patch.raised in _causes(error):
                from headoff.harness.exceptions import describe_exception

                findings = [Finding("crash", f"it raised {describe_exception(error)}")]
            noted |= {"findings": [finding.as_dict() for finding in findings], "message": _first_line(error)}
        return noted

    # In the process that reports

    def tell(self, **event: Any) -> None:
        """Take an event in, here and in the process that judges."""
        self.run.take(event)
        emit(event)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self.worker and session.items:
            self.tell(collected=len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.tell(collected=len(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        if not self.worker:
            emit({"begin": nodeid})

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        if not self.worker:
            emit({"end": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker:
            return
        noted = getattr(report, "headoff", None)
        if noted is None and report.failed and is_suite(Path(report.fspath)):
            self.tell(broken=f"it ended the process of a worker during {report.nodeid}: debug it")
            emit({"end": report.nodeid})
        elif noted is not None:
            about = {"id": report.nodeid, "phase": report.when or "call"}
            self.tell(test={**about, "outcome": report.outcome, "seconds": report.duration, "noted": noted})

    def pytest_keyboard_interrupt(self) -> None:
        self.tell(interrupted=True)

    @pytest.hookimpl(trylast=True)  # syrupy combines exit codes bit by bit: 2 for no verdict would become 3
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int | pytest.ExitCode) -> None:
        if self.worker or not (self.run.tests or self.run.broken):
            return
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            session.exitstatus = self._exit_code(exitstatus)
        self._describe()
        if self.run.verdict == "wrong" and not self.run.interrupted:
            self._diagnose()
        if not is_watched():
            from headoff.harness.report import write_report

            self.document = self.run.document()
            if report := value_of(self.config, "report"):
                try:
                    write_report(self.document, report)
                except OutputError as error:
                    raise pytest.UsageError(f"headoff: {error}") from error

    def _exit_code(self, exitstatus: int | pytest.ExitCode) -> int | pytest.ExitCode:
        """1 is for a wrong or slow attention, 2 for no verdict; all tests skipped is as good as none collected."""
        if self.run.all_skipped and not self.run.broken:
            return pytest.ExitCode.NO_TESTS_COLLECTED
        if self.run.verdict == "incomplete":
            asked = bool(text_of(self.config, "attention"))
            return NO_VERDICT if self.run.problems or self.run.broken or asked else exitstatus
        return exitstatus

    def _describe(self) -> None:
        """What the tests ran on."""
        import torch

        import headoff
        from headoff.timing import THREADS, describe_machine

        settings = all_settings(self.config)
        device = settings[0].device
        benchmarks = self.config.stash.get(RECORDS, [])
        machine = describe_machine(device, THREADS if benchmarks else None)
        about = {
            "dtype": ", ".join(one.dtype for one in settings),
            "device": device,
            "headoff": headoff.__version__,
            "torch": torch.__version__,
        }
        if device.startswith("cuda"):
            about["gpu"] = machine["gpu"]["name"]
        notes: list[str] = []
        # Single calls need no model, and the bundled one is known.
        if settings[0].model != Settings.model and any(
            test.suite not in ("operator", *DEFORMABLE.suites) for test in self.run.tests.values()
        ):
            from headoff.harness.reference.cases import oracle_of

            detector = oracle_of(settings[0].model_choice)
            about["heads"] = detector.head_layout.heads_text
            notes = [f"{settings[0].model}: {assumption}" for assumption in detector.assumptions]
        if settings[0].forward_only:
            notes.append(self._about_backward(settings[0]))
        self.tell(about=about, machine=machine, benchmarks=benchmarks, notes=notes, finished=True)

    def _about_backward(self, settings: Settings) -> str:
        """What a verdict on the forward pass leaves out."""
        from headoff.harness.forward_only import has_backward
        from headoff.harness.plugin.patch import Patch

        patch = Patch.of(settings)
        with limited("a look for its backward pass"):
            has_one = has_backward(patch.uncounted, settings.of_contract, patch.device, patch.dtype)
        only = "its forward pass alone was tested; gradients, where maps need them, are those of the formula"
        return f"{only}; it has a backward pass, which was not tested" if has_one else only

    def _diagnose(self) -> None:
        from headoff.harness.plugin.diagnosis import diagnose_run

        settings = {one.dtype: one for one in all_settings(self.config)}
        wrong = self.run.wrong[0].dtype
        with limited("the diagnosis"):
            findings, notes = diagnose_run(self.run, settings.get(wrong or "", next(iter(settings.values()))))
        self.tell(diagnosis=[finding.as_dict() for finding in findings], notes=notes)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> Generator[None]:
        if self.document is None:
            return (yield)
        from headoff.harness.report.terminal import summary_lines

        right = self.document["verdict"] == "right"
        colour = {"green" if right else "red": True, "bold": True}
        terminalreporter.write_sep("=", "headoff", **colour)
        terminalreporter.write_line(self.document["headline"], **colour)
        for line in summary_lines(self.document, value_of(self.config, "failures")):
            terminalreporter.write_line(line)
        if report := value_of(self.config, "report"):
            terminalreporter.write_line(f"  report: {report}")
        result = yield
        if self.run.failed() and self.config.option.tbstyle != "no":
            # Hundreds of failures may stand between the first lines and the prompt.
            terminalreporter.write_line(self.document["headline"], **colour)
        return result


def about_contract(chosen: Mapping[str, str], contract: str, forward_only: bool) -> dict[str, str]:
    """What was `chosen`, with the contract in the place of the model where no model is run."""
    passes = {PASSES: "forward only"} if forward_only else {}
    if contract == Settings.contract:
        return {**chosen, **passes}
    return {
        **{name: text for name, text in chosen.items() if name != "model"},
        "contract": contract,
        **passes,
    }


def command_line() -> str:
    """As it was typed, without the path of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def is_suite(path: Path) -> bool:
    """Whether the file is a heads_off suite, here or in somebody's own tests: their files have no other name."""
    return path.name.startswith("test_heads_off_")


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
