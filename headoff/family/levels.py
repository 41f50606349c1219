"""Several levels of memory tokens on one grid."""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.deformable import Shapes


def on_finest_grid(x: Tensor, shapes: Shapes) -> Tensor:
    """Numbers of tokens (..., N) as maps (..., h, w) on the grid of the first level, which is the finest.

    A coarser token's number is spread over the cells that the token covers, in proportion to the covered area. So the
    sum over a map is the sum over all tokens.
    """
    height, width = shapes[0]
    maps = x.new_zeros(*x.shape[:-1], height, width)
    for (rows, columns), level in zip(shapes, x.split([h * w for h, w in shapes], -1), strict=True):
        level = level.unflatten(-1, (rows, columns))
        if (rows, columns) == (height, width):
            maps = maps + level
        else:
            maps = maps + _shares(rows, height).to(x) @ level @ _shares(columns, width).to(x).T
    return maps


def on_level(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """Numbers of cells (..., h, w) as the means over the cells of a coarser grid, (..., rows, columns)."""
    rows, columns = (
        _shares(coarse, fine) / _shares(coarse, fine).sum(0)
        for coarse, fine in zip(shape, x.shape[-2:], strict=True)
    )
    return rows.to(x).T @ x @ columns.to(x)


def _shares(coarse: int, fine: int) -> Tensor:
    """(fine, coarse) float64: the part of each coarse cell of an axis that lies in each fine cell."""
    fine_edges = torch.arange(fine + 1).double() / fine
    coarse_edges = torch.arange(coarse + 1).double() / coarse
    low = torch.maximum(fine_edges[:-1, None], coarse_edges[None, :-1])
    high = torch.minimum(fine_edges[1:, None], coarse_edges[None, 1:])
    return (high - low).clamp(min=0) * coarse
