"""What a forward pass leaves behind: each attention call's inputs and context, and what the layers' VJPs need.

The model's own modules run, with the detector's own attention; nothing is recomputed here. Attention calls are kept
through the `Attend` function that every attention goes through, the rest by forward hooks on the layer norms and on
the hidden layers of the feed-forward blocks.

Shapes: G runs (configurations in the decoder, 1 in the encoder), T tokens or queries, S keys, H heads, D channels of
a head, d = H * D.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import TracebackType

import torch
from torch import Tensor, nn

from headoff.detr.detector import Detector
from headoff.detr.transformer import Attend, AttentionAddress, AttentionCall, FeedForward
from headoff.errors import NonFiniteError
from headoff.relevance.vjp import of_runs

LOG_SUM_TILE = 2**17
"""Scores that are held at once while only the logarithms of their rows' sums are wanted: a CPU's cache holds them."""

ACCELERATOR_LOG_SUM_TILE = 2**25
"""The same elsewhere: large enough for the launch of a kernel not to matter."""


@dataclass
class AttentionRecord:
    """One attention call, the runs in the first dimension, in the dtype that relevance is computed in.

    - `query` (G, H, T, D); `key`, `value` (G or 1, H, S, D)
    - `gate` (G, H, T or 1, 1), or None where every head is on
    - `keys` (S,) bool, True = attended, or None where all are
    - `context` (G, H, T, D): gated, as the attention callable returned it
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
        """Keep the weights, (G, H, T, S), rather than to make them anew whenever a tile of them is wanted."""
        if self._weights is None:
            self._weights = self._scores(slice(None), slice(None), slice(None)).softmax(-1)
            if self.keys is not None:
                self._weights.nan_to_num_(nan=0.0)  # a row without keys has no weights

    def weights(self, run: int, heads: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """Weights after softmax, before the gate, of one run: (heads, rows, S). Not to be written to."""
        if self._weights is not None:
            return self._weights[run, heads, rows]
        runs = slice(run, run + 1)
        return self._scores(runs, heads, rows).sub_(self.log_sum[runs, heads, rows]).exp_()[0]

    def weights_of(self, runs: Tensor, heads: slice = slice(None), rows: slice = slice(None)) -> Tensor:
        """As `weights`, of runs (P,) int64: (P, heads, rows, S), or (1, ...) where the one run stands for all."""
        if self._weights is not None:
            return of_runs(self._weights[:, heads, rows], runs)
        query, key, log_sum = (
            of_runs(x, runs)
            for x in (self.scaled_query[:, heads, rows], self.key[:, heads], self.log_sum[:, heads, rows])
        )
        scores = query @ key.transpose(-2, -1)
        if self.keys is not None:
            scores.masked_fill_(~self.keys, -math.inf)
        return scores.sub_(log_sum).exp_()

    @property
    def log_sum(self) -> Tensor:
        """Logarithms of the sums that softmax divides by, (G, H, T, 1); 0 for rows without keys. Computed once."""
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
        # Without keys all scores are -inf, and so is this; exp(-inf - 0) is the 0 that is wanted.
        return result.masked_fill_(result == -math.inf, 0)

    def _scores(self, runs: slice, heads: slice, rows: slice) -> Tensor:
        keys = self.key if len(self.key) == 1 else self.key[runs]
        scores = self.scaled_query[runs, heads, rows] @ keys[:, heads].transpose(-2, -1)
        return scores if self.keys is None else scores.masked_fill_(~self.keys, -math.inf)


class Capture:
    """Runs part of a detector and keeps what it leaves behind. A context manager: hooks are on only within it.

    Args:
        detector: whose modules will run; B = 1 image.
        attend: the attention, by default the detector's.
    """

    def __init__(self, detector: Detector, attend: Attend | None = None) -> None:
        self.detector = detector
        self.compute = torch.promote_types(detector.dtype, torch.float32)
        self.attention: dict[AttentionAddress, AttentionRecord] = {}
        self.norms: dict[nn.Module, Tensor] = {}
        """Input of each layer norm, (1, [G,] T, d); of the decoder's final one with the layers in front."""
        self.hidden: dict[nn.Module, Tensor] = {}
        """Hidden layer of each feed-forward block before its ReLU, (1, [G,] T, hidden)."""
        self._attend = attend or detector.attend
        self._order: list[tuple[str, Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Capture:
        for module in (*self.detector.encoder.modules(), *self.detector.decoder.modules()):
            if isinstance(module, nn.LayerNorm):
                self._handles.append(module.register_forward_hook(self._keep_norm))
            elif isinstance(module, FeedForward):
                self._handles.append(module.expand.register_forward_hook(self._keep_hidden(module)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def attend(self, call: AttentionCall) -> Tensor:
        """The `Attend` function to hand to encoder and decoder."""
        context = self._attend(call)
        address, query, key, value, attn_mask, head_gate = call
        self._order.append((f"the {address.site} attention of layer {address.layer}", context))
        self.attention[address] = AttentionRecord(
            address,
            query.to(self.compute),
            key.to(self.compute),
            value.to(self.compute),
            None if head_gate is None else head_gate.to(self.compute),
            None if attn_mask is None else attn_mask.flatten(),
            context.to(self.compute),
        )
        return context

    def check(self, features: Tensor, result: Iterable[Tensor]) -> None:
        """Raise NonFiniteError, saying where it appeared first, unless all of `result` is finite."""
        if all(bool(each.isfinite().all()) for each in result):
            return
        for where, value in (("the backbone or the input projection", features), *self._order):
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"NaN or infinity first appears in the output of {where}: check the attention, the weights "
                    "and the picture for numbers too large"
                )
        raise NonFiniteError("NaN or infinity first appears in the class or box head: check their weights")

    def _keep_norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.norms[module] = inputs[0]

    def _keep_hidden(self, block: FeedForward):
        name = next(name for name, module in self.detector.named_modules() if module is block)
        stack, _, layer, *_ = name.split(".")

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._order.append((f"the {stack}'s feed-forward block of layer {layer}", output))
            self.hidden[block] = output

        return keep


def unfold_runs(record: AttentionRecord, runs: int) -> AttentionRecord:
    """A cross-attention call (1, H, G * Q, D), whose runs lie end to end, as (G, H, Q, D)."""

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
