"""faithfulness.json, objects.csv, table.md, figures and the page of `headoff faithfulness`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from headoff.faithfulness import CONTROLS, ExplainedImage, Faithfulness
from headoff.figures.captions import listed
from headoff.files import write_file
from headoff.report.charts import Chart, Table, charts_page, write_charts
from headoff.report.output import PAGE
from headoff.report.tables import cells, csv_text

COLUMNS = ("image", "object", "query", "class", "score", "truth", "method", "measure", "quantity", "value")
SCHEMA_VERSION = 1
BESIDE = 6
"""Most numbers beside a map."""
MOST_NAMED = 3
"""Most methods that a sentence names."""
_KINDS = {"curves": "Curves", "methods": "Methods compared"}
"""Captions of figures, by the first word of their names."""


def write_faithfulness(
    folder: Path,
    found: Faithfulness,
    provenance: Mapping[str, str],
    example: tuple[int, ExplainedImage] | None = None,
    *,
    figures: bool = True,
) -> None:
    """Write what `headoff.faithfulness` found into `folder`, the JSON last.

    Args:
        folder: where to.
        found: the numbers.
        provenance: how they were made.
        example: the number of a record and its image, for the sheet of maps.
        figures: whether to draw anything.

    Raises:
        OutputError: a file cannot be written.
    """
    from headoff.figures.canvas import figure_of
    from headoff.figures.faithfulness import faithfulness_figures, numbers_of, plot_methods

    write_file(folder / "objects.csv", csv_text(COLUMNS, map(cells, found.rows())))
    write_file(folder / "table.md", found.table() + "\n")
    if figures:
        charts = []
        if example is not None:
            record, image = example
            columns = found.columns[:BESIDE]
            sheet = plot_methods(
                image,
                found.methods,
                numbers_of(found, record, columns),
                caption=f"{found.records[record].name}.",
            )
            charts.append(
                Chart("maps", "Maps of one image by all methods", figure_of(sheet), is_picture=True)
            )
        for stem, figure in faithfulness_figures(found):
            kind, _, measure = stem.partition("-")
            charts.append(Chart(stem, f"{_KINDS[kind]}: {measure.replace('-', ' ')}", figure))
        files = ["faithfulness.json", "objects.csv", "table.md", *write_charts(folder, charts)]
        write_file(folder / PAGE, _page(found, charts, provenance, files))
    else:
        (folder / PAGE).unlink(missing_ok=True)  # of an earlier run, whose numbers it has
    contents = {"version": SCHEMA_VERSION, "provenance": dict(provenance), **found.as_dict()}
    write_file(folder / "faithfulness.json", json.dumps(contents, indent=1, allow_nan=False) + "\n")


def headline(found: Faithfulness) -> str:
    """The best method by each measure's first quantity that ranks, or the best ones that do not differ."""
    best: dict[str, list[str]] = {}
    for measure in found.measures:
        ranking = [quantity.name for quantity in measure.quantities if quantity.direction != "neither"]
        methods = found.best(measure.name, ranking[0]) if ranking else ()
        methods = tuple(method for method in methods if method not in CONTROLS)
        if methods:
            words = (
                listed(methods)
                if len(methods) <= MOST_NAMED
                else f"{methods[0]} and {len(methods) - 1} others"
            )
            best.setdefault(words, []).append(f"{measure.name} ({ranking[0].replace('_', ' ')})")
    if not best:
        return "No measure ranks methods."
    return " ".join(f"Best by {listed(measures)}: {methods}." for methods, measures in best.items())


def _page(
    found: Faithfulness, charts: Sequence[Chart], provenance: Mapping[str, str], files: Sequence[str]
) -> str:
    tables = [
        Table(f"{measure.name}: {measure.summary}", head, rows) for measure, head, rows in found.tables()
    ]
    return charts_page(
        "Which relevance maps to believe",
        headline(found),
        tables,
        charts,
        provenance=provenance,
        files=files,
        notes=[
            "Numbers are means over images of means over their objects, with 95% intervals of a bootstrap over images. "
            "Bold: the best, and those that do not differ from it significantly (p < 0.05, corrected for all pairs). "
            f"{listed(CONTROLS)} are controls, which a method has to beat."
        ],
    )
