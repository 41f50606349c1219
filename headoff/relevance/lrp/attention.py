"""LRP through an attention call: its two products of matrices, and the softmax between them.

With weights P before the gate, A = gate * P, the gated context O = A V and scores s = q k^T (k already scaled), and
with 1 / z as in `LrpRules.reciprocal`:

    S    = R_O / (2 O)                                  half of the relevance for each factor of A V
    R_A  = A * (S V^T)                                  what LRP puts in the place of A in equation 5
    R_V  = V * (A^T S)
    S_s  = P * (gate * S V^T) / (2 s)                   softmax passes on unchanged (`PositiveRules`)
    S_s  = P * (gate * S V^T - rowsum(S * O)) s / (2 s) by deep Taylor decomposition (`EpsilonRules`)
    R_q  = q * (S_s k),  R_k = k * (S_s^T q)

The last quotient s / s differs from 1 only by the stabiliser. Padding has the weight 0 and gets nothing. It is computed
in tiles, as the attention's backward pass is (`headoff.relevance.attention_vjp`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headoff.relevance.attention_vjp import add_product, tiles_of
from headoff.relevance.lrp.rules import LrpRules
from headoff.relevance.records import AttentionRecord, select_runs


class AttentionShares(NamedTuple):
    """The result for P pairs.

    Attributes:
        contribution: S (P, H, T, D), from which cams are computed.
        query: R_q (P, H, T, D).
        key, value: R_k and R_V, (P, H, S, D).
    """

    contribution: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


class AttentionRelevance:
    """LRP through a recorded attention call.

    Args:
        record: the call.
        tile, batched: see `AttentionVjp`.
        keep: whether P / s is stored, (G, H, T, S), as P may be; otherwise it is recomputed tile by tile.
    """

    def __init__(
        self, record: AttentionRecord, rules: LrpRules, tile: int, batched: bool, keep: bool = False
    ) -> None:
        self.record = record
        self._rules = rules
        self._tile = tile
        self._batched = batched
        self._reciprocal = rules.reciprocal(record.context) / 2
        self._value = record.value.transpose(-2, -1)
        everything = slice(None)
        self._kept: Tensor | None = None
        if keep:
            self._kept = self._weights_by_scores(everything, everything, everything)

    def contribution(self, relevance: Tensor, runs: Tensor) -> Tensor:
        """S, from R_O (P, H, T, D)."""
        return relevance * select_runs(self._reciprocal, runs)

    def __call__(self, relevance: Tensor, runs: Tensor) -> AttentionShares:
        """From R_O (P, H, T, D)."""
        record, rules = self.record, self._rules
        pairs, keys = len(runs), record.key.shape[2]
        shares = self.contribution(relevance, runs)
        gated = shares if record.gate is None else shares * select_runs(record.gate, runs)
        centre = None
        if rules.centred_softmax:
            centre = (shares * select_runs(record.context, runs)).sum(-1, keepdim=True)
        of_query = torch.zeros_like(shares)
        shape = pairs, shares.shape[1], keys, shares.shape[3]
        of_key, of_value = shares.new_zeros(shape), shares.new_zeros(shape)
        pair_slices, row_slices, head_slices = tiles_of(record, runs, self._tile, self._batched)
        for pairs_here, runs_here in pair_slices:
            for heads in head_slices:
                # Heads that are off, and pairs without relevance, are skipped where that can be seen without waiting.
                if not self._batched and not bool(gated[pairs_here, heads].any()):
                    continue
                key = select_runs(record.scaled_key[:, heads], runs_here)
                value = select_runs(self._value[:, heads], runs_here)
                for rows in row_slices:
                    here = pairs_here, heads, rows
                    query = select_runs(record.query[:, heads, rows], runs_here)
                    weights = record.weights(runs_here, heads, rows)
                    add_product(of_value[pairs_here, heads], weights.mT, gated[here])
                    change = gated[here] @ value
                    if centre is not None:
                        change -= centre[here]
                    change *= self._weights_by_scores(runs_here, heads, rows)
                    of_query[here] = change @ key
                    add_product(of_key[pairs_here, heads], change.mT, query)
        # The scale 1 / sqrt(D) is with the keys in both products, once.
        of_query *= select_runs(record.query, runs) / 2
        of_key *= select_runs(record.scaled_key, runs) / 2
        of_value *= select_runs(record.value, runs)
        return AttentionShares(shares, of_query, of_key, of_value)

    def _weights_by_scores(self, runs: Tensor | slice, heads: slice, rows: slice) -> Tensor:
        """P times `LrpRules.of_scores`, (P or 1, heads, rows, S). Read only."""
        if self._kept is not None:
            return select_runs(self._kept[:, heads, rows], runs)
        query = select_runs(self.record.query[:, heads, rows], runs)
        scores = query @ select_runs(self.record.scaled_key[:, heads], runs).mT
        return self._rules.of_scores(scores).mul_(self.record.weights(runs, heads, rows))
