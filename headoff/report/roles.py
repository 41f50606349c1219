"""roles.json, roles.csv, figures and the page of `headoff roles`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from headoff.figures.captions import listed
from headoff.files import write_file
from headoff.importance.roles import CLASS_IMAGES, ROLES, HeadRoles, Role
from headoff.report.charts import Chart, Table, charts_page, write_charts
from headoff.report.output import PAGE
from headoff.report.tables import csv_text
from headoff.wording import counted

COLUMNS = ("class", "layer", "head", "quantity", "mean", "low", "high")
SCHEMA_VERSION = 1

_DOES = {
    "class evidence": ("gives class evidence", "give class evidence"),
    "box precision": ("places boxes", "place boxes"),
    "suppresses duplicates": ("suppresses duplicates", "suppress duplicates"),
}
"""What one head, or several, of a role do."""
_CAPTIONS = {
    "effects": "What the removal of a head costs",
    "attention": "Where heads look",
    "agreement": "Which heads look alike",
}


def write_roles(folder: Path, found: HeadRoles, provenance: Mapping[str, str]) -> None:
    """Write what `head_roles` found into `folder`, the JSON last.

    Raises:
        OutputError: a file cannot be written.
    """
    from headoff.figures.roles import role_figures

    charts = [Chart(name, _CAPTIONS[name], figure) for name, figure in role_figures(found)]
    write_file(folder / "roles.csv", csv_text(COLUMNS, found.rows()))
    files = ["roles.json", "roles.csv", *write_charts(folder, charts)]
    page = charts_page(
        f"What heads of {found.site} are for",
        headline(found),
        [_table(found), *_class_tables(found)],
        charts,
        provenance=provenance,
        files=files,
        notes=[
            f"{counted(found.objects, 'object')} in {counted(found.images, 'image')}. A role is stated where the "
            "interval of the mean, for all heads and roles together (95%), lies beyond the smallest effect that counts."
        ],
    )
    write_file(folder / PAGE, page)
    contents = {"version": SCHEMA_VERSION, "provenance": dict(provenance), **found.as_dict()}
    write_file(folder / "roles.json", json.dumps(contents, indent=1) + "\n")


def headline(found: HeadRoles) -> str:
    """Which heads, in all layers together, have which role, in a sentence for each role."""
    sentences = []
    for role in ROLES:
        heads = [str(head) for head in range(found.shape[1]) if role in found.roles(head)]
        if heads:
            subject, does = ("Head", 0) if len(heads) == 1 else ("Heads", 1)
            sentences.append(f"{subject} {listed(heads)} {_DOES[role.name][does]}.")
    return " ".join(sentences) or "No role is supported for a head in all layers together."


def _table(found: HeadRoles) -> Table:
    layers, heads = found.shape

    def singles(role: Role, head: int) -> list[str]:
        return [f"L{layer}H{head}" for layer in range(layers) if role in found.roles(head, layer)]

    rows = []
    for head in range(heads):
        cells = [f"head {head}"]
        for role in ROLES:
            of = found.column_effects[role.value]
            text = f"{of.mean[head]:+.2f} ({of.low[head]:+.2f} to {of.high[head]:+.2f})".replace("-", "−")
            cells.append(f"**{text}**" if role in found.roles(head) else text)
        cells.append(", ".join(name for role in ROLES for name in singles(role, head)) or "none")
        rows.append(cells)
    return Table(
        "A head removed from all layers",
        ("", *(role.name for role in ROLES), "single heads with a role"),
        rows,
        "What the removal takes from an object: class logit, IoU of its box, duplicates (negative: it has more of "
        "them). Mean over images of the mean over objects, with 95% intervals; bold where the role is supported.",
    )


def _class_tables(found: HeadRoles) -> list[Table]:
    """The effects on objects of each class, a table for each role; none where there is one class alone."""
    if len(found.classes) < 2:
        return []
    tables = []
    for role in ROLES:
        rows = []
        for name, of in found.classes.items():
            cells = [f"{name} ({of.objects} in {of.images})"]
            for head in range(found.shape[1]):
                text = f"{of.effects[role.value].mean[head]:+.2f}".replace("-", "−")
                cells.append(f"**{text}**" if role in found.roles_for(name, head) else text)
            rows.append(cells)
        tables.append(
            Table(
                f"A head removed from all layers, by class: {role.name} ({role.value})",
                ("class (objects in images)", *(f"head {head}" for head in range(found.shape[1]))),
                rows,
                f"Bold where the role is supported with all heads, roles and classes together, and the class is in at "
                f"least {CLASS_IMAGES} images. roles.csv has the intervals.",
            )
        )
    return tables
