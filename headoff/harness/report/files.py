"""From the JSON file of a verification to its page or summary."""

from __future__ import annotations

import json
import os
from pathlib import Path

from headoff.errors import OutputError, SettingError
from headoff.files import written_atomically
from headoff.harness.report.markdown import summary
from headoff.harness.report.rendering import render

_WRITERS = {".html": render, ".htm": render, ".md": summary}


def render_file(json_path: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Write the page (`path` ends in .html) or the summary (.md) of the verification in `json_path`; returns `path`.

    The file is whole or absent. Raises SettingError for another suffix and for a file that is not the JSON of a
    verification, OutputError where `path` cannot be written.
    """
    source, target = Path(json_path), Path(path)
    writer = _WRITERS.get(target.suffix.lower())
    if writer is None:
        raise SettingError(
            f"a report is written as .html or .md, not as {target.name!r}: give it such a name"
        )
    try:
        document = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SettingError(
            f"{str(source)!r} cannot be read ({reason}): give the JSON of a verification"
        ) from error
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingError(
            f"{str(source)!r} is not JSON ({reason}): give the JSON of a verification"
        ) from error
    try:
        text = writer(document)
    except SettingError as error:
        raise SettingError(f"{str(source)!r}: {error}") from error
    try:
        with written_atomically(target) as file:
            file.write(text.encode("utf-8", "replace"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise OutputError(
            f"the report cannot be written to {str(target)!r} ({reason}): choose another place, or free space and "
            "permissions there"
        ) from error
    return target
