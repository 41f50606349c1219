"""From the gradient of an attention's context to its cam (equation 5), and to the gradients of its inputs.

Two identities make it cheap. The gradient with respect to the gated weights A is dA = dO V^T, dO the gradient of the
gated context: nothing but query, key, value, gate and dO is needed, whatever kernel computed the context. And a
gate is a factor of the context, so the gated attention is an ungated one of weights P whose context has the gradient
dO' = gate * dO: A * dA = P * (dO' V^T), and of the gate nothing but dO' is left. With O the gated context and
W = P * (dO' V^T):

    scores    dS = W - P * rowsum(dO * O)
    inputs    dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D),  dV = P^T dO'
    cam       mean over heads of relu(W)        (`gradient`, equation 5)
              mean over heads of relu(dS)       (`centred`)
              relu of the mean of P * gate * c  (`attention` with c = 1, `gradcam` with c the mean of dA per head)

All of it is done tile by tile: T x S matrices need not exist for more than a few rows of one head. Here pairs go one
by one, for the caches of a CPU; `headoff.relevance.batched_vjp` and `fused_vjp` are for accelerators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from headoff.attention.contract import AdaptedAttention
from headoff.detr.transformer import Attend
from headoff.relevance.callable_vjp import gradients_by_callable
from headoff.relevance.capture import AttentionRecord
from headoff.relevance.rules import CENTRED_RESOLUTION
from headoff.relevance.vjp import of_runs

CamRule = Literal["gradient", "centred", "attention", "gradcam"]

CPU_TILE = 2**17
"""Numbers in a tile on the CPU: a tile, its weights and their gradient are to fit into the second-level cache."""


class AttentionVjp:
    """The backward pass of one attention call, for many targets, with cams.

    Args:
        record: the call.
        rule: of the cam.
        attend: where given, gradients of the inputs are those of this attention's own backward pass; the detector's
            dtype, `dtype`, is the one it is called in.
        tile: numbers in a tile; `CPU_TILE` where None.
    """

    def __init__(
        self,
        record: AttentionRecord,
        rule: CamRule,
        attend: Attend | None = None,
        dtype: torch.dtype | None = None,
        tile: int | None = None,
    ) -> None:
        self.record = record
        self.rule = rule
        self._attend = attend
        self._dtype = dtype or record.query.dtype
        self._tile = tile or CPU_TILE
        self._value = record.value.transpose(-2, -1)
        self._longest = record.value.norm(dim=-1, keepdim=True).amax(2, keepdim=True)

    def __call__(
        self, gradient: Tensor | None, runs: Tensor, *, cam: bool = True, inputs: bool = True
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Cams (P, T, S), and gradients of query, key and value (P, H, T or S, D); None where not asked for.

        `gradient` (P, H, T, D): of the context as the model uses it, gated. None where the cam needs none.
        """
        own = None
        if inputs and self._attend is not None:
            assert gradient is not None
            own = gradients_by_callable(self.record, self._attend, self._dtype, gradient, runs)
            inputs = False
        cams, by_formula = self._formula(gradient, runs, cam, inputs) if cam or inputs else (None, None)
        return cams, by_formula if own is None else own

    def right(self, gradient: Tensor | None, runs: Tensor, vectors: Tensor) -> Tensor:
        """Cams times vectors (P, S): (P, T). No cam is kept."""
        result = vectors.new_empty(len(runs), self.record.query.shape[2])
        for pairs, rows, tile in self._tiles(gradient, runs, None):
            result[pairs, rows] = (tile @ vectors[pairs, :, None])[:, :, 0]
        return result

    def left(self, gradient: Tensor | None, runs: Tensor, rows: Tensor) -> Tensor:
        """rows (P, M, T) times cams: (P, M, S). No cam is kept."""
        result = rows.new_zeros(*rows.shape[:2], self.record.key.shape[2])
        for pairs, part, tile in self._tiles(gradient, runs, None):
            result[pairs].baddbmm_(rows[pairs, :, part], tile)
        return result

    def _formula(
        self, gradient: Tensor | None, runs: Tensor, cam: bool, inputs: bool
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Cams, and gradients of query, key and value by the formula."""
        query, key = self.record.query, self.record.key
        pairs, heads, queries, channels = len(runs), *query.shape[1:]
        keys = key.shape[2]
        cams = query.new_empty(pairs, queries, keys) if cam else None
        own: tuple[Tensor, Tensor, Tensor] | None = None
        if inputs:
            # The rows of key and value are added up over tiles, those of the query are written once.
            own = (
                query.new_zeros(pairs, heads, queries, channels),
                query.new_zeros(pairs, heads, keys, channels),
                query.new_zeros(pairs, heads, keys, channels),
            )
        for which, rows, tile in self._tiles(gradient, runs, own):
            if cams is not None:
                cams[which, rows] = tile
        return cams, own

    def _tiles(
        self, gradient: Tensor | None, runs: Tensor, into: tuple[Tensor, ...] | None
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Cam tiles (pairs, rows, S); gradients of query, key and value are added to `into` on the way."""
        record = self.record
        pairs, (_, heads, queries, _), keys = len(runs), record.query.shape, record.key.shape[2]
        rows_at_once = max(1, min(queries, self._tile // keys))
        heads_at_once = max(1, min(heads, self._tile // (keys * rows_at_once)))
        head_slices = [slice(start, start + heads_at_once) for start in range(0, heads, heads_at_once)]
        row_slices = [slice(start, start + rows_at_once) for start in range(0, queries, rows_at_once)]
        which = [0] * pairs if len(record.query) == 1 else runs.tolist()
        weighted = self.rule in ("attention", "gradcam")
        factor = self._factors(gradient, runs) if weighted else None
        gated, centre = self._gated(gradient, runs) if not weighted or into is not None else (None, None)
        on = self._on(factor if weighted and into is None else gated, head_slices)
        for pair, run in enumerate(which):
            shared = 0 if len(record.key) == 1 else run
            for rows in row_slices:
                cam = record.query.new_zeros(len(range(*rows.indices(queries))), keys)
                for heads_now, is_on in zip(head_slices, on[pair], strict=True):
                    if not is_on:
                        continue
                    weights = record.weights(run, heads_now, rows)
                    if factor is not None:
                        _add_heads(cam, weights * factor[pair, heads_now, rows])
                    if gated is None or centre is None:
                        continue
                    of_context = gated[pair, heads_now, rows]
                    scores = torch.bmm(of_context, self._value[shared, heads_now])
                    if self.rule == "centred":
                        middle = centre[pair, heads_now, rows]
                        longest = self._longest[shared, heads_now]
                        _add_heads(cam, centred(scores, middle, of_context, longest).mul_(weights))
                    scores.mul_(weights)
                    if self.rule == "gradient":
                        _add_heads(cam, scores.clamp_min(0))
                    if into is None:
                        continue
                    scores.addcmul_(weights, centre[pair, heads_now, rows], value=-1)
                    into[0][pair, heads_now, rows] = torch.bmm(scores, record.scaled_key[shared, heads_now])
                    into[1][pair, heads_now].baddbmm_(
                        scores.transpose(1, 2), record.scaled_query[run, heads_now, rows]
                    )
                    into[2][pair, heads_now].baddbmm_(weights.transpose(1, 2), of_context)
                cam.mul_(1 / heads)
                if self.rule == "gradcam":
                    cam.clamp_min_(0)
                yield slice(pair, pair + 1), rows, cam[None]

    def _gated(self, gradient: Tensor | None, runs: Tensor) -> tuple[Tensor, Tensor]:
        """dO' (P, H, T, D), and rowsum(dO * O) (P, H, T, 1)."""
        assert gradient is not None
        gate, context = self.record.gate, of_runs(self.record.context, runs)
        centre = (gradient * context).sum(-1, keepdim=True)
        gated = gradient if gate is None else gradient * of_runs(gate, runs)
        return gated.contiguous(), centre

    def _factors(self, gradient: Tensor | None, runs: Tensor) -> Tensor:
        """What each row of weights is multiplied by, (P, H, T, 1), under the rules that take no product with dA."""
        record = self.record
        _, heads, queries, _ = record.query.shape
        factor = record.query.new_ones(len(runs), heads, queries, 1)
        if record.gate is not None:
            factor = factor * of_runs(record.gate, runs)
        if self.rule == "gradcam":
            assert gradient is not None
            # The mean of dO V^T over all rows and columns, without the matrix. Padding is masked, not left out: how
            # many tokens are no padding is nothing to wait for.
            if record.keys is None:
                mean = record.value.mean(2, keepdim=True)
            else:
                attended = record.keys[:, None]
                mean = torch.where(attended, record.value, 0).sum(2, keepdim=True) / attended.sum()
            values = of_runs(mean, runs)
            factor = factor * (gradient.mean(2, keepdim=True) * values).sum(-1, keepdim=True)
        return factor

    def _on(self, factor: Tensor | None, head_slices: list[slice]) -> list[list[bool]]:
        """For each pair and slice of heads, whether there is anything to do: heads that are off have no gradient."""
        assert factor is not None
        # Not zero, rather than positive: NaN has to come through.
        some = (factor != 0).flatten(2).any(-1)
        return [[bool(row[heads].any()) for heads in head_slices] for row in some]


def centred(of_weights: Tensor, centre: Tensor, of_context: Tensor, longest: Tensor) -> Tensor:
    """relu of dO' V^T (..., rows, S) less rowsum(dO * O), `centre` (..., rows, 1); rounding errors are zero.

    `of_context` (..., rows, D) is dO', `longest` (..., 1, 1) the norm of the longest value.
    """
    excess = of_weights - centre
    # Of no interest below zero, so one comparison will do.
    return torch.where(excess > centred_threshold(of_context, longest), excess, 0)


def centred_threshold(of_context: Tensor, longest: Tensor) -> Tensor:
    """What is rounding of dO' V^T, (..., rows, 1)."""
    scale = of_context.norm(dim=-1, keepdim=True) * longest
    return CENTRED_RESOLUTION * torch.finfo(scale.dtype).eps * scale


def _add_heads(cam: Tensor, tile: Tensor) -> None:
    """Add a tile (heads, rows, S) to a cam (rows, S)."""
    cam.add_(tile[0] if len(tile) == 1 else tile.sum(0))


def is_builtin(attention: Callable[..., Tensor]) -> bool:
    """Whether the analytic backward pass is this attention's own: it is one of this package's."""
    call = attention.call if isinstance(attention, AdaptedAttention) else attention
    return (getattr(call, "__module__", None) or "").startswith("headoff.attention.")
