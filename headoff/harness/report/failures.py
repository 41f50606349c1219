"""Tests that failed, by what is wrong: one cause often fails hundreds of tests, and is to be read once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from headoff.harness.report.document import Document, FindingRecord, TestRecord
from headoff.harness.report.words import excess, first_line


@dataclass(frozen=True)
class Group:
    """Tests with one cause: the same property at the same site, or else messages that differ in numbers only.

    - `title`: for people
    - `wrong`: the property that the findings are about; None where tests failed without any
    - `broken`: errors in what surrounds a test: it could not be run
    - `tests`: the most telling one first
    """

    title: str
    wrong: str | None
    broken: bool
    tests: tuple[TestRecord, ...]

    @property
    def findings(self) -> list[FindingRecord]:
        """The first finding of each test that has one: what the group is about."""
        return [test["findings"][0] for test in self.tests if test["findings"]]

    @property
    def worst(self) -> FindingRecord | None:
        """The finding that is furthest beyond its budget; None where no budget is known."""
        measured = [each for each in self.findings if excess(each) is not None]
        return max(measured, key=lambda each: excess(each) or 0.0, default=None)


def grouped(document: Document) -> list[Group]:
    """All that failed: causes in the order of the diagnosis, then by how many tests they fail, errors last."""
    kinds: dict[tuple[bool, str, str], list[TestRecord]] = {}
    for test in document["tests"]:
        if test["outcome"] in ("failed", "error"):
            kinds.setdefault(_kind(test), []).append(test)
    causes = [(each["property"], each["site"] or "") for each in document["diagnosis"]]

    def place(kind: tuple[bool, str, str]) -> tuple[bool, int, int]:
        cause = kind[1:]
        return kind[0], causes.index(cause) if cause in causes else len(causes), -len(kinds[kind])

    return [_group(kind, kinds[kind]) for kind in sorted(kinds, key=place)]


def skipped(tests: Iterable[TestRecord]) -> list[tuple[str, int]]:
    """Reasons for which tests were skipped, and how many; the most frequent first."""
    reasons: dict[str, int] = {}
    for test in tests:
        if test["outcome"] == "skipped":
            # pytest begins every reason so.
            reason = first_line(test["message"]).removeprefix("Skipped: ") or "no reason given"
            reasons[reason] = reasons.get(reason, 0) + 1
    return sorted(reasons.items(), key=lambda each: -each[1])


def _kind(test: TestRecord) -> tuple[bool, str, str]:
    """(error, property or nothing, site or message): tests with the same are one group."""
    broken = test["outcome"] == "error"
    if test["findings"]:
        cause = test["findings"][0]
        return broken, cause["property"], cause["site"] or ""
    # Addresses and numbers are those of the case, not of the cause.
    return broken, "", re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]?\d+)?", "#", first_line(test["message"]))


def _group(kind: tuple[bool, str, str], tests: Sequence[TestRecord]) -> Group:
    broken, property_, where = kind
    if property_:
        title = f"{property_} at {where}" if where else property_
    else:
        title = first_line(tests[0]["message"]) or "no message"
    return Group(title, property_ or None, broken, tuple(sorted(tests, key=_telling)))


def _telling(test: TestRecord) -> tuple[bool, float, float]:
    """Sorts a test with a picture before others, then the earliest layer and head: what is wrong there is no
    consequence of anything before it."""
    if not test["findings"]:
        return True, 0.0, 0.0
    cause = test["findings"][0]
    pictured = any(each["pictures"] for each in test["findings"])
    layer, head = (float("inf") if each is None else float(each) for each in (cause["layer"], cause["head"]))
    return not pictured, layer, head
