"""Images to measure on, which are read or drawn when it is their turn, and in whatever process."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from headoff.detector import Detector
from headoff.errors import SettingError
from headoff.faithfulness.measures import Needs
from headoff.faithfulness.truth import Annotations, Truth, truth_of_scene
from headoff.images import ImageSource, load_image
from headoff.scenes.dataset import draw_scene
from headoff.scenes.held_out import held_out_scenes


class Source(Protocol):
    """An image with a name."""

    @property
    def name(self) -> str: ...

    @property
    def knows(self) -> Needs:
        """What is known of its true objects, see `Measure.needs`."""
        ...

    def load(self) -> tuple[Image.Image, Truth | None]:
        """The image as RGB, and its true objects where they are known. Raises ImageError."""
        ...


@dataclass(frozen=True)
class SceneSource:
    """A held-out scene of the bundled data set, whose objects are known to the pixel."""

    seed: int
    size: int

    @property
    def name(self) -> str:
        return f"scene {self.seed}"

    @property
    def knows(self) -> Needs:
        return "masks"

    def load(self) -> tuple[Image.Image, Truth]:
        scene = draw_scene(self.seed, self.size, "held_out")
        return load_image(scene.image), truth_of_scene(self.seed, self.size)


@dataclass(frozen=True, eq=False)
class PictureSource:
    """An image, and its true objects where they are known."""

    name: str
    image: ImageSource
    truth: Truth | None = None

    @property
    def knows(self) -> Needs:
        return "" if self.truth is None else "boxes" if self.truth.masks is None else "masks"

    def load(self) -> tuple[Image.Image, Truth | None]:
        return load_image(self.image), self.truth


def sources_of(
    images: Iterable[Any] | Any, detector: Detector, annotations: str | Path | None = None
) -> list[Source]:
    """The images that `headoff.faithfulness` was given.

    Args:
        images: one or several; each an image source (`headoff.images.load_image`), `scenes:N` or `scenes:N:FIRST` for
            N held-out scenes of the bundled data set from seed FIRST (0) on, or a `Source`.
        detector: whose image size and classes scenes must have.
        annotations: true objects of image files, see `Annotations`.

    Raises:
        SettingError: there are no images, scenes do not suit the detector, or the annotations cannot be read.
    """
    known = None if annotations is None else Annotations(annotations, detector.class_names)
    is_one = isinstance(images, str | Path | Image.Image | np.ndarray) or not isinstance(images, Iterable)
    several: list[Any] = [images] if is_one else list(images)
    found: list[Source] = []
    for image in several:
        scenes = held_out_scenes(image, detector) if isinstance(image, str) else None
        if scenes is not None:
            seeds = range(scenes.first, scenes.first + scenes.count)
            found += [SceneSource(seed, scenes.side) for seed in seeds]
        elif hasattr(image, "load") and hasattr(image, "name"):
            found.append(image)
        elif isinstance(image, str | Path):
            path = Path(image)
            found.append(PictureSource(str(path), path, None if known is None else known.of(path)))
        else:
            found.append(PictureSource(f"image {len(found)}", image))
    if not found:
        raise SettingError("there are no images to measure on: give at least one")
    return found
