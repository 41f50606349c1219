"""What happened in a run, and the document that reports are made of.

A run is told as events, of types that JSON knows: tests may run in several processes, and the process that judges a
patch is not one of them where `headoff verify` started it (`headoff.harness.process`).
"""

from __future__ import annotations

import base64
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headoff.harness.contracts import CONTRACTS
from headoff.harness.finding import PROPERTIES, Finding
from headoff.harness.report.document import FORMAT, Verdict
from headoff.wording import counted

PICTURES = 8
"""That a document keeps of one property."""

PASSES = "passes"
"""The entry of what a run is about that says that only the forward pass is under test."""

SUITE_ORDER = tuple(suite for contract in CONTRACTS.values() for suite in contract.suites)


@dataclass
class TestRecord:
    """One test: its outcome in all phases together.

    Attributes:
        dtype: of the attention under test; None where the test never had it.
        calls: of the attention under test, those of cached results included.
        findings: what the test said is wrong with the attention, by `fail_on`.
        problem: why it failed otherwise, which is no word about the attention; empty where it did not.
    """

    __test__ = False

    id: str
    suite: str
    outcome: str = "passed"
    seconds: float = 0.0
    message: str = ""
    dtype: str | None = None
    calls: int = 0
    findings: list[Finding] = field(default_factory=list)
    problem: str = ""

    @property
    def is_verdict(self) -> bool:
        """Whether the test found the attention wrong (or slow): it called it, and failed by `fail_on`."""
        return bool(self.findings) and self.calls > 0

    @property
    def harness_problem(self) -> str:
        """Why the test failed without a word about the attention; empty where it did not."""
        if self.findings and not self.calls:
            return "it reports a wrong attention but never called it: call `under_test.attention` in the test"
        return self.problem

    def as_dict(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "suite": self.suite,
            "outcome": self.outcome,
            "seconds": round(self.seconds, 4),
            "message": self.message,
            "problem": self.harness_problem,
            "findings": [finding.as_dict() for finding in self.findings],
        }


@dataclass
class Run:
    """Everything that a run's document says.

    Attributes:
        about: the attention and what it was run on.
        collected, done: how many checks there are, and the ids of those that have come to their end.
        finished: whether all that was to be told has been, but for the diagnosis.
        broken: why the report is not complete, continuing "because"; empty where it is.
    """

    about: dict[str, Any]
    tests: dict[str, TestRecord] = field(default_factory=dict)
    unsupported: dict[str, str] = field(default_factory=dict)
    observed: dict[str, Counter[str]] = field(default_factory=dict)
    cannot_tell: list[str] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    diagnosis: list[Finding] = field(default_factory=list)
    benchmarks: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    collected: int = 0
    done: set[str] = field(default_factory=set)
    finished: bool = False
    broken: str = ""
    interrupted: bool = False
    started: datetime = field(default_factory=lambda: datetime.now(UTC).astimezone())

    @property
    def label(self) -> str:
        """The attention, and that only its forward pass is under test where that is so."""
        return f"{self.about['attention']}{' (forward pass only)' if PASSES in self.about else ''}"

    def take(self, event: Mapping[str, Any]) -> None:
        """Take in one event: what `Reporter` reports, in the order in which it happens."""
        for name, what in event.items():
            match name:
                case "test":
                    self.add(**what)
                case "diagnosis":
                    self.diagnosis = [Finding.from_dict(finding) for finding in what]
                case "notes":
                    self.notes += what
                case "about":
                    self.about |= what
                case "collected" | "finished" | "broken" | "interrupted" | "machine" | "benchmarks":
                    setattr(self, name, what)

    def end(self, how: str = "") -> None:
        """The process that ran the tests has ended: without having told everything, there is no verdict.

        Args:
            how: it ended before its time, continuing a sentence about the attention: `ended its process by SIGSEGV`.
        """
        done = f"{len(self.done)} of {self.collected} checks were done"
        if self.interrupted or self.broken:
            return
        if not self.finished:
            self.broken = f"it {how}" + (f" ({done})" if self.collected else "")
        elif self.verdict == "right" and len(self.done) < self.collected:
            self.broken = f"only {done}; leave out what ended the run early"
        elif how:
            self.notes.append(f"its cause was not found: it {how}")

    def add(self, id: str, phase: str, outcome: str, seconds: float, noted: Mapping[str, Any]) -> None:
        """Take in the report of one phase (setup, call, teardown) of a test, and what the plugin noted with it."""
        record = self.tests.setdefault(id, TestRecord(id, suite_of(id)))
        if phase == "teardown":
            self.done.add(id)
        record.seconds += seconds
        message, findings = noted.get("message", ""), noted.get("findings", [])
        record.calls += noted.get("calls_credited", 0)
        record.dtype = noted.get("dtype") or record.dtype
        record.message = record.message or message
        if outcome == "skipped" and record.outcome == "passed":
            record.outcome = "skipped"
        elif outcome == "failed":
            record.outcome = "failed" if phase == "call" else "error"
            if phase == "call" and findings:
                record.findings += [Finding.from_dict(finding) for finding in findings]
            else:
                record.problem = record.problem or message or "it failed without a message"
        self.unsupported.update(noted.get("unsupported", {}))
        self.calls.update(noted.get("calls", {}))
        self.cannot_tell += [what for what in noted.get("cannot_tell", ()) if what not in self.cannot_tell]
        self.notes += [what for what in noted.get("remarks", ()) if what not in self.notes]
        for where, finding in noted.get("observed", ()):
            self.observed.setdefault(where, Counter())[f"{finding['property']}: {finding['message']}"] += 1

    def failed(self) -> list[TestRecord]:
        """Tests that failed or could not be run."""
        return [test for test in self.tests.values() if test.outcome in ("failed", "error")]

    @property
    def wrong(self) -> list[TestRecord]:
        """Tests that found the attention wrong; not those that found it slow alone."""
        return [
            test
            for test in self.tests.values()
            if test.is_verdict and any(finding.property != "time" for finding in test.findings)
        ]

    @property
    def slow(self) -> list[TestRecord]:
        """Tests that found the attention slow alone."""
        wrong = self.wrong
        return [test for test in self.tests.values() if test.is_verdict and test not in wrong]

    @property
    def problems(self) -> list[TestRecord]:
        """Tests that failed for a reason that is not the attention."""
        return [test for test in self.tests.values() if test.harness_problem]

    @property
    def passed(self) -> int:
        """Checks: tests that called the attention and passed."""
        return sum(test.outcome == "passed" and test.calls > 0 for test in self.tests.values())

    @property
    def all_skipped(self) -> bool:
        return all(test.outcome == "skipped" for test in self.tests.values())

    @property
    def verdict(self) -> Verdict:
        if self.broken:
            return "incomplete"
        if self.wrong:
            return "wrong"
        if self.interrupted or self.problems or not (self.passed or self.slow):
            return "incomplete"
        return "slower" if self.slow else "right"

    @property
    def findings(self) -> list[Finding]:
        """Of all tests, those of the properties that explain most first."""
        found = [finding for test in self.tests.values() for finding in test.findings]
        return sorted(found, key=lambda finding: PROPERTIES.index(finding.property))

    def headline(self) -> str:
        """The verdict, and what there is to say for it, in a line."""
        verdict = self.verdict
        if verdict == "right":
            return f"{self.label} is right: {counted(self.passed, 'check')} passed{self._limits()}{self._times()}"
        if verdict == "slower":
            return f"{self.label} is right but slower in {len(self.slow)} of its benchmarks{self._times()}"
        if verdict == "wrong":
            return f"{self.label} is wrong: {self._cause()}"
        if self.interrupted:
            return f"{self.label}: interrupted after {counted(len(self.tests), 'test')}, none of which found it wrong"
        if self.broken:
            return f"{self.label}: no verdict, because {self.broken}"
        if self.problems:
            return f"{self.label}: no verdict, because {self._problem()}"
        return f"{self.label}: no verdict, because no test that ran called it"

    def _problem(self) -> str:
        """The first failure that is not about the attention, and what to do about it."""
        first, *more = self.problems
        others = f" (and {counted(len(more), 'other test')})" if more else ""
        return (
            f"{first.id} failed for a reason that is not the attention{others}: {first.harness_problem}; "
            f"fix that and run again"
        )

    def _cause(self) -> str:
        causes = self.diagnosis or self.findings
        if causes:
            first = causes[0]
            # The first clause says what is wrong; numbers and case follow below.
            message = f"{first.property}: {first.message.split('; ')[0]}"
            return message if first.site is None else f"{message}; in the model first at {place_of(first)}"
        return self.wrong[0].message or self.wrong[0].id

    def _limits(self) -> str:
        """What the tolerance could not tell apart, which limits what `right` means."""
        if not self.cannot_tell:
            return ""
        number = counted(len(self.cannot_tell), "wrong answer")
        return f", but its tolerances accept {number}, such as: {self.cannot_tell[0]}"

    def _times(self) -> str:
        if not self.benchmarks:
            return ""
        ratios = sorted(record["ratio"] for record in self.benchmarks)
        return f"; {ratios[0]:.2f} to {ratios[-1]:.2f} times the time of {self.about['baseline']}"

    def document(self) -> dict[str, Any]:
        """All of it, of types that JSON knows, pictures included."""
        notes = [
            f"{what} is not supported by it and was not tested: {why}"
            for what, why in self.unsupported.items()
        ]
        if self.verdict == "wrong" and self.problems:
            notes.append(f"not about the attention: {self._problem()}")
        for where, seen in self.observed.items():
            message, count = seen.most_common(1)[0]
            more = f" (and {seen.total() - count} more)" if seen.total() > count else ""
            notes.append(f"{where}, which nobody asked for, is wrong: {message}{more}")
        finished = datetime.now(UTC).astimezone()
        return {
            "format": FORMAT,
            "verdict": self.verdict,
            "headline": self.headline(),
            "about": {
                **self.about,
                "python": platform.python_version(),
                "started": self.started.isoformat(timespec="seconds"),
                "seconds": round((finished - self.started).total_seconds(), 1),
            },
            "machine": self.machine,
            "calls": dict(self.calls),
            "cannot_tell": self.cannot_tell,
            "notes": [*self.notes, *notes],
            "diagnosis": [finding.as_dict() for finding in self.diagnosis],
            "suites": self.suites(),
            "tests": [test.as_dict() for test in self.tests.values()],
            "benchmarks": self.benchmarks,
            "pictures": _pictures([*self.diagnosis, *self.findings]),
        }

    def suites(self) -> list[dict[str, Any]]:
        """Counts and seconds of each suite, in the order they are best read in."""
        names = sorted({test.suite for test in self.tests.values()}, key=_place)
        return [_count(name, [test for test in self.tests.values() if test.suite == name]) for name in names]


def place_of(finding: Finding) -> str:
    """`decoder_cross layer 0, head 2, with 'first 1 off'`, as far as it is known."""
    parts = [str(finding.site)]
    parts[0] += "" if finding.layer is None else f" layer {finding.layer}"
    parts += [] if finding.head is None else [f"head {finding.head}"]
    parts += [] if finding.configuration is None else [f"with '{finding.configuration}'"]
    return ", ".join(parts)


def suite_of(id: str) -> str:
    """`operator` of `tests/test_heads_off_operator.py::test_...`."""
    return Path(id.split("::")[0]).stem.removeprefix("test_").removeprefix("heads_off_")


def _place(name: str) -> tuple[int, str]:
    return (SUITE_ORDER.index(name) if name in SUITE_ORDER else len(SUITE_ORDER), name)


def _count(name: str, tests: list[TestRecord]) -> dict[str, Any]:
    outcomes = Counter(test.outcome for test in tests)
    return {
        "name": name,
        "passed": outcomes["passed"],
        "failed": outcomes["failed"],
        "skipped": outcomes["skipped"],
        "errors": outcomes["error"],
        "seconds": round(sum(test.seconds for test in tests), 2),
    }


def _pictures(findings: Iterable[Finding]) -> dict[str, str]:
    """PNG files in base64, by the path that findings know them by; a few of each property say as much as all."""
    shown: Counter[str] = Counter()
    pictures: dict[str, str] = {}
    for finding in findings:
        for path in finding.pictures:
            if path not in pictures and shown[finding.property] < PICTURES and Path(path).is_file():
                shown[finding.property] += 1
                pictures[path] = base64.b64encode(Path(path).read_bytes()).decode()
    return pictures
