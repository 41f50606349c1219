"""faithfulness.json, objects.csv, table.md and figures of `headoff faithfulness`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

from headoff.faithfulness import ExplainedImage, Faithfulness
from headoff.files import write_file
from headoff.report.tables import cells, csv_text

COLUMNS = ("image", "object", "query", "class", "score", "truth", "method", "measure", "quantity", "value")
SCHEMA_VERSION = 1
BESIDE = 6
"""Most numbers beside a map."""


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
        for stem, figure in faithfulness_figures(found):
            _write_figure(folder / f"{stem}.png", figure)
        if example is not None:
            record, image = example
            columns = found.columns[:BESIDE]
            sheet = plot_methods(
                image,
                found.methods,
                numbers_of(found, record, columns),
                caption=f"{found.records[record].name}.",
            )
            _write_figure(folder / "maps.png", figure_of(sheet))
    contents = {"version": SCHEMA_VERSION, "provenance": dict(provenance), **found.as_dict()}
    write_file(folder / "faithfulness.json", json.dumps(contents, indent=1, allow_nan=False) + "\n")


def _write_figure(path: Path, figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())
