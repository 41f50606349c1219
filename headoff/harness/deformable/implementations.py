"""Right implementations of deformable attention that round differently: what a tolerance has to admit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from headoff.attention import gate_context
from headoff.deformable import (
    DeformableAttention,
    Shapes,
    corners,
    gather_attention,
    grid_sample_attention,
)
from headoff.harness.deformable.cases import DeformableCase
from headoff.harness.operator.compare import standard_formulations

LARGE = 300_000
"""Entries of the dense matrix (queries x tokens of all heads) above which that formulation is left out."""


def dense_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """The dense equivalent: the weights of all tokens as a matrix (B, H, Q, N), times the values."""
    compute = torch.promote_types(value.dtype, torch.float32)
    tokens, bilinear = corners(spatial_shapes, sampling_locations.to(compute))
    weights = (attention_weights.to(compute)[..., None] * bilinear).flatten(3).transpose(1, 2)
    matrix = weights.new_zeros(*weights.shape[:3], value.shape[1])
    matrix = matrix.scatter_add(-1, tokens.flatten(3).transpose(1, 2), weights)
    context = (matrix @ value.to(compute).transpose(1, 2)).transpose(1, 2)
    if head_gate is not None:
        context = context * head_gate.to(compute)
    return context.to(value.dtype).contiguous()


def gated_afterwards(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """`grid_sample_attention` as a callable without a gate is called: its context is gated."""
    context = grid_sample_attention(value, spatial_shapes, sampling_locations, attention_weights)
    return gate_context(context, head_gate)


STANDARD: dict[str, DeformableAttention] = {
    "grid_sample": grid_sample_attention,
    "grid_sample, gated afterwards": gated_afterwards,
    "gather": gather_attention,
    "dense matrix": dense_attention,
}
"""The formulations that tolerances are measured on, by name."""


@standard_formulations.register
def _(case: DeformableCase) -> Iterable[DeformableAttention]:
    small = case.batch * case.heads * case.queries * case.tokens <= LARGE
    return STANDARD.values() if small else (grid_sample_attention, gather_attention)
