"""The images that a command line names: files, and folders with all that is in them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headoff.errors import ImageError
from headoff.images import find_images
from headoff.scenes.samples import sample_image


@dataclass(frozen=True)
class ImageChoice:
    """Images, each of them once.

    Attributes:
        paths: in the order given, those of a folder sorted.
        common: the deepest folder that all given folders and files are in; None for one image that was named itself,
            whose results need no folder of their own.
        given: what was asked for, for messages.
    """

    paths: tuple[Path, ...]
    common: Path | None
    given: str

    def place(self, image: Path) -> Path:
        """The path of an image below `common`, which no other image has."""
        assert self.common is not None
        return Path(os.path.relpath(image, self.common))


def images_at(given: Sequence[Path], out: Path | None = None) -> ImageChoice:
    """The images at these paths, and in these folders and all below; a bundled scene if there is none.

    Folders with results of headoff are not searched, for these contain pictures too.

    Args:
        given: files and folders.
        out: a folder that is not searched either.

    Raises:
        ImageError: a path does not exist, or a folder has no image.
    """
    if not given:
        return ImageChoice((sample_image(0),), None, "the bundled scene")
    for path in given:
        if not path.exists():
            raise ImageError(f"there is no image or folder {path}; name one that exists")
    paths: dict[str, Path] = {}
    for path in given:
        for image in _images_in(path, out) if path.is_dir() else [path]:
            paths.setdefault(os.path.abspath(image), image)
    words = str(given[0]) if len(given) == 1 else f"{len(given)} files and folders"
    if len(given) == 1 and not given[0].is_dir():
        return ImageChoice((given[0],), None, words)
    folders = [os.path.abspath(path if path.is_dir() else path.parent) for path in given]
    return ImageChoice(tuple(paths.values()), Path(os.path.commonpath(folders)), words)


def _images_in(folder: Path, out: Path | None) -> list[Path]:
    from headoff.report import has_results  # imports matplotlib

    output = None if out is None else out.resolve()
    return find_images(folder, lambda below: has_results(below) or below.resolve() == output)
