"""Where the images of a data set come from, by their index. Sources are small, and pickle."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from headoff.errors import ImageError
from headoff.images import load_image


class Source(Protocol):
    """Images by their index."""

    def load(self, index: int) -> tuple[Image.Image, str]:
        """The RGB picture, and a hash of what it was read from.

        Raises:
            ImageError: it cannot be read, or is not of the annotated size.
        """
        ...


@dataclass(frozen=True)
class Files:
    """Files in a folder.

    Attributes:
        folder: of the images.
        names: file names, with the folders below.
        sizes: annotated (height, width) of each.
    """

    folder: Path
    names: Sequence[str]
    sizes: np.ndarray

    def path(self, index: int) -> Path:
        """The path of an image. The same name may have its accents composed or not, as file systems differ in this."""
        path = self.folder / self.names[index]
        if not path.exists():
            forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
            for form in forms:
                other = self.folder / unicodedata.normalize(form, self.names[index])
                if other.exists():
                    return other
        return path

    def load(self, index: int) -> tuple[Image.Image, str]:
        path = self.path(index)
        height, width = self.sizes[index].tolist()
        picture = load_image(path)
        if picture.size != (width, height):
            # Some tools annotate pictures as they are stored, and do not turn them upright.
            stored = load_image(path, upright=False)
            if stored.size != (width, height):
                raise ImageError(
                    f"{str(path)!r} is of {picture.height} x {picture.width} pixels, and was annotated at {height} x "
                    f"{width}: give the image that was annotated"
                )
            picture = stored
        return picture, hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class Scenes:
    """Held-out scenes, which are drawn when they are needed.

    Attributes:
        first_seed: of the first scene.
        side: pixels of a side.
    """

    first_seed: int
    side: int

    def load(self, index: int) -> tuple[Image.Image, str]:
        from headoff.scenes.dataset import draw_scene

        picture = Image.fromarray(draw_scene(self.first_seed + index, self.side, "held_out").image)
        return picture, hashlib.sha256(picture.tobytes()).hexdigest()[:16]
