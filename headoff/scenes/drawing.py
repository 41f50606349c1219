"""The pixels of a scene's parts: shapes, backgrounds and strokes.

All coordinates here are in units of the image side (0 is the left or top edge, 1 the right or bottom edge), x
before y, and all colours are RGB in 0..1, so that a description can be drawn at any size. Nothing in this module is
random; `headoff.scenes.dataset` decides what is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

FloatArray = NDArray[np.float64]
Contours = tuple[FloatArray, ...]
"""Closed polygons, each float64 (k, 2) xy: the outer contour first, then the holes in it, if any."""

SHAPE_NAMES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart")

REFERENCE_CELLS = 48
"""Side of the coarse grid that a background is described on."""

_SUPERSAMPLING = 4
_CURVE_POINTS = 72
_TURN = np.linspace(0.0, 2.0 * math.pi, _CURVE_POINTS, endpoint=False)
_UNIT_CIRCLE: FloatArray = np.stack([np.cos(_TURN), np.sin(_TURN)], axis=1)
_HEART: FloatArray = np.stack(
    [
        16.0 * np.sin(_TURN) ** 3,
        -(13.0 * np.cos(_TURN) - 5.0 * np.cos(2 * _TURN) - 2.0 * np.cos(3 * _TURN) - np.cos(4 * _TURN)),
    ],
    axis=1,
)


@dataclass(frozen=True)
class Paint:
    """How the inside of a shape is coloured.

    Attributes:
        corners: float64 (2, 2, 3), the colours at the corners of the shape's box, [row, column]; equal for a solid
            fill.
        outline: float64 (3,), the colour of a line along the inside of the edge, or None.
        outline_width: its width in units of the image side.
    """

    corners: FloatArray
    outline: FloatArray | None = None
    outline_width: float = 0.0

    @property
    def mean(self) -> FloatArray:
        """The colour at the middle of the box, float64 (3,)."""
        return np.asarray(self.corners.mean(axis=(0, 1)))


@dataclass(frozen=True)
class Background:
    """A smooth field of colour and, optionally, a low-contrast pattern on top of it.

    `cells` is uint8 (REFERENCE_CELLS, REFERENCE_CELLS, 3). `pattern` is None, "stripes" or "checks": a
    periodic change towards `pattern_colour` of at most `pattern_strength` (0..1), `pattern_frequency` periods
    per image side, along `pattern_angle` radians, shifted by `pattern_phase` radians.
    """

    cells: NDArray[np.uint8]
    pattern: str | None = None
    pattern_colour: FloatArray | None = None
    pattern_strength: float = 0.0
    pattern_frequency: float = 0.0
    pattern_angle: float = 0.0
    pattern_phase: float = 0.0


@dataclass(frozen=True)
class Stroke:
    """A line `width` wide through `points`, float64 (k, 2), or, if k = 1, a round dot of that diameter.

    `colour` is float64 (3,).
    """

    points: FloatArray
    width: float
    colour: FloatArray


def shape_contours(name: str, proportion: float, aspect: float) -> Contours:
    """The contours of a shape around the origin, upright, at no particular scale.

    Args:
        name: one of `SHAPE_NAMES`.
        proportion: 0..1, a parameter of the class (the thickness of a ring, the depth of a star's notches, ...).
        aspect: factor of the height; squares ignore it.

    Raises:
        ValueError: there is no such shape.
    """
    holes: list[FloatArray] = []
    if name == "circle":
        outer = _UNIT_CIRCLE
    elif name == "square":
        outer = np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
        aspect = 1.0
    elif name == "triangle":
        outer = _on_circle(np.linspace(-0.5 * math.pi, 1.5 * math.pi, 3, endpoint=False))
    elif name == "star":
        outer = _on_circle(np.linspace(-0.5 * math.pi, 1.5 * math.pi, 10, endpoint=False))
        outer[1::2] *= 0.38 + 0.12 * proportion
    elif name == "cross":
        arm = 0.26 + 0.14 * proportion
        corner = np.array([[arm, 1.0], [arm, arm], [1.0, arm]])
        # Each quarter turn (x, y) -> (y, -x) continues the outline where the quarter before it ended.
        quarters = [corner]
        for _ in range(3):
            last = quarters[-1]
            quarters.append(np.stack([last[:, 1], -last[:, 0]], axis=1))
        outer = np.concatenate(quarters)
    elif name == "ring":
        outer = _UNIT_CIRCLE
        holes.append(_UNIT_CIRCLE * (0.5 + 0.15 * proportion))
    elif name == "crescent":
        outer = _crescent(cutter_radius=0.85 + 0.07 * proportion, cutter_offset=0.5)
    elif name == "heart":
        outer = _HEART
    else:
        raise ValueError(f"there is no shape {name!r}; choose one of {', '.join(SHAPE_NAMES)}")
    stretch = np.array([1.0, aspect])
    return tuple(contour * stretch for contour in (outer, *holes))


def rotated(contours: Contours, angle: float, longer_side: float) -> Contours:
    """The contours turned by `angle` radians, then scaled and moved.

    The longer side of their box is `longer_side` afterwards, and its left top corner is at (0, 0).
    """
    cosine, sine = math.cos(angle), math.sin(angle)
    turn = np.array([[cosine, sine], [-sine, cosine]])
    turned = [contour @ turn for contour in contours]
    low, high = turned[0].min(axis=0), turned[0].max(axis=0)
    scale = longer_side / float((high - low).max())
    return tuple((contour - low) * scale for contour in turned)


def contours_box(contours: Contours) -> FloatArray:
    """The exact box of the shape, float64 (4,) xyxy in the units of the contours."""
    return np.concatenate([contours[0].min(axis=0), contours[0].max(axis=0)])


def coverage(
    contours: Contours, size: int, supersampling: int = _SUPERSAMPLING
) -> tuple[Image.Image, int, int]:
    """How much of each pixel the shape covers, at `size` pixels per image side.

    Returns:
        (mask, left, top): an "L" image (0..255) of the shape's box, and the pixel of its left top corner. The shape
        must be inside the image.
    """
    left, top, width, height = _pixel_crop(contours_box(contours), size)
    mask = Image.new("L", (width * supersampling, height * supersampling), 0)
    pen = ImageDraw.Draw(mask)
    for index, contour in enumerate(contours):
        pen.polygon(_canvas_points(contour, size, left, top, supersampling), fill=0 if index else 255)
    return (mask.reduce(supersampling) if supersampling > 1 else mask), left, top


def paint_background(background: Background, size: int) -> Image.Image:
    """The background as an RGB image of `size` x `size` pixels."""
    image = Image.fromarray(background.cells).resize((size, size), Image.Resampling.BICUBIC)
    if background.pattern is not None and background.pattern_colour is not None:
        image.paste(_colour_tuple(background.pattern_colour), (0, 0), _pattern_mask(background, size))
    return image


def paint_shape(canvas: Image.Image, contours: Contours, paint: Paint) -> None:
    """Paint a shape onto `canvas` (square, RGB), in place."""
    size = canvas.width
    mask, left, top = coverage(contours, size)
    corners = paint.corners
    if np.ptp(corners, axis=(0, 1)).max() > 0.0:
        cells = np.rint(corners * 255.0).astype(np.uint8)
        fill = Image.fromarray(cells).resize(mask.size, Image.Resampling.BILINEAR)
        canvas.paste(fill, (left, top), mask)
    else:
        canvas.paste(_colour_tuple(corners[0, 0]), (left, top), mask)
    if paint.outline is not None:
        # The line is drawn twice as wide as wanted along every contour; the mask cuts its outer half off.
        scale = _SUPERSAMPLING
        line = Image.new("L", (mask.width * scale, mask.height * scale), 0)
        pen = ImageDraw.Draw(line)
        width = max(1, round(2.0 * paint.outline_width * size * scale))
        for contour in contours:
            points = _canvas_points(contour, size, left, top, scale)
            pen.line([*points, *points[:4]], fill=255, width=width, joint="curve")
        edge = ImageChops.darker(line.reduce(scale), mask)
        canvas.paste(_colour_tuple(paint.outline), (left, top), edge)


def paint_stroke(canvas: Image.Image, stroke: Stroke) -> None:
    """Paint a stroke onto `canvas` (square, RGB), in place, clipped to the canvas."""
    size = canvas.width
    half = 0.5 * stroke.width
    low, high = stroke.points.min(axis=0) - half, stroke.points.max(axis=0) + half
    box = np.clip(np.concatenate([low, high]), 0.0, 1.0)
    if box[0] >= box[2] or box[1] >= box[3]:
        return
    left, top, width, height = _pixel_crop(box, size)
    scale = 3
    mask = Image.new("L", (width * scale, height * scale), 0)
    pen = ImageDraw.Draw(mask)
    points = _canvas_points(stroke.points, size, left, top, scale)
    if len(stroke.points) == 1:
        x, y = points
        radius = half * size * scale
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    else:
        pen.line(points, fill=255, width=max(1, round(stroke.width * size * scale)))
    canvas.paste(_colour_tuple(stroke.colour), (left, top), mask.reduce(scale))


def _on_circle(angles: FloatArray) -> FloatArray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _crescent(cutter_radius: float, cutter_offset: float) -> FloatArray:
    """The unit disc without the disc of `cutter_radius` around (`cutter_offset`, 0)."""
    tip_x = (1.0 - cutter_radius**2 + cutter_offset**2) / (2.0 * cutter_offset)
    tip_y = math.sqrt(1.0 - tip_x**2)
    outer_tip = math.atan2(tip_y, tip_x)
    inner_tip = math.atan2(tip_y, tip_x - cutter_offset)
    outer = _on_circle(np.linspace(outer_tip, 2.0 * math.pi - outer_tip, 48))
    inner = _on_circle(np.linspace(2.0 * math.pi - inner_tip, inner_tip, 32)[1:-1])
    return np.concatenate([outer, inner * cutter_radius + np.array([cutter_offset, 0.0])])


def _pixel_crop(box: FloatArray, size: int) -> tuple[int, int, int, int]:
    """(left, top, width, height) of the whole pixels that `box` (xyxy, units of the image side) touches."""
    x0, y0, x1, y1 = (float(value) * size for value in box)
    left, top = max(0, math.floor(x0)), max(0, math.floor(y0))
    right, bottom = min(size, math.ceil(x1)), min(size, math.ceil(y1))
    return left, top, max(1, right - left), max(1, bottom - top)


def _canvas_points(points: FloatArray, size: int, left: int, top: int, scale: int) -> list[float]:
    """The points in the coordinates of a supersampled crop, flat (x, y, x, y, ...) as Pillow takes them."""
    # Minus a half, because Pillow's coordinates are those of pixel centres, and ours those of pixel edges.
    flat: list[float] = np.rint((points * size - (left, top)) * scale - 0.5).ravel().tolist()
    return flat


def _pattern_mask(background: Background, size: int) -> Image.Image:
    centres = ((np.arange(size, dtype=np.float32) + np.float32(0.5)) / np.float32(size)).astype(np.float32)
    turn = 2.0 * math.pi * background.pattern_frequency
    along_x = np.float32(turn * math.cos(background.pattern_angle))
    along_y = np.float32(turn * math.sin(background.pattern_angle))
    phase = np.float32(background.pattern_phase)
    # sin(a + b) from the sines of rows and columns: a few outer products instead of a sine for every pixel.
    row, column = centres * along_x + phase, centres * along_y
    wave = np.outer(np.sin(column), np.cos(row)) + np.outer(np.cos(column), np.sin(row))
    if background.pattern == "checks":
        row, column = centres * along_y + phase, centres * along_x
        wave *= np.outer(np.cos(column), np.cos(row)) + np.outer(np.sin(column), np.sin(row))
        wave *= np.float32(2.0)
    # Steeper than a sine, but soft enough to need no supersampling.
    level = np.clip(wave * np.float32(2.0) + np.float32(0.5), 0.0, 1.0) * np.float32(
        255.0 * background.pattern_strength
    )
    return Image.fromarray(level.astype(np.uint8))


def _colour_tuple(colour: FloatArray) -> tuple[int, int, int]:
    red, green, blue = (round(255.0 * value) for value in colour.tolist())
    return red, green, blue
