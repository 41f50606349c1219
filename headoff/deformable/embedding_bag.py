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
    batch, tokens, heads, channels = value.shape
    shapes = host_shapes(spatial_shapes)
    compute = torch.promote_types(value.dtype, torch.float32)
    weights = attention_weights.to(compute)
    if head_gate is not None:
        weights = weights * head_gate[..., None].to(compute)
    # Row (b * N + n) * H + h of the table is what head h of token n has.
    table = value.to(compute).reshape(-1, channels)
    first = torch.arange(batch, dtype=torch.int32, device=value.device)[:, None] * (tokens * heads)
    first = first + torch.arange(heads, dtype=torch.int32, device=value.device)
    at_once = max(1, AT_ONCE // max(1, batch * math.prod(weights.shape[2:])))
    contexts = []
    for places, some in zip(sampling_locations.split(at_once, 1), weights.split(at_once, 1), strict=True):
        four = corner_by_corner(shapes, places.to(compute), some)
        indices, products = (torch.stack(parts, 3).flatten(3) for parts in zip(*four, strict=True))
        context = embedding_bag(
            indices.mul_(heads).add_(first[:, None, :, None]).flatten(0, 2),
            table,
            per_sample_weights=products.flatten(0, 2),
            mode="sum",
        )
        contexts.append(context.view(batch, -1, heads, channels))
    return torch.cat(contexts, 1).to(value.dtype)
