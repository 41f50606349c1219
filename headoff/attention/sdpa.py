"""torch's fused attention with a gate on its context, skipping heads that are off."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention.contract import gate_context
from headoff.attention.skipping import attend_groups, plan_groups


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Context (B, H, Q, D) of `query` (B, H, Q, D) over `key` and `value` (B, H, S, D), in their dtype.

    See `headoff.attention.contract` for masks and gates. On the CPU, rows of heads that are off are skipped if that is
    faster (`headoff.attention.skipping`); this needs a gate on the CPU that does not require a gradient.
    Differentiable once, like torch's fused kernels. Raises what torch raises for shapes and dtypes that do not fit.
    """
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    groups = None if head_gate is None else plan_groups(head_gate, query, key.shape[-2])
    if groups is None:
        context = _attend(query, key, value, attn_mask)
    else:
        context = attend_groups(groups, _attend, query, key, value, attn_mask)
    return gate_context(context, head_gate)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Ungated context, zero in rows whose keys are all masked."""
    if attn_mask is None:
        return scaled_dot_product_attention(query, key, value)
    # For a fully masked row, some backends return 0, others NaN or the mean of all values. So such a row attends all
    # keys, and its context is then set to 0. As no NaN occurs, its gradients are 0 as well.
    if attn_mask.dtype == torch.bool:
        fully_masked = ~attn_mask.any(-1, keepdim=True)
        attn_mask = attn_mask | fully_masked
    else:
        attn_mask = attn_mask.to(query)
        fully_masked = (attn_mask == -math.inf).all(-1, keepdim=True)
        attn_mask = attn_mask.masked_fill(fully_masked, 0.0)
    return scaled_dot_product_attention(query, key, value, attn_mask).masked_fill(fully_masked, 0.0)
