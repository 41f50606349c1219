"""The report of a verification: its JSON document as one HTML page, or as Markdown for the summary of a CI job.

document.py   the JSON document: its parts, and a sentence for what is not one
failures.py   failed tests by what is wrong, in words: hundreds with one cause are one entry
html.py       the page, from templates/
terminal.py   the lines below the headline in a terminal
markdown.py   the summary

Both are rendered from the document alone, which may come from another machine: nothing here needs torch or pytest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headoff.errors import OutputError, SettingError
from headoff.files import write_file
from headoff.harness.report.document import FORMAT, Document, validate
from headoff.harness.report.html import render
from headoff.harness.report.markdown import summary

__all__ = [
    "FORMAT",
    "Document",
    "render",
    "remove_earlier_report",
    "render_file",
    "summary",
    "validate",
    "write_report",
]

_RENDERERS = {".html": render, ".htm": render, ".md": summary}


def render_file(json_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write the page or the summary of a verification; the file is complete or absent.

    Args:
        json_path: what `headoff verify --report FILE.json` wrote.
        path: ends in .html for the page, in .md for the summary.

    Returns:
        `path`.

    Raises:
        SettingError: `path` ends otherwise, or `json_path` is not the JSON of a verification.
        OutputError: `path` cannot be written.
    """
    source, target = Path(json_path), Path(path)
    renderer = _RENDERERS.get(target.suffix.lower())
    if renderer is None:
        raise SettingError(
            f"a report is written as .html or .md, not as {target.name!r}: give it such a name"
        )
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(
            f"{str(source)!r} cannot be read ({error.strerror}): give the JSON of a verification"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"{str(source)!r} is not JSON ({reason}): give the JSON of a verification"
        ) from error
    try:
        text = renderer(document)
    except SettingError as error:
        raise SettingError(f"{str(source)!r}: {error}") from error
    write_file(target, text)
    return target


def write_report(document: Mapping[str, Any], path: Path) -> None:
    """Write the JSON of a verification and, where `path` ends in .html, the page. Raises OutputError."""
    write_file(path.with_suffix(".json"), json.dumps(document, indent=1, allow_nan=False))
    if path.suffix == ".html":
        write_file(path, render(document))


def remove_earlier_report(path: Path) -> None:
    """Remove an earlier report, which would be taken for this run's if anything went wrong.

    Raises OutputError, before anything runs, for one that could not be written in the end.
    """
    if path.suffix not in (".html", ".json"):
        raise OutputError(f"a report cannot be written to {path}: give a name that ends in .html or .json")
    if not path.absolute().parent.is_dir():
        raise OutputError(
            f"there is no folder {path.absolute().parent} for the report: make it, or name another"
        )
    try:
        for old in (path, path.with_suffix(".json")):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be replaced ({error.strerror}): name another report") from error
