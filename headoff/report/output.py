"""The output folder of one image.

A report is built in a temporary folder inside the output folder, and moved when it is complete: an error or an
interruption leaves the earlier report as it was. Files of two reports never mix: those of the earlier one are removed
before the first new one is moved. sweep.json (or heads.json) goes first and comes last, so that where it is, everything
is.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from headoff.choices import FigureFormat, Figures
from headoff.errors import SettingError
from headoff.figures import sweep_figures
from headoff.figures.canvas import DPI
from headoff.figures.colouring import MapStyle
from headoff.figures.pictures import small_picture
from headoff.figures.relevance_sheets import relevance_figures
from headoff.figures.removal_curves import curves_figure
from headoff.figures.sheets import SweepFigure
from headoff.files import lock, output_errors, write_file
from headoff.images import ImageSource
from headoff.importance.curves import RemovalCurves
from headoff.relevance.explanations import Explanation
from headoff.report.drawing import Drawing
from headoff.report.page import render_page
from headoff.report.tables import (
    DETECTION_COLUMNS,
    OBJECT_COLUMNS,
    RELEVANCE_COLUMNS,
    csv_text,
    detection_rows,
    object_rows,
    relevance_rows,
    sweep_json,
)
from headoff.sweeps import SweepResult
from headoff.versions import versions

FINISHED = "sweep.json"
"""The last file of the report on a sweep."""
HEADS_FINISHED = "heads.json"
"""The last file of the report on what heads contribute."""
PAGE = "index.html"
THUMBNAIL = "thumbnail.webp"
INDEX = "headoff-index.json"
"""In a folder with the index of several reports."""
SUMMARY = "summary.json"
"""The last file of the summary of a data set."""
COMPARISON = "comparison.json"
"""The last file of the comparison of two data sets' results."""
_LAST = (FINISHED, HEADS_FINISHED, INDEX, SUMMARY, COMPARISON)
"""Where one of these is, its report is complete; it lists the report's files."""
_UNFINISHED = ".unfinished.json"
"""The files of both reports while one replaces the other, for the next run if this one is killed meanwhile."""

_THUMBNAIL_SIDE = 360


def write_report(
    folder: str | os.PathLike[str],
    image: ImageSource,
    result: SweepResult,
    *,
    provenance: Mapping[str, str] | None = None,
    figures: Figures = "page",
    format: FigureFormat = "png",
    dpi: int = DPI,
    explanation: Explanation | None = None,
    style: MapStyle | None = None,
    maps: Literal["npz", "safetensors"] = "npz",
    curves: RemovalCurves | None = None,
    others: Sequence[Explanation] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Path:
    """Write the report on a sweep into `folder`, and return the path of its page (without one, of sweep.json).

    The report has index.html, a thumbnail, detections.csv, objects.csv, and sweep.json, which is written last.
    Files of an earlier report in the same folder are replaced or removed; other files are not touched.

    Args:
        folder: is created if it does not exist.
        image: the image of the sweep.
        result: the sweep.
        provenance: the origin of the results, shown in this order: `image`, `model`, `attention`, `device`, `dtype`,
            `confidence`, `order`, versions, `command`. `image` is also the page's title. By default, the image's name
            and versions.
        figures: `page` writes the page, which draws everything from data; `all` also every figure as a file in
            figures/, for papers; `none` writes numbers only.
        format, dpi: of the files of figures: `png`, `svg` or `pdf`, and pixels an inch.
        explanation: relevance maps of the same configurations, in the same order. They are shown on the page and in
            figures, and written to relevance.csv and, as arrays with named axes, to maps.npz or maps.safetensors.
        style: how maps are drawn; by default on the image, with one scale for each object.
        maps: the format of the arrays.
        others: maps of the same configurations, objects and layers by other methods. They can be chosen on the page,
            are in relevance.csv, and have a file of arrays each.
        curves: how the order of a cumulative sweep compares with others, see `HeadImportance.curves`.
        progress: called with (number of drawn figures, number of figures); the page counts as one.

    Raises:
        OutputError: a file cannot be written.
        SettingError: the explanation is of other configurations than the sweep, or an argument is none of its choices.
    """
    drawing = Drawing(figures, format, dpi)
    if explanation is not None and explanation.configurations != result.configurations:
        raise SettingError(
            "the explanation is of other configurations than the sweep: explain(..., result.configurations)"
        )
    if any(one.axes != explanation.axes for one in others if explanation is not None):
        raise SettingError(
            "the explanations by other methods are of other configurations, objects or layers: make all of the same"
        )
    folder = Path(folder)
    if provenance is None:
        named = {"image": Path(image).name} if isinstance(image, str | os.PathLike) else {}
        provenance = {**named, **versions()}
    name = provenance.get("image", "")
    picture = small_picture(image)
    with new_report(folder) as write:
        write("detections.csv", csv_text(DETECTION_COLUMNS, detection_rows(result, name)))
        write("objects.csv", csv_text(OBJECT_COLUMNS, object_rows(result, name)))
        if explanation is not None:
            rows = chain.from_iterable(relevance_rows(one, name) for one in (explanation, *others))
            write("relevance.csv", csv_text(RELEVANCE_COLUMNS, rows))
            explanation.save(write.path(f"maps.{maps}"))
            for one in others:
                one.save(write.path(f"maps-{one.method}.{maps}"))
        drawn = [*sweep_figures(picture, result, dpi=dpi)] if figures == "all" else []
        if figures == "all" and curves is not None:
            drawn.append(curves_figure(curves))
        if figures == "all" and explanation is not None:
            drawn += relevance_figures(
                picture,
                explanation,
                style=style or MapStyle(),
                baseline=result.baseline,
                confidence=result.confidence,
            )
        total = len(drawn) + (figures != "none")
        write.figures(drawn, drawing, lambda done, _: progress(done, total))
        if figures != "none":
            progress(len(drawn), total)
            write(THUMBNAIL, thumbnail(picture))
            write(PAGE, render_page(picture, result, provenance, explanation, style, curves, others))
        progress(total, total)
        write(FINISHED, sweep_json(result, provenance, write.files, explanation))
    return folder / (FINISHED if figures == "none" else PAGE)


class ReportFiles:
    """The files of a new report: call it with a name and contents.

    Attributes:
        files: the names of the files so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: list[str] = []

    def __call__(self, name: str, contents: bytes | str) -> None:
        self.path(name).write_bytes(contents.encode() if isinstance(contents, str) else contents)

    def path(self, name: str) -> Path:
        """Where to write a file, whose folder is made."""
        path = self._folder / name
        path.parent.mkdir(exist_ok=True)
        self.files.append(name)
        return path

    def figures(
        self,
        drawn: Sequence[SweepFigure],
        drawing: Drawing,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Draw figures and write them to figures/; `progress` is called with (finished, number of figures)."""
        for done, figure in enumerate(drawn):
            progress(done, len(drawn))
            buffer = io.BytesIO()
            drawing.save(figure.draw(), buffer)
            self(f"figures/{figure.stem}.{drawing.format}", buffer.getvalue())


@contextmanager
def new_report(folder: Path) -> Iterator[ReportFiles]:
    """A report that replaces the one in `folder` when the block ends without an error; its last file must be a JSON
    that lists the others. Raises OutputError.
    """
    with output_errors(folder), lock(folder), replacing(folder) as new:
        yield ReportFiles(new)


def is_finished(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` has a complete report."""
    return finished_file(Path(folder)) is not None


def finished_file(folder: Path) -> Path | None:
    """The JSON file of the complete report in `folder`, on a sweep or on heads; None if there is none."""
    return next((folder / name for name in (FINISHED, HEADS_FINISHED) if (folder / name).is_file()), None)


def has_results(folder: Path) -> bool:
    """Whether headoff has written `folder`: a report, or the index of several."""
    return is_finished(folder) or (folder / INDEX).is_file()


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder, whose files replace the report or index in `folder` when the block ends without an error."""
    folder.mkdir(parents=True, exist_ok=True)
    for left_by_a_killed_process in folder.glob(".new-*"):
        shutil.rmtree(left_by_a_killed_process, ignore_errors=True)
    new = Path(tempfile.mkdtemp(prefix=".new-", dir=folder))
    try:
        yield new
        files = [str(path.relative_to(new).as_posix()) for path in new.rglob("*") if path.is_file()]
        earlier = _files_of_report(folder)
        if earlier:
            write_file(folder / _UNFINISHED, json.dumps({"files": sorted(earlier.union(files))}))
        remove_report(folder)
        for file in sorted(files, key=_LAST.__contains__):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (new / file).replace(folder / file)
        (folder / _UNFINISHED).unlink(missing_ok=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def remove_report(folder: Path) -> None:
    """Remove the files of the report or index in `folder`; others stay."""
    files = _files_of_report(folder)
    for name in _LAST:
        (folder / name).unlink(missing_ok=True)
    for file in sorted(files - {_UNFINISHED}):
        (folder / file).unlink(missing_ok=True)


def _files_of_report(folder: Path) -> set[str]:
    """What the report or index in `folder` consists of, as its JSON says; only names that stay within the folder."""
    files: list[object] = []
    for name in (*_LAST, _UNFINISHED):
        try:
            listed = json.loads((folder / name).read_text())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        files += [name, *listed] if isinstance(listed, list) else []
    plain = (PurePosixPath(file) for file in files if isinstance(file, str))
    return {str(file) for file in plain if not file.is_absolute() and ".." not in file.parts and file.name}


def thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=78)
    return buffer.getvalue()
