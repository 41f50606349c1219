"""Deformable attention by its definition: the four cells around each point are gathered, weighted and added up.

All levels are taken together, and nothing is left to `grid_sample`: what a CUDA kernel does, in lines that can be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headoff.deformable.contract import Shapes, host_shapes


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
    tokens: list[Tensor] = []
    fractions: list[Tensor] = []
    first = 0
    # Level by level, as numbers broadcast faster than tensors of the levels' sizes.
    for level, (height, width) in enumerate(spatial_shapes):
        left, right, in_left, in_right = _cells(sampling_locations[:, :, :, level, :, 0], width)
        upper, lower, in_upper, in_lower = _cells(sampling_locations[:, :, :, level, :, 1], height)
        upper, lower = upper.mul_(width).add_(first), lower.mul_(width).add_(first)
        tokens += upper + left, upper + right, lower + left, lower + right
        fractions += in_left * in_upper, in_right * in_upper, in_left * in_lower, in_right * in_lower
        first += height * width
    return _by_level_and_corner(tokens), _by_level_and_corner(fractions)


def _by_level_and_corner(parts: Sequence[Tensor]) -> Tensor:
    """The (B, Q, H, P) of all levels' four corners as (B, Q, H, L, P, 4)."""
    # In memory corners come before points: whole runs of points are copied, and not number by number.
    return torch.stack(tuple(parts), -2).unflatten(-2, (-1, 4)).transpose(-1, -2)


def _cells(locations: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two cells around each location along one side, from 0 to `size` - 1, and their linear weights.

    A weight is 0 where its cell is outside. NaN has cell 0, and stays NaN.
    """
    position = locations * size - 0.5
    low = position.detach().floor()
    fraction = position - low
    first = (1 - fraction).masked_fill((low < 0) | (low >= size), 0)
    second = fraction.masked_fill((low < -1) | (low >= size - 1), 0)
    # Clamped as floats: a point may be further away than integers reach.
    low = low.nan_to_num_(0)
    high = (low + 1).clamp_(0, size - 1)
    return low.clamp_(0, size - 1).long(), high.long(), first, second
