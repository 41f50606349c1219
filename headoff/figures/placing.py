"""Places of labels: at their boxes, within the image, without overlap if possible."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Rect(NamedTuple):
    """An upright rectangle; y grows upwards."""

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        return self.y1 - self.y0

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x0 + self.x1) / 2, (self.y0 + self.y1) / 2

    def within(self, other: "Rect") -> "Rect":
        """This rectangle, clipped to `other`; sides outside of it are moved to its edge."""
        return Rect(
            min(max(self.x0, other.x0), other.x1),
            min(max(self.y0, other.y0), other.y1),
            min(max(self.x1, other.x0), other.x1),
            min(max(self.y1, other.y0), other.y1),
        )

    def shrunk(self, margin: float) -> "Rect":
        """This rectangle, smaller by `margin` on each side; at most to its centre."""
        x, y = min(margin, self.width / 2), min(margin, self.height / 2)
        return Rect(self.x0 + x, self.y0 + y, self.x1 - x, self.y1 - y)

    def overlap(self, other: "Rect") -> float:
        """The area of the intersection."""
        wide = min(self.x1, other.x1) - max(self.x0, other.x0)
        high = min(self.y1, other.y1) - max(self.y0, other.y0)
        return wide * high if wide > 0 and high > 0 else 0.0

    def touches(self, other: "Rect") -> bool:
        return (
            self.x0 <= other.x1 + 1
            and other.x0 <= self.x1 + 1
            and self.y0 <= other.y1 + 1
            and other.y0 <= self.y1 + 1
        )


def place_label(
    box: Rect, width: float, height: float, image: Rect, placed: Sequence[Rect], boxes: Sequence[Rect]
) -> Rect:
    """A place of `width` x `height`, not larger than `image`, for the label of `box`.

    Candidates are places at the edges of the box, then places further away, all shifted into the image. Overlap with
    labels that were `placed` costs more than overlap with `boxes`, and that costs more than distance.
    """
    places = np.array([*_places(box, width, height)])
    left = places[:, 0].clip(image.x0, image.x1 - width)
    lower = places[:, 1].clip(image.y0, image.y1 - height)
    spots = np.stack([left, lower, left + width, lower + height], 1)
    # A label that is shifted sideways is still at its box; one that is shifted up or down may not be.
    cost = 0.02 * np.arange(len(spots)) + 0.5 * (np.abs(lower - places[:, 1]) > 0.5)
    if placed:
        cost += 10 * _overlaps(spots, np.array(placed)).sum(1)
    if boxes:
        others = np.array(boxes)
        areas = np.maximum((others[:, 2] - others[:, 0]) * (others[:, 3] - others[:, 1]), 1.0)
        cost += 0.3 * (_overlaps(spots, others) / (height * np.sqrt(areas))).sum(1)
    return Rect(*spots[cost.argmin()].tolist())


def _overlaps(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n, m), the areas of the intersections of n with m rectangles (x0, y0, x1, y1)."""
    lowest = np.maximum(ones[:, None, :2], others[None, :, :2])
    sides = np.minimum(ones[:, None, 2:], others[None, :, 2:]) - lowest
    return sides.clip(0).prod(-1)


def _places(box: Rect, width: float, height: float) -> Iterator[tuple[float, float]]:
    """Lower left corners of a label, the best first."""
    above, top, below, foot = box.y1, box.y1 - height, box.y0 - height, box.y0
    right = box.x1 - width
    yield from ((box.x0, above), (box.x0, top), (box.x0, below), (right, above), (right, below))
    yield from ((box.x0, foot), (right, top), (right, foot), (box.x1, top), (box.x0 - width, top))
    for step in range(1, 9):
        for x in (box.x0, right, box.x0 - width, box.x1):
            yield x, above + step * height * 1.05
            yield x, below - step * height * 1.05
            yield x, top - step * height * 1.05
