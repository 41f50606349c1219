"""A verification in the lines below the headline that a terminal shows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

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
