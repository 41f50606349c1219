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

All of it is done tile by tile: T x S matrices need not exist for more than a few rows of one head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from headoff.attention import attention_label
from headoff.detr.transformer import Attend
from headoff.errors import AttentionError
from headoff.relevance.capture import AttentionRecord
from headoff.relevance.rules import CENTRED_RESOLUTION

CamRule = Literal["gradient", "centred", "attention", "gradcam"]

CPU_TILE = 2**17
"""Numbers in a tile on the CPU: a tile, its weights and their gradient are to fit into the second-level cache."""

ACCELERATOR_TILE = 2**26
"""Numbers in a tile elsewhere: large enough for the launch of a kernel not to matter."""


class AttentionVjp:
    """The backward pass of one attention call, for many targets, with cams.

    Args:
        record: the call.
        rule: of the cam.
        attend: where given, gradients of the inputs are those of this attention's own backward pass; the detector's
            dtype, `dtype`, is the one it is called in.
        tile: numbers in a tile; by device where None.
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
        self._tile = tile or (CPU_TILE if record.query.device.type == "cpu" else ACCELERATOR_TILE)
        self._value = record.value.transpose(-2, -1)
        self._longest = record.value.norm(dim=-1, keepdim=True).amax(2, keepdim=True)

    def __call__(
        self, gradient: Tensor | None, runs: Tensor, *, cam: bool = True, inputs: bool = True
    ) -> tuple[Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
        """Cams (P, T, S), and gradients of query, key and value (P, H, T or S, D); None where not asked for.

        `gradient` (P, H, T, D): of the context as the model uses it, gated. None where the cam needs none.
        """
        by_callable = None
        if inputs and self._attend is not None:
            assert gradient is not None
            by_callable = self._by_callable(gradient, runs)
        record = self.record
        pairs, queries, keys = len(runs), record.query.shape[2], record.key.shape[2]
        cams = record.query.new_empty(pairs, queries, keys) if cam else None
        own: tuple[Tensor, Tensor, Tensor] | None = None
        if inputs and by_callable is None:
            heads, channels, zeros = record.query.shape[1], record.query.shape[3], record.query.new_zeros
            # The rows of key and value are added up over tiles, those of the query are written once.
            own = (
                zeros(pairs, heads, queries, channels),
                zeros(pairs, heads, keys, channels),
                zeros(pairs, heads, keys, channels),
            )
        if cams is not None or own is not None:
            for pair, rows, tile in self._tiles(gradient, runs, own):
                if cams is not None:
                    cams[pair, rows] = tile
        return cams, own if by_callable is None else by_callable

    def cam_blocks(self, gradient: Tensor | None, runs: Tensor) -> Iterator[tuple[int, slice, Tensor]]:
        """The cams in blocks of rows, for those who cannot keep them: pair, rows, (rows, S)."""
        return self._tiles(gradient, runs, None)

    def _tiles(
        self, gradient: Tensor | None, runs: Tensor, into: tuple[Tensor, ...] | None
    ) -> Iterator[tuple[int, slice, Tensor]]:
        """Cam tiles (rows, S), pair by pair; gradients of query, key and value are added to `into` on the way."""
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
                        _add_heads(
                            cam, self._centred(scores, middle, of_context, shared, heads_now).mul_(weights)
                        )
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
                yield pair, rows, cam.clamp_min_(0) if self.rule == "gradcam" else cam

    def _centred(
        self, gradient: Tensor, middle: Tensor, of_context: Tensor, shared: int, heads: slice
    ) -> Tensor:
        """relu of the gradient (heads, rows, S) less its mean `middle`; rounding errors are zero."""
        scale = of_context.norm(dim=-1, keepdim=True) * self._longest[shared, heads]
        least = CENTRED_RESOLUTION * torch.finfo(scale.dtype).eps * scale
        centred = gradient - middle
        # Of no interest below zero, so one comparison will do.
        return torch.where(centred > least, centred, 0)

    def _gated(self, gradient: Tensor | None, runs: Tensor) -> tuple[Tensor, Tensor]:
        """dO' (P, H, T, D), and rowsum(dO * O) (P, H, T, 1)."""
        assert gradient is not None
        gate, context = self.record.gate, self._of_runs(self.record.context, runs)
        centre = (gradient * context).sum(-1, keepdim=True)
        gated = gradient if gate is None else gradient * self._of_runs(gate, runs)
        return gated.contiguous(), centre

    def _factors(self, gradient: Tensor | None, runs: Tensor) -> Tensor:
        """What each row of weights is multiplied by, (P, H, T, 1), under the rules that take no product with dA."""
        record = self.record
        _, heads, queries, _ = record.query.shape
        factor = record.query.new_ones(len(runs), heads, queries, 1)
        if record.gate is not None:
            factor = factor * self._of_runs(record.gate, runs)
        if self.rule == "gradcam":
            assert gradient is not None
            values = record.value if record.keys is None else record.value[:, :, record.keys]
            # The mean of dO V^T over all rows and columns, without the matrix.
            values = self._of_runs(values.mean(2, keepdim=True), runs)
            factor = factor * (gradient.mean(2, keepdim=True) * values).sum(-1, keepdim=True)
        return factor

    def _on(self, factor: Tensor | None, head_slices: list[slice]) -> list[list[bool]]:
        """For each pair and slice of heads, whether there is anything to do: heads that are off have no gradient."""
        assert factor is not None
        if factor.device.type != "cpu":
            return [[True] * len(head_slices)] * len(factor)
        # Not zero, rather than positive: NaN has to come through.
        some = (factor != 0).flatten(2).any(-1)
        return [[bool(row[heads].any()) for heads in head_slices] for row in some]

    def _of_runs(self, x: Tensor, runs: Tensor) -> Tensor:
        return x if len(x) == 1 else x.index_select(0, runs.to(x.device))

    def _by_callable(self, gradient: Tensor, runs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value by the attention's own backward pass, all pairs in one call.

        The forward pass is repeated, rather than its graph kept: a kernel's backward pass may free what it needs.
        """
        record, attend = self.record, self._attend
        assert attend is not None
        dtype = self._dtype

        def leaf(x: Tensor) -> Tensor:
            x = x.expand(len(runs), *x.shape[1:]) if len(x) == 1 else self._of_runs(x, runs)
            return x.to(dtype).detach().requires_grad_()

        query, key, value = leaf(record.query), leaf(record.key), leaf(record.value)
        mask = None if record.keys is None else record.keys[None, None, None]
        gate = None if record.gate is None else self._of_runs(record.gate, runs).to(dtype)
        # Half precision cannot hold gradients as small as these: a power of two is lent to them.
        lent = 1.0
        if dtype == torch.float16:
            largest = float(gradient.abs().max())
            lent = 2.0 ** -math.ceil(math.log2(largest)) if 0 < largest < math.inf else 1.0
        try:
            with torch.enable_grad():
                context = attend(record.address, query, key, value, mask, gate)
                if not context.requires_grad:
                    raise RuntimeError("its context has no gradient")
                found = torch.autograd.grad(
                    context, (query, key, value), (gradient * lent).to(dtype), allow_unused=True
                )
        except RuntimeError as error:
            raise AttentionError(
                f"the backward pass of the attention failed at {record.address.site}, layer "
                f"{record.address.layer} ({' '.join(str(error).split())}): give it one, or explain with "
                "backward='analytic', which needs none"
            ) from error
        compute = record.query.dtype
        dq, dk, dv = (
            torch.zeros_like(leaf_, dtype=compute) if gradient_ is None else gradient_.to(compute) / lent
            for leaf_, gradient_ in zip((query, key, value), found, strict=True)
        )
        return dq, dk, dv


def _add_heads(cam: Tensor, tile: Tensor) -> None:
    """Add a tile (heads, rows, S) to a cam (rows, S)."""
    cam.add_(tile[0] if len(tile) == 1 else tile.sum(0))


Builtin = Callable[..., Tensor]


def is_builtin(attention: Builtin) -> bool:
    """Whether the analytic backward pass is this attention's own: it is one of this package's."""
    return attention_label(attention) in ("eager", "sdpa") and attention.__module__.startswith(
        "headoff.attention"
    )
