"""An attention in the dtype under test, in a model that computes in float32 at least.

What a low-precision kernel is to be judged by is its own rounding, not that of weights, norms and feed-forward blocks
in the same low precision, which would be many times larger and hide it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headoff.attention import Attention


class InDtype:
    """`attention`, called in `dtype` whatever the dtype around it: inputs are rounded to it, the context is widened.

    float16 cannot hold gradients as small as relevance has them. A power of two is lent to the gradient of the context
    and taken back from those of query, key and value, as loss scaling does in training.
    """

    def __init__(self, attention: Attention, dtype: torch.dtype) -> None:
        self.attention = attention
        self.dtype = dtype

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        if query.dtype == self.dtype:
            return self.attention(query, key, value, attn_mask, head_gate=head_gate)
        loan = _Loan()
        query_, key_, value_ = (_Narrow.apply(x, self.dtype, loan) for x in (query, key, value))
        gate = None if head_gate is None else head_gate.to(self.dtype)
        context = self.attention(query_, key_, value_, attn_mask, head_gate=gate)
        return _Widen.apply(context, query.dtype, loan)


class _Loan:
    """The power of two that one call's gradients are multiplied by on their way through the attention."""

    factor = 1.0


class _Narrow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, loan: _Loan) -> Tensor:
        ctx.wide, ctx.loan = x.dtype, loan
        return x.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].to(ctx.wide) / ctx.loan.factor, None, None


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, context: Tensor, dtype: torch.dtype, loan: _Loan) -> Tensor:
        ctx.narrow, ctx.loan = context.dtype, loan
        return context.to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        if ctx.narrow == torch.float16:
            largest = float(gradient.abs().max())
            ctx.loan.factor = 2.0 ** -math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0
        return (gradient * ctx.loan.factor).to(ctx.narrow), None, None
