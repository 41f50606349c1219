"""The index of a folder of reports: a sentence on every image, the link to its page, and totals."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar
from urllib.parse import quote

from headoff.errors import OutputError
from headoff.figures.canvas import figure_of
from headoff.figures.totals import plot_totals
from headoff.files import output_errors
from headoff.report.links import link_pages
from headoff.report.output import FINISHED, INDEX, PAGE, THUMBNAIL, replacing
from headoff.report.page import png_of, template
from headoff.report.tables import TOTAL_COLUMNS, csv_text, total_rows
from headoff.totals import ImageSums, add_up

T = TypeVar("T")

TOTALS_TABLE = "totals.csv"
TOTALS_CHART = "totals.png"
MOST_ROWS = 60
"""Most configurations in the table of the page."""


def folder_index(
    folder: str | os.PathLike[str],
    entries: Iterable[str | os.PathLike[str]],
    *,
    failures: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder`/index.html, which links the pages of `entries`, and return its path.

    Where all entries have the same configurations, totals.csv and the chart totals.png say what became of all objects
    together (`headoff.total`).

    Args:
        folder: where the page is written.
        entries: folders with a finished report, in `folder` or elsewhere, in order. Their sentences are read from
            their sweep.json, so that reports of earlier runs can be included.
        failures: why an image has no report, by the image's name.

    Raises:
        OutputError: an entry has no finished report, or the page cannot be written.
    """
    folder, reports = Path(folder), [Path(entry) for entry in entries]
    cards, sums = read_reports(folder, reports, FINISHED, ImageSums.of, "run the sweep of that image again")
    same = len({tuple(image.names) for image in sums}) == 1
    total = add_up(sums) if same else None
    with output_errors(folder), replacing(folder) as new:
        files = {
            PAGE: template("folder.html")
            .render(
                title=folder.resolve().name or "Results",
                cards=cards,
                failures=dict(failures or {}),
                totals=total,
                chart=TOTALS_CHART,
                table=TOTALS_TABLE,
                most_rows=MOST_ROWS,
            )
            .encode()
        }
        if total is not None:
            files[TOTALS_TABLE] = csv_text(TOTAL_COLUMNS, total_rows(total)).encode()
            files[TOTALS_CHART] = png_of(figure_of(plot_totals(total)))
        for name, content in files.items():
            (new / name).write_bytes(content)
        index = {"schema": "headoff.index", "files": list(files), "images": len(cards)}
        (new / INDEX).write_text(json.dumps(index, indent=1) + "\n")
        link_pages(folder, reports, [card["name"] for card in cards])
    return folder / PAGE


def read_reports(
    folder: Path,
    reports: Sequence[Path],
    finished: str,
    read: Callable[[Mapping[str, Any]], T],
    remedy: str,
) -> tuple[list[dict[str, Any]], list[T]]:
    """For each report what the index in `folder` shows of it, and what `read` makes of its JSON, named `finished`.

    Raises:
        OutputError: a report has none, or a damaged one; its remedy is `remedy`.
    """
    cards, found = [], []
    for entry in reports:
        try:
            contents = json.loads((entry / finished).read_text(encoding="utf-8"))
            cards.append(_card_of(folder, entry, contents))
            found.append(read(contents))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{str(entry)!r} holds no finished results (its {finished} is missing or damaged): {remedy}"
            ) from error
    return cards, found


def _card_of(folder: Path, entry: Path, contents: Mapping[str, Any]) -> dict[str, Any]:
    """What an index shows of the report in `entry`, whose JSON has `contents`."""
    name = PurePath(contents["provenance"].get("image", "")).name or entry.name
    if entry.is_relative_to(folder):
        name = (entry.relative_to(folder).parent / name).as_posix()
    place = quote(os.path.relpath(entry, folder).replace(os.sep, "/"))
    return {
        "name": name,
        "verdict": contents["verdict"],
        "page": f"{place}/{PAGE if (entry / PAGE).is_file() else FINISHED}",
        "thumbnail": f"{place}/{THUMBNAIL}" if (entry / THUMBNAIL).is_file() else "",
    }
