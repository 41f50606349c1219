"""Deformable attention by `torch.nn.functional.grid_sample`, one level at a time: the usual reference.

It is what Deformable DETR, mmcv and transformers ship as their pure PyTorch form (Zhu et al., arXiv 2010.04159), with
head gates added.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from headoff.deformable.contract import Shapes, host_shapes


def grid_sample_attention(
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
    shapes = host_shapes(spatial_shapes)
    batch, queries, heads, levels, points, _ = sampling_locations.shape
    grids = 2 * sampling_locations - 1
    sampled = []
    tokens_by_level = value.split([height * width for height, width in shapes], dim=1)
    for level, ((height, width), tokens) in enumerate(zip(shapes, tokens_by_level, strict=True)):
        # grid_sample takes channels as an image (n, D, h, w) and points as a grid (n, Q, P, 2), with n = B * H.
        # Contiguous: in half precision on a CPU, torch 2.14's grid_sample reads beyond an image that has gaps.
        image = tokens.permute(0, 2, 3, 1).reshape(batch * heads, value.shape[-1], height, width).contiguous()
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sampled.append(grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = attention_weights if head_gate is None else attention_weights * head_gate[..., None]
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    context = (torch.cat(sampled, -1) * weights).sum(-1)
    return context.view(batch, heads, value.shape[-1], queries).permute(0, 3, 1, 2).contiguous()
