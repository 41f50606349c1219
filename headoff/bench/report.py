"""What `headoff bench` found: as Markdown for a terminal or a page, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from typing import Any, Literal

from headoff.timing import processor
from headoff.wording import counted, format_bytes, format_seconds, markdown_table

Status = Literal["timed", "reference", "wrong", "unsupported"]

FORMAT = "headoff bench 3"

TITLES = {
    "attention": "Attention",
    "skipping": "Attention without the rows of heads that are off",
    "decoder": "Decoder",
    "sweep": "Sweep, from the image to the outcomes",
    "relevance": "Relevance, from the image to the maps",
    "methods": "Relevance methods, from the image to the maps",
    "importance": "What heads contribute, from the image to the scores",
    "faithfulness": "Deletion curves, from the encoded image to the values",
    "deformable": "Deformable attention",
}
HEAD = ("provider", "x reference", "interval", "time", "memory", "rounds")


@dataclass(frozen=True)
class Measurement:
    """One provider in one case.

    Attributes:
        status: `reference` is what the ratios of the others refer to; `wrong` and `unsupported` were not timed.
        note: why it was not timed, or a remark on its time or memory.
        ratio, low, high: time relative to the reference, and its interval, for which it takes some rounds.
        seconds: median time of a call.
        memory: peak bytes that a call allocates; None where that was not measured.
        rounds: how often it was timed.
    """

    suite: str
    case: str
    dtype: str
    provider: str
    status: Status
    note: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    memory: int | None = None
    rounds: int = 0

    @property
    def was_timed(self) -> bool:
        return self.status in ("timed", "reference")

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of `HEAD`."""
        assert self.ratio is not None and self.seconds is not None
        if self.status == "reference":
            interval = "reference"
        else:
            interval = "-" if self.low is None else f"{self.low:.3g} to {self.high:.3g}"
        numbers = (format_seconds(self.seconds), format_bytes(self.memory), str(self.rounds))
        return (self.provider, f"{self.ratio:.3g}", interval, *numbers)


@dataclass(frozen=True)
class Report:
    """All measurements of a run; `made_with` has the command, the date and versions."""

    measurements: tuple[Measurement, ...]
    made_with: Mapping[str, str]
    machine: Mapping[str, Any]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    def to_csv(self) -> str:
        """A line for each measurement."""
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(found) for found in self.measurements)
        return file.getvalue()

    def to_markdown(self) -> str:
        """A table for each case, and at the end what was not timed."""
        made = self.made_with
        versions = (f"{name} {made[name]}" for name in made if name not in ("command", "date"))
        lines = [f"    {made['command']}", "", f"{made['date']}, {self._where()}; {', '.join(versions)}"]
        for suite, of_suite in groupby(self.measurements, lambda one: one.suite):
            lines += ["", f"### {TITLES[suite]}"]
            for (dtype, case), of_case in groupby(of_suite, lambda one: (one.dtype, one.case)):
                lines += ["", f"{case} ({dtype}):", ""]
                timed = sorted((one for one in of_case if one.was_timed), key=lambda one: one.ratio or 0)
                lines += markdown_table(HEAD, [one.cells for one in timed])
                notes = [f"- {one.provider}: {one.note}" for one in timed if one.note]
                lines += ["", *notes] if notes else []
        left_out = self._left_out()
        return "\n".join([*lines, *(["", "Not timed:", "", *left_out] if left_out else [])]) + "\n"

    def _where(self) -> str:
        gpu = self.machine["gpu"]
        if gpu is None:
            return f"{processor(self.machine)} of {self.machine['cpu']['cores']} cores"
        clocks = f", {gpu['sm_clock']} of {gpu['max_sm_clock']} MHz" if gpu["sm_clock"] else ""
        return f"{processor(self.machine)} (driver {gpu['driver'] or 'unknown'}{clocks})"

    def _left_out(self) -> list[str]:
        """A line for each provider and reason, with the case where it is one alone."""
        cases: dict[tuple[str, str, str], list[str]] = {}
        for one in self.measurements:
            if not one.was_timed:
                cases.setdefault((one.provider, one.status, one.note), []).append(f"{one.case} ({one.dtype})")
        return [
            f"- {provider}, {status} in {some[0] if len(some) == 1 else counted(len(some), 'case')}: {note}"
            for (provider, status, note), some in cases.items()
        ]
