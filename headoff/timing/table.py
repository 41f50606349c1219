"""The comparisons of a run as a table of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from headoff.timing.comparisons import format_bytes, format_seconds

HEAD = ("benchmark", "ratio", "interval", "verdict", "patch", "baseline", "memory", "baseline")
"""Times are of one call; memory is the most that one call held at once."""


def table(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines: a head, a rule, and one for each record that a benchmark made (`Comparison.as_dict`, and its name)."""
    rows = [HEAD, *(_row(each) for each in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = ["  ".join(_set(cell, width, column) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
             for row in rows]  # fmt: skip
    return [lines[0].rstrip(), "-" * max(map(len, lines)), *(line.rstrip() for line in lines[1:])]


def _set(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if HEAD[column] in ("benchmark", "verdict") else cell.rjust(width)


def _row(record: Mapping[str, Any]) -> tuple[str, ...]:
    verdict = record["verdict"] if record["outputs"] == "right" else f"{record['verdict']}, and wrong"
    return (
        record["name"],
        f"{record['ratio']:.3f}",
        f"{record['low']:.3f} to {record['high']:.3f}",
        verdict,
        format_seconds(record["patch_seconds"]),
        format_seconds(record["baseline_seconds"]),
        format_bytes(record["patch_memory"]),
        format_bytes(record["baseline_memory"]),
    )
