"""The attention's backward pass with all pairs in flight, in plain PyTorch: for accelerators.

What a CPU does pair by pair, within its caches, would be thousands of small launches on an accelerator. Here a tile is
of as many pairs, heads and rows as memory allows, and nothing waits: no value of a tensor is read by the host. Products
are torch's own, so that those of float32 keep all bits unless torch was told to round them to TF32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from headoff.detr.transformer import Attend
from headoff.relevance.attention_vjp import AttentionVjp, CamRule, centred
from headoff.relevance.capture import AttentionRecord
from headoff.relevance.vjp import of_runs

BATCHED_TILE = 2**26
"""Numbers in a tile where nothing is said: large enough for the launch of a kernel not to matter."""

TEMPORARIES = 4
"""Tensors of a tile's size that exist at once: weights, their gradient, and what comes of both."""


class BatchedVjp(AttentionVjp):
    """As `AttentionVjp`, with tiles of many pairs. `tile`: numbers in one; `TEMPORARIES` such tiles exist at once."""

    def __init__(
        self,
        record: AttentionRecord,
        rule: CamRule,
        attend: Attend | None = None,
        dtype: torch.dtype | None = None,
        tile: int = BATCHED_TILE,
    ) -> None:
        super().__init__(record, rule, attend, dtype, tile)

    def _tiles(
        self, gradient: Tensor | None, runs: Tensor, into: tuple[Tensor, ...] | None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Cam tiles (pairs, rows, S); gradients of query, key and value are added to `into` on the way."""
        record, heads = self.record, self.record.query.shape[1]
        pair_slices, row_slices, head_slices = self._slices(len(runs))
        weighted = self.rule in ("attention", "gradcam")
        factor = self._factors(gradient, runs) if weighted else None
        gated, centre = self._gated(gradient, runs) if not weighted or into is not None else (None, None)
        for pairs in pair_slices:
            some = runs[pairs]
            for rows in row_slices:
                cam: Tensor | None = None
                for now in head_slices:
                    weights = record.weights_of(some, now, rows)
                    if factor is not None:
                        cam = _added(cam, weights * factor[pairs, now, rows])
                    if gated is None or centre is None:
                        continue
                    of_context, middle = gated[pairs, now, rows], centre[pairs, now, rows]
                    scores = of_context @ of_runs(self._value[:, now], some)
                    if self.rule == "centred":
                        longest = of_runs(self._longest[:, now], some)
                        cam = _added(cam, centred(scores, middle, of_context, longest).mul_(weights))
                    scores.mul_(weights)
                    if self.rule == "gradient":
                        cam = _added(cam, scores.clamp_min(0))
                    if into is None:
                        continue
                    scores.addcmul_(weights, middle, value=-1)
                    into[0][pairs, now, rows] = scores @ of_runs(record.scaled_key[:, now], some)
                    into[1][pairs, now] += scores.mT @ of_runs(record.scaled_query[:, now, rows], some)
                    into[2][pairs, now] += _transposed_product(weights, of_context)
                assert cam is not None
                cam.div_(heads)
                yield pairs, rows, cam.clamp_min_(0) if self.rule == "gradcam" else cam

    def _slices(self, pairs: int) -> tuple[list[slice], list[slice], list[slice]]:
        """Pairs, rows and heads of the tiles: first the heads are divided, then the pairs, and the rows last."""
        _, heads, queries, _ = self.record.query.shape
        keys = self.record.key.shape[2]
        rows_at_once = max(1, min(queries, self._tile // keys))
        pairs_at_once = max(1, min(pairs, self._tile // (keys * rows_at_once)))
        heads_at_once = max(1, min(heads, self._tile // (keys * rows_at_once * pairs_at_once)))
        return _cut(pairs, pairs_at_once), _cut(queries, rows_at_once), _cut(heads, heads_at_once)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _added(cam: Tensor | None, tile: Tensor) -> Tensor:
    """A cam (P, rows, S), or nothing yet, and a tile (P, heads, rows, S)."""
    return tile.sum(1) if cam is None else cam.add_(tile.sum(1))


def _transposed_product(weights: Tensor, of_context: Tensor) -> Tensor:
    """weights^T (P or 1, heads, S, rows) times (P, heads, rows, D), without a copy of the weights for each pair."""
    if len(weights) == len(of_context):
        return weights.mT @ of_context
    return torch.einsum("hts,phtd->phsd", weights[0], of_context)
