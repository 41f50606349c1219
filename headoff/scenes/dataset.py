"""Seeded scenes of simple shapes with exact boxes: an unlimited detection data set without files.

A scene is a function of (split, seed) only. `plan_scene` makes the plan, in units of the image side, and `render_scene`
draws it at any size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from headoff.scenes.drawing import (
    REFERENCE_CELLS,
    SHAPE_NAMES,
    Background,
    Contours,
    FloatArray,
    Paint,
    Stroke,
    contours_box,
    coverage,
    paint_background,
    paint_shape,
    paint_stroke,
    rotated,
    shape_contours,
)

CLASS_NAMES: tuple[str, ...] = SHAPE_NAMES
"""The classes; a label is an index into this tuple."""

SPLITS: dict[str, int] = {"train": 0x7261696E, "held_out": 0x68656C64}
"""A constant per split, which is a part of the random seed, so that splits have different scenes."""

MAX_OBJECTS = 5
MIN_SIDE = 0.13
MAX_SIDE = 0.45
MAX_BOX_OVERLAP = 0.3
"""Largest intersection of two boxes of a scene, divided by the area of the smaller one."""
MIN_VISIBLE = 0.6
"""Smallest fraction of an object that is visible, as later objects may cover it."""

_MARGIN = 0.01
_MIN_CONTRAST = 0.38
_OWNER_CELLS = 96
# Larger than MIN_VISIBLE by the error of counting on a coarse grid.
_MIN_VISIBLE_CELLS = MIN_VISIBLE + 0.04
_TRIES_PER_SIDE = 12
_SHRINKING = (1.0, 0.8, 0.65, 0.5, 0.3)


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 (H, W, 3), RGB.
        boxes: float32 (n, 4), xyxy in pixels (0 is the edge of the first pixel, not its centre), the exact extents of
            the whole object, even if another object covers a part of it.
        labels: int64 (n,).
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class PlannedObject:
    """An object before it is drawn: its label, its contours (units of the image side) and its paint."""

    label: int
    contours: Contours
    paint: Paint


@dataclass(frozen=True)
class ScenePlan:
    """A scene before it is drawn at some size. Objects are in the order of painting: later ones cover earlier ones."""

    background: Background
    strokes_below: tuple[Stroke, ...]
    objects: tuple[PlannedObject, ...]
    strokes_above: tuple[Stroke, ...]

    def boxes(self, size: int) -> NDArray[np.float32]:
        """The boxes, float32 (n, 4), xyxy in pixels of an image of `size` x `size`."""
        return np.stack([contours_box(item.contours) * size for item in self.objects]).astype(np.float32)

    def labels(self) -> NDArray[np.int64]:
        """The labels, int64 (n,)."""
        return np.array([item.label for item in self.objects], dtype=np.int64)

    def masks(self, size: int) -> NDArray[np.uint8]:
        """uint8 (n, size, size): how much of each pixel an object covers, 0..255, without regard to other objects."""
        masks = np.zeros((len(self.objects), size, size), dtype=np.uint8)
        for mask, item in zip(masks, self.objects, strict=True):
            crop, left, top = coverage(item.contours, size)
            mask[top : top + crop.height, left : left + crop.width] = np.asarray(crop)
        return masks


def draw_scene(seed: int, size: int = 192, split: str = "train") -> Scene:
    """The scene of a seed (>= 0), `size` x `size` pixels.

    The same arguments always give the same scene, except that antialiased pixels may differ slightly between versions
    of Pillow.

    Raises:
        ValueError: the split is unknown, the seed negative or the size below 16.
    """
    return render_scene(plan_scene(seed, split), size)


def plan_scene(seed: int, split: str = "train") -> ScenePlan:
    """The plan of the scene of a seed.

    Raises:
        ValueError: the split is unknown, or the seed negative.
    """
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"the seed {seed} is negative; seeds count from 0")
    # Only PCG64 and `random` are the same in all versions of NumPy; `default_rng` and other distributions may change.
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([SPLITS[split], seed])))
    background = _background(rng)
    count = 1 + _integer(rng, MAX_OBJECTS)
    below = tuple(_stroke(rng) for _ in range(_integer(rng, 4)))
    objects = _objects(rng, count, background)
    above = tuple(_stroke(rng) for _ in range(_integer(rng, 3)))
    return ScenePlan(background, below, objects, above)


def render_scene(plan: ScenePlan, size: int = 192) -> Scene:
    """Draw a plan at `size` x `size` pixels.

    Raises:
        ValueError: the size is below 16.
    """
    if size < 16:
        raise ValueError(f"a scene of {size} pixels is too small to draw; use 16 or more")
    canvas = paint_background(plan.background, size)
    for stroke in plan.strokes_below:
        paint_stroke(canvas, stroke)
    for item in plan.objects:
        paint_shape(canvas, item.contours, item.paint)
    for stroke in plan.strokes_above:
        paint_stroke(canvas, stroke)
    return Scene(np.array(canvas), plan.boxes(size), plan.labels())


class SceneDataset(Dataset[Scene]):
    """The scenes of consecutive seeds: item i is `draw_scene(first_seed + i, size, split)`.

    With `count=None` it has no end: `len` is 2**40, which a sequential sampler takes, but a shuffling one
    does not (nor is there a point in shuffling independent scenes). It holds four plain values, so it pickles
    and works in any worker. Raises ValueError, at construction, for what `draw_scene` raises it for and for a
    negative count.
    """

    UNLIMITED = 2**40

    def __init__(
        self, size: int = 192, count: int | None = None, split: str = "train", first_seed: int = 0
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"there is no split {split!r}; choose one of {', '.join(SPLITS)}")
        if first_seed < 0:
            raise ValueError(f"the first seed {first_seed} is negative; seeds count from 0")
        if size < 16:
            raise ValueError(f"a scene of {size} pixels is too small to draw; use 16 or more")
        if count is not None and count < 0:
            raise ValueError(f"the count {count} is negative; use 0 or more, or None for no end")
        self.size = size
        self.count = count
        self.split = split
        self.first_seed = first_seed

    def __len__(self) -> int:
        return self.UNLIMITED if self.count is None else self.count

    def __getitem__(self, index: int) -> Scene:
        """The scene at `index`, from 0.

        Raises:
            IndexError: there is no such scene.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"there is no scene {index}; the data set has {len(self)}, counted from 0")
        return draw_scene(self.first_seed + int(index), self.size, self.split)


def collate(scenes: Sequence[Scene]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A batch of scenes of one size, for `augment` and training (a `collate_fn` of a DataLoader).

    Returns:
        Images uint8 (B, 3, H, W); B boxes float32 (n, 4), cxcywh as fractions of the image; B labels int64 (n,).
    """
    images = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).contiguous()
    height, width = images.shape[-2:]
    scale = np.array([width, height, width, height], dtype=np.float32)
    boxes = []
    for scene in scenes:
        xyxy = scene.boxes / scale
        middle, extent = (xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]
        boxes.append(torch.from_numpy(np.concatenate([middle, extent], axis=1).astype(np.float32)))
    return images, boxes, [torch.from_numpy(scene.labels) for scene in scenes]


_CHANNEL_ORDERS = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])


def augment(
    images: Tensor, boxes: Sequence[Tensor], generator: torch.Generator | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Rotate, mirror and recolour images at random. Labels do not change.

    Geometry is one of the 8 symmetries of the square. Colours are a random order of the channels and, for half of the
    images, inversion.

    Args:
        images: uint8 (B, 3, S, S), on the CPU.
        boxes: B float tensors (n, 4), cxcywh in 0..1.
        generator: of random numbers.

    Returns:
        New images and boxes of the same shapes and dtypes.

    Raises:
        ValueError: images are not square uint8 RGB, or the number of boxes is not that of images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be uint8 (B, 3, S, S), not {images.dtype} {tuple(images.shape)}")
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"images must be square to be turned, not {images.shape[2]} x {images.shape[3]}")
    batch = images.shape[0]
    if len(boxes) != batch:
        raise ValueError(f"there are {batch} images but boxes for {len(boxes)}; give one tensor for each")
    if batch == 0:
        return images.clone(), []
    transposed, mirrored, flipped, inverted = (
        torch.randint(0, 2, (4, batch), generator=generator).bool().unbind()
    )
    orders = _CHANNEL_ORDERS[torch.randint(0, len(_CHANNEL_ORDERS), (batch,), generator=generator)]

    result = images[torch.arange(batch)[:, None], orders]
    result[transposed] = result[transposed].transpose(2, 3)
    result[mirrored] = result[mirrored].flip(3)
    result[flipped] = result[flipped].flip(2)
    # Inverting is flipping all bits, for which no subset has to be copied.
    result ^= (inverted.to(torch.uint8) * 255)[:, None, None, None]

    counts = [len(item) for item in boxes]
    owner = torch.repeat_interleave(torch.arange(batch), torch.tensor(counts))
    joined = torch.cat(list(boxes))
    joined = torch.where(transposed[owner, None], joined[:, [1, 0, 3, 2]], joined)
    x, y, width, height = joined.unbind(1)
    x = torch.where(mirrored[owner], 1 - x, x)
    y = torch.where(flipped[owner], 1 - y, y)
    return result, list(torch.split(torch.stack([x, y, width, height], dim=1), counts))


def _integer(rng: np.random.Generator, stop: int) -> int:
    """A whole number in 0..stop-1."""
    return int(rng.random() * stop)


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()


def _resized(cells: FloatArray, side: int) -> FloatArray:
    """float (h, w, 3) smoothly resized to (side, side, 3), float32 inside."""
    planes = [
        np.asarray(
            Image.fromarray(np.ascontiguousarray(cells[..., channel], dtype=np.float32)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for channel in range(3)
    ]
    return np.stack(planes, axis=-1)


def _background(rng: np.random.Generator) -> Background:
    base = rng.random(3)
    kind = rng.random()
    if kind < 0.4:
        # A gradient between the four corners.
        strength = _between(rng, 0.05, 0.3)
        field = base + strength * _resized(2.0 * rng.random((2, 2, 3)) - 1.0, REFERENCE_CELLS)
    else:
        # Smooth noise: octaves, each finer and weaker than the one before; gray and colour in a random mix.
        strength = _between(rng, 0.05, 0.28)
        colourful = rng.random()
        total = np.zeros((24, 24, 3))
        for octave, side in enumerate((3, 6, 12, 24)):
            noise = 2.0 * rng.random((side, side, 3)) - 1.0
            noise = colourful * noise + (1.0 - colourful) * noise[..., :1]
            total += 0.6**octave * (_resized(noise, 24) if side < 24 else noise)
        field = base + strength * _resized(total, REFERENCE_CELLS)
    cells = np.rint(np.clip(field, 0.0, 1.0) * 255.0).astype(np.uint8)
    style = rng.random()
    if style < 0.6:
        return Background(cells)
    return Background(
        cells,
        pattern="stripes" if style < 0.8 else "checks",
        pattern_colour=rng.random(3),
        pattern_strength=_between(rng, 0.06, 0.2),
        pattern_frequency=_between(rng, 3.0, 14.0),
        pattern_angle=_between(rng, 0.0, math.pi),
        pattern_phase=_between(rng, 0.0, 2.0 * math.pi),
    )


def _stroke(rng: np.random.Generator) -> Stroke:
    """A distractor: a scribble, a straight line or a dot, too thin to be taken for an object or to hide one."""
    kind = rng.random()
    colour = rng.random(3)
    start = rng.random((1, 2))
    if kind < 0.3:
        return Stroke(start, _between(rng, 0.015, 0.035), colour)
    width = _between(rng, 0.005, 0.012)
    heading = _between(rng, 0.0, 2.0 * math.pi)
    if kind < 0.6:
        length = _between(rng, 0.15, 0.8)
        end = start + length * np.array([[math.cos(heading), math.sin(heading)]])
        return Stroke(np.concatenate([start, end]), width, colour)
    steps = 28
    # A walk whose heading changes smoothly: a constant bend and a slowly varying one.
    phase = np.linspace(0.0, _between(rng, 2.0, 10.0), steps) + _between(rng, 0.0, 2.0 * math.pi)
    headings = heading + _between(rng, -3.0, 3.0) * np.linspace(0.0, 1.0, steps)
    headings = headings + _between(rng, 0.5, 2.0) * np.sin(phase)
    walk = np.cumsum(np.stack([np.cos(headings), np.sin(headings)], axis=1), axis=0)
    return Stroke(start + walk * (_between(rng, 0.3, 1.0) / steps), width, colour)


def _objects(rng: np.random.Generator, count: int, background: Background) -> tuple[PlannedObject, ...]:
    """Between one and `count` objects; an object that fits nowhere is left out."""
    objects: list[PlannedObject] = []
    boxes = np.zeros((0, 4))
    # For a coarse grid: the topmost object of each cell, and the total number of cells of each object.
    owner = np.full((_OWNER_CELLS, _OWNER_CELLS), -1, dtype=np.int8)
    cells: list[int] = []
    ground = background.cells[::2, ::2].reshape(REFERENCE_CELLS // 2, REFERENCE_CELLS // 2, 3) / 255.0
    for _ in range(count):
        label = _integer(rng, len(CLASS_NAMES))
        proportion, aspect = rng.random(), _between(rng, 0.87, 1.15)
        upright = shape_contours(CLASS_NAMES[label], proportion, aspect)
        angle = _between(rng, 0.0, 2.0 * math.pi)
        side = _between(rng, MIN_SIDE, MAX_SIDE)
        placed = _place(rng, upright, angle, side, boxes, owner, cells)
        if placed is None:
            continue
        contours, box = placed
        crossed = _intersections(box[None], boxes)[0] > 0.0
        near = [objects[index].paint.mean for index in np.flatnonzero(crossed)]
        paint = _paint(rng, _ground_under(ground, box), near, float((box[2:] - box[:2]).max()))
        objects.append(PlannedObject(label, contours, paint))
        boxes = np.concatenate([boxes, box[None]])
    return tuple(objects)


def _place(
    rng: np.random.Generator,
    upright: Contours,
    angle: float,
    side: float,
    boxes: FloatArray,
    owner: NDArray[np.int8],
    cells: list[int],
) -> tuple[Contours, FloatArray] | None:
    """Contours at a random place without too much overlap, and their box; None if no place was found.

    Adds the object to `owner` and `cells`.
    """
    for shrinking in _SHRINKING:
        contours = rotated(upright, angle, max(MIN_SIDE, side * shrinking))
        extent = contours_box(contours)[2:]
        corners = _MARGIN + rng.random((_TRIES_PER_SIDE, 2)) * (1.0 - 2.0 * _MARGIN - extent)
        candidates = np.concatenate([corners, corners + extent], axis=1)
        if len(boxes):
            areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
            smaller = np.minimum(areas, extent[0] * extent[1])
            fits = (_intersections(candidates, boxes) <= MAX_BOX_OVERLAP * smaller).all(axis=1)
        else:
            fits = np.ones(_TRIES_PER_SIDE, dtype=bool)
        for index in np.flatnonzero(fits):
            moved = tuple(contour + corners[index] for contour in contours)
            if _claim(moved, owner, cells):
                return moved, candidates[index]
    return None


def _claim(contours: Contours, owner: NDArray[np.int8], cells: list[int]) -> bool:
    """Add an object on top of the others to `owner` and `cells`, unless it hides too much of one; whether it did."""
    mask, left, top = coverage(contours, _OWNER_CELLS, supersampling=1)
    inside = np.asarray(mask) > 127
    window = owner[top : top + mask.height, left : left + mask.width]
    hidden = window[inside]
    if hidden.size and hidden.max() >= 0:
        for index in np.unique(hidden[hidden >= 0]).tolist():
            visible = int((owner == index).sum()) - int((hidden == index).sum())
            if visible < _MIN_VISIBLE_CELLS * cells[index]:
                return False
    window[inside] = len(cells)
    cells.append(int(inside.sum()))
    return True


def _intersections(first: FloatArray, second: FloatArray) -> FloatArray:
    """Areas (k, n) of the intersections of boxes (k, 4) and (n, 4), xyxy."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    return np.asarray(np.clip(high - low, 0.0, None).prod(axis=-1))


def _ground_under(ground: FloatArray, box: FloatArray) -> FloatArray:
    """The colours (k, 3) of the coarse background under and just around a box."""
    side = len(ground)
    x0, y0 = (max(0, math.floor(value * side)) for value in box[:2].tolist())
    x1, y1 = (min(side, math.ceil(value * side)) for value in box[2:].tolist())
    return ground[y0:y1, x0:x1].reshape(-1, 3)


def _paint(rng: np.random.Generator, ground: FloatArray, near: list[FloatArray], longer_side: float) -> Paint:
    """A random paint with as much contrast as possible to all colours of `ground` (k, 3) and `near`."""
    candidates = rng.random((12, 3))
    others = np.concatenate([ground, np.stack(near)]) if near else ground
    # Squared distances by |a|^2 - 2ab + |b|^2, whose largest part is a single small matrix product.
    squared = (
        (candidates**2).sum(axis=1)[:, None] - 2.0 * candidates @ others.T + (others**2).sum(axis=1)[None, :]
    ).min(axis=1)
    enough = np.flatnonzero(squared >= _MIN_CONTRAST**2)
    colour = candidates[enough[0] if len(enough) else int(squared.argmax())]
    corners = np.broadcast_to(colour, (2, 2, 3))
    if rng.random() < 0.35:
        # Gentle, so that the whole shape keeps the contrast of its middle.
        slope = _between(rng, 0.06, 0.14)
        direction = _between(rng, 0.0, 2.0 * math.pi)
        across, down = math.cos(direction), math.sin(direction)
        change = 0.5 * slope * np.array([[-across - down, across - down], [-across + down, across + down]])
        corners = np.clip(colour + change[..., None] * (0.5 + rng.random(3)), 0.0, 1.0)
    if rng.random() < 0.3:
        target = 0.0 if rng.random() < 0.5 else 1.0
        outline = colour + (target - colour) * _between(rng, 0.4, 0.8)
        return Paint(corners, outline, longer_side * _between(rng, 0.025, 0.045))
    return Paint(corners)
