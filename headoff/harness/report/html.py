"""The page of a verification: one HTML file with everything in it, the verdict first."""

from __future__ import annotations

import base64
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import pairwise
from typing import Any

import jinja2

from headoff.harness.report.document import (
    VERDICTS,
    BenchmarkRecord,
    FindingRecord,
    TestRecord,
    printable,
    tally,
    validate,
)
from headoff.harness.report.failures import PROPERTIES, Group, excess, grouped, measure, places, skipped
from headoff.templates import template
from headoff.wording import format_bytes, format_ratio, format_seconds, format_times

LEAST_SPAN = 1.25
"""The scale reaches at least this far from 1 to both sides: two per cent are not to look like a landslide."""

LEAST_GAP = 9.0
"""Per cent of the axis between two round numbers, for both to be read."""

_DECADES = range(-12, 13)
_LADDERS = (
    tuple(step / 20 for step in range(1, 60)),
    tuple(step / 10 for step in range(1, 60)),
    tuple(step / 5 for step in range(1, 60)),
    (*(2.0**step for step in range(-5, 6)),),
    tuple(step * 10.0**decade for decade in _DECADES for step in (1, 2, 5)),
    tuple(10.0**decade for decade in _DECADES),
    tuple(100.0**decade for decade in _DECADES),
)
"""Round numbers, all with 1 among them, from close to far apart."""


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

    Raises:
        SettingError: `document` is not one.
    """
    checked = validate(document)
    gallery = Gallery(checked["pictures"])
    # In the page's order: the first who asks for a picture gets it.
    diagnosis = [_finding(record, gallery) for record in checked["diagnosis"]]
    groups = [_group(group, gallery) for group in grouped(checked)]
    scale, benchmarks = rows(checked["benchmarks"])
    html = _template().render(
        document=checked,
        verdict=VERDICTS[checked["verdict"]],
        counts=_counts(checked["tests"]),
        about=_flat(checked["about"]),
        machine=_flat(checked["machine"]),
        diagnosis=diagnosis,
        most_findings=MOST_FINDINGS,
        failures=[group for group in groups if not group["broken"]],
        errors=[group for group in groups if group["broken"]],
        benchmarks=benchmarks,
        tally=tally(checked["benchmarks"]),
        ticks=scale.ticks(),
        skipped=skipped(checked["tests"]),
    )
    return printable(html)


def _counts(tests: Sequence[TestRecord]) -> dict[str, int]:
    counts = {"failed": 0, "error": 0, "passed": 0, "skipped": 0}
    for test in tests:
        counts[test["outcome"]] += 1
    return counts


def _finding(record: FindingRecord, gallery: Gallery, *, embed: int = MOST_PICTURES) -> dict[str, Any]:
    """A finding in words, with its pictures, of which at most `embed` get their file here."""
    measured, text_of = measure(record["property"])
    known = {measured: record["error"], "allowed": record["budget"]}
    times = excess(record)
    return {
        "property": record["property"],
        "about": PROPERTIES.get(record["property"], ""),
        "message": _shortened(record["message"]),
        "facts": {
            "case": record["case"],
            "place": places([record]),
            **{name: text_of(value) for name, value in known.items() if value is not None},
        },
        "excess": f"{format_times(times)} what is allowed" if times is not None and times > 1 else "",
        "pictures": [gallery.place(path, embed=n < embed) for n, path in enumerate(record["pictures"])],
    }


def _group(group: Group, gallery: Gallery) -> dict[str, Any]:
    first = group.tests[0]
    left = MOST_PICTURES
    shown = {
        "id": first["id"],
        "message": _shortened(first["message"]),
        "findings": [_finding(record, gallery) for record in first["findings"]],
    }
    left -= sum(len(record["pictures"]) for record in first["findings"])
    rest = []
    for test in group.tests[1:]:
        pictures: list[Picture] = []
        for path in dict.fromkeys(path for record in test["findings"] for path in record["pictures"]):
            pictures.append(gallery.place(path, embed=left > 0))
            left -= 1
        same = test["message"] == first["message"]
        rest.append(
            {"id": test["id"], "message": "" if same else _shortened(test["message"]), "pictures": pictures}
        )
    return {
        "title": group.title if group.wrong else _shortened(group.title),
        "about": PROPERTIES.get(group.wrong or "", ""),
        "broken": group.broken,
        "count": len(group.tests),
        "places": places(group.findings),
        "worst": _worst(group.worst),
        "shown": shown,
        "rest": rest,
    }


def _worst(finding: FindingRecord | None) -> str:
    if finding is None or finding["error"] is None or finding["budget"] is None:
        return ""
    measured, text_of = measure(finding["property"])
    return f"worst {measured} {text_of(finding['error'])}, allowed {text_of(finding['budget'])}"


def _flat(entries: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested objects as one list of names and texts, lists in one line; what is null is left out."""
    flat: dict[str, str] = {}
    for name, value in entries.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{name} ")
        elif isinstance(value, list):
            flat[f"{before}{name}"] = ", ".join(map(str, value))
        elif value is not None:
            flat[f"{before}{name}"] = format_seconds(value) if name == "seconds" else str(value)
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
    return template("page.html", _read)


def _read(name: str) -> str:
    # The look is that of the pages of sweeps, whose module is not imported: it needs torch and matplotlib.
    package = resources.files("headoff")
    folder = package / "report" if name == "style.css" else package / "harness" / "report"
    return (folder / "templates" / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Picture:
    """A picture where a finding shows it.

    - `path`: as the finding calls it
    - `anchor`: the id of the element that holds it; empty where the document does not have it
    - `source`: the file as a data URI; empty where the picture is not to be drawn here, but is elsewhere on the page
    - `width`, `height`: in pixels
    """

    path: str
    anchor: str = ""
    source: str = ""
    width: int = 0
    height: int = 0


class Gallery:
    """Hands out the pictures of one page, in the page's order: the first that asks for a picture gets the file."""

    def __init__(self, pictures: Mapping[str, str]) -> None:
        self._pictures = pictures
        self._anchors: dict[str, str] = {}

    def place(self, path: str, *, embed: bool = True) -> Picture:
        """The picture for the next place on the page; without `embed` never the file itself."""
        if path in self._anchors:
            return Picture(path, self._anchors[path])
        if not embed or path not in self._pictures:
            return Picture(path)
        encoded = self._pictures[path]
        anchor = self._anchors[path] = f"picture-{len(self._anchors) + 1}"
        # Width and height open the header, which is the first chunk of every PNG file.
        width, height = struct.unpack(">II", base64.b64decode(encoded[:32])[16:24])
        return Picture(path, anchor, f"data:image/png;base64,{encoded}", width, height)


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def of(cls, benchmarks: Iterable[BenchmarkRecord]) -> Scale:
        """One that holds all intervals and thresholds, and 1."""
        values = [1 / LEAST_SPAN, LEAST_SPAN]
        for record in benchmarks:
            ends = (record["low"], record["high"], record["ratio"], record["max_slowdown"] * 1.05)
            values += [value for value in ends if _drawable(value)]
        span = math.log(max(values) / min(values))
        # Room at both ends, for a dot to be drawn whole.
        return cls(min(values) * math.exp(-0.04 * span), max(values) * math.exp(0.04 * span))

    def at(self, value: float) -> float:
        """Where `value` is, in per cent of the axis from its left end; values beyond an end are at that end."""
        inside = min(max(value, self.low), self.high)
        return round(100 * math.log(inside / self.low) / math.log(self.high / self.low), 2)

    def ticks(self) -> list[tuple[float, str]]:
        """Places of round numbers and how they are written, a few, among them always 1."""
        for ladder in _LADDERS:
            ticks = [(self.at(value), f"{value:g}") for value in ladder if self.low < value < self.high]
            if all(right[0] - left[0] >= LEAST_GAP for left, right in pairwise(ticks)):
                break
        return ticks


@dataclass(frozen=True)
class Row:
    """A benchmark as the page shows it: words, and places in per cent of the scale."""

    record: BenchmarkRecord
    ratio: str
    interval: str
    patch: str
    baseline: str
    patch_memory: str
    baseline_memory: str
    drawn: dict[str, float] | None
    """`ratio`, `low`, `high`, `one` and `threshold`; None where the numbers cannot be drawn."""

    @property
    def spoken(self) -> str:
        """The drawing in words."""
        allowed = f"{self.record['max_slowdown']:g}"
        return f"ratio {self.ratio}, interval {self.interval}, allowed {allowed}: {self.record['verdict']}"

    @property
    def wrong(self) -> bool:
        """Whether what was timed computes something else."""
        return self.record.get("outputs") == "wrong"


def rows(benchmarks: Sequence[BenchmarkRecord]) -> tuple[Scale, list[tuple[str, list[Row]]]]:
    """The scale, and the rows by group, both in the order of the document."""
    scale = Scale.of(benchmarks)
    groups: dict[str, list[Row]] = {}
    for record in benchmarks:
        groups.setdefault(record["group"], []).append(_row(record, scale))
    return scale, list(groups.items())


def _row(record: BenchmarkRecord, scale: Scale) -> Row:
    places: dict[str, Any] = {name: record[name] for name in ("ratio", "low", "high")}
    places |= {"one": 1.0, "threshold": record["max_slowdown"]}
    drawable = all(_drawable(value) for value in places.values())
    return Row(
        record=record,
        ratio=format_ratio(record["ratio"]),
        interval=f"{format_ratio(record['low'])} to {format_ratio(record['high'])}",
        patch=format_seconds(record["patch_seconds"]),
        baseline=format_seconds(record["baseline_seconds"]),
        patch_memory=format_bytes(record["patch_memory"], unknown=""),
        baseline_memory=format_bytes(record["baseline_memory"], unknown=""),
        drawn={name: scale.at(value) for name, value in places.items()} if drawable else None,
    )


def _drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0
