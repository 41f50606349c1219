"""The summary of a verification in Markdown, for the page of a CI job and for comments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headoff.harness.report import words
from headoff.harness.report.document import BenchmarkRecord, Document, validate
from headoff.harness.report.failures import grouped
from headoff.harness.report.ratios import tally

MOST_CAUSES = 5
MOST_RATIOS = 20

_SYMBOLS = {"right": "✅", "wrong": "❌", "slower": "🐢", "incomplete": "⚠️"}


def summary(document: Mapping[str, Any]) -> str:
    """Verdict, headline, counts, causes and ratios: what fits a screen. The page has the rest.

    Raises SettingError for a document that is not one.
    """
    checked = validate(document)
    parts = [
        f"### {_SYMBOLS[checked['verdict']]} {words.VERDICTS[checked['verdict']]}",
        _text(checked["headline"]),
        _tests(checked),
        *(f"- {_text(words.first_line(note))}" for note in checked["notes"]),
        _causes(checked),
        _ratios(checked["benchmarks"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tests(document: Document) -> str:
    outcomes = [test["outcome"] for test in document["tests"]]
    names = {"failed": "failed", "error": "errors", "passed": "passed", "skipped": "skipped"}
    counts = [f"{outcomes.count(key):,} {name}" for key, name in names.items() if key in outcomes]
    return f"{words.counted(len(outcomes), 'test')}: {', '.join(counts)}" if counts else "No test ran."


def _causes(document: Document) -> str:
    groups = grouped(document)
    lines = []
    for group in groups[:MOST_CAUSES]:
        places = words.places(group.findings)
        where = f" ({_text(places)})" if places else ""
        error = " (could not be run)" if group.broken else ""
        lines.append(f"- **{_text(group.title)}**{error}: {words.counted(len(group.tests), 'test')}{where}")
    if len(groups) > MOST_CAUSES:
        lines.append(f"- and {len(groups) - MOST_CAUSES} more")
    return "\n".join(lines)


def _ratios(benchmarks: list[BenchmarkRecord]) -> str:
    if not benchmarks:
        return ""
    # The slower ones are what a reader must not miss.
    ranks = list(tally(benchmarks))
    ordered = sorted(benchmarks, key=lambda each: ranks.index(each["verdict"]))
    lines = [
        "| benchmark | heads off | patch / baseline | interval | verdict |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for each in ordered[:MOST_RATIOS]:
        interval = f"{words.ratio(each['low'])} to {words.ratio(each['high'])}"
        verdict = each["verdict"] + (", and wrong" if each.get("outputs") == "wrong" else "")
        off = "" if each["heads_off"] is None else each["heads_off"]
        lines.append(
            f"| {_text(each['name'])} | {off} | {words.ratio(each['ratio'])} | {interval} | {verdict} |"
        )
    if len(ordered) > MOST_RATIOS:
        lines.append(f"\n{len(ordered) - MOST_RATIOS} more are in the report.")
    return "\n".join(lines)


def _text(text: str) -> str:
    """One line that Markdown takes as it stands, whatever is in it."""
    line = " ".join(words.printable(text).split())
    # An @ would notify people where this is posted as a comment.
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", line).replace("@", "@\u200b")
