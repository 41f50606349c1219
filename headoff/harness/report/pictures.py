"""Pictures of a document on a page: the file of each is in it once, however many findings show it."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """A picture where a finding shows it.

    - `path`: as the finding calls it
    - `anchor`: the id of the element that holds it; empty where the document does not have it
    - `source`: the file as a data URI; empty where the picture is not to be drawn here, but is elsewhere on the page
    - `width`, `height`: in pixels
    """

    path: str
    anchor: str = ""
    source: str = ""
    width: int = 0
    height: int = 0


class Gallery:
    """Hands out the pictures of one page, in the page's order: the first that asks for a picture gets the file."""

    def __init__(self, pictures: Mapping[str, str]) -> None:
        self._pictures = pictures
        self._anchors: dict[str, str] = {}

    def place(self, path: str, *, embed: bool = True) -> Picture:
        """The picture for the next place on the page; without `embed` never the file itself."""
        if path in self._anchors:
            return Picture(path, self._anchors[path])
        if not embed or path not in self._pictures:
            return Picture(path)
        encoded = self._pictures[path]
        anchor = self._anchors[path] = f"picture-{len(self._anchors) + 1}"
        # Width and height open the header, which is the first chunk of every PNG file.
        width, height = struct.unpack(">II", base64.b64decode(encoded[:32])[16:24])
        return Picture(path, anchor, f"data:image/png;base64,{encoded}", width, height)
