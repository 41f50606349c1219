"""Controls: maps that no relevance method made. A method whose maps are no better has shown nothing.

They are of this package alone, and not relevance methods.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from headoff.detector import Detector
from headoff.errors import SettingError, did_you_mean
from headoff.relevance import method_names
from headoff.values import Objects

if TYPE_CHECKING:
    from headoff.faithfulness.explained import ExplainedImage

Control = Callable[["ExplainedImage", str, Objects], Tensor]
"""(image, text of the configuration, objects) -> (O, h, w) float64."""

SPREAD = 0.25
"""Standard deviation of the control `box`, in sides of the box."""


def random_maps(image: ExplainedImage, configuration: str, objects: Objects) -> Tensor:
    """Every cell uniform in 0..1, seeded by image, configuration, query and class."""
    maps = []
    for detection in objects.detections:
        generator = image.generator("random map", configuration, detection.query, detection.label)
        maps.append(torch.rand(image.grid.shape, generator=generator, dtype=torch.float64))
    return torch.stack(maps) if maps else torch.zeros(0, *image.grid.shape, dtype=torch.float64)


def box_maps(image: ExplainedImage, configuration: str, objects: Objects) -> Tensor:
    """A Gaussian at the centre of the detected box, with a standard deviation of `SPREAD` sides of the box."""
    rows, columns = image.grid.middles
    maps = []
    for left, top, right, bottom in objects.detections.boxes.double().tolist():
        along = []
        for middles, low, high in ((rows, top, bottom), (columns, left, right)):
            width = max(high - low, 1.0) * SPREAD
            along.append(torch.exp(-0.5 * ((middles - (low + high) / 2) / width) ** 2))
        maps.append(along[0][:, None] * along[1])
    return torch.stack(maps) if maps else torch.zeros(0, *image.grid.shape, dtype=torch.float64)


def edge_maps(image: ExplainedImage, configuration: str, objects: Objects) -> Tensor:
    """The gradient of the image's brightness, its mean over each cell: the same map for all objects."""
    grey = np.asarray(image.picture.convert("L"), dtype=np.float64) / 255
    down, across = (np.gradient(grey, axis=axis) if grey.shape[axis] > 1 else grey * 0 for axis in (0, 1))
    strength = image.grid.mean_over_cells(torch.from_numpy(np.hypot(down, across)))
    return strength.expand(len(objects), -1, -1).clone()


CONTROLS: dict[str, Control] = {"random": random_maps, "box": box_maps, "edges": edge_maps}


def known_methods(detector: Detector | None = None) -> tuple[str, ...]:
    """All relevance methods, or those that suit a detector, and the controls."""
    return (*method_names(detector), *CONTROLS)


def check_methods(methods: tuple[str, ...]) -> None:
    """Raise SettingError unless all are relevance methods or controls, and different."""
    known = known_methods()
    for name in methods:
        if name not in known:
            raise SettingError(
                f"there is no relevance method or control {name!r}{did_you_mean(name, known)}: use some of "
                f"{', '.join(known)}"
            )
    if len(set(methods)) < len(methods):
        raise SettingError(f"the methods {', '.join(methods)} are not all different: name each only once")
