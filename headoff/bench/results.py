"""What `headoff bench` found, as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from headoff.bench.roofline import Peaks, RooflinePoint

Status = Literal["timed", "reference", "wrong", "unsupported"]

FORMAT = "headoff bench 2"


@dataclass(frozen=True)
class Measurement:
    """One provider in one case.

    Attributes:
        status: `reference` is what the ratios of the others refer to; `wrong` and `unsupported` were not timed.
        reference: name of the reference.
        note: why it was not timed, or a remark on its time or memory.
        ratio, low, high: time relative to the reference, and its interval.
        seconds: median time of a call.
        memory: peak bytes that a call allocates; None where that was not measured.
        roofline: of attention calls.
    """

    suite: str
    case: str
    dtype: str
    provider: str
    status: Status
    reference: str = ""
    note: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    memory: int | None = None
    roofline: RooflinePoint | None = None

    @property
    def was_timed(self) -> bool:
        return self.status in ("timed", "reference")


@dataclass(frozen=True)
class Report:
    """All measurements of a run, the command, date and versions, the machine, and the peaks by dtype."""

    measurements: tuple[Measurement, ...]
    made_with: Mapping[str, str]
    machine: Mapping[str, Any]
    peaks: Mapping[str, Peaks]

    def of_suite(self, suite: str) -> list[Measurement]:
        return [found for found in self.measurements if found.suite == suite]

    @property
    def suites(self) -> list[str]:
        return list(dict.fromkeys(found.suite for found in self.measurements))

    def to_json(self) -> str:
        document = {
            "format": FORMAT,
            "made_with": dict(self.made_with),
            "machine": dict(self.machine),
            "peaks": {dtype: asdict(peaks) for dtype, peaks in self.peaks.items()},
            "measurements": [asdict(found) for found in self.measurements],
        }
        return json.dumps(document, indent=1)

    def to_csv(self) -> str:
        """A line for each measurement, with the roofline's numbers in columns of their own."""
        plain = [field.name for field in fields(Measurement) if field.name != "roofline"]
        of_roofline = [field.name for field in fields(RooflinePoint)]
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*plain, "flops_per_second", "bytes_per_second", *of_roofline[2:]])
        for found in self.measurements:
            point = [getattr(found.roofline, name, None) for name in of_roofline]
            writer.writerow([*(getattr(found, name) for name in plain), *point])
        return file.getvalue()


def by_case(measurements: Sequence[Measurement]) -> dict[tuple[str, str], list[Measurement]]:
    """Measurements by (dtype, case), in order."""
    found: dict[tuple[str, str], list[Measurement]] = {}
    for one in measurements:
        found.setdefault((one.dtype, one.case), []).append(one)
    return found
