"""An attention without a backward pass in the suites: its own context, and the gradients of the formula.

With `--forward-only` the attention under test is wrapped in `ForwardOnlyAttention`. It never sees a tensor that
requires a gradient, and is called under `torch.no_grad`. Where the suites need gradients (relevance maps), they are
those of the formula, softmax(Q K^T / sqrt(D) + mask) g V or that of deformable attention, at the inputs that the
attention was called with. So maps show what its context does to the layers after it. They say nothing of its own
weights, which a kernel does not give away: those of an attention that leaves keys out on purpose are not the formula's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headoff.attention import AdaptedAttention
from headoff.attention.eager import eager
from headoff.deformable import AdaptedDeformableAttention, grid_sample_attention
from headoff.harness.contracts import DEFORMABLE, Contract

NEEDS_BACKWARD = ("crossed-backward", "gate-gradient")
"""Side effects of backward passes alone."""


class ForwardOnlyAttention(AdaptedAttention):
    """The forward pass of an attention with the backward pass of the formula."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__  # the user's callable may not be hashable

    attention: Any
    formula: Any

    def __init__(self, attention: Any, label: str, contract: Contract) -> None:
        adapted = isinstance(attention, (AdaptedAttention, AdaptedDeformableAttention))
        super().__init__(attention.call if adapted else attention, label, None, takes_gate=True)
        object.__setattr__(self, "attention", attention)  # the class is frozen
        object.__setattr__(self, "formula", grid_sample_attention if contract is DEFORMABLE else eager)

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        plain = [_detached(argument) for argument in arguments]
        with torch.no_grad():
            context = self.attention(*plain, **{name: _detached(value) for name, value in keywords.items()})
        needed = any(
            isinstance(value, Tensor) and value.requires_grad for value in (*arguments, *keywords.values())
        )
        if not (needed and torch.is_grad_enabled()):
            return context
        of_formula = self.formula(*arguments, **keywords)
        comparable = isinstance(context, Tensor) and context.shape == of_formula.shape
        return _GradientOf.apply(of_formula, context) if comparable else context


class _GradientOf(torch.autograd.Function):
    """The second tensor, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, context: Tensor) -> Tensor:
        ctx.dtype = source.dtype
        return context.view_as(context)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


def _detached(value: Any) -> Any:
    """Of the same memory, and with the same count of what was written into it."""
    return value.detach() if isinstance(value, Tensor) else value


def is_forward_only(attention: Any) -> bool:
    """Whether only the forward pass of this attention is under test, counted or not."""
    inner = getattr(attention, "attention", attention)  # of one that is counted
    return isinstance(attention, ForwardOnlyAttention) or isinstance(inner, ForwardOnlyAttention)


def has_backward(attention: Any, contract: Contract, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a small call of the user's own callable has a backward pass, right or wrong."""
    from headoff.harness.checks.candidate import Candidate

    candidate = Candidate(attention, contract, dtype, device)
    try:
        results = candidate.call(attention, candidate.tensors(candidate.case()))
        return results["context"].requires_grad
    except Exception:
        return False
