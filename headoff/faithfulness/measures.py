"""Measures of whether relevance maps say what the detector looks at: one registry, one signature.

A measure computes one or several quantities for every object and method of an image. Shapes: O objects, K quantities,
P points of a curve, h x w cells of a map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from headoff.detector import Detector
from headoff.errors import SettingError, did_you_mean
from headoff.faithfulness.explained import ExplainedImage

Direction = Literal["higher", "lower", "neither"]
Needs = Literal["", "boxes", "masks"]


@dataclass(frozen=True)
class Quantity:
    """A number that a measure computes.

    Attributes:
        name: among those of its measure.
        title: for people.
        direction: what is better; `neither` where that says nothing about a method.
        unit: of the number, such as `probability` or `share`.
        range: the least and the greatest possible number.
        of_object: what the number of a single object is called, where it is another one than that of several images.
    """

    name: str
    title: str
    direction: Direction
    unit: str
    range: tuple[float, float] = (0.0, 1.0)
    of_object: str = ""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a measure found for one image and method. float64 on the CPU.

    Attributes:
        values: (O, K); NaN where a quantity is not defined, as for an object whose true box is not known.
        curves: (O, K, P), where the quantities are areas under curves.
        parts: further tensors, for `Measure.pooled`.
    """

    values: Tensor
    curves: Tensor | None = None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Measure(ABC):
    """A measure.

    Attributes:
        name: in the registry.
        summary: what it is, in a sentence.
        quantities: K of them.
        needs: what has to be known of the true objects of an image: nothing, `boxes`, or `masks`.
        is_mean: whether a quantity of several images is the mean over images of the mean over their objects; otherwise
            `pooled` computes it.
    """

    name: str
    summary: str
    quantities: tuple[Quantity, ...]
    needs: ClassVar[Needs] = ""
    is_mean: ClassVar[bool] = True

    @property
    def settings(self) -> dict[str, Any]:
        """All parameters that numbers depend on, of JSON types."""
        return {}

    @property
    def points(self) -> Tensor | None:
        """(P,) the x axis of the curves; None where there are none."""
        return None

    @property
    def axis(self) -> str:
        """What the x axis of the curves is."""
        return ""

    def check(self, detector: Detector) -> None:
        """Raise SettingError where the measure does not suit the detector."""
        return

    @abstractmethod
    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        """The scores of each method for the objects of `image`, of which there is at least one.

        A method is a name that `image.explain` takes: a relevance method, or a control.
        """

    def pooled(self, images: Sequence[Scores], draws: np.ndarray) -> np.ndarray:
        """The quantities of a whole data set, in samples of a bootstrap over its images.

        Args:
            images: n.
            draws: (R, n), how often each image is drawn; all ones for the data set itself.

        Returns:
            (R, K); NaN where no image that was drawn has a value.
        """
        means = np.stack([mean_over_objects(one) for one in images])
        there = np.isfinite(means)
        with np.errstate(invalid="ignore", divide="ignore"):
            return (draws @ np.where(there, means, 0.0)) / (draws @ there.astype(np.float64))


def mean_over_objects(scores: Scores) -> np.ndarray:
    """(K,) the mean over the objects that have a value; NaN where none has."""
    values = scores.values.double()
    there = values.isfinite()
    total = torch.where(there, values, 0.0).sum(0) / there.sum(0)
    return total.numpy()


_measures: dict[str, Callable[[], Measure]] = {}


def register_measure(name: str, make: Callable[[], Measure]) -> None:
    """Register what makes a measure with its defaults, under its name; it replaces an earlier one of that name."""
    _measures[name] = make


def measure_names() -> tuple[str, ...]:
    """The registered names."""
    return tuple(_measures)


def resolve_measure(spec: str | Measure) -> Measure:
    """The measure of that name, with its defaults.

    Raises:
        SettingError: there is no such measure.
    """
    if isinstance(spec, Measure):
        return spec
    if spec not in _measures:
        raise SettingError(
            f"there is no measure of faithfulness {spec!r}{did_you_mean(spec, _measures)}: use one of "
            f"{', '.join(_measures)}"
        )
    return _measures[spec]()
