"""The page of a verification: one HTML file with everything in it, the verdict first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from headoff.harness.report import words
from headoff.harness.report.document import FindingRecord, TestRecord, validate
from headoff.harness.report.failures import Group, grouped, skipped
from headoff.harness.report.pictures import Gallery, Picture
from headoff.harness.report.ratios import rows, tally

MOST_FINDINGS = 3
"""Findings of the diagnosis that are seen at once; the rest is folded."""

MOST_PICTURES = 8
"""Pictures that a group of failures puts on the page; beyond, the path must do: the JSON has them all."""

MOST_CHARACTERS = 6_000
"""Of a message. Of longer ones, beginning and end are shown."""


def render(document: Mapping[str, Any]) -> str:
    """The HTML of the page, which needs no other file and no network. Scripts only filter: it is whole without.

    Args:
        document: what `headoff verify --report FILE.json` writes, see `headoff.harness.report.document`.

    Raises SettingError for a document that is not one.
    """
    checked = validate(document)
    gallery = Gallery(checked["pictures"])
    # In the page's order: the first who asks for a picture gets it.
    diagnosis = [_finding(each, gallery) for each in checked["diagnosis"]]
    groups = [_group(each, gallery) for each in grouped(checked)]
    scale, benchmarks = rows(checked["benchmarks"])
    html = _template().render(
        document=checked,
        verdict=words.VERDICTS[checked["verdict"]],
        counts=_counts(checked["tests"]),
        about=_flat(checked["about"]),
        machine=_flat(checked["machine"]),
        diagnosis=diagnosis,
        most_findings=MOST_FINDINGS,
        failures=[each for each in groups if not each["broken"]],
        errors=[each for each in groups if each["broken"]],
        benchmarks=benchmarks,
        tally=tally(checked["benchmarks"]),
        ticks=scale.ticks(),
        skipped=skipped(checked["tests"]),
    )
    return words.printable(html)


def _counts(tests: Sequence[TestRecord]) -> dict[str, int]:
    counts = {"failed": 0, "error": 0, "passed": 0, "skipped": 0}
    for test in tests:
        counts[test["outcome"]] += 1
    return counts


def _finding(record: FindingRecord, gallery: Gallery, *, embed: int = MOST_PICTURES) -> dict[str, Any]:
    """A finding in words, with its pictures, of which at most `embed` get their file here."""
    measured, said = words.measure(record["property"])
    known = {measured: record["error"], "allowed": record["budget"]}
    times = words.excess(record)
    return {
        "property": record["property"],
        "about": words.PROPERTIES.get(record["property"], ""),
        "message": _shortened(record["message"]),
        "facts": {
            "case": record["case"],
            "place": words.places([record]),
            **{name: said(value) for name, value in known.items() if value is not None},
        },
        "excess": f"{words.times(times)} what is allowed" if times is not None and times > 1 else "",
        "pictures": [gallery.place(path, embed=n < embed) for n, path in enumerate(record["pictures"])],
    }


def _group(group: Group, gallery: Gallery) -> dict[str, Any]:
    first = group.tests[0]
    left = MOST_PICTURES
    shown = {
        "id": first["id"],
        "message": _shortened(first["message"]),
        "findings": [_finding(each, gallery) for each in first["findings"]],
    }
    left -= sum(len(each["pictures"]) for each in first["findings"])
    rest = []
    for test in group.tests[1:]:
        pictures: list[Picture] = []
        for path in dict.fromkeys(path for each in test["findings"] for path in each["pictures"]):
            pictures.append(gallery.place(path, embed=left > 0))
            left -= 1
        same = test["message"] == first["message"]
        rest.append(
            {"id": test["id"], "message": "" if same else _shortened(test["message"]), "pictures": pictures}
        )
    return {
        "title": group.title if group.wrong else _shortened(group.title),
        "about": words.PROPERTIES.get(group.wrong or "", ""),
        "broken": group.broken,
        "count": len(group.tests),
        "places": words.places(group.findings),
        "worst": _worst(group.worst),
        "shown": shown,
        "rest": rest,
    }


def _worst(finding: FindingRecord | None) -> str:
    if finding is None or finding["error"] is None or finding["budget"] is None:
        return ""
    measured, said = words.measure(finding["property"])
    return f"worst {measured} {said(finding['error'])}, allowed {said(finding['budget'])}"


def _flat(entries: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested objects as one list of names and texts, lists in one line; what is null is left out."""
    flat: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name} ")
        elif isinstance(value, list):
            flat[f"{before}{name}"] = ", ".join(str(each) for each in value)
        elif value is not None:
            flat[f"{before}{name}"] = words.seconds(value) if name == "seconds" else str(value)
    return flat


def _shortened(message: str) -> str:
    message = message.strip("\n")
    left_out = len(message) - MOST_CHARACTERS
    if left_out <= 0:
        return message
    end = MOST_CHARACTERS // 3
    return f"{message[: MOST_CHARACTERS - end]}\n… {left_out:,} characters left out …\n{message[-end:]}"


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        # Everything that is put in is escaped: messages and ids are made of other people's code.
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["counted"] = words.counted
    environment.filters["seconds"] = words.seconds
    return environment.get_template("page.html")


def _read(name: str) -> str:
    # The look is that of the pages of sweeps, whose module is not imported: it needs torch and matplotlib.
    package = resources.files("headoff")
    folder = package / "report" if name == "style.css" else package / "harness" / "report"
    return (folder / "templates" / name).read_text(encoding="utf-8")
