"""What `headoff bench` found: rows of one table, and all that they depend on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from headoff.bench.roofline import Ceilings, Position

Level = Literal["attention", "decoder", "sweep", "relevance", "blocked"]
Status = Literal["timed", "reference", "wrong", "unsupported"]

FORMAT = "headoff bench 1"


@dataclass(frozen=True)
class Row:
    """One contestant in one case.

    - `status`: `reference` is what the others' ratios are to; `wrong` and `unsupported` were not timed
    - `note`: why it was not timed; else what is to be known of its time or memory
    - `ratio`, `low`, `high`: time by that of the `reference`, and its interval
    - `seconds` of a call (median); `memory`: most bytes that a call held, None where that was not measured
    - `position`: under the roofline, of attention calls
    """

    level: Level
    case: str
    dtype: str
    contestant: str
    status: Status
    reference: str = ""
    note: str = ""
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float | None = None
    memory: int | None = None
    position: Position | None = None

    @property
    def was_timed(self) -> bool:
        return self.status in ("timed", "reference")


@dataclass(frozen=True)
class Report:
    """All rows of a run.

    - `made_with`: command, date, versions
    - `machine`: as `headoff.timing.machine` describes it
    - `ceilings`: per dtype
    """

    rows: tuple[Row, ...]
    made_with: Mapping[str, str]
    machine: Mapping[str, Any]
    ceilings: Mapping[str, Ceilings]

    def level(self, level: Level) -> list[Row]:
        return [row for row in self.rows if row.level == level]

    @property
    def levels(self) -> list[Level]:
        return list(dict.fromkeys(row.level for row in self.rows))

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT,
                "made_with": dict(self.made_with),
                "machine": dict(self.machine),
                "ceilings": {dtype: each.as_dict() for dtype, each in self.ceilings.items()},
                "rows": [asdict(row) for row in self.rows],
            },
            indent=1,
        )

    def to_csv(self) -> str:
        """A line for each row; what lies in `position` in columns of its own."""
        plain = [field.name for field in fields(Row) if field.name != "position"]
        of_position = [field.name for field in fields(Position)]
        file = io.StringIO(newline="")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            [*plain, *(f"{name}_per_second" if name in ("flops", "bytes") else name for name in of_position)]
        )
        for row in self.rows:
            place = [getattr(row.position, name) if row.position else None for name in of_position]
            writer.writerow([*(getattr(row, name) for name in plain), *place])
        return file.getvalue()


def cases_of(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by (dtype, case), in the order in which they were made."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.dtype, row.case), []).append(row)
    return found
