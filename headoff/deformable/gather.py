"""Deformable attention by its definition: the four cells around each point are gathered, weighted and added up.

All levels are taken together, and nothing is left to `grid_sample`: what a CUDA kernel does, in lines that can be read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.deformable.contract import Shapes, host_shapes, level_tensors


def gather_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Context (B, Q, H, D) of `value` (B, N, H, D) at `sampling_locations` (B, Q, H, L, P, 2).

    See `headoff.deformable.contract`. Positions, weights and sums are computed in float32 where the inputs are in half
    precision. Differentiable with respect to all tensors. Raises what torch raises for shapes and dtypes that do not
    fit.
    """
    compute = torch.promote_types(value.dtype, torch.float32)
    indices, fractions = corners(host_shapes(spatial_shapes), sampling_locations.to(compute))
    weights = attention_weights.to(compute)
    if head_gate is not None:
        weights = weights * head_gate[..., None].to(compute)
    weights = (weights[..., None] * fractions).transpose(1, 2).flatten(3)  # (B, H, Q, L * P * 4)
    indices = indices.transpose(1, 2).flatten(3)
    tokens = value.transpose(1, 2)  # (B, H, N, D)
    by_corner = indices.flatten(2)[..., None].expand(-1, -1, -1, tokens.shape[-1])
    gathered = tokens.gather(2, by_corner).unflatten(2, indices.shape[2:])  # (B, H, Q, L * P * 4, D)
    context = (weights[..., None, :] @ gathered.to(compute))[..., 0, :]
    return context.transpose(1, 2).to(value.dtype).contiguous()


def corners(spatial_shapes: Shapes, sampling_locations: Tensor) -> tuple[Tensor, Tensor]:
    """The four cells around each sampling point, and their bilinear weights.

    Args:
        spatial_shapes: (h, w) of each level.
        sampling_locations: (B, Q, H, L, P, 2).

    Returns:
        Tokens (B, Q, H, L, P, 4), int64, from 0 to N - 1 also for cells outside the level; and weights of the same
        shape, which are 0 there. They add up to 1 for a point among the centres of its level's cells. The weights
        are differentiable with respect to the locations.
    """
    four = corner_by_corner(spatial_shapes, sampling_locations)
    tokens, weights = (torch.stack(parts, -1) for parts in zip(*four, strict=True))
    return tokens.long(), weights


def corner_by_corner(
    spatial_shapes: Shapes, sampling_locations: Tensor, factors: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """What `corners` gives, for the upper left, upper right, lower left and lower right corner, with int32 tokens.

    Args:
        factors: (B, Q, H, L, P), which the weights are multiplied by.
    """
    like = heads, levels, points = sampling_locations.shape[2:5]
    sizes, tokens_before = level_tensors(spatial_shapes, sampling_locations.device)
    # All heads and levels in one dimension: a short innermost dimension is slow on a CPU.
    height, width, first = (
        x[:, None].expand(heads, levels, points).flatten() for x in (*sizes.unbind(1), tokens_before)
    )
    x, y = (one.flatten(2) for one in sampling_locations.unbind(-1))
    columns, rows = _cells(x, width), _cells(y, height)
    rows = [(row * width.int() + first.int(), weight) for row, weight in rows]
    if factors is not None:
        rows = [(row, weight * factors.flatten(2)) for row, weight in rows]
    return [
        ((row + column).unflatten(2, like), (in_row * in_column).unflatten(2, like))
        for row, in_row in rows
        for column, in_column in columns
    ]


def _cells(locations: Tensor, size: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The two cells around each location along one side, from 0 to `size` - 1, and their linear weights.

    A weight is 0 where its cell is outside. NaN has cell 0, and stays NaN.
    """
    size = size.to(locations.dtype)
    position = locations * size - 0.5
    low = position.detach().floor()
    fraction = position - low
    high = low + 1
    weights = [
        (1 - fraction).masked_fill((low < 0) | (low >= size), 0),
        fraction.masked_fill((high < 0) | (high >= size), 0),
    ]
    # Clamped as floats: a point may be further away than integers reach.
    nearest = [cell.clamp_(min=0).minimum(size - 1).nan_to_num_(0).int() for cell in (low, high)]
    return list(zip(nearest, weights, strict=True))
