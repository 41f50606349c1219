"""Faults in hand-written backward passes; the context is right."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mutants.parts import (
    BACKWARD,
    FORWARD,
    as_stored,
    blocks,
    by_hand,
    delta,
    dkey,
    dquery,
    dscores,
    dvalue,
    masked,
    plain,
    run,
    scale,
    start,
)
from mutants.registry import wrong


@wrong("backward", "the softmax's backward pass lacks the term delta", shows=("dq", "dk"))
def backward_without_delta():
    return by_hand(dscores=lambda s: s.weights * s.dweights)


@wrong("backward", "delta is of the context before the gate", needs=("gate",), shows=("dq", "dk"))
def backward_delta_ungated():
    return by_hand(delta=lambda s: (s.gradient * (s.weights @ s.value)).sum(-1, keepdim=True))


@wrong(
    "backward",
    "delta is of the gated context and the gated gradient: the gate is in it twice",
    needs=("fraction",),
    shows=("dq", "dk"),
)
def backward_delta_gated_twice():
    return by_hand(delta=lambda s: (s.gated_gradient * s.context).sum(-1, keepdim=True))


@wrong(
    "backward",
    "the weights that the softmax's backward pass starts from are gated",
    needs=("fraction",),
    shows=("dq", "dk"),
)
def backward_of_gated_weights():
    return by_hand(dscores=lambda s: s.gated * (s.dweights - s.delta))


@wrong("backward", "delta has the other sign", shows=("dq", "dk"))
def backward_delta_added():
    return by_hand(delta=lambda s: -delta(s))


@wrong("backward", "delta is a mean over keys and not weighted", shows=("dq", "dk"), needs=("S > 1",))
def backward_delta_unweighted():
    return by_hand(delta=lambda s: s.dweights.mean(-1, keepdim=True))


@wrong("backward", "delta is read one query further", shows=("dq", "dk"), needs=("Q > 1",))
def backward_delta_of_next_query():
    return by_hand(delta=lambda s: delta(s).roll(-1, 2))


@wrong("backward", "dq lacks the scale", shows=("dq",), needs=("S > 1",))
def backward_dq_unscaled():
    return by_hand(dquery=lambda s: s.dscores @ s.key)


@wrong("backward", "dk lacks the scale", shows=("dk",), needs=("S > 1",))
def backward_dk_unscaled():
    return by_hand(dkey=lambda s: s.dscores.mT @ s.query)


@wrong("backward", "dk is of the scaled query and scaled again", shows=("dk",), needs=("S > 1",))
def backward_dk_scaled_twice():
    return by_hand(dkey=lambda s: dkey(s) * s.scale)


@wrong("backward", "dv is not gated", needs=("gate",), shows=("dv",))
def backward_dv_ungated():
    return by_hand(dvalue=lambda s: s.weights.mT @ s.gradient)


@wrong(
    "backward", "dv is gated twice, by the weights and by the gradient", needs=("fraction",), shows=("dv",)
)
def backward_dv_gated_twice():
    return by_hand(dvalue=lambda s: s.gated.mT @ s.gated_gradient)


@wrong("backward", "dv is that of the next head", shows=("dv",), needs=("heads",))
def backward_dv_of_next_head():
    return by_hand(dvalue=lambda s: dvalue(s).roll(-1, 1))


@wrong("backward", "dk and dv are returned in the wrong order", shows=("dk", "dv"))
def backward_dk_dv_swapped():
    return by_hand(dkey=dvalue, dvalue=dkey)


@wrong("backward", "the key is detached", shows=("dk",), needs=("S > 1",))
def backward_without_dk():
    return by_hand(dkey=lambda s: torch.zeros_like(s.key))


@wrong("backward", "the value is detached", shows=("dv",))
def backward_without_dv():
    return by_hand(dvalue=lambda s: torch.zeros_like(s.value))


@wrong("backward", "the query is detached", shows=("dq",), needs=("S > 1",))
def backward_without_dq():
    return by_hand(dquery=lambda s: torch.zeros_like(s.query))


@wrong("backward", "the whole call is detached", shows=("no gradient",))
def backward_missing():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        with torch.no_grad():
            return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "backward",
    "the derivative of the maximum is counted as if the sum did not contain it",
    shows=("dq", "dk"),
)
def backward_through_maximum():
    def with_maximum(s) -> Tensor:
        at = s.filled.argmax(-1, keepdim=True)
        return dscores(s).scatter_add(-1, at, -s.delta)

    return by_hand(dscores=with_maximum)


@wrong("backward", "softmax passes its gradient straight through", shows=("dq", "dk"))
def backward_straight_through():
    return by_hand(dscores=lambda s: s.dweights)


@wrong("backward", "the gate is missing in the gradient of the query", needs=("gate",), shows=("dq",))
def backward_dq_ungated():
    def ungated(s) -> Tensor:
        raw = s.gradient @ s.value.mT
        return (s.weights * (raw - (s.weights * raw).sum(-1, keepdim=True))) @ s.key * s.scale

    return by_hand(dquery=ungated)


@wrong(
    "backward",
    "the whole backward pass is that of attention without a gate",
    needs=("gate",),
    shows=("dq", "dk", "dv"),
)
def backward_without_gate():
    return by_hand(gated_gradient=lambda s: s.gradient)


@wrong(
    "backward",
    "the gradient is gated as bool: fractions count as 1",
    needs=("fraction",),
    shows=("dq", "dk", "dv"),
)
def backward_gate_as_bool():
    return by_hand(gated_gradient=lambda s: s.gradient * (s.gate != 0))


@wrong(
    "backward",
    "the backward pass reads the gate of the next head",
    needs=("gate by head",),
    shows=("dq", "dk", "dv"),
)
def backward_gate_of_next_head():
    return by_hand(gate=lambda s: s.gate.roll(-1, 1))


@wrong(
    "backward",
    "the backward pass reads the gate of the first query",
    needs=("gate by query",),
    shows=("dq", "dk", "dv"),
)
def backward_gate_of_first_query():
    return by_hand(gate=lambda s: s.gate[:, :, :1].expand_as(s.gate))


@wrong("backward", "weights are recomputed without the mask", needs=("mask",), shows=("dq", "dk", "dv"))
def backward_without_mask():
    return by_hand(masked=lambda s: s.scores)


@wrong(
    "backward",
    "weights are recomputed with the first item's mask",
    needs=("mask by item",),
    shows=("dq", "dk", "dv"),
)
def backward_mask_of_first_item():
    return by_hand(mask=lambda s: s.mask[:1].expand_as(s.mask))


@wrong("backward", "weights are recomputed from unscaled scores", shows=("dq", "dk", "dv"), needs=("S > 1",))
def backward_recomputes_unscaled():
    return by_hand(
        scores=lambda s: s.query @ s.key.mT,
        masked=lambda s: masked(s),
    )


@wrong(
    "backward", "fully masked rows have NaN gradients", needs=("fully masked row",), shows=("dq", "dk", "dv")
)
def backward_fully_masked_rows_nan():
    return by_hand(weights=lambda s: s.masked.softmax(-1))


@wrong(
    "backward",
    "fully masked rows are recomputed as attending to all keys",
    needs=("fully masked row",),
    shows=("dq", "dk", "dv"),
)
def backward_fully_masked_rows_mean():
    return by_hand(weights=lambda s: s.softmax)


@wrong(
    "backward",
    "the gradient of the context is read as if it were contiguous",
    needs=("strided gradient",),
    shows=("dq", "dk", "dv"),
)
def backward_of_contiguous_gradient():
    return by_hand(gated_gradient=lambda s: as_stored(s.grad_output).to(s.query) * s.gate)


@wrong("backward", "dk and dv keep only the last block of 16 queries", needs=("Q > 16",), shows=("dk", "dv"))
def backward_dk_dv_overwritten():
    def last(s) -> slice:
        return blocks(s.query.shape[2], 16)[-1]

    return by_hand(
        dkey=lambda s: s.dscores[:, :, last(s)].mT @ s.query[:, :, last(s)] * s.scale,
        dvalue=lambda s: s.weights[:, :, last(s)].mT @ s.gated_gradient[:, :, last(s)],
    )


@wrong("backward", "dq keeps only the last block of 16 keys", needs=("S > 16",), shows=("dq",))
def backward_dq_overwritten():
    def partial(s) -> Tensor:
        last = blocks(s.key.shape[2], 16)[-1]
        return s.dscores[..., last] @ s.key[:, :, last] * s.scale

    return by_hand(dquery=partial)


@wrong(
    "backward",
    "dk and dv of the last keys, no whole block of 16, are zero",
    needs=("S ragged",),
    shows=("dk", "dv"),
)
def backward_last_keys_dropped():
    def cut(x: Tensor) -> Tensor:
        x[:, :, x.shape[2] // 16 * 16 :] = 0
        return x

    return by_hand(dkey=lambda s: cut(dkey(s)), dvalue=lambda s: cut(dvalue(s)))


@wrong(
    "backward", "dq of the last queries, no whole block of 16, is zero", needs=("Q ragged",), shows=("dq",)
)
def backward_last_queries_dropped():
    def cut(x: Tensor) -> Tensor:
        x[:, :, x.shape[2] // 16 * 16 :] = 0
        return x

    return by_hand(dquery=lambda s: cut(dquery(s)))


@wrong(
    "backward",
    "key and value get no gradient where the query wants none",
    needs=("query without gradient",),
    shows=("dk", "dv"),
)
def backward_stops_at_query():
    return by_hand(
        dkey=lambda s: dkey(s) * s.needed[0],
        dvalue=lambda s: dvalue(s) * s.needed[0],
    )


@wrong(
    "backward",
    "the gradient of the query is left out where key and value want none",
    needs=("query alone",),
    shows=("dq",),
)
def backward_stops_at_key():
    return by_hand(dquery=lambda s: dquery(s) * s.needed[1])


@wrong("backward", "dk is summed over the batch", needs=("batch",), shows=("dk",))
def backward_dk_summed_over_batch():
    return by_hand(dkey=lambda s: dkey(s).sum(0, keepdim=True).expand_as(s.key))


@wrong("backward", "dv of one head is the mean of all", needs=("heads",), shows=("dv",))
def backward_dv_averaged_over_heads():
    return by_hand(dvalue=lambda s: dvalue(s).mean(1, keepdim=True).expand_as(s.value))


@wrong(
    "backward",
    "the forward pass is a gated kernel, the backward pass that of torch's ungated attention",
    needs=("gate",),
    shows=("dq", "dk", "dv"),
)
def backward_of_torch():
    def differentiated(s) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (s.query, s.key, s.value)]
            mask = s.mask
            if mask is not None:
                gone = s.fully_masked if mask.dtype == torch.bool else s.fully_masked & (mask == -math.inf)
                mask = mask | gone if mask.dtype == torch.bool else mask.masked_fill(gone, 0.0)
            context = scaled_dot_product_attention(*leaves, mask).masked_fill(s.fully_masked, 0)
            return torch.autograd.grad(context, leaves, s.gradient)

    return by_hand(
        dquery=lambda s: differentiated(s)[0],
        dkey=lambda s: differentiated(s)[1],
        dvalue=lambda s: differentiated(s)[2],
    )


@wrong("backward", "gradients are clipped to 1", needs=("large gradient",), shows=("dq", "dk", "dv"))
def backward_clipped():
    def clip(x: Tensor) -> Tensor:
        return x / x.abs().amax().clamp_min(1)

    return by_hand(
        dquery=lambda s: clip(dquery(s)), dkey=lambda s: clip(dkey(s)), dvalue=lambda s: clip(dvalue(s))
    )


@wrong(
    "backward",
    "gradients below 1e-6 are flushed to zero, as by a cast to half precision without loss scaling",
    needs=("small gradient", "full precision"),
    shows=("dq", "dk", "dv"),
)
def backward_flushed():
    def half(x: Tensor) -> Tensor:
        return torch.where(x.abs() < 1e-6, 0, x)

    return by_hand(gated_gradient=lambda s: half(s.gradient * s.gate))


@wrong(
    "backward",
    "the backward pass overwrites the weights that it has saved: a second one starts from others",
    shows=("second backward",),
)
def backward_overwrites_saved():
    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, attn_mask, head_gate):
            s = run(FORWARD, start(query, key, value, attn_mask, head_gate))
            ctx.filled, ctx.dtype = s, query.dtype
            return s.context.to(query.dtype)

        @staticmethod
        def backward(ctx, grad_output):
            s = ctx.filled
            s.gradient = grad_output.to(s.query.dtype)
            run(BACKWARD, s)
            s.weights.copy_(s.dscores)  # one buffer less
            return *(x.to(ctx.dtype) for x in (s.dquery, s.dkey, s.dvalue)), None, None

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return Saving.apply(query, key, value, attn_mask, head_gate)

    return attention


@wrong(
    "backward",
    "the scale of the backward pass is that of 16 channels",
    needs=("D not 16", "S > 1"),
    shows=("dq", "dk"),
)
def backward_scale_of_16_channels():
    return by_hand(
        scores=lambda s: s.query @ s.key.mT * scale(s),
        scale=lambda s: 1 / 4,
    )
