"""The parts of grids of maps: a sheet measured in inches, with pictures, maps, boxes, texts and a colour scale."""

from collections.abc import Iterator
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from PIL import Image

from headoff.figures.canvas import DPI, TITLE_POINTS, figure_of
from headoff.figures.captions import one_line, shorten
from headoff.figures.colouring import MapStyle, subdued
from headoff.figures.marks import Line
from headoff.figures.object_views import Box, ObjectView
from headoff.figures.palette import GRID, INK, MUTED

EDGE = 0.14
"""Inches around a grid."""
LINE = 0.15
"""Height of a line of text in inches."""
POINTS, SMALL = 7.5, 6.5
_EMPTY = "#E9EBEF"
_MIDDLE = 85
_SAME = 0.015
"""Boxes whose sides differ by at most this fraction of the image look the same."""


class Place(NamedTuple):
    """The place of a picture on a sheet, in inches: left, top, width and height; y grows downwards."""

    left: float
    top: float
    width: float
    height: float

    def box(self, fractions: Box) -> "Place":
        """The place of a box on the picture, clipped to the picture."""
        left, top, right, bottom = (min(max(side, 0.0), 1.0) for side in fractions)
        return Place(
            self.left + left * self.width,
            self.top + top * self.height,
            (right - left) * self.width,
            (bottom - top) * self.height,
        )


class Sheet:
    """Axes whose unit is the inch, in a new figure of the given size; or, scaled to fit, in given axes.

    Pictures are numpy arrays (h, w, 3 or 4) of uint8.
    """

    def __init__(self, width: float, height: float, ax: Axes | None = None) -> None:
        self.width, self.height = width, height
        self._factor = 1.0
        if ax is None:
            figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
            ax = figure.add_axes((0, 0, 1, 1))
        else:
            room, dpi = ax.get_window_extent(), figure_of(ax).dpi
            self._factor = min(room.width / dpi / width, room.height / dpi / height, 1.5)
        ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal", anchor="NW")
        ax.axis("off")
        self.ax = ax

    def head(self, title: str, lines: list[str]) -> None:
        """A title at the top, and lines below it."""
        self.write(EDGE, EDGE + 0.12, title, TITLE_POINTS, room=self.width - 2 * EDGE, bold=True)
        for number, line in enumerate(lines):
            self.write(EDGE, EDGE + 0.2 + (number + 0.9) * LINE, line, colour=MUTED)

    def write(
        self,
        x: float,
        y: float,
        text: str,
        points: float = POINTS,
        *,
        colour: str = INK,
        room: float | None = None,
        bold: bool = False,
        right: bool = False,
    ) -> None:
        """Write one line that begins (with `right`: ends) at `x`, and is cut to `room` inches."""
        if room is not None:
            text = shorten(one_line(text), int(room * 72 / (points * (0.64 if bold else 0.56))))
        self.ax.text(
            x,
            y,
            text,
            fontsize=points * self._factor,
            color=colour,
            fontweight="bold" if bold else "normal",
            ha="right" if right else "left",
            va="baseline",
            parse_math=False,
        )

    def paint(self, pixels: np.ndarray, place: Place, span: tuple[float, float] = (1.0, 1.0)) -> None:
        """Draw a picture in its place, or scaled to `span` times the place and clipped to it."""
        right, bottom = place.left + span[0] * place.width, place.top + span[1] * place.height
        # Maps, which have an opacity, are drawn without smoothing.
        smoothing = "nearest" if pixels.shape[-1] == 4 else "antialiased"
        image = AxesImage(self.ax, extent=(place.left, right, bottom, place.top), interpolation=smoothing)
        image.set_data(pixels)
        self.ax.add_image(image)
        image.set_clip_path(Rectangle(place[:2], place.width, place.height, transform=self.ax.transData))

    def frame(self, place: Place) -> None:
        """Draw a frame around a picture."""
        self._rectangle(place, fill=False, edgecolor=GRID, linewidth=0.6, zorder=2)

    def message(self, place: Place, words: str) -> None:
        """Write a message in the place of a map."""
        self._rectangle(place, facecolor=_EMPTY, edgecolor=GRID, linewidth=0.6, hatch="///", zorder=1)
        self.ax.text(
            place.left + place.width / 2,
            place.top + place.height / 2,
            words.replace(" ", "\n", 1) if place.width < 1.2 else words,
            ha="center",
            va="center",
            fontsize=POINTS * self._factor,
            color=MUTED,
            bbox={"facecolor": _EMPTY, "edgecolor": "none", "pad": 1.5},
        )

    def boxes(self, place: Place, view: ObjectView, width: float) -> None:
        """Draw an object's boxes on a picture, in lines of `width` points; the baseline's box is dotted."""
        for box, dashes in _visible_boxes(view):
            line = width * self._factor * (0.7 if dashes else 1)
            # A dark rim around a light rim around the colour: one of them is visible on any map.
            rims = (("#000000", 1.4, 0.5), ("#FFFFFF", 0.8, 0.9)) if width > 1 else (("#000000", 0.7, 0.55),)
            for colour, rim, alpha in (*rims, (view.colour, 0.0, 1.0)):
                # Dashes are in units of the line width, and all lines must have the same gaps.
                pattern = tuple(dash * line / (line + rim) for dash in dashes) if dashes else ()
                self._rectangle(
                    place.box(box),
                    fill=False,
                    edgecolor=colour,
                    alpha=alpha,
                    linewidth=line + rim,
                    linestyle=(0, pattern) if pattern else "-",
                    joinstyle="miter",
                    zorder=3,
                )

    def scale(self, style: MapStyle, what: str, greatest: float) -> None:
        """Draw the colour scale at the bottom, with its meaning."""
        bar = Place(EDGE, self.height - 0.25, min(1.2, self.width / 3), 0.1)
        # As on an image of middle grey.
        opacity = style.colours[:, 3:] / 255
        colours = (style.colours[:, :3] * opacity + _MIDDLE * (1 - opacity)).astype(np.uint8)
        self.paint(np.repeat(colours[None], 2, axis=0), bar)
        self.frame(bar)
        ends = {
            "sweep": f"0 to {greatest:.3g}, one scale for all",
            "object": "0 to each object's maximum over configurations and layers",
            "map": "each map's minimum to its maximum",
        }[style.scale]
        words, left = f"{what}, {ends}", bar.left + bar.width + 0.07
        if len(words) * SMALL * 0.56 / 72 < self.width - left:
            self.write(left, bar.top + 0.085, words, SMALL, colour=MUTED)
        else:  # a narrow sheet
            self.write(bar.left, bar.top - 0.05, words, SMALL, colour=MUTED)

    def _rectangle(self, place: Place, **look: Any) -> None:
        # Not add_patch, which would compute limits that are fixed here.
        self.ax.add_artist(Rectangle(place[:2], place.width, place.height, **look))


def wrapped(text: str, width: float) -> list[str]:
    """`text` in lines that fit a sheet of `width` inches."""
    return wrap(text, max(int((width - 2 * EDGE) * 72 / (POINTS * 0.54)), 12))


def pixels_of(picture: Image.Image, place: Place, under_map: bool = False) -> np.ndarray:
    """The pixels of a picture, reduced to its displayed size; subdued for maps that are drawn on it."""
    side = int(max(place.width, place.height) * DPI * 1.3)
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    return subdued(small) if under_map else np.asarray(small)


def _visible_boxes(view: ObjectView) -> Iterator[tuple[Box, tuple[float, float] | None]]:
    """Boxes and their dashes. The baseline's box is left out if the query's box looks the same."""
    if view.box is None or max(abs(a - b) for a, b in zip(view.box, view.first_box, strict=True)) > _SAME:
        yield view.first_box, Line.WAS.dashes
    if view.box is not None:
        yield view.box, None
