"""Where sampling points lie, kinds of attention weights, and the layouts (strides) of tensors of any shape.

A point is made of a cell and a fraction: it lies between the centres of the cells c and c + 1 of its level, at
c + fraction. Fractions keep away from 0 and 1, further in half precision, where positions are rounded so coarsely that
right implementations differ by a tenth of a cell.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from headoff.deformable import Shapes
from headoff.harness.operator.inputs import expanded_over, sliced

FAR = 300.0
"""Images by which a far point is off."""


def locations(kind: str, generator: Generator, sizes: tuple[int, ...], shapes: Shapes, half: bool) -> Tensor:
    """Float64 locations for `sizes` (B, Q, H, L, P) by a kind of `LOCATION_KINDS`. KeyError for an unknown kind.

    Args:
        half: whether they are to be rounded to half precision.
    """
    of_levels = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]
    shape = (*sizes, 2)
    margin = 0.25 if half else 0.02
    fraction = margin + (1 - 2 * margin) * torch.rand(shape, generator=generator, dtype=torch.float64)
    cell = torch.rand(shape, generator=generator, dtype=torch.float64)
    which = torch.rand(shape, generator=generator, dtype=torch.float64)
    position = LOCATION_KINDS[kind](cell, fraction, which, of_levels.expand(shape))
    return (position + 0.5) / of_levels


Place = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""From random numbers (0 to 1) for cells, fractions, more random numbers, and the levels' sizes: positions in cells."""


def _between(low: Tensor | float, high: Tensor) -> Place:
    """Cells from `low` to size + `high`, both included."""

    def place(cell: Tensor, fraction: Tensor, which: Tensor, size: Tensor) -> Tensor:
        return (low + cell * (size + high - low + 1)).floor() + fraction

    return place


def _inside(cell: Tensor, fraction: Tensor, which: Tensor, size: Tensor) -> Tensor:
    """All four cells in the level, where it has more than one row and column."""
    return (cell * (size - 1).clamp(min=1)).floor() + fraction


def _borders(cell: Tensor, fraction: Tensor, which: Tensor, size: Tensor) -> Tensor:
    """Half of the coordinates between the level and what is outside of it."""
    border = torch.where(cell < 0.5, -1.0, size - 1) + fraction
    return torch.where(which < 0.5, border, _inside(cell, fraction, which, size))


def _outside(cell: Tensor, fraction: Tensor, which: Tensor, size: Tensor) -> Tensor:
    """None of the four cells in the level: one coordinate at least is off by more than a cell."""
    beyond = torch.where(cell < 0.5, -2 - (4 * cell).floor(), size + (4 * cell - 2).floor()) + fraction
    inside = _inside(cell, fraction, which, size)
    x_beyond = which[..., :1] < 0.5
    return torch.where(torch.cat((x_beyond, ~x_beyond | (which[..., 1:] < 0.3)), -1), beyond, inside)


def _far(cell: Tensor, fraction: Tensor, which: Tensor, size: Tensor) -> Tensor:
    """Every third coordinate is further away than any table of cells reaches."""
    far = torch.where(cell < 0.5, -FAR, FAR) * size + fraction
    return torch.where(which < 0.33, far, _inside(cell, fraction, which, size))


def _one_place(cell: Tensor, fraction: Tensor, which: Tensor, size: Tensor) -> Tensor:
    """All points of a level in one place: all of them add to the gradient of the same four tokens."""
    cell, fraction, which = (tensor[:1, :1, :1, :, :1].expand_as(size) for tensor in (cell, fraction, which))
    return _inside(cell, fraction, which, size)


LOCATION_KINDS: dict[str, Place] = {
    "normal": _between(-2.0, torch.zeros(())),
    "inside": _inside,
    "borders": _borders,
    "outside": _outside,
    "far": _far,
    "one place": _one_place,
    # Exactly (0, 0), (0, 1), ...: the corners of the image, half a cell outside the centres.
    "corners": lambda cell, fraction, which, size: torch.where(cell < 0.5, -0.5, size - 0.5),
    # Exactly on the lines between cells, where the gradient of the locations jumps.
    "cell centres": lambda cell, fraction, which, size: (cell * size).floor(),
}
"""Where the points of a call lie; `normal` is up to a cell beyond the level."""


def _softmax(generator: Generator, sizes: tuple[int, ...]) -> Tensor:
    logits = torch.randn(sizes, generator=generator, dtype=torch.float64)
    return logits.flatten(-2).softmax(-1).view(sizes)


def _filled_up(generator: Generator, sizes: tuple[int, ...]) -> Tensor:
    """The last level has 2 points less than the first, the one before it 1 less."""
    weights = _softmax(generator, sizes)
    levels, points = sizes[-2:]
    missing = torch.arange(levels)[:, None] + torch.arange(points) >= points
    return weights.masked_fill(missing, 0.0)


WEIGHT_KINDS: dict[str, Callable[[Generator, tuple[int, ...]], Tensor]] = {
    "softmax": _softmax,
    "filled up": _filled_up,
    "one point": lambda generator, sizes: (
        _softmax(generator, sizes).flatten(-2).argsort(-1).eq(0).double().view(sizes)
    ),
    # The contract leaves the softmax to the caller: any numbers are weights.
    "any": lambda generator, sizes: torch.randn(sizes, generator=generator, dtype=torch.float64),
}


def heads_first(tensor: Tensor) -> Tensor:
    """Out of a buffer with heads before tokens or queries."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def reversed_dimensions(tensor: Tensor) -> Tensor:
    """Out of a buffer whose dimensions are in the opposite order: the last one has the largest stride."""
    order = [*range(tensor.dim() - 1, -1, -1)]
    return tensor.permute(order).contiguous().permute(order)


def every_second(tensor: Tensor) -> Tensor:
    """Every second element of the last dimension of a wider buffer."""
    buffer = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
    buffer[..., ::2] = tensor
    return buffer[..., ::2]


def packed(tensor: Tensor) -> Tensor:
    """One of three in the last dimension of a buffer, as one projection for several layers leaves it."""
    buffer = tensor.new_full((*tensor.shape[:-1], 3 * tensor.shape[-1]), torch.nan)
    buffer[..., tensor.shape[-1] : 2 * tensor.shape[-1]] = tensor
    return buffer[..., tensor.shape[-1] : 2 * tensor.shape[-1]]


def _contiguous(tensor: Tensor) -> Tensor:
    return tensor


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "heads first": heads_first,
    "reversed": reversed_dimensions,
    "every second": every_second,
    "packed": packed,
    "sliced": sliced,
    "expanded": expanded_over(0),
    "ones": lambda tensor: tensor.flatten()[:1].clone().view(()).expand(tensor.shape),
}
"""Layouts of a single tensor; `ones` is one number expanded to all elements, as the gradient of a sum is."""

LAYOUTS: dict[str, tuple[str, str, str]] = {
    **{name: (name,) * 3 for name in ("contiguous", "heads first", "reversed", "every second", "sliced")},
    "packed": ("packed", "contiguous", "packed"),
    # One image for all items, which differ in their queries.
    "expanded value": ("expanded", "contiguous", "contiguous"),
    "expanded locations": ("contiguous", "expanded", "expanded"),
    "mixed": ("heads first", "reversed", "every second"),
}
"""The layouts of value, sampling locations and attention weights in a call."""

assert all(kind in STRIDES for kind in itertools.chain(*LAYOUTS.values()))
