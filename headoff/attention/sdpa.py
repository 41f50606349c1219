"""The fast path: torch's fused attention, the gate on its context, and no work for heads that are off."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention.contract import gate_context
from headoff.attention.skipping import attend_groups, plan


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Context (B, H, Q, D) of `query` (B, H, Q, D) over `key` and `value` (B, H, S, D), in their dtype.

    See `headoff.attention.contract` for masks and gates. On the CPU, rows of heads that a gate of 0
    switches off are not computed where enough of them are off for that to be faster
    (`headoff.attention.skipping`); keep the gate on the CPU for it, and without `requires_grad`.
    Raises what torch raises for shapes and dtypes that do not fit. Differentiable once: torch's fused
    backward passes have no backward pass of their own.
    """
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    groups = None if head_gate is None else plan(head_gate, query, key.shape[-2])
    if groups is None:
        context = _attend(query, key, value, attn_mask)
    else:
        context = attend_groups(groups, _attend, query, key, value, attn_mask)
    return gate_context(context, head_gate)


def _attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Ungated context, zero in rows whose keys are all masked."""
    if attn_mask is None:
        return scaled_dot_product_attention(query, key, value)
    # What a backend makes of a row without keys (0, NaN, a mean of all values) is its own affair and changes
    # from one to the next. Such a row is allowed all keys and its context then cut off, in both directions:
    # with no NaN anywhere, its gradients are 0 and not 0 * NaN.
    if attn_mask.dtype == torch.bool:
        fully_masked = ~attn_mask.any(-1, keepdim=True)
        attn_mask = attn_mask | fully_masked
    else:
        attn_mask = attn_mask.to(query)
        fully_masked = (attn_mask == -math.inf).all(-1, keepdim=True)
        attn_mask = attn_mask.masked_fill(fully_masked, 0.0)
    return scaled_dot_product_attention(query, key, value, attn_mask).masked_fill(fully_masked, 0.0)
