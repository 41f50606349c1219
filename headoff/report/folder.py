"""The index page of a folder of images: a sentence on every image, and the link to its page."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from headoff.errors import OutputError
from headoff.report.output import FINISHED, PAGE, THUMBNAIL, write_file
from headoff.report.page import template


def folder_index(
    folder: str | os.PathLike[str],
    entries: Iterable[str | os.PathLike[str]],
    *,
    failures: Mapping[str, str] | None = None,
) -> Path:
    """Write `folder`/index.html, which links the pages of `entries`, and return its path.

    Args:
        folder: where the page is written.
        entries: folders with a finished report, in `folder` or elsewhere, in order. Their sentences are read from
            their sweep.json, so that reports of earlier runs can be included.
        failures: why an image has no report, by the image's name.

    Raises:
        OutputError: an entry has no finished report, or the page cannot be written.
    """
    folder = Path(folder)
    cards = [_card(folder, Path(entry)) for entry in entries]
    html = template("folder.html").render(
        title=folder.resolve().name or "Results", cards=cards, failures=dict(failures or {})
    )
    write_file(folder / PAGE, html)
    return folder / PAGE


def _card(folder: Path, entry: Path) -> dict[str, Any]:
    try:
        sweep = json.loads((entry / FINISHED).read_text(encoding="utf-8"))
        name, verdict = PurePath(sweep["provenance"].get("image", "")).name or entry.name, sweep["verdict"]
        if entry.is_relative_to(folder):
            name = (entry.relative_to(folder).parent / name).as_posix()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(
            f"{str(entry)!r} holds no finished results (its {FINISHED} is missing or damaged): "
            "run the sweep of that image again"
        ) from error
    place = quote(os.path.relpath(entry, folder).replace(os.sep, "/"))
    return {"name": name, "verdict": verdict, "page": f"{place}/{PAGE}", "thumbnail": f"{place}/{THUMBNAIL}"}
