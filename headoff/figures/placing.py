"""Places of labels: at their boxes, within the image, without overlap if possible."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple


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
    best, least = Rect(image.x0, image.y0, image.x0 + width, image.y0 + height), float("inf")
    for rank, (x, y) in enumerate(_places(box, width, height)):
        distance = rank * 0.02
        if least <= distance:
            break
        left = min(max(x, image.x0), image.x1 - width)
        lower = min(max(y, image.y0), image.y1 - height)
        spot = Rect(left, lower, left + width, lower + height)
        # A label that is shifted sideways is still at its box; one that is shifted up or down may not be.
        cost = distance + (0.5 if abs(lower - y) > 0.5 else 0.0)
        cost += 10 * sum(spot.overlap(other) for other in placed)
        cost += 0.3 * sum(
            spot.overlap(other) / (height * max(other.width * other.height, 1.0) ** 0.5) for other in boxes
        )
        if cost < least:
            best, least = spot, cost
    return best


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
