"""The output folder of one image.

An interruption at any moment leaves whole files only: each is written under another name and then renamed.
The last one is sweep.json, so that where it is, everything is; and it is the first to go when a folder is
written again.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal

from PIL import Image

from headoff.errors import OutputError, SettingError
from headoff.figures import sweep_figures
from headoff.figures.colouring import MapStyle
from headoff.figures.pictures import small_picture
from headoff.figures.relevance_sheets import relevance_figures
from headoff.files import atomic_write
from headoff.images import ImageSource
from headoff.relevance.explanations import Explanation
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

FINISHED = "sweep.json"
PAGE = "index.html"
THUMBNAIL = "thumbnail.webp"
_THUMBNAIL_SIDE = 360


def write_report(
    folder: str | os.PathLike[str],
    image: ImageSource,
    result: SweepResult,
    *,
    provenance: Mapping[str, str],
    figures: bool = True,
    explanation: Explanation | None = None,
    style: MapStyle | None = None,
    maps: Literal["npz", "safetensors"] = "npz",
) -> Path:
    """Write everything about a sweep into `folder`, which is made if need be, and return its index.html.

    Also: detections.csv, objects.csv, figures/*.png (not if `figures` is False), a thumbnail, and
    sweep.json, which comes last. Files of an earlier report in the same folder are replaced or removed, other
    files stay.

    Args:
        provenance: what to say about where the results come from, in order: `image`, `model`, `attention`,
            `device`, `dtype`, `confidence`, `order`, versions, `command`. `image` is used as a title.
        explanation: relevance maps of the same configurations, in the same order: on the page, in relevance.csv,
            in figures and, as numbers with named axes, in maps.npz or maps.safetensors, as `maps` says.
        style: how maps are drawn; by default plain and on one scale.

    Raises OutputError when something cannot be written, SettingError for an explanation of other configurations.
    """
    if explanation is not None and explanation.configurations != result.configurations:
        raise SettingError(
            "the explanation is of other configurations than the sweep: explain(..., result.configurations)"
        )
    folder = Path(folder)
    name = provenance.get("image", "")
    picture = small_picture(image)
    written: list[str] = []

    def write(file: str, contents: bytes | str) -> None:
        write_file(folder / file, contents)
        written.append(file)

    with _one_sentence(folder):
        earlier = _files_of_earlier_report(folder)
        (folder / FINISHED).unlink(missing_ok=True)
        write("detections.csv", csv_text(DETECTION_COLUMNS, detection_rows(result, name)))
        write("objects.csv", csv_text(OBJECT_COLUMNS, object_rows(result, name)))
        if explanation is not None:
            write("relevance.csv", csv_text(RELEVANCE_COLUMNS, relevance_rows(explanation, name)))
            explanation.save(folder / f"maps.{maps}")
            written.append(f"maps.{maps}")
        if figures:
            drawn = sweep_figures(picture, result)
            if explanation is not None:
                drawn = chain(
                    drawn,
                    relevance_figures(
                        picture,
                        explanation,
                        style=style or MapStyle(),
                        baseline=result.baseline,
                        confidence=result.confidence,
                    ),
                )
            for figure in drawn:
                buffer = io.BytesIO()
                # Level 3 takes half the time of the usual 6 and a few per cent more space.
                figure.draw().savefig(
                    buffer, format="png", metadata={"Software": None}, pil_kwargs={"compress_level": 3}
                )
                write(f"figures/{figure.stem}.png", buffer.getvalue())
        write(THUMBNAIL, _thumbnail(picture))
        write(PAGE, render_page(picture, result, provenance, explanation, style))
        for stale in earlier - set(written):
            (folder / stale).unlink(missing_ok=True)
        write(FINISHED, sweep_json(result, provenance, written, explanation))
    return folder / PAGE


def is_finished(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a whole report."""
    return (Path(folder) / FINISHED).is_file()


def write_file(path: Path, contents: bytes | str) -> None:
    """Write a file so that it is never seen half written: it is there as a whole or not at all.

    Raises OutputError, and leaves nothing behind, when it cannot be written.
    """
    data = contents.encode() if isinstance(contents, str) else contents
    with _one_sentence(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)


@contextmanager
def _one_sentence(where: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        culprit = error.filename if isinstance(error.filename, str) else str(where)
        reason = error.strerror or str(error) or type(error).__name__
        if culprit != str(where):
            reason += f": {culprit!r}"
        raise OutputError(
            f"cannot write results to {str(where)!r} ({reason}):"
            " choose another output folder, or free space and permissions there"
        ) from error


def _files_of_earlier_report(folder: Path) -> set[str]:
    """What an earlier sweep.json says that its report consists of; only names that stay within the folder."""
    try:
        files = json.loads((folder / FINISHED).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    if not isinstance(files, list):
        return set()
    plain = (PurePosixPath(file) for file in files if isinstance(file, str))
    return {str(file) for file in plain if not file.is_absolute() and ".." not in file.parts and file.name}


def _thumbnail(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=78)
    return buffer.getvalue()
