"""Attention in steps, from which the wrong attentions, and some of the right ones, are made.

A call is a namespace that is filled step by step. A step is a function of that namespace, and its result is stored
there under the step's name. So a wrong attention is a right one with one step replaced:

    plain(gate=lambda s: s.gate.flip(1))            # heads in reversed order; autograd differentiates it
    by_hand(dquery=lambda s: s.dscores @ s.key)     # the context is right, the query's gradient lacks the scale

The namespace initially has `query`, `key` and `value` in the dtype of computation; `asked`, the dtype of the call;
`attn_mask` and `head_gate` as passed; `mask`, which is `attn_mask` expanded to (B, H, Q, S), or None; and `gate` (B,
H, Q, 1), ones if none is passed. The steps `mask` and `gate` are skipped in calls without them. In the backward pass
it also has `grad_output`, as autograd passes it, and `gradient`, the same in the dtype of computation.

Half precision is computed in float32 and rounded at the end, as kernels do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headoff.attention import Attention

Step = Callable[[SimpleNamespace], Any]


def scale(s: SimpleNamespace) -> float:
    return 1 / math.sqrt(s.query.shape[-1])


def scores(s: SimpleNamespace) -> Tensor:
    return s.query @ s.key.transpose(-2, -1) * s.scale


def masked(s: SimpleNamespace) -> Tensor:
    if s.mask is None:
        return s.scores
    if s.mask.dtype == torch.bool:
        return s.scores.masked_fill(~s.mask, -math.inf)
    return s.scores + s.mask


def fully_masked(s: SimpleNamespace) -> Tensor:
    """Rows (B, H, Q, 1) whose keys are all masked."""
    return (s.masked == -math.inf).all(-1, keepdim=True)


def filled(s: SimpleNamespace) -> Tensor:
    """Scores without fully masked rows, so that every row has a softmax."""
    return s.masked.masked_fill(s.fully_masked, 0.0)


def softmax(s: SimpleNamespace) -> Tensor:
    return s.filled.softmax(-1)


def weights(s: SimpleNamespace) -> Tensor:
    return s.softmax.masked_fill(s.fully_masked, 0.0)


def gated(s: SimpleNamespace) -> Tensor:
    return s.weights * s.gate


def context(s: SimpleNamespace) -> Tensor:
    return s.gated @ s.value


FORWARD: dict[str, Step] = {
    "gate": lambda s: s.gate,
    "mask": lambda s: s.mask,
    "scale": scale,
    "scores": scores,
    "masked": masked,
    "fully_masked": fully_masked,
    "filled": filled,
    "softmax": softmax,
    "weights": weights,
    "gated": gated,
    "context": context,
}


def gated_gradient(s: SimpleNamespace) -> Tensor:
    """Gradient of the ungated context, (B, H, Q, D)."""
    return s.gradient * s.gate


def dweights(s: SimpleNamespace) -> Tensor:
    return s.gated_gradient @ s.value.transpose(-2, -1)


def delta(s: SimpleNamespace) -> Tensor:
    return (s.weights * s.dweights).sum(-1, keepdim=True)


def dscores(s: SimpleNamespace) -> Tensor:
    return s.weights * (s.dweights - s.delta)


def dquery(s: SimpleNamespace) -> Tensor:
    return s.dscores @ s.key * s.scale


def dkey(s: SimpleNamespace) -> Tensor:
    return s.dscores.transpose(-2, -1) @ s.query * s.scale


def dvalue(s: SimpleNamespace) -> Tensor:
    return s.weights.transpose(-2, -1) @ s.gated_gradient


BACKWARD: dict[str, Step] = {
    "gated_gradient": gated_gradient,
    "dweights": dweights,
    "delta": delta,
    "dscores": dscores,
    "dquery": dquery,
    "dkey": dkey,
    "dvalue": dvalue,
}


def plain(**steps: Step) -> Attention:
    """Attention with these steps replaced, differentiated by autograd."""
    return _plain(FORWARD | _known(steps, FORWARD))


def _plain(steps: Mapping[str, Step]) -> Attention:
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return run(steps, start(query, key, value, attn_mask, head_gate)).context.to(query.dtype)

    return attention


def by_hand(**steps: Step) -> Attention:
    """Attention with a hand-written backward pass, with these steps replaced in that pass only.

    It recomputes the weights, so its first steps are those of the forward pass.
    """
    backward = FORWARD | BACKWARD
    backward |= _known(steps, backward)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return ByHand.apply(query, key, value, attn_mask, head_gate, backward)

    return attention


class ByHand(torch.autograd.Function):
    """The right context; gradients by the steps that are passed last."""

    @staticmethod
    def forward(ctx, query, key, value, attn_mask, head_gate, steps):
        ctx.save_for_backward(query, key, value, attn_mask, head_gate)
        ctx.steps = steps
        return run(FORWARD, start(query, key, value, attn_mask, head_gate)).context.to(query.dtype)

    @staticmethod
    def backward(ctx, grad_output):
        s = start(*ctx.saved_tensors)
        s.grad_output, s.gradient = grad_output, grad_output.to(s.query.dtype)
        s.needed = ctx.needs_input_grad
        run(ctx.steps, s)
        dtype = grad_output.dtype
        return s.dquery.to(dtype), s.dkey.to(dtype), s.dvalue.to(dtype), None, None, None


def start(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, head_gate: Tensor | None
) -> SimpleNamespace:
    """The namespace before the first step."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = query.shape[:3]
    mask = None
    if attn_mask is not None:
        mask = attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(dtype)
        mask = mask.expand(*rows, key.shape[2])
    gate = query.new_ones(1, dtype=dtype) if head_gate is None else head_gate.to(dtype)
    return SimpleNamespace(
        query=query.to(dtype),
        key=key.to(dtype),
        value=value.to(dtype),
        asked=query.dtype,
        attn_mask=attn_mask,
        head_gate=head_gate,
        mask=mask,
        gate=gate.expand(*rows, 1),
    )


def run(steps: Mapping[str, Step], s: SimpleNamespace) -> SimpleNamespace:
    """`s` after these steps."""
    absent = {name for name, given in (("gate", s.head_gate), ("mask", s.attn_mask)) if given is None}
    for name, step in steps.items():
        if name not in absent:
            setattr(s, name, step(s))
    return s


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to `dtype`, in the dtype of `x`; the gradient passes through."""
    change = x.detach().to(dtype).to(x.dtype) - x.detach()
    return x + change.nan_to_num(0.0, math.inf, -math.inf)  # -inf is unchanged


def as_stored(x: Tensor, strides: tuple[int, ...] | None = None, offset: int | None = None) -> Tensor:
    """`x` as read by a kernel that uses other strides (by default, those of a contiguous tensor).

    Reads past the end of the memory of `x` give zeros. The gradient passes through.
    """
    if strides is None:
        strides = tuple(math.prod(x.shape[at + 1 :]) for at in range(x.dim()))
    offset = x.storage_offset() if offset is None else offset
    last = offset + sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
    memory = x.detach().as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    memory = torch.cat([memory, memory.new_zeros(max(0, last + 1 - len(memory)))])
    seen = memory.as_strided(x.shape, strides, offset)
    return x + (seen - x.detach()) if x.requires_grad else seen


def blocks(length: int, size: int) -> list[slice]:
    """Slices of `size` that cover `length`; the last one may be smaller."""
    return [slice(begin, min(begin + size, length)) for begin in range(0, length, size)]


def _known(steps: Mapping[str, Step], of: Mapping[str, Step]) -> Mapping[str, Step]:
    unknown = sorted(steps.keys() - of.keys())
    assert not unknown, f"no such steps: {unknown}"
    return steps
