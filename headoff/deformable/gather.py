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
    shapes, first = level_tensors(spatial_shapes, sampling_locations.device)
    sizes = shapes.flip(1)[:, None]  # (L, 1, 2): w, h
    position = sampling_locations * sizes - 0.5
    cell = position.detach().floor()
    fraction = position - cell
    by_corner = torch.tensor(((0, 0), (1, 0), (0, 1), (1, 1)), device=cell.device)  # x, y
    around = cell[..., None, :] + by_corner  # (B, Q, H, L, P, 4, 2)
    along_x, along_y = torch.where(
        by_corner.bool(), fraction[..., None, :], 1 - fraction[..., None, :]
    ).unbind(-1)
    inside = ((around >= 0) & (around < sizes[..., None, :])).all(-1)
    # Clamped as floats: a point may be further away than integers reach.
    x, y = (
        around.nan_to_num(0)
        .clamp(torch.zeros_like(sizes[..., None, :]), sizes[..., None, :] - 1)
        .long()
        .unbind(-1)
    )
    tokens = first[:, None, None] + y * sizes[..., 0, None] + x
    known = inside | around.isnan().any(-1)  # NaN stays NaN
    return tokens, torch.where(known, along_x * along_y, 0.0)
