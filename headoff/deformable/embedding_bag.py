"""Deformable attention as an embedding bag: a weighted sum of rows of a table, in one call, without gathering them.

`torch.nn.functional.embedding_bag` has a CPU kernel for that, which reads every row once and stores only the sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from headoff.deformable.contract import Shapes, host_shapes
from headoff.deformable.gather import corner_by_corner

AT_ONCE = 2**18
"""Sampling points whose corners are computed at once: what is written of them is then read again from a CPU's cache."""


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
    batch = value.shape[0]
    queries = sampling_locations.shape[1]
    compute = torch.promote_types(value.dtype, torch.float32)
    table = value.to(compute)
    points = math.prod(sampling_locations.shape[2:5])
    at_once = max(1, AT_ONCE // (batch * points))
    contexts = []
    for start in range(0, max(queries, 1), at_once):
        rows = slice(start, start + at_once)
        weights = attention_weights[:, rows].to(compute)
        if head_gate is not None:
            gate = head_gate if head_gate.shape[1] == 1 else head_gate[:, rows]
            weights = weights * gate[..., None].to(compute)
        contexts.append(
            _context(table, host_shapes(spatial_shapes), sampling_locations[:, rows].to(compute), weights)
        )
    return torch.cat(contexts, 1).to(value.dtype)


def _context(value: Tensor, spatial_shapes: Shapes, sampling_locations: Tensor, weights: Tensor) -> Tensor:
    """Context (B, Q, H, D) of some queries."""
    batch, tokens, heads, channels = value.shape
    four = corner_by_corner(spatial_shapes, sampling_locations, weights)
    indices, products = (torch.stack(parts, 3).flatten(3) for parts in zip(*four, strict=True))
    # Row (b * N + n) * H + h of the table is what head h of token n has.
    first = torch.arange(batch, dtype=torch.int32, device=value.device)[:, None] * (tokens * heads)
    first = first + torch.arange(heads, dtype=torch.int32, device=value.device)
    context = embedding_bag(
        indices.mul_(heads).add_(first[:, None, :, None]).flatten(0, 2),
        value.reshape(-1, channels),
        per_sample_weights=products.flatten(0, 2),
        mode="sum",
    )
    return context.view(batch, -1, heads, channels)
