"""roles.json, roles.csv and figures of `headoff roles`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from headoff.files import write_file
from headoff.importance.roles import HeadRoles
from headoff.report.tables import csv_text

COLUMNS = ("layer", "head", "quantity", "mean", "low", "high")
SCHEMA_VERSION = 1


def write_roles(folder: Path, found: HeadRoles, provenance: Mapping[str, str]) -> None:
    """Write what `head_roles` found into `folder`.

    Raises:
        OutputError: a file cannot be written.
    """
    from headoff.figures.roles import role_figures

    write_file(folder / "roles.csv", csv_text(COLUMNS, found.rows()))
    for name, figure in role_figures(found):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", metadata={"Software": None})
        write_file(folder / f"{name}.png", buffer.getvalue())
    contents = {"version": SCHEMA_VERSION, "provenance": dict(provenance), **found.as_dict()}
    write_file(folder / "roles.json", json.dumps(contents, indent=1) + "\n")
