"""A verification in the lines below the headline that a terminal shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from headoff.wording import format_bytes, format_seconds, markdown_table

SHOWN = 5
"""Causes that are shown; the report has all of them."""


def summary_lines(document: Mapping[str, Any], failures: str | os.PathLike[str]) -> list[str]:
    """What stands below the headline.

    Args:
        document: of the run.
        failures: the folder of its pictures.
    """
    causes = document["diagnosis"]
    lines = [f"  accepted although wrong: {answer}" for answer in document["cannot_tell"][:SHOWN]]
    lines += [f"  {cause['property']}: {cause['message']}" for cause in causes[:SHOWN]]
    if len(causes) > SHOWN:
        lines.append(f"  and {len(causes) - SHOWN} more causes")
    for suite in document["suites"]:
        if failed := suite["failed"] + suite["errors"]:
            lines.append(f"  {suite['name']}: {failed} of {suite['passed'] + failed} checks failed")
    lines += [f"  {note}" for note in document["notes"]]
    if calls := document["calls"]:
        lines.append(
            "  called in the model: " + ", ".join(f"{site} {count}" for site, count in calls.items())
        )
    if document["pictures"]:
        lines.append(f"  pictures of failures are in {failures}")
    return lines


_HEAD = ("benchmark", "ratio", "interval", "verdict", "patch", "baseline", "memory", "baseline")


def benchmark_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Patch and baseline in a table with a line for each record of a benchmark."""
    if not records:
        return []
    title = f" {records[0]['patch']} against {records[0]['baseline']} "
    return [title.center(80, "="), *markdown_table(_HEAD, [_cells(record) for record in records])]


def _cells(record: Mapping[str, Any]) -> tuple[str, ...]:
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
