"""Boxes and their labels on an image, laid out when they are drawn.

Only then are the figure's size, its resolution and the place of the axes final, so that labels can be kept within the
image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from matplotlib.artist import Artist
from matplotlib.backend_bases import RendererBase
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from matplotlib.transforms import Bbox, IdentityTransform

from headoff.figures.captions import one_line, shorten
from headoff.figures.palette import ink_on
from headoff.figures.placing import Rect, place_label

LONGEST_NAME = 32
"""Most characters of a class name; longer names are cut, so that labels do not hide the image."""


MOST_LABELLED = 24
"""Most labels in a picture: more would hide it. The first marks have them."""


class Line(Enum):
    """How a box is drawn: line width in points, and dashes in line widths."""

    FOUND = (1.8, None)
    DUPLICATE = (1.8, (3.2, 2.0))
    WAS = (1.1, (1.2, 1.8))
    """The baseline's box of an object that has moved or is lost."""

    @property
    def width(self) -> float:
        return self.value[0]

    @property
    def dashes(self) -> tuple[float, float] | None:
        return self.value[1]


@dataclass(frozen=True)
class Mark:
    """A box (left, top, right, bottom in the image's pixels) and its label, if `name` or `note` are given."""

    box: tuple[float, float, float, float]
    colour: str
    line: Line = Line.FOUND
    name: str = ""
    note: str = ""
    """The part of the label that is cut last: the score."""
    object: int | None = None


class Marks(Artist):
    """Draws marks, the first on top, within the image of `width` x `height` pixels.

    Only the first `MOST_LABELLED` labels are drawn.

    After drawing, `texts` and `label_boxes` are the labels as they were laid out, in display coordinates.
    """

    def __init__(
        self, marks: Sequence[Mark], width: float, height: float, font_size: float | None = None
    ) -> None:
        super().__init__()
        self.marks = tuple(marks)
        self.width, self.height = width, height
        self.font_size = font_size
        self.texts: list[Text] = []
        self.label_boxes: list[Rect] = []
        self.set_zorder(3)
        # Marks stay within the axes, so layout engines can ignore them.
        self.set_in_layout(False)

    def get_window_extent(self, renderer: RendererBase | None = None) -> Bbox:
        image = self._image()
        return Bbox([(image.x0, image.y0), (image.x1, image.y1)])

    def draw(self, renderer: RendererBase) -> None:
        self.texts, self.label_boxes = [], []
        if not self.get_visible():
            return
        points = float(renderer.points_to_pixels(1.0))  # type: ignore[arg-type]
        image = self._image()
        # Moved inwards at the border of the image, so that lines are not cut.
        boxes = [
            self._to_display(mark.box).within(image.shrunk((mark.line.width / 2 + 0.9) * points))
            for mark in self.marks
        ]
        self._draw_boxes(renderer, boxes)
        self._draw_labels(renderer, image, boxes, points)
        self.stale = False

    def _image(self) -> Rect:
        """The part of the image that the axes show, in display coordinates."""
        assert self.axes is not None
        x0, y0, x1, y1 = (float(value) for value in self.axes.bbox.extents)
        return self._to_display((0, 0, self.width, self.height)).within(Rect(x0, y0, x1, y1))

    def _to_display(self, box: tuple[float, float, float, float]) -> Rect:
        assert self.axes is not None
        (xa, ya), (xb, yb) = self.axes.transData.transform([box[:2], box[2:]]).tolist()
        return Rect(min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb))

    def _draw_boxes(self, renderer: RendererBase, boxes: list[Rect]) -> None:
        outlines, colours, widths, styles = [], [], [], []
        for mark, box in reversed([*zip(self.marks, boxes, strict=True)]):
            width, dashes = mark.line.width, mark.line.dashes
            # A dark rim around a light rim around the colour: one of them is visible on any image.
            for colour, rim, alpha in (
                ("#000000", 1.8, 0.55),
                ("#FFFFFF", 1.0, 0.9),
                (mark.colour, 0.0, 1.0),
            ):
                # Dashes are in units of the line width, and all three lines must have the same gaps.
                pattern = None if dashes is None else tuple(dash * width / (width + rim) for dash in dashes)
                outlines.append([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])
                colours.append(to_rgba(colour, alpha))
                widths.append(width + rim)
                styles.append("-" if pattern is None else (0, pattern))
        if outlines:
            # One collection: hundreds of separate rectangles take most of the time of a picture.
            look: dict[str, Any] = {"edgecolors": colours, "linewidths": widths, "linestyles": styles}
            self._paint(renderer, PolyCollection(outlines, facecolors="none", joinstyle="miter", **look))

    def _draw_labels(self, renderer: RendererBase, image: Rect, boxes: list[Rect], points: float) -> None:
        font = FontProperties(size=self.font_size or self._readable_size(image, points), weight="bold")

        def width_of(text: str) -> float:
            return renderer.get_text_width_height_descent(text, font, ismath=False)[0]

        _, line_height, descent = renderer.get_text_width_height_descent("lp", font, ismath=False)
        pad = 1.8 * points
        height = line_height + 2 * pad
        if height > image.height:
            return
        labels: list[tuple[Mark, Rect, Rect, str]] = []
        for mark, box in zip(self.marks, boxes, strict=True):
            if len(labels) == MOST_LABELLED:
                break
            room = image.width - 2 * pad
            text = next(
                (text for text in _shorter_labels(mark.name, mark.note) if width_of(text) <= room), ""
            )
            if text:
                spot = place_label(box, width_of(text) + 2 * pad, height, image, self.label_boxes, boxes)
                self.label_boxes.append(spot)
                labels.append((mark, box, spot, text))
        for mark, box, spot, text in reversed(labels):
            was = mark.line is Line.WAS
            fill = "#FFFFFF" if was else mark.colour
            if not spot.touches(box):
                self._draw_leader(renderer, mark.colour, spot, box)
            plate = Rectangle((spot.x0, spot.y0), spot.width, spot.height, facecolor=fill)
            if was:
                plate.set(edgecolor=mark.colour, linewidth=0.9, linestyle=(0, (1.2, 1.4)), alpha=0.88)
            else:
                plate.set(edgecolor="#000000", linewidth=0.4, alpha=0.95)
            self._paint(renderer, plate)
            words = Text(
                spot.x0 + pad, spot.y0 + pad + descent, text, color=ink_on(fill), fontproperties=font
            )
            words.set_parse_math(False)  # a class name may contain "$"
            self._paint(renderer, words)
            self.texts.append(words)

    def _draw_leader(self, renderer: RendererBase, colour: str, spot: Rect, box: Rect) -> None:
        """A line from a label to its box, which it does not touch."""
        x, y = spot.centre
        to_x, to_y = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        for ink, width in (("#000000", 1.8), (colour, 1.0)):
            self._paint(renderer, Line2D([x, to_x], [y, to_y], color=ink, linewidth=width))

    def _paint(self, renderer: RendererBase, artist: Artist) -> None:
        assert self.figure is not None and self.axes is not None
        artist.set_figure(self.figure)
        artist.set_transform(IdentityTransform())
        artist.set_clip_box(self.axes.bbox)
        artist.draw(renderer)

    def _readable_size(self, image: Rect, points: float) -> float:
        """The font size: it grows with the image, and is smaller for many labels."""
        size = min(max((image.width * image.height) ** 0.5 / points / 42, 6.5), 9.0)
        return size * 0.85 if labels_of(self.marks) > 15 else size


def labels_of(marks: Sequence[Mark]) -> int:
    """How many of the marks have a label."""
    return sum(bool(mark.name or mark.note) for mark in marks)


def _shorter_labels(name: str, note: str) -> Iterator[str]:
    """The label, then shorter versions of it: with ever shorter names, and finally the note alone."""
    name = one_line(name)
    for length in range(min(len(name), LONGEST_NAME), 1, -1):
        yield f"{shorten(name, length)} {note}".strip()
    if note:
        yield note
