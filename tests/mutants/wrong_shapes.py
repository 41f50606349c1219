"""Faults with sizes that are not multiples of a block's, and with memory layouts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mutants.cases import expanded
from mutants.parts import BACKWARD, FORWARD, ByHand, as_stored, context, filled, masked, plain, scale
from mutants.registry import wrong


def keys_hidden(which) -> dict:
    """A step that hides the keys which are True in `which(s)` (S,), as if they had never been loaded."""
    return {"masked": lambda s: masked(s).masked_fill(which(s), -math.inf)}


def positions(s) -> Tensor:
    return torch.arange(s.key.shape[2], device=s.key.device)


@wrong("sizes", "keys after the last whole block of 64 are dropped", needs=("S > 64",))
def sizes_last_of_64_keys_dropped():
    def dropped(s) -> Tensor:
        whole = s.key.shape[2] // 64 * 64
        return (positions(s) >= whole) & (whole > 0)

    return plain(**keys_hidden(dropped))


@wrong("sizes", "keys after the last whole block of 16 are dropped", needs=("S ragged", "S > 16"))
def sizes_last_of_16_keys_dropped():
    def dropped(s) -> Tensor:
        whole = s.key.shape[2] // 16 * 16
        return (positions(s) >= whole) & (whole > 0)

    return plain(**keys_hidden(dropped))


@wrong("sizes", "the last key is dropped where their number is odd", needs=("S > 1",))
def sizes_odd_key_dropped():
    return plain(**keys_hidden(lambda s: (positions(s) == s.key.shape[2] // 2 * 2) & (s.key.shape[2] > 1)))


@wrong("sizes", "keys after the 512th are not seen", needs=("S > 512",))
def sizes_keys_after_512_dropped():
    return plain(**keys_hidden(lambda s: positions(s) >= 512))


@wrong(
    "sizes",
    "the last block of 16 keys begins early to be whole, and some keys count twice",
    needs=("S ragged", "S > 16"),
)
def sizes_last_block_overlaps():
    def twice(s) -> Tensor:
        keys = s.key.shape[2]
        overlap = (
            (positions(s) >= keys - 16) & (positions(s) < keys // 16 * 16) & (keys > 16 and keys % 16 > 0)
        )
        return filled(s) + math.log(2) * overlap

    return plain(filled=twice)


@wrong(
    "sizes",
    "keys are padded to a multiple of 16 by zeros, and those are in the denominator",
    needs=("S ragged",),
)
def sizes_padding_in_denominator():
    def padded(s) -> Tensor:
        missing = -s.key.shape[2] % 16
        # The zeros have no mask of their own: they are seen by every row that sees anything.
        more = torch.cat([s.filled, s.filled.new_zeros(*s.filled.shape[:3], missing)], -1)
        return more.softmax(-1)[..., : s.key.shape[2]]

    return plain(softmax=padded)


@wrong("sizes", "queries after the last whole block of 16 stay zero", needs=("Q ragged",))
def sizes_last_queries_zero():
    def cut(s) -> Tensor:
        whole = s.query.shape[2] // 16 * 16
        return torch.cat([context(s)[:, :, :whole], torch.zeros_like(s.query[:, :, whole:])], 2)

    return plain(context=cut)


@wrong(
    "sizes",
    "queries after the last whole block of 16 are the query before, repeated",
    needs=("Q ragged", "Q > 16"),
)
def sizes_last_queries_clamped():
    def clamped(s) -> Tensor:
        whole = s.query.shape[2] // 16 * 16 or s.query.shape[2]
        rows = torch.arange(s.query.shape[2], device=s.query.device).clamp_max(whole - 1)
        return context(s)[:, :, rows]

    return plain(context=clamped)


@wrong("sizes", "queries after the 512th stay zero: the grid is too small", needs=("Q > 512",))
def sizes_queries_after_512_zero():
    def cut(s) -> Tensor:
        return torch.cat([context(s)[:, :, :512], torch.zeros_like(s.query[:, :, 512:])], 2)

    return plain(context=cut)


@wrong("sizes", "one query goes to a path for decoding that has no scale", needs=("Q = 1", "S > 1"))
def sizes_one_query_unscaled():
    return plain(scale=lambda s: 1.0 if s.query.shape[2] == 1 else scale(s))


@wrong("sizes", "one query goes to a path for decoding that has no mask", needs=("Q = 1", "mask"))
def sizes_one_query_unmasked():
    return plain(masked=lambda s: s.scores if s.query.shape[2] == 1 else masked(s))


@wrong("sizes", "of one key the value is returned, gate or no gate", needs=("S = 1", "gate"))
def sizes_one_key_ungated():
    return plain(gated=lambda s: s.weights if s.key.shape[2] == 1 else s.weights * s.gate)


@wrong("sizes", "of one key the value is returned, masked or not", needs=("S = 1", "fully masked row"))
def sizes_one_key_unmasked():
    return plain(
        weights=lambda s: s.softmax if s.key.shape[2] == 1 else s.softmax.masked_fill(s.fully_masked, 0)
    )


@wrong("sizes", "products of query and key use the first 64 channels", needs=("D > 64",))
def sizes_channels_after_64_dropped():
    return plain(scores=lambda s: s.query[..., :64] @ s.key[..., :64].mT * s.scale)


@wrong("sizes", "channels after the last whole 16 are not written", needs=("D ragged",))
def sizes_last_channels_zero():
    def cut(s) -> Tensor:
        whole = s.value.shape[-1] // 16 * 16
        return context(s) * (torch.arange(s.value.shape[-1], device=s.value.device) < whole)

    return plain(context=cut)


@wrong(
    "sizes", "self-attention is taken for granted: the number of keys is that of queries", needs=("S > Q",)
)
def sizes_keys_as_queries():
    return plain(**keys_hidden(lambda s: positions(s) >= s.query.shape[2]))


@wrong("sizes", "head numbers are taken modulo 8", needs=("H > 8",))
def sizes_heads_modulo_8():
    def modulo(s) -> Tensor:
        heads = torch.arange(s.value.shape[1], device=s.value.device) % 8
        return s.gated @ s.value[:, heads]

    return plain(context=modulo)


@wrong("layout", "query, key and value are read as if they were contiguous", needs=("strided input",))
def layout_contiguous_assumed():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return whole(*(as_stored(x) for x in (query, key, value)), attn_mask, head_gate=head_gate)

    return attention


@wrong("layout", "the last dimension is read as if its stride were 1", needs=("strided channels",))
def layout_channels_assumed_dense():
    whole = plain()

    def dense(x: Tensor) -> Tensor:
        return as_stored(x, (*x.stride()[:-1], 1))

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return whole(*(dense(x) for x in (query, key, value)), attn_mask, head_gate=head_gate)

    return attention


@wrong("layout", "the value is read by the strides of the key", needs=("value unlike key",))
def layout_value_by_strides_of_key():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return whole(query, key, as_stored(value, key.stride()), attn_mask, head_gate=head_gate)

    return attention


@wrong("layout", "the offset of a slice in its storage is ignored", needs=("storage offset",))
def layout_offset_ignored():
    whole = plain()

    def first(x: Tensor) -> Tensor:
        return as_stored(x, x.stride(), 0)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return whole(*(first(x) for x in (query, key, value)), attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "layout",
    "batch items lie one behind the other, even where a batch of stride 0 has one item only",
    needs=("expanded batch",),
)
def layout_expanded_batch_misread():
    whole = plain()

    def spread(x: Tensor) -> Tensor:
        if x.stride(0) == 0 and x.shape[0] > 1:
            return as_stored(x, (math.prod(x.shape[1:]), *x.stride()[1:]))
        return x

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return whole(*(spread(x) for x in (query, key, value)), attn_mask, head_gate=head_gate)

    return attention


@wrong("layout", "an expanded mask is read as if all of it were there", needs=("expanded mask",))
def layout_mask_assumed_dense():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        mask = as_stored(attn_mask) if expanded(attn_mask) else attn_mask
        return whole(query, key, value, mask, head_gate=head_gate)

    return attention


@wrong("layout", "an expanded gate is read as if all of it were there", needs=("expanded gate",))
def layout_gate_assumed_dense():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        gate = as_stored(head_gate) if expanded(head_gate) else head_gate
        return whole(query, key, value, attn_mask, head_gate=gate)

    return attention


@wrong("layout", "with as many queries as heads, inputs are taken for (B, Q, H, D)", needs=("Q = H",))
def layout_order_guessed():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if query.shape[1] != query.shape[2]:
            return whole(query, key, value, attn_mask, head_gate=head_gate)
        return whole(query.transpose(1, 2), key, value, attn_mask, head_gate=head_gate).transpose(1, 2)

    return attention


@wrong(
    "layout", "the context is (B, Q, H, D) in memory and (B, H, Q, D) by its shape", needs=("heads", "Q > 1")
)
def layout_context_not_transposed():
    return plain(context=lambda s: context(s).transpose(1, 2).reshape(s.query.shape))


@wrong("layout", "query is flattened as (H, B), key and value as (B, H)", needs=("batch", "heads"))
def layout_heads_and_batch_mixed():
    return plain(
        scores=lambda s: s.query.transpose(0, 1).reshape(s.query.shape) @ s.key.mT * s.scale,
    )


@wrong(
    "layout",
    "all batch items have the first one's key and value",
    needs=("batch",),
    shows=("context", "dk", "dv"),
)
def layout_keys_of_first_item():
    return plain(
        scores=lambda s: s.query @ s.key[:1].mT * s.scale,
        context=lambda s: s.gated @ s.value[:1],
    )


@wrong("layout", "all heads have the first one's key, as in multi-query attention", needs=("heads", "S > 1"))
def layout_keys_of_first_head():
    return plain(scores=lambda s: s.query @ s.key[:, :1].mT * s.scale)


@wrong("layout", "heads share keys in pairs, as in grouped-query attention", needs=("heads", "S > 1"))
def layout_heads_grouped():
    def grouped(s) -> Tensor:
        heads = torch.arange(s.key.shape[1], device=s.key.device) // 2 * 2
        return s.query @ s.key[:, heads].mT * s.scale

    return plain(scores=grouped)


@wrong(
    "layout",
    "of a batch that is one item expanded, one is computed and expanded",
    shows=("layout",),
    needs=("all expanded",),
)
def layout_context_expanded():
    class Expanded(ByHand):
        @staticmethod
        def forward(ctx, query, key, value, attn_mask, head_gate, steps):
            result = ByHand.forward(ctx, query, key, value, attn_mask, head_gate, steps)
            alike = all(x is None or x.dim() < 4 or x.shape[0] == 1 for x in (attn_mask, head_gate))
            alike = alike and all(x.stride(0) == 0 for x in (query, key, value))
            return result[:1].expand(result.shape) if alike else result

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return Expanded.apply(query, key, value, attn_mask, head_gate, FORWARD | BACKWARD)

    return attention


@wrong("layout", "of one key, the value itself is returned, expanded", shows=("layout",), needs=("S = 1",))
def layout_context_is_value():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if key.shape[2] == 1 and attn_mask is None and head_gate is None:
            return value.expand(query.shape)
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "layout", "the context is written over the query, whose memory is as large", shows=("layout", "in-place")
)
def layout_context_in_query():
    whole = plain()

    class Inside(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, key, value, attn_mask, head_gate):
            ctx.save_for_backward(query.clone(), key, value)
            ctx.others = attn_mask, head_gate
            result = whole(query, key, value, attn_mask, head_gate=head_gate)
            memory = query.detach()
            if 0 in memory.stride():
                return result
            return memory.copy_(result)

        @staticmethod
        def backward(ctx, grad_output):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
                result = whole(*leaves, ctx.others[0], head_gate=ctx.others[1])
            return *torch.autograd.grad(result, leaves, grad_output), None, None

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return Inside.apply(query, key, value, attn_mask, head_gate)

    return attention
