"""Faults in the handling of the attention mask."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mutants.parts import blocks, masked, plain, softmax
from mutants.registry import wrong


def is_bool(s) -> bool:
    return s.mask.dtype == torch.bool


def hidden(s) -> Tensor:
    """What the mask hides, (B, H, Q, S) bool."""
    return ~s.mask if is_bool(s) else s.mask == -math.inf


@wrong("mask", "the mask is taken and never used", needs=("mask",))
def mask_ignored():
    return plain(masked=lambda s: s.scores)


@wrong("mask", "a mask of bools is read as True = hidden", needs=("bool mask",))
def mask_inverted():
    return plain(mask=lambda s: ~s.mask if is_bool(s) else s.mask)


@wrong("mask", "an additive mask is converted to bool: not 0 = attend", needs=("float mask",))
def mask_float_as_bool():
    return plain(mask=lambda s: s.mask.bool())


@wrong("mask", "an additive mask is read as 0 = attend, so that finite biases hide keys", needs=("bias",))
def mask_bias_hides():
    return plain(mask=lambda s: s.mask if is_bool(s) else s.mask == 0)


@wrong("mask", "of an additive mask only -inf is used, biases are dropped", needs=("bias",))
def mask_bias_dropped():
    return plain(mask=lambda s: s.mask if is_bool(s) else s.mask != -math.inf)


@wrong("mask", "a mask of bools is converted to 0 and 1 and added", needs=("bool mask",))
def mask_bool_added():
    return plain(mask=lambda s: s.mask.to(s.query))


@wrong("mask", "an additive mask is added before the scores are scaled", needs=("bias",))
def mask_added_before_scale():
    def early(s) -> Tensor:
        if s.mask is None or is_bool(s):
            return masked(s)
        return (s.query @ s.key.transpose(-2, -1) + s.mask) * s.scale

    return plain(masked=early)


@wrong(
    "mask",
    "exponentials are of base 2, and the scores get their log2(e), but the bias does not",
    needs=("bias",),
)
def mask_bias_without_log2e():
    return plain(mask=lambda s: s.mask if is_bool(s) else s.mask * math.log(2))


@wrong("mask", "an additive mask is subtracted", needs=("bias",))
def mask_bias_negated():
    def negated(s) -> Tensor:
        return s.mask if is_bool(s) else torch.where(s.mask == -math.inf, s.mask, -s.mask)

    return plain(mask=negated)


@wrong("mask", "all batch items have the mask of the first", needs=("mask by item",))
def mask_of_first_item():
    return plain(mask=lambda s: s.mask[:1].expand_as(s.mask))


@wrong("mask", "all heads have the mask of the first", needs=("mask by head",))
def mask_of_first_head():
    return plain(mask=lambda s: s.mask[:, :1].expand_as(s.mask))


@wrong("mask", "all queries have the mask of the first", needs=("mask by query",))
def mask_of_first_query():
    return plain(mask=lambda s: s.mask[:, :, :1].expand_as(s.mask))


@wrong(
    "mask", "the mask's batch item is counted over items and heads together", needs=("mask by item", "heads")
)
def mask_of_flat_index():
    def flat(s) -> Tensor:
        batch, heads = s.mask.shape[:2]
        streams = torch.arange(batch * heads, device=s.mask.device)
        return s.mask[streams % batch, streams % heads].view(s.mask.shape)

    return plain(mask=flat)


@wrong("mask", "hidden scores are -100 and not -inf", needs=("mask", "large logits"))
def mask_of_minus_100():
    return plain(
        masked=lambda s: masked(s) if s.mask is None else masked(s).clamp_min(-100),
        fully_masked=lambda s: (masked(s) == -math.inf).all(-1, keepdim=True),
    )


@wrong("mask", "hidden scores are 10000 lower than they were, and not -inf", needs=("mask", "huge logits"))
def mask_lowers_by_10000():
    def lowered(s) -> Tensor:
        return masked(s) if s.mask is None else torch.where(hidden(s), s.scores - 1e4, masked(s))

    return plain(masked=lowered, fully_masked=lambda s: (masked(s) == -math.inf).all(-1, keepdim=True))


@wrong(
    "mask",
    "the running maximum includes hidden scores: what is seen underflows",
    needs=("mask", "huge logits"),
)
def mask_after_maximum():
    def late(s) -> Tensor:
        terms = (s.filled - s.scores.amax(-1, keepdim=True).detach()).exp()
        return terms / terms.sum(-1, keepdim=True)

    return plain(softmax=lambda s: softmax(s) if s.mask is None or bool(s.fully_masked.any()) else late(s))


@wrong("mask", "fully masked rows are NaN", needs=("fully masked row",))
def mask_fully_masked_rows_nan():
    return plain(weights=lambda s: s.softmax.masked_fill(s.fully_masked, math.nan))


@wrong("mask", "fully masked rows attend to all keys alike", needs=("fully masked row",))
def mask_fully_masked_rows_mean():
    return plain(weights=lambda s: s.softmax)


@wrong("mask", "fully masked rows attend as if nothing were masked", needs=("fully masked row",))
def mask_fully_masked_rows_unmasked():
    return plain(weights=lambda s: torch.where(s.fully_masked, s.scores.softmax(-1), s.softmax))


@wrong("mask", "fully masked rows attend to the first key", needs=("fully masked row",))
def mask_fully_masked_rows_first_key():
    def first(s) -> Tensor:
        chosen = torch.zeros_like(s.softmax)
        chosen[..., 0] = 1
        return torch.where(s.fully_masked, chosen, s.softmax)

    return plain(weights=first)


@wrong("mask", "a call with one fully masked row is skipped altogether", needs=("fully masked row",))
def mask_fully_masked_row_skips_call():
    return plain(weights=lambda s: s.softmax * (not bool(s.fully_masked.any())))


@wrong("mask", "the mask is not loaded for the last block of 16 keys", needs=("mask",))
def mask_not_in_last_block():
    def short(s) -> Tensor:
        last = blocks(s.key.shape[2], 16)[-1]
        mask = s.mask.clone()
        mask[..., last] = True if is_bool(s) else 0.0
        return mask

    return plain(mask=short)


@wrong(
    "mask",
    "a block of 16 keys is skipped where its first key is hidden from the first query",
    needs=("mask",),
)
def mask_skips_block_by_first_key():
    def skipping(s) -> Tensor:
        scores = masked(s)
        if s.mask is not None:
            scores = scores.clone()
            for block in blocks(s.key.shape[2], 16):
                gone = hidden(s)[:, :, :1, block.start : block.start + 1]
                scores[..., block] = scores[..., block].masked_fill(gone, -math.inf)
        return scores

    return plain(masked=skipping)


@wrong("mask", "padding is read as a length with <=: one hidden key is seen", needs=("bool mask",))
def mask_one_key_too_long():
    def longer(s) -> Tensor:
        return s.mask | s.mask.roll(1, -1).index_fill(-1, s.mask.new_zeros(1, dtype=torch.long), False)

    return plain(mask=lambda s: longer(s) if is_bool(s) else s.mask)


@wrong("mask", "a mask is read as a length, up to the last key that is seen", needs=("hole in mask",))
def mask_holes_filled():
    return plain(mask=lambda s: s.mask.flip(-1).cummax(-1).values.flip(-1) if is_bool(s) else s.mask)


@wrong("mask", "a mask is read as a length, up to the first key that is hidden", needs=("hole in mask",))
def mask_ends_at_first_hole():
    return plain(mask=lambda s: s.mask.cummin(-1).values if is_bool(s) else s.mask)


@wrong("mask", "a mask is read as a count of keys, and the first ones are seen", needs=("hole in mask",))
def mask_counted():
    def counted(s) -> Tensor:
        return torch.arange(s.mask.shape[-1], device=s.mask.device) < s.mask.sum(-1, keepdim=True)

    return plain(mask=lambda s: counted(s) if is_bool(s) else s.mask)


@wrong("mask", "a mask is ignored unless it has four dimensions", needs=("mask of fewer dimensions",))
def mask_ignored_unless_4d():
    return plain(masked=lambda s: s.scores if s.mask is not None and s.attn_mask.dim() < 4 else masked(s))


@wrong(
    "mask",
    "queries and keys of the mask are swapped where there are as many of both",
    needs=("mask by query", "Q = S"),
)
def mask_transposed():
    return plain(mask=lambda s: s.mask.mT if s.mask.shape[-1] == s.mask.shape[-2] else s.mask)


@wrong("mask", "any square mask by query is taken for the causal one", needs=("mask by query", "Q = S"))
def mask_taken_for_causal():
    def causal(s) -> Tensor:
        square = s.mask.shape[-1] == s.mask.shape[-2] and s.attn_mask.shape[-2] > 1
        return torch.ones_like(s.mask, dtype=torch.bool).tril() if square else s.mask

    return plain(mask=causal)


@wrong("mask", "the mask is applied after softmax, without normalising again", needs=("mask",))
def mask_after_softmax():
    return plain(
        masked=lambda s: s.scores if s.mask is None or is_bool(s) else masked(s),
        weights=lambda s: s.softmax if s.mask is None else s.softmax * ~hidden(s),
    )


@wrong("mask", "hidden scores are multiplied by 0 and not set to -inf", needs=("bool mask",))
def mask_multiplies_scores():
    return plain(masked=lambda s: s.scores * s.mask if s.mask is not None and is_bool(s) else masked(s))


@wrong("mask", "with a gate, the mask is lost", needs=("gate", "mask"))
def mask_ignored_with_gate():
    return plain(masked=lambda s: s.scores if s.head_gate is not None else masked(s))
