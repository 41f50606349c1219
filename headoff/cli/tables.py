"""Tables of text for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MAX_ROWS = 60
SHORTENED_ROWS = 10


WIDTH = 80
"""Characters of a line. The first column gives way: names of configurations, such as off matrices, are long."""

LEAST = 12
"""Characters of the first column that are always shown."""


def columns(rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells, aligned in columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))] if cells else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A header and rows in columns of `WIDTH` characters; of more than `MAX_ROWS` rows, the first ones only."""
    from headoff.figures.captions import shorten

    shown = rows if len(rows) <= MAX_ROWS else rows[:SHORTENED_ROWS]
    excess = max(map(len, columns([header, *shown]).splitlines())) - WIDTH
    longest = max(len(str(row[0])) for row in (header, *shown))
    room = max(LEAST, longest - max(0, excess))
    text = columns([header, *((shorten(str(row[0]), room), *row[1:]) for row in shown)])
    return text if shown is rows else f"{text}\n... and {len(rows) - len(shown)} more in the report"
