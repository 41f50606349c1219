"""Deformable attention as an embedding bag: a weighted sum of rows of a table, in one call, without gathering them.

`torch.nn.functional.embedding_bag` has a CPU kernel for that, which reads every row once and stores only the sums.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from headoff.deformable.contract import Shapes, host_shapes
from headoff.deformable.gather import corners


def embedding_bag_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Context (B, Q, H, D) of `value` (B, N, H, D) at `sampling_locations` (B, Q, H, L, P, 2).

    See `headoff.deformable.contract`. Differentiable with respect to all tensors. Raises what torch raises for shapes
    and dtypes that do not fit.
    """
    batch, tokens, heads, channels = value.shape
    compute = torch.promote_types(value.dtype, torch.float32)
    indices, fractions = corners(host_shapes(spatial_shapes), sampling_locations.to(compute))
    weights = attention_weights.to(compute)
    if head_gate is not None:
        weights = weights * head_gate[..., None].to(compute)
    # Corners before points, as they are in memory.
    weights = (weights[:, :, :, :, None] * fractions.transpose(-1, -2)).flatten(3)  # (B, Q, H, L * 4 * P)
    # Row (b * N + n) * H + h of the table is what head h of token n has.
    head = torch.arange(heads, device=value.device)[:, None]
    image = torch.arange(batch, device=value.device)[:, None, None, None] * (tokens * heads)
    rows = indices.transpose(-1, -2).flatten(3).mul_(heads).add_(head)
    if batch > 1:
        rows.add_(image)
    context = embedding_bag(
        rows.flatten(0, 2),
        value.to(compute).reshape(-1, channels),
        per_sample_weights=weights.flatten(0, 2),
        mode="sum",
    )
    return context.view(batch, -1, heads, channels).to(value.dtype)
