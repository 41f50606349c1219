"""Faults without effect in most calls: they need rare shapes, strides, sizes or values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mutants.cases import expanded
from mutants.parts import (
    BACKWARD,
    FORWARD,
    ByHand,
    as_stored,
    by_hand,
    context,
    delta,
    dquery,
    dvalue,
    filled,
    plain,
    scores,
    softmax,
)
from mutants.registry import wrong
from mutants.wrong_masks import is_bool
from mutants.wrong_shapes import keys_hidden, positions

# Shapes and strides of masks


@wrong(
    "mask",
    "padding is read as a length where that of the first batch item is one",
    needs=("right padding first",),
)
def pattern_padding_by_first_item():
    def lengths(s) -> Tensor:
        mask = s.mask
        ends = mask[:1].long().diff().amax(-1) <= 0
        if is_bool(s) and bool(ends.all()) and bool(mask[:1, ..., 0].all()):
            return torch.arange(mask.shape[-1], device=mask.device) < mask.sum(-1, keepdim=True)
        return mask

    return plain(mask=lengths)


@wrong(
    "mask",
    "a mask that has no queries is one of padding and is read for the first head alone",
    needs=("mask of one row", "mask by head"),
)
def pattern_mask_of_keys_has_no_heads():
    def first_head(s) -> Tensor:
        has_no_queries = s.attn_mask.dim() == 4 and s.attn_mask.shape[2] == 1
        return s.mask[:, :1].expand_as(s.mask) if has_no_queries else s.mask

    return plain(mask=first_head)


@wrong(
    "mask",
    "the number of keys is that of the mask, which may be 1 for all",
    needs=("mask of one key", "S > 1"),
)
def pattern_keys_counted_in_mask():
    def beyond(s) -> Tensor:
        return positions(s) >= (s.key.shape[2] if s.mask is None else s.attn_mask.shape[-1])

    return plain(**keys_hidden(beyond))


@wrong(
    "mask",
    "a square mask with its diagonal on and nothing above is taken for the causal one",
    needs=("narrow causal mask",),
)
def pattern_window_taken_for_causal():
    def causal(s) -> Tensor:
        mask = s.attn_mask
        if mask.dtype != torch.bool or mask.shape[-1] != mask.shape[-2]:
            return s.mask
        looks = bool(mask.diagonal(dim1=-2, dim2=-1).all()) and not bool(mask.triu(1).any())
        return torch.ones_like(s.mask).tril() if looks else s.mask

    return plain(mask=causal)


@wrong(
    "mask",
    "an additive mask that raises no score is taken for padding",
    needs=("bias", "bias never positive"),
)
def pattern_penalty_taken_for_padding():
    return plain(mask=lambda s: s.mask == 0 if not is_bool(s) and bool((s.mask <= 0).all()) else s.mask)


@wrong("mask", "of an additive mask, -10000 and less count as -inf", needs=("bias below -10000",))
def pattern_low_bias_hides():
    return plain(mask=lambda s: s.mask if is_bool(s) else s.mask.masked_fill(s.mask < -1e4, -math.inf))


@wrong("softmax", "the running maximum starts at -1000", needs=("low row",))
def pattern_maximum_starts_at_minus_1000():
    def started(s) -> Tensor:
        terms = (s.filled - s.filled.amax(-1, keepdim=True).clamp_min(-1000).detach()).exp()
        sums = terms.sum(-1, keepdim=True)
        return terms / sums.masked_fill(sums == 0, 1)

    return plain(softmax=started)


@wrong("softmax", "the maximum is taken before the bias is added", needs=("bias above 90",))
def pattern_maximum_before_bias():
    def early(s) -> Tensor:
        if s.mask is None or is_bool(s):
            return softmax(s)
        largest = s.scores.masked_fill(s.mask == -math.inf, -math.inf).amax(-1, keepdim=True).detach()
        # Where that is harmless, too: a row that lies low is another fault.
        largest = torch.minimum(largest.masked_fill(s.fully_masked, 0), s.filled.amax(-1, keepdim=True))
        terms = (s.filled - largest.detach()).exp()
        return terms / terms.sum(-1, keepdim=True)

    return plain(softmax=early)


@wrong(
    "layout", "the rows of a mask lie one behind the other, whatever its strides", needs=("mask with gaps",)
)
def pattern_mask_rows_assumed_dense():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        # Dimensions of stride 0 are known to be expanded.
        if (
            attn_mask is not None
            and 0 not in attn_mask.stride()
            and attn_mask.stride(-2) > attn_mask.stride(-1)
        ):
            attn_mask = as_stored(attn_mask)
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "layout", "a square mask is read row by row, even if it lies key by key", needs=("turned mask", "Q = S")
)
def pattern_turned_mask_read_by_rows():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        square = attn_mask is not None and attn_mask.shape[-1] == attn_mask.shape[-2]
        if square and attn_mask.stride(-1) > attn_mask.stride(-2) == 1:
            attn_mask = attn_mask.mT
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong("mask", "two dimensions of which one is the batch's are (B, S)", needs=("mask of rows as items",))
def pattern_two_dimensions_are_items():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if attn_mask is not None and attn_mask.dim() == 2 and attn_mask.shape[0] == query.shape[0] > 1:
            attn_mask = attn_mask[:, None, None]
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "mask", "three dimensions of which one is the batch's are (B, Q, S)", needs=("mask of heads as items",)
)
def pattern_three_dimensions_are_items():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if attn_mask is not None and attn_mask.dim() == 3 and attn_mask.shape[0] == query.shape[0] > 1:
            attn_mask = attn_mask[:, None]
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


# Shapes, strides and values of gates


@wrong("gate", "as many gates as heads are those of the heads", needs=("as many gates as heads",))
def pattern_gates_counted():
    def counted(s) -> Tensor:
        gate = s.head_gate
        return (
            gate.to(s.gate).reshape(-1, 1, 1).expand_as(s.gate) if gate.numel() == s.gate.shape[1] else s.gate
        )

    return plain(gate=counted)


@wrong("gate", "gates within 0.01 of 0 on either side are skipped", needs=("fraction", "small gate"))
def pattern_small_gates_skipped():
    return plain(gate=lambda s: s.gate.masked_fill(s.gate.abs() < 0.01, 0))


@wrong("gate", "gates that are all 1 up to a hundredth are not applied", needs=("gate nearly 1",))
def pattern_gates_nearly_1_not_applied():
    return plain(
        gate=lambda s: torch.ones_like(s.gate) if bool(((s.gate - 1).abs() < 0.01).all()) else s.gate
    )


@wrong("layout", "gates of heads lie one behind the other", needs=("gate with gaps",))
def pattern_gates_assumed_dense():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if head_gate is not None and head_gate.dim() >= 3 and head_gate.numel() == query.shape[1] > 1:
            if head_gate.shape[-3] == query.shape[1] and head_gate.stride(-3) > 0:
                head_gate = as_stored(head_gate, (1,) * head_gate.dim())
        return whole(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong("gate", "heads that are on are kept in a word of 16 bits", needs=("H > 16", "gate"))
def pattern_gates_in_16_bits():
    def cut(s) -> Tensor:
        return s.gate * (torch.arange(s.gate.shape[1], device=s.gate.device) < 16)[:, None, None]

    return plain(gate=cut)


# Which gradients are asked for, and how that of the context comes


@wrong(
    "backward",
    "heads that share their keys have the sum of their gradients",
    needs=("expanded heads",),
    shows=("dk", "dv"),
)
def pattern_shared_keys_share_gradients():
    shared = plain()

    class Summed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.sum(1, keepdim=True).expand_as(gradient)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if key.stride(1) == 0 and key.shape[1] > 1:
            key, value = Summed.apply(key), Summed.apply(value)
        return shared(query, key, value, attn_mask, head_gate=head_gate)

    return attention


@wrong(
    "backward",
    "a gradient that has a stride of 0 is that of a sum, one number for all",
    needs=("gradient expanded in one dimension",),
    shows=("dq", "dk", "dv"),
)
def pattern_expanded_gradient_is_a_number():
    def gated_gradient(s) -> Tensor:
        given = s.gradient
        if expanded(s.grad_output):
            given = given[:1, :1, :1, :1].expand_as(given)
        return given * s.gate

    return by_hand(gated_gradient=gated_gradient)


@wrong(
    "backward",
    "gradients are filed under the address of their input, and key and value have one address",
    needs=("key is value",),
    shows=("dk",),
)
def pattern_gradients_by_address():
    class Filed(ByHand):
        @staticmethod
        def backward(ctx, grad_output):
            found = ByHand.backward(ctx, grad_output)
            filed = dict(zip(ctx.addresses, found[:3], strict=True))
            return *(filed[address] for address in ctx.addresses), *found[3:]

        @staticmethod
        def forward(ctx, query, key, value, attn_mask, head_gate, steps):
            ctx.addresses = query.data_ptr(), key.data_ptr(), value.data_ptr()
            return ByHand.forward(ctx, query, key, value, attn_mask, head_gate, steps)

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        return Filed.apply(query, key, value, attn_mask, head_gate, FORWARD | BACKWARD)

    return attention


@wrong(
    "backward",
    "dv comes out of the kernel of dk, which is not started for the value alone",
    needs=("value alone",),
    shows=("dv",),
)
def pattern_value_alone_forgotten():
    return by_hand(dvalue=lambda s: dvalue(s) * (s.needed[0] or s.needed[1]))


@wrong(
    "backward",
    "without the key's gradient, the query's is halved",
    needs=("query and value alone",),
    shows=("dq",),
)
def pattern_query_and_value_alone():
    return by_hand(dquery=lambda s: dquery(s) * (0.5 if s.needed[:3] == (True, False, True) else 1))


@wrong(
    "backward",
    "for the query alone there is a kernel of its own, whose delta is of the first 64 keys",
    needs=("query alone", "S > 64"),
    shows=("dq",),
)
def pattern_query_alone_among_many_keys():
    def early(s) -> Tensor:
        if any(s.needed[1:3]):
            return delta(s)
        return (s.weights * s.dweights)[..., :64].sum(-1, keepdim=True)

    return by_hand(delta=early)


# Sizes


@wrong(
    "sizes",
    "channels are read in fours, and what is left of them has no scores",
    needs=("D no multiple of 4",),
)
def pattern_channels_in_fours():
    def fours(s) -> Tensor:
        whole = s.query.shape[-1] // 4 * 4 or s.query.shape[-1]
        return s.query[..., :whole] @ s.key[..., :whole].mT * s.scale

    return plain(scores=fours)


@wrong("sizes", "channels between 64 and 128 are computed in a block of 64", needs=("64 < D < 128",))
def pattern_channels_between_blocks():
    def block(s) -> Tensor:
        channels = s.query.shape[-1]
        kept = 64 if channels < 128 else channels
        return s.query[..., :kept] @ s.key[..., :kept].mT * s.scale

    return plain(scores=block)


@wrong("sizes", "channels after the 128th have no scores", needs=("D > 128",))
def pattern_channels_after_128_dropped():
    return plain(scores=lambda s: s.query[..., :128] @ s.key[..., :128].mT * s.scale)


@wrong(
    "sizes", "batches come in chunks of 32, all with the masks of the first", needs=("B > 32", "mask by item")
)
def pattern_masks_of_first_32_items():
    return plain(mask=lambda s: s.mask[torch.arange(s.mask.shape[0], device=s.mask.device) % 32])


@wrong("sizes", "a row of scores is one block of 4096", needs=("S > 4096",))
def pattern_keys_after_4096_dropped():
    return plain(**keys_hidden(lambda s: positions(s) >= 4096))


@wrong("sizes", "rows are counted in 16 bits", needs=("Q > 32768",))
def pattern_rows_in_16_bits():
    def wrapped(s) -> Tensor:
        return context(s)[:, :, torch.arange(s.query.shape[2], device=s.query.device) % 2**15]

    return plain(context=wrapped)


# Numbers


@wrong("scale", "scores are of directions and lengths, and keys of length 0 have none", needs=("zero key",))
def pattern_keys_by_direction():
    def directed(s) -> Tensor:
        lengths = s.key.norm(dim=-1, keepdim=True)
        direction = torch.where(lengths == 0, math.nan, normalize(s.key, dim=-1))
        return (s.query @ direction.mT) * lengths.mT * s.scale

    return plain(scores=lambda s: directed(s) if bool((s.key == 0).all(-1).any()) else scores(s))


@wrong("precision", "the context is clamped to what float16 holds", needs=("great value",))
def pattern_context_clamped():
    return plain(context=lambda s: context(s).clamp(-65504, 65504))


@wrong(
    "precision",
    "in float16, sums over keys are stored before they are divided by the normaliser",
    needs=("float16", "heavy sums"),
)
def pattern_half_sums_overflow():
    def stored(s) -> Tensor:
        found = context(s)
        if s.asked != torch.float16:
            return found
        sums = (filled(s) - filled(s).amax(-1, keepdim=True)).exp() @ s.value
        return found.masked_fill(sums.abs() > 65504, math.inf)

    return plain(context=stored)


@wrong("precision", "float64 with more than 1024 keys is computed in float32", needs=("float64", "S > 1024"))
def pattern_long_float64_in_float32():
    whole = plain()

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if query.dtype != torch.float64 or key.shape[2] <= 1024:
            return whole(query, key, value, attn_mask, head_gate=head_gate)
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.float()
        found = whole(query.float(), key.float(), value.float(), attn_mask, head_gate=head_gate)
        return found.double()

    return attention
