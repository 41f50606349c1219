"""A page of tables and figures in one file, for results over many images."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from headoff.files import write_file
from headoff.report.page import data_uri, inline_svg, png_of, template

PIXELS = 110
"""Of an inch of a chart, where the page has room."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: above it.
        head: names of the columns, the first for the row's name.
        rows: text; between two asterisks on either side it is bold, as in Markdown.
        note: below it.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure.

    Attributes:
        stem: of the figure's name.
        caption: above it.
        figure: drawn as SVG on the page.
        is_picture: whether it shows images, and is drawn as PNG instead.
    """

    stem: str
    caption: str
    figure: Figure
    is_picture: bool = False

    @property
    def element(self) -> str:
        """HTML."""
        if not self.is_picture:
            # Its text is readable at this width, and all charts of a page have text of one size.
            width = self.figure.get_figwidth() * PIXELS
            return f'<div style="max-width: {width:.0f}px">{inline_svg(self.figure.axes[0], self.stem)}</div>'
        return f'<img src="{data_uri("png", png_of(self.figure))}" alt="{html.escape(self.caption)}">'


def charts_page(
    title: str,
    verdict: str,
    tables: Sequence[Table],
    charts: Sequence[Chart],
    *,
    provenance: Mapping[str, str],
    files: Sequence[str],
    notes: Sequence[str] = (),
) -> str:
    """The HTML of a page, with everything in it; `files` are links to what is next to it."""
    return template("charts.html").render(
        title=title,
        verdict=verdict,
        notes=notes,
        tables=tables,
        charts=[{"caption": chart.caption, "picture": chart.element} for chart in charts],
        provenance=provenance,
        files=files,
    )


def write_charts(folder: Path, charts: Sequence[Chart]) -> list[str]:
    """Write figures as PNG into `folder`, and return their names. Raises OutputError."""
    for chart in charts:
        write_file(folder / f"{chart.stem}.png", png_of(chart.figure))
    return [f"{chart.stem}.png" for chart in charts]
