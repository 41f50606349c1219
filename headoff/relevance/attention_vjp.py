"""The backward pass of an attention call, and its cam (equation 5), tile by tile.

It uses two identities. First, the gradient with respect to the gated weights A is dA = dO V^T, with dO the gradient of
the gated context: query, key, value, gate and dO suffice, whatever kernel computed the context. Second, a gate is a
factor of the context, so gated attention is ungated attention with weights P whose context has the gradient
dO' = gate * dO: A * dA = P * (dO' V^T). With O the gated context and W = P * (dO' V^T):

    scores    dS = W - P * rowsum(dO * O)
    inputs    dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D),  dV = P^T dO'
    cam       mean over heads of relu(W)        (`gradient`, equation 5)
              mean over heads of W              (`signed`)
              mean over heads of relu(dS)       (`centred`)
              relu of the mean of P * gate * c  (`attention` with c = 1, `gradcam` with c the mean of dA per head)

With a `contribution` S (P, H, T, D), the cam of rule `gradient` is the mean over heads of relu(W * (S V^T)): LRP gives
A * (S V^T) the place of the weights in equation 5 (`headoff.relevance.lrp`).

A tile has a few rows of a few heads of one or more pairs, so that no T x S matrix of all heads is allocated.

Shapes: P pairs of (configuration, target), every one of which belongs to one of the G runs of the forward pass; H
heads, T queries or tokens, S keys, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from headoff.attention.contract import AdaptedAttention
from headoff.calls import Attend
from headoff.relevance.callable_vjp import gradients_by_callable
from headoff.relevance.records import AttentionRecord, select_runs
from headoff.relevance.rules import CENTRED_RESOLUTION

CamRule = Literal["gradient", "centred", "attention", "gradcam", "signed"]
InputGradients = tuple[Tensor, Tensor, Tensor]
"""Gradients of query (P, H, T, D), key and value (P, H, S, D)."""

CPU_TILE = 2**17
"""Numbers in a tile of one pair: a tile, its weights and their gradient fit into the second-level cache of a CPU."""

BATCHED_TILE = 2**26
"""Numbers in a tile of many pairs: so many that the launch of kernels takes no noticeable time."""

TEMPORARIES = 4
"""Tensors of a tile's size in memory at the same time: weights, their gradient, and intermediate results."""


class AttentionVjp:
    """The backward pass of one attention call for many targets, with cams.

    Args:
        record: the call.
        rule: how a cam is computed.
        attend: if given, the gradients of query, key and value come from this attention's backward pass.
        dtype: the dtype in which `attend` is called; the record's by default.
        tile: numbers in a tile; `CPU_TILE` or `BATCHED_TILE` by default. There are up to `TEMPORARIES` such tensors.
        batched: False, for CPUs: tiles of one pair, and heads without a gradient are skipped. True, for accelerators:
            tiles of as many pairs as fit, and the host reads no tensor's values, so it never waits.
    """

    def __init__(
        self,
        record: AttentionRecord,
        rule: CamRule,
        attend: Attend | None = None,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
        *,
        batched: bool = False,
    ) -> None:
        self.record = record
        self.rule = rule
        self._attend = attend
        self._dtype = dtype or record.query.dtype
        self._tile = tile or (BATCHED_TILE if batched else CPU_TILE)
        self._batched = batched
        self._value = record.value.transpose(-2, -1)
        self._largest_value = record.value.norm(dim=-1, keepdim=True).amax(2, keepdim=True)

    def __call__(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        *,
        cam: bool = True,
        inputs: bool = True,
        contribution: Tensor | None = None,
    ) -> tuple[Tensor | None, InputGradients | None]:
        """The backward pass of the call.

        Args:
            grad_context: (P, H, T, D), gradient of the gated context; None if the cam does not depend on it.
            runs: (P,) int64, the run of each pair.
            cam, inputs: whether to compute cams, and gradients of the inputs.
            contribution: (P, H, T, D), see above; None for attention weights as they are.

        Returns:
            Cams (P, T, S), and the gradients of the inputs; None for what is not requested.
        """
        input_gradients = None
        if inputs and self._attend is not None:
            assert grad_context is not None
            input_gradients = gradients_by_callable(
                self.record, self._attend, self._dtype, grad_context, runs
            )
            inputs = False
        if not (cam or inputs):
            return None, input_gradients
        cams, analytic = self._analytic(grad_context, runs, cam, inputs, contribution)
        return cams, input_gradients or analytic

    def right(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        vectors: Tensor,
        contribution: Tensor | None = None,
    ) -> Tensor:
        """Cams times vectors (P, S): (P, T). The cams are not stored."""
        result = vectors.new_empty(len(runs), self.record.query.shape[2])
        for pairs, rows, tile in self._tiles(grad_context, runs, None, contribution):
            result[pairs, rows] = (tile @ vectors[pairs, :, None])[:, :, 0]
        return result

    def left(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        vectors: Tensor,
        contribution: Tensor | None = None,
    ) -> Tensor:
        """Row vectors (P, M, T) times cams: (P, M, S). The cams are not stored."""
        result = vectors.new_zeros(*vectors.shape[:2], self.record.key.shape[2])
        for pairs, rows, tile in self._tiles(grad_context, runs, None, contribution):
            result[pairs].baddbmm_(vectors[pairs, :, rows], tile)
        return result

    @property
    def device(self) -> torch.device:
        return self.record.query.device

    @property
    def tokens(self) -> int:
        """S."""
        return self.record.key.shape[2]

    def weights_at(self, run: int, queries: Tensor) -> Tensor:
        """Gated weights of a run at some queries (q,): (q, H, S)."""
        weights = self.record.weights(slice(run, run + 1))[0].index_select(1, queries)
        if self.record.gate is not None:
            gate = self.record.gate[run]
            weights = weights * (gate if gate.shape[1] == 1 else gate.index_select(1, queries))
        return weights.transpose(0, 1)

    def _analytic(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        cam: bool,
        inputs: bool,
        contribution: Tensor | None,
    ) -> tuple[Tensor | None, InputGradients | None]:
        """Cams, and gradients of the inputs, by the formulas above."""
        query, key = self.record.query, self.record.key
        pairs, heads, queries, channels = len(runs), *query.shape[1:]
        keys = key.shape[2]
        cams = query.new_empty(pairs, queries, keys) if cam else None
        input_gradients: InputGradients | None = None
        if inputs:
            # Gradients of key and value are sums over tiles; that of the query is written once per row.
            input_gradients = (
                query.new_zeros(pairs, heads, queries, channels),
                query.new_zeros(pairs, heads, keys, channels),
                query.new_zeros(pairs, heads, keys, channels),
            )
        for tile_pairs, rows, tile in self._tiles(grad_context, runs, input_gradients, contribution):
            if cams is not None:
                cams[tile_pairs, rows] = tile
        return cams, input_gradients

    def _tiles(
        self,
        grad_context: Tensor | None,
        runs: Tensor,
        input_gradients: InputGradients | None,
        contribution: Tensor | None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Slices of pairs and rows with their cams (pairs, rows, S); also adds to `input_gradients`."""
        record, heads = self.record, self.record.query.shape[1]
        weighted = self.rule in ("attention", "gradcam")
        factor = self._factors(grad_context, runs) if weighted else None
        gated, centre = None, None
        if not weighted or input_gradients is not None:
            gated, centre = self._gated(grad_context, runs)
        pair_slices, row_slices, head_slices = tiles_of(record, runs, self._tile, self._batched)
        active = self._active(factor if gated is None else gated, head_slices)
        for pairs, runs_here in pair_slices:
            for rows in row_slices:
                cam: Tensor | None = None
                for index, some_heads in enumerate(head_slices):
                    if active is not None and not active[pairs.start][index]:
                        continue
                    weights = record.weights(runs_here, some_heads, rows)
                    if factor is not None:
                        cam = _add_heads(cam, weights * factor[pairs, some_heads, rows])
                    if gated is None or centre is None:
                        continue
                    gated_here, centre_here = gated[pairs, some_heads, rows], centre[pairs, some_heads, rows]
                    value = select_runs(self._value[:, some_heads], runs_here)
                    scores = gated_here @ value
                    if self.rule == "centred":
                        largest = select_runs(self._largest_value[:, some_heads], runs_here)
                        cam = _add_heads(cam, centred(scores, centre_here, gated_here, largest).mul_(weights))
                    scores.mul_(weights)
                    if self.rule == "signed":
                        cam = _add_heads(cam, scores)
                    elif self.rule == "gradient":
                        cam = _add_heads(
                            cam,
                            scores.clamp_min(0)
                            if contribution is None
                            else (contribution[pairs, some_heads, rows] @ value).mul_(scores).clamp_min_(0),
                        )
                    if input_gradients is None:
                        continue
                    scores.addcmul_(weights, centre_here, value=-1)
                    grad_query, grad_key, grad_value = input_gradients
                    grad_query[pairs, some_heads, rows] = scores @ select_runs(
                        record.scaled_key[:, some_heads], runs_here
                    )
                    query = select_runs(record.scaled_query[:, some_heads, rows], runs_here)
                    add_product(grad_key[pairs, some_heads], scores.mT, query)
                    add_product(grad_value[pairs, some_heads], weights.mT, gated_here)
                if cam is None:
                    shape = pairs.stop - pairs.start, rows.stop - rows.start, record.key.shape[2]
                    cam = record.query.new_zeros(shape)
                cam.mul_(1 / heads)
                yield pairs, rows, cam.clamp_min_(0) if self.rule == "gradcam" else cam

    def _gated(self, grad_context: Tensor | None, runs: Tensor) -> tuple[Tensor, Tensor]:
        """dO' (P, H, T, D), and rowsum(dO * O) (P, H, T, 1)."""
        assert grad_context is not None
        gate, context = self.record.gate, select_runs(self.record.context, runs)
        centre = (grad_context * context).sum(-1, keepdim=True)
        gated = grad_context if gate is None else grad_context * select_runs(gate, runs)
        return gated.contiguous(), centre

    def _factors(self, grad_context: Tensor | None, runs: Tensor) -> Tensor:
        """The factor of each row of weights, (P, H, T, 1), under the rules `attention` and `gradcam`."""
        record = self.record
        _, heads, queries, _ = record.query.shape
        factor = record.query.new_ones(len(runs), heads, queries, 1)
        if record.gate is not None:
            factor = factor * select_runs(record.gate, runs)
        if self.rule == "gradcam":
            assert grad_context is not None
            # The mean of dO V^T over all rows and columns, without computing the matrix. Padding is masked instead of
            # removed, because the host would have to wait for the number of tokens.
            if record.keys is None:
                mean = record.value.mean(2, keepdim=True)
            else:
                attended = record.keys[:, None]
                mean = torch.where(attended, record.value, 0).sum(2, keepdim=True) / attended.sum()
            values = select_runs(mean, runs)
            factor = factor * (grad_context.mean(2, keepdim=True) * values).sum(-1, keepdim=True)
        return factor

    def _active(self, factor: Tensor | None, head_slices: list[slice]) -> list[list[bool]] | None:
        """For every pair and slice of heads, whether any head contributes; None if batched, as nothing is skipped then.

        Heads that are off have a factor (P, H, T, n) of zero.
        """
        if self._batched:
            return None
        assert factor is not None
        # Not `factor > 0`, so that NaN is not skipped.
        nonzero = (factor != 0).flatten(2).any(-1)
        return [[bool(row[heads].any()) for heads in head_slices] for row in nonzero]


def centred(grad_weights: Tensor, centre: Tensor, gated: Tensor, largest_value: Tensor) -> Tensor:
    """relu(dO' V^T - rowsum(dO * O)), with differences of the size of rounding errors set to zero.

    Args:
        grad_weights: dO' V^T (..., rows, S).
        centre: rowsum(dO * O) (..., rows, 1).
        gated: dO' (..., rows, D).
        largest_value: the largest norm of a row of V (..., 1, 1).
    """
    excess = grad_weights - centre
    return torch.where(excess > centred_threshold(gated, largest_value), excess, 0)


def centred_threshold(gated: Tensor, largest_value: Tensor) -> Tensor:
    """The size of rounding errors of dO' V^T, (..., rows, 1); see `centred` for the arguments."""
    scale = gated.norm(dim=-1, keepdim=True) * largest_value
    return CENTRED_RESOLUTION * torch.finfo(scale.dtype).eps * scale


def tiles_of(
    record: AttentionRecord, runs: Tensor, tile: int, batched: bool
) -> tuple[list[tuple[slice, Tensor | slice]], list[slice], list[slice]]:
    """Slices of pairs with their runs, of rows and of heads: tiles of `tile` numbers. Heads are divided first, then
    pairs, and rows last. `runs` and `batched` are those of `AttentionVjp`.
    """
    _, heads, queries, _ = record.query.shape
    keys, pairs = record.key.shape[2], len(runs)
    rows_at_once = max(1, min(queries, tile // keys))
    pairs_at_once = max(1, min(pairs, tile // (keys * rows_at_once))) if batched else 1
    heads_at_once = max(1, min(heads, tile // (keys * rows_at_once * pairs_at_once)))
    pair_slices: list[tuple[slice, Tensor | slice]]
    if batched:
        pair_slices = [(some, runs[some]) for some in _cut(pairs, pairs_at_once)]
    else:
        # Indexing with a slice gives views, indexing with a tensor gives copies.
        pair_slices = [(slice(at, at + 1), slice(run, run + 1)) for at, run in enumerate(runs.tolist())]
    return pair_slices, _cut(queries, rows_at_once), _cut(heads, heads_at_once)


def _cut(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _add_heads(cam: Tensor | None, tile: Tensor) -> Tensor:
    """A cam (P, rows, S), or None for zero, plus a tile (P, heads, rows, S)."""
    total = tile[:, 0] if tile.shape[1] == 1 else tile.sum(1)
    return total if cam is None else cam.add_(total)


def add_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left (P or 1, H, S, rows) times right (P or 1, H, rows, D) to the result (P, H, S, D)."""
    if len(result) == len(left) == len(right) == 1:
        result[0].baddbmm_(left[0], right[0])
    elif len(left) == len(right):
        result += left @ right
    elif len(left) == 1:
        # matmul would copy the weights for each pair.
        result += torch.einsum("hts,phsd->phtd", left[0], right)
    else:
        result += left @ right


def is_builtin(attention: Callable[..., Tensor]) -> bool:
    """Whether an attention is one of this package's, so that the analytic backward pass is valid for it."""
    call = attention.call if isinstance(attention, AdaptedAttention) else attention
    return (getattr(call, "__module__", None) or "").startswith("headoff.attention.")
