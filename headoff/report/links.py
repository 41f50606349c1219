"""Links from the page of a report to the index of its folder, and to the pages before and after it."""

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from headoff.files import atomic_write
from headoff.report.output import PAGE

_PLACE = re.compile(r"<!--pages-->.*?<!--/pages-->", re.DOTALL)
_HEAD = 4096
"""The links are within so many characters from a page's begin, whose rest is long."""


def link_pages(folder: Path, entries: Sequence[Path], names: Sequence[str]) -> None:
    """Link the pages of `entries` with each other and with `folder`/index.html. Only pages that change are written."""
    pages = [
        (entry / PAGE, name) for entry, name in zip(entries, names, strict=True) if (entry / PAGE).is_file()
    ]
    for number, (page, _) in enumerate(pages):
        linked = [("index", folder / PAGE, "all images")]
        linked += [("prev", *pages[number - 1])] if number else []
        linked += [("next", *pages[number + 1])] if number + 1 < len(pages) else []
        links = "".join(
            f'<link rel="{rel}" href="{_relative(target, page)}" title="{html.escape(title)}">'
            for rel, target, title in linked
        )
        links = f"<!--pages-->{links}<!--/pages-->"
        with page.open(encoding="utf-8") as file:
            head = file.read(_HEAD)
            if links in head or not _PLACE.search(head):
                continue
            text = _PLACE.sub(lambda _, links=links: links, head, count=1) + file.read()  # type: ignore[misc]
        with atomic_write(page) as file:
            file.write(text.encode())


def _relative(target: Path, page: Path) -> str:
    return quote(os.path.relpath(target, page.parent).replace(os.sep, "/"))
