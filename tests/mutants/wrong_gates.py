"""Faults in the handling of the head gate."""

from __future__ import annotations

import torch
from torch import Tensor

from mutants.parts import blocks, filled, plain, rounded, scores
from mutants.registry import wrong


@wrong("gate", "the gate is taken and never used", needs=("gate",))
def gate_ignored():
    return plain(gated=lambda s: s.weights)


@wrong("gate", "each head has the gate of the head before it", needs=("gate by head",))
def gate_of_previous_head():
    return plain(gate=lambda s: s.gate.roll(1, 1))


@wrong("gate", "the gate's heads are counted from the end", needs=("gate by head",))
def gate_heads_reversed():
    return plain(gate=lambda s: s.gate.flip(1))


@wrong("gate", "the gate is taken for an off vector: 1 switches off", needs=("gate",))
def gate_inverted():
    return plain(gate=lambda s: 1 - s.gate)


@wrong(
    "gate",
    "heads and queries of the gate are swapped where there are as many of both",
    needs=("gate by query", "Q = H"),
)
def gate_transposed():
    return plain(gate=lambda s: s.gate.transpose(1, 2) if s.gate.shape[1] == s.gate.shape[2] else s.gate)


@wrong(
    "gate", "the gate multiplies the scores: a head that is off attends to all keys alike", needs=("gate",)
)
def gate_times_scores():
    return plain(scores=lambda s: scores(s) * s.gate, gated=lambda s: s.weights)


@wrong(
    "gate",
    "the gate's logarithm is added to the scores: 0 works, but softmax cancels every other gate",
    needs=("fraction",),
)
def gate_log_added_to_scores():
    return plain(scores=lambda s: scores(s) + s.gate.log(), gated=lambda s: s.weights)


@wrong("gate", "the gates are renormalised so that their mean over heads stays 1", needs=("gate",))
def gate_renormalised():
    def over_mean(s) -> Tensor:
        mean = s.gate.mean(1, keepdim=True)
        return s.gate / torch.where(mean == 0, 1, mean)

    return plain(gate=over_mean)


@wrong("gate", "every gate that is not 0 counts as 1", needs=("fraction",))
def gate_as_bool():
    return plain(gate=lambda s: s.gate.bool().to(s.gate))


@wrong("gate", "the gate is rounded to 0 or 1", needs=("fraction",))
def gate_thresholded():
    return plain(gate=lambda s: (s.gate >= 0.5).to(s.gate))


@wrong("gate", "the gate is stored as integers, which cuts fractions off", needs=("fraction",))
def gate_as_integer():
    return plain(gate=lambda s: s.gate.long().to(s.gate))


@wrong("gate", "gates below 0.01 count as 0, to skip more heads", needs=("fraction",))
def gate_skipped_when_small():
    return plain(gate=lambda s: s.gate.masked_fill(s.gate < 0.01, 0))


@wrong("gate", "the gate is clamped to 1", needs=("gate above 1",))
def gate_clamped():
    return plain(gate=lambda s: s.gate.clamp(0, 1))


@wrong("gate", "all batch items have the gate of the first", needs=("gate by item",))
def gate_of_first_item():
    return plain(gate=lambda s: s.gate[:1].expand_as(s.gate))


@wrong("gate", "all heads have the gate of the first", needs=("gate by head",))
def gate_of_first_head():
    return plain(gate=lambda s: s.gate[:, :1].expand_as(s.gate))


@wrong("gate", "all queries have the gate of the first", needs=("gate by query",))
def gate_of_first_query():
    return plain(gate=lambda s: s.gate[:, :, :1].expand_as(s.gate))


@wrong("gate", "all queries have the mean of the gates of all queries", needs=("gate by query",))
def gate_of_mean_query():
    return plain(gate=lambda s: s.gate.mean(2, keepdim=True).expand_as(s.gate))


@wrong("gate", "a block of 16 queries has the gate of its first query", needs=("gate by query",))
def gate_of_query_block():
    def of_block(s) -> Tensor:
        queries = torch.arange(s.gate.shape[2], device=s.gate.device)
        return s.gate[:, :, queries // 16 * 16]

    return plain(gate=of_block)


@wrong("gate", "each query has the gate of the query before it", needs=("gate by query",))
def gate_of_previous_query():
    return plain(gate=lambda s: s.gate.roll(1, 2))


@wrong("gate", "a head is skipped where the gate of its first query is 0", needs=("gate by query",))
def gate_skips_by_first_query():
    return plain(gate=lambda s: s.gate * (s.gate[:, :, :1] != 0))


@wrong("gate", "a head is skipped where the first batch item has it off", needs=("gate by item",))
def gate_skips_by_first_item():
    return plain(gate=lambda s: s.gate * (s.gate[:1] != 0))


@wrong(
    "gate",
    "a head is computed in full, its gates unread, where any of its queries is on",
    needs=("gate by query",),
)
def gate_skips_whole_heads_only():
    return plain(
        gate=lambda s: (s.gate != 0).any(2, keepdim=True).to(s.gate).expand_as(s.gate) * s.gate.amax(2, True)
    )


@wrong("gate", "the gate is applied to the weights and to the context", needs=("fraction",))
def gate_applied_twice():
    return plain(context=lambda s: (s.gated @ s.value) * s.gate)


@wrong(
    "gate",
    "the accumulator is multiplied by the gate at every block of 64 keys",
    needs=("fraction", "S > 64"),
)
def gate_applied_by_block():
    return plain(gate=lambda s: s.gate ** len(blocks(s.key.shape[2], 64)))


@wrong("gate", "the gate passes through bfloat16", needs=("fraction",))
def gate_in_bfloat16():
    return plain(gate=lambda s: rounded(s.gate, torch.bfloat16))


@wrong("gate", "a gate that is off everywhere is taken for one that is not set", needs=("all off",))
def gate_ignored_when_all_off():
    return plain(gate=lambda s: s.gate if bool(s.gate.any()) else torch.ones_like(s.gate))


@wrong(
    "gate",
    "the gate is repeated for batch items as (H, B), the scores are (B, H)",
    needs=("gate", "batch", "heads"),
)
def gate_flattened_heads_first():
    return plain(gate=lambda s: s.gate.transpose(0, 1).reshape(s.gate.shape))


@wrong("gate", "a head that is off keeps the mean of its values", needs=("gate",))
def gate_ablates_to_mean():
    def ablated(s) -> Tensor:
        return torch.lerp(s.value.mean(2, keepdim=True), s.weights @ s.value, s.gate)

    return plain(context=ablated)


@wrong("gate", "rows that are off are never written: they hold what was in memory", needs=("gate zero",))
def gate_leaves_rows_unwritten():
    return plain(context=lambda s: torch.where(s.gate == 0, s.query.detach(), s.gated @ s.value))


@wrong("gate", "with a mask, the gate is lost", needs=("gate", "mask"))
def gate_ignored_with_mask():
    return plain(gated=lambda s: s.weights if s.mask is not None else s.weights * s.gate)


@wrong(
    "gate", "rows of a gate of 0 are masked, and masked rows attend to all keys alike", needs=("gate zero",)
)
def gate_as_mask():
    return plain(
        filled=lambda s: filled(s).masked_fill(s.gate == 0, 0.0),
        gated=lambda s: s.weights * torch.where(s.gate == 0, 1, s.gate),
    )
