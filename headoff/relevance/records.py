"""Recorded attention calls, from which weights and gradients are computed.

Shapes: G runs (configurations in the decoder, 1 in the encoder), T tokens or queries, S keys, H heads, D channels of
a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor

from headoff.calls import AttentionAddress

LOG_SUM_TILE = 2**17
"""Scores in memory while log-sum-exps are computed: as many as fit into a CPU's cache."""

ACCELERATOR_LOG_SUM_TILE = 2**25
"""The same on accelerators: so many that the launch of kernels takes no noticeable time."""


@dataclass
class AttentionRecord:
    """One attention call, in the dtype of relevance.

    Attributes:
        address: site and layer.
        query: (G, H, T, D).
        key, value: (G or 1, H, S, D).
        gate: (G or 1, H, T or 1, 1), or None if every head is on.
        keys: (S,) bool, True = attended; None if all keys are.
        context: (G, H, T, D), gated, as the attention callable returned it.
    """

    address: AttentionAddress
    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    keys: Tensor | None
    context: Tensor
    _log_sum: Tensor | None = field(default=None, repr=False)
    _weights: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.query, self.key, self.value = (x.contiguous() for x in (self.query, self.key, self.value))
        self.scaled_query = self.query / math.sqrt(self.query.shape[-1])
        self.scaled_key = self.key / math.sqrt(self.query.shape[-1])

    def keep_weights(self) -> None:
        """Store the weights (G, H, T, S), instead of recomputing tiles of them."""
        if self._weights is None:
            self._weights = self._scores(slice(None), slice(None), slice(None)).softmax(-1)
            if self.keys is not None:
                self._weights.nan_to_num_(nan=0.0)  # the weights of fully masked rows are zero

    def weights(self, runs: Tensor | slice, heads: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """Weights after softmax, before the gate: (P, heads, rows, S), or (1, ...) if G = 1. Read only.

        Args:
            runs: (P,) int64, or a slice.
            heads, rows: slices of heads and rows.
        """
        if self._weights is not None:
            return select_runs(self._weights[:, heads, rows], runs)
        scores = self._scores(runs, heads, rows)
        return scores.sub_(select_runs(self.log_sum[:, heads, rows], runs)).exp_()

    @property
    def log_sum(self) -> Tensor:
        """Log-sum-exp of each row of scores, (G, H, T, 1); 0 for fully masked rows. Computed once."""
        if self._log_sum is None:
            self._log_sum = self._log_sums()
        return self._log_sum

    def _log_sums(self) -> Tensor:
        runs, heads, queries, _ = self.query.shape
        result = self.query.new_empty(runs, heads, queries, 1)
        tile = LOG_SUM_TILE if self.query.device.type == "cpu" else ACCELERATOR_LOG_SUM_TILE
        at_once = max(1, tile // (heads * self.key.shape[2]))
        for run in range(runs):
            for start in range(0, queries, at_once):
                part = slice(run, run + 1), slice(None), slice(start, start + at_once)
                result[part] = self._scores(*part).logsumexp(-1, keepdim=True)
        # The scores of fully masked rows are -inf, and so is their log-sum-exp; with 0 instead, their weights are
        # exp(-inf).
        return result.masked_fill_(result == -math.inf, 0)

    def _scores(self, runs: Tensor | slice, heads: slice, rows: slice) -> Tensor:
        query = select_runs(self.scaled_query[:, heads, rows], runs)
        scores = query @ select_runs(self.key[:, heads], runs).transpose(-2, -1)
        return scores if self.keys is None else scores.masked_fill_(~self.keys, -math.inf)


def select_runs(x: Tensor, runs: Tensor | slice) -> Tensor:
    """x (G, ...) at the indices `runs` (P,): (P, ...); x itself if G = 1, because it broadcasts. A slice gives a
    view.
    """
    if len(x) == 1:
        return x
    return x[runs] if isinstance(runs, slice) else x.index_select(0, runs)


def unfold_runs(record: AttentionRecord, runs: int) -> AttentionRecord:
    """A cross-attention call (1, H, G * Q, D), with runs concatenated along the query axis, as (G, H, Q, D)."""

    def unfold(x: Tensor) -> Tensor:
        return x.unflatten(2, (runs, -1))[0].transpose(0, 1)

    return AttentionRecord(
        record.address,
        unfold(record.query),
        record.key,
        record.value,
        None if record.gate is None else unfold(record.gate),
        record.keys,
        unfold(record.context),
    )
