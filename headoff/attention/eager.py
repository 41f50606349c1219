"""The oracle: attention as in its formula, in the dtype of its inputs.

In float64 its results are the truth that other implementations are compared with; in float32, bfloat16 and float16
its errors are those of the dtype alone. It is written to be read, not to be fast: it computes the weights (B, H, Q, S),
and multiplies them by the gate.

Sources: Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), equation 1; Michel, Levy, Neubig,
"Are Sixteen Heads Really Better than One?" (arXiv 1905.10650), for the gate.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Context (B, H, Q, D) of `query` (B, H, Q, D) over `key` and `value` (B, H, S, D).

    See `headoff.attention.contract` for masks and gates. Differentiable any number of times, also with respect to
    mask and gate. Raises what torch raises for shapes and dtypes that do not fit.
    """
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    if attn_mask is None:
        weights = scores.softmax(-1)
    else:
        scores = _masked(scores, attn_mask)
        # The softmax of a row of -inf is NaN, and so is its gradient, even if it is multiplied by 0 later. So a
        # fully masked row gets finite scores before the softmax and zero weights after it.
        fully_masked = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(fully_masked, 0.0).softmax(-1).masked_fill(fully_masked, 0.0)
    if head_gate is not None:
        weights = weights * head_gate.to(weights)
    return weights @ value


def _masked(scores: Tensor, attn_mask: Tensor) -> Tensor:
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask.to(scores)
