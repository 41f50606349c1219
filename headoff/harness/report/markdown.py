"""The summary of a verification in Markdown, for the page of a CI job and for comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headoff.harness.report.document import VERDICTS, BenchmarkRecord, Document, printable, tally, validate
from headoff.harness.report.failures import first_line, grouped, places
from headoff.wording import counted, format_ratio, markdown_table

MOST_CAUSES = 5
MOST_RATIOS = 20

_SYMBOLS = {"right": "✅", "wrong": "❌", "slower": "🐢", "incomplete": "⚠️"}


def summary(document: Mapping[str, Any]) -> str:
    """Verdict, headline, counts, causes and ratios: what fits a screen. The page has the rest.

    Raises:
        SettingError: `document` is not one.
    """
    checked = validate(document)
    parts = [
        f"### {_SYMBOLS[checked['verdict']]} {VERDICTS[checked['verdict']]}",
        _text(checked["headline"]),
        _tests(checked),
        _accepted(checked["cannot_tell"]),
        *(f"- {_text(first_line(note))}" for note in checked["notes"]),
        _causes(checked),
        _ratios(checked["benchmarks"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _accepted(answers: list[str]) -> str:
    if not answers:
        return ""
    lines = [f"- {_text(answer)}" for answer in answers[:MOST_CAUSES]]
    more = [f"- and {len(answers) - MOST_CAUSES} more"] if len(answers) > MOST_CAUSES else []
    return "\n".join([f"Tolerances accept {counted(len(answers), 'wrong answer')} here:", "", *lines, *more])


def _tests(document: Document) -> str:
    outcomes = [test["outcome"] for test in document["tests"]]
    names = {"failed": "failed", "error": "errors", "passed": "passed", "skipped": "skipped"}
    counts = [f"{outcomes.count(key):,} {name}" for key, name in names.items() if key in outcomes]
    return f"{counted(len(outcomes), 'test')}: {', '.join(counts)}" if counts else "No test ran."


def _causes(document: Document) -> str:
    groups = grouped(document)
    lines = []
    for group in groups[:MOST_CAUSES]:
        where = f" ({_text(places(group.findings))})" if group.findings else ""
        error = " (could not be run)" if group.broken else ""
        lines.append(f"- **{_text(group.title)}**{error}: {counted(len(group.tests), 'test')}{where}")
    if len(groups) > MOST_CAUSES:
        lines.append(f"- and {len(groups) - MOST_CAUSES} more")
    return "\n".join(lines)


def _ratios(benchmarks: list[BenchmarkRecord]) -> str:
    if not benchmarks:
        return ""
    # The slower ones are what a reader must not miss.
    ranks = list(tally(benchmarks))
    ordered = sorted(benchmarks, key=lambda record: ranks.index(record["verdict"]))
    rows = []
    for record in ordered[:MOST_RATIOS]:
        interval = f"{format_ratio(record['low'])} to {format_ratio(record['high'])}"
        verdict = record["verdict"] + (", and wrong" if record.get("outputs") == "wrong" else "")
        off = "" if record["heads_off"] is None else record["heads_off"]
        rows.append((_text(record["name"]), off, format_ratio(record["ratio"]), interval, verdict))
    head = ("benchmark", "heads off", "patch / baseline", "interval", "verdict")
    lines = markdown_table(head, rows, padded=False, right=(1, 2))
    if len(ordered) > MOST_RATIOS:
        lines.append(f"\n{len(ordered) - MOST_RATIOS} more are in the report.")
    return "\n".join(lines)


def _text(text: str) -> str:
    """One line that Markdown takes as it stands, whatever is in it."""
    line = " ".join(printable(text).split())
    # An @ would notify people where this is posted as a comment.
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", line).replace("@", "@\u200b")
