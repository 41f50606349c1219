"""The reports on what heads contribute: of an image, and of a folder of images."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from headoff.choices import FigureFormat, Figures
from headoff.figures.canvas import DPI
from headoff.figures.importance_sheets import importance_figures
from headoff.figures.pictures import small_picture
from headoff.images import ImageSource
from headoff.importance.aggregate import ImageMeans, add_up_means
from headoff.importance.cards import HeadCards
from headoff.importance.result import HeadImportance
from headoff.report.drawing import Drawing
from headoff.report.folder import read_reports
from headoff.report.heads_data import heads_data, totals_data
from headoff.report.heads_story import heads_headline, totals_headline
from headoff.report.links import link_pages
from headoff.report.maps import as_script
from headoff.report.output import HEADS_FINISHED, INDEX, PAGE, THUMBNAIL, new_report, thumbnail
from headoff.report.page import background_uri, template
from headoff.report.tables import HEAD_COLUMNS, HEAD_TOTAL_COLUMNS, cells, csv_text

HEADS_SCHEMA_VERSION = 1
"""Version of heads.json. It changes when a key is renamed or removed or gets another meaning, not when one is added."""
TABLE = "heads.csv"


def write_heads_report(
    folder: str | os.PathLike[str],
    image: ImageSource,
    importance: HeadImportance,
    *,
    provenance: Mapping[str, str],
    cards: HeadCards | None = None,
    figures: Figures = "page",
    format: FigureFormat = "png",
    dpi: int = DPI,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write the report on what heads contribute to the objects of an image, and return the path of its page (without
    one, of heads.json).

    The report has index.html, a thumbnail, heads.csv, heads.safetensors, and heads.json, which is written last.
    Files of an earlier report in the same folder are replaced or removed; other files are not touched.

    Args:
        folder: is created if it does not exist.
        image: the image.
        importance: of `headoff.heads`.
        provenance: see `headoff.report.write_report`.
        cards: what single heads do, for the page and for figures.
        figures, format, dpi: see `headoff.report.write_report`.
        progress: called with (number of drawn figures, number of figures); the page counts as one.

    Raises:
        OutputError: a file cannot be written.
    """
    drawing = Drawing(figures, format, dpi)
    folder = Path(folder)
    picture = small_picture(image)
    name = provenance.get("image", "")
    headline = heads_headline(importance)
    with new_report(folder) as write:
        write(TABLE, csv_text(HEAD_COLUMNS, map(cells, importance.rows(name))))
        importance.save(write.path("heads.safetensors"))
        drawn = [*importance_figures(picture, importance, cards)] if figures == "all" else []
        total = len(drawn) + (figures != "none")
        write.figures(drawn, drawing, lambda done, _: progress(done, total))
        if figures != "none":
            progress(len(drawn), total)
            page = render_heads_page(
                heads_data(importance, cards),
                title=PurePath(name).name or "Heads",
                verdict=headline,
                provenance=provenance,
                background=background_uri(picture),
                size=importance.objects.image_size[::-1],
                pixelated=max(picture.size) < 400,
                files=(TABLE, "heads.safetensors", HEADS_FINISHED),
            )
            write(THUMBNAIL, thumbnail(picture))
            write(PAGE, page)
        progress(total, total)
        contents = {
            "schema": "headoff.heads",
            "schema_version": HEADS_SCHEMA_VERSION,
            "verdict": headline,
            "provenance": dict(provenance),
            "files": list(write.files),
            **importance.as_dict(),
        }
        write(HEADS_FINISHED, json.dumps(contents, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / (HEADS_FINISHED if figures == "none" else PAGE)


def heads_index(
    folder: str | os.PathLike[str],
    entries: Iterable[str | os.PathLike[str]],
    *,
    failures: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder`/index.html: what heads contribute over all images, and links to the pages of `entries`.

    The folder also has heads.csv, the means over images with their intervals.

    Args:
        folder: where the page is written.
        entries: folders with finished reports of `write_heads_report`, in order. Only means are kept of each.
        failures: why an image has no report, by the image's name.

    Raises:
        OutputError: an entry has no finished report, or a file cannot be written.
        SettingError: the entries were not scored alike.
    """
    folder, reports = Path(folder), [Path(entry) for entry in entries]
    links, found = read_reports(
        folder,
        reports,
        HEADS_FINISHED,
        lambda contents: (ImageMeans.of(contents), dict(contents["provenance"])),
        "score the heads on that image again",
    )
    totals, provenance = add_up_means([means for means, _ in found]), found[0][1]
    with new_report(folder) as write:
        write(TABLE, csv_text(HEAD_TOTAL_COLUMNS, map(cells, totals.rows())))
        page = render_heads_page(
            totals_data(totals),
            title=folder.resolve().name or "Heads",
            verdict=totals_headline(totals),
            provenance={name: value for name, value in provenance.items() if name != "image"},
            links=links,
            failures=dict(failures or {}),
            images=totals.images,
            objects=totals.objects,
            files=(TABLE,),
        )
        write(PAGE, page)
        index = {"schema": "headoff.heads.index", "files": list(write.files), "images": len(links)}
        write(INDEX, json.dumps(index, indent=1) + "\n")
        link_pages(folder, reports, [link["name"] for link in links])
    return folder / PAGE


def render_heads_page(data: Mapping[str, Any], **context: Any) -> str:
    """The HTML of the page of an image or of many, from templates/heads.html."""
    width, height = context.get("size", (1, 1))
    defaults: dict[str, Any] = {
        "links": [],
        "failures": {},
        "background": None,
        "pixelated": False,
        "images": 0,
        "objects": len(data["objects"]),
    }
    return template("heads.html").render(
        data=data,
        json=as_script(dict(data)),
        aspect=f"{width} / {height}",
        flat=width > 2.2 * height,
        **{**defaults, **context},
    )
