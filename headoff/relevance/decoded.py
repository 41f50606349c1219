"""What engines of `EngineMethod` have in common: all configurations decoded, with their targets and results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headoff.calls import AttentionAddress
from headoff.detector import Detector
from headoff.gates import Gates
from headoff.relevance.autograd_engine import Recorder, check_finite, make_vjp, points_at_targets
from headoff.relevance.engine import (
    ConfigurationRelevance,
    PairRelevance,
    TargetsOf,
    check_finite_rows,
    head_weights,
)
from headoff.relevance.targets import Target
from headoff.sweeps import by_encoder_gate


@dataclass(frozen=True)
class Decoded:
    """One configuration, decoded.

    Attributes:
        index: of the configuration, in the gates.
        encoder_gate: (layers, N or 1, H), or None.
        gates: of the decoder, for this configuration alone.
        logits: (Q, columns), on the CPU.
        boxes: (Q, 4), on the CPU.
        targets: None where there is nothing to explain.
        heads, points: see `ConfigurationRelevance`.
    """

    index: int
    encoder_gate: Tensor | None
    gates: Gates
    logits: Tensor
    boxes: Tensor
    targets: Sequence[Target | None]
    heads: Tensor | None
    points: Tensor | None

    @property
    def present(self) -> list[Target]:
        """The targets that are not None."""
        return [target for target in self.targets if target is not None]

    def result(self, rows: Tensor, layers: Sequence[int]) -> ConfigurationRelevance:
        """The result from the rows (P, M, N) of the P `present` targets. Raises NonFiniteError."""
        check_finite_rows(rows, [(target, self.gates.names[0]) for target in self.present], layers)
        nothing = torch.zeros(len(layers), dtype=torch.long)
        given = iter(rows.cpu())
        pairs = [
            None
            if target is None
            else PairRelevance(next(given), self._value(target), nothing, 0, nothing.bool())
            for target in self.targets
        ]
        return ConfigurationRelevance(self.index, self.logits, self.boxes, pairs, self.heads, self.points)

    def _value(self, target: Target) -> float:
        with torch.enable_grad():
            logits, boxes = (x.clone().requires_grad_() for x in (self.logits, self.boxes))
            return float(target.value(logits, boxes).detach())


@torch.no_grad()
def decoded(
    detector: Detector,
    features: Any,
    gates: Gates,
    targets: TargetsOf,
    layers: Sequence[int],
    heads: bool,
    budget: int,
) -> Iterator[Decoded]:
    """Every configuration of one image, those with the same encoder gate one after the other.

    Args:
        gates, targets, layers, heads: see `RelevanceEngine.run`.
        budget: bytes.
    """
    compute = torch.promote_types(detector.dtype, torch.float32)
    at_once = max(1, budget // 2 // detector.decoder_bytes(features))
    for encoder_gate, members in by_encoder_gate(gates):
        memory = detector.encode_features(features, encoder_gate)
        for batch in members.split(at_once):
            some = of_decoder(gates[batch])
            recorder = Recorder(("decoder_cross",) if heads else ())
            with detector.intercepting(recorder):
                output = detector.decode(memory, detector.plan(some, share=not heads))
            logits, boxes = output.logits[:, 0].cpu(), output.boxes[:, 0].cpu()
            check_finite((recorder,), logits, boxes)
            cross = [
                make_vjp(
                    *recorder.calls[AttentionAddress("decoder_cross", layer)], len(some), "attention", compute
                )
                for layer in layers
                if heads
            ]
            for run, index in enumerate(batch.tolist()):
                chosen = targets(index, logits[run], boxes[run])
                yield Decoded(
                    index,
                    encoder_gate,
                    some[[run]],
                    logits[run],
                    boxes[run],
                    chosen,
                    head_weights(cross, run, chosen) if heads else None,
                    points_at_targets(cross, run, chosen) if heads else None,
                )


def of_decoder(gates: Gates) -> Gates:
    """The gates without those of the encoder, as `Detector.plan` takes them."""
    return Gates(gates.names, None, gates.decoder_self, gates.decoder_cross)


def constant_replacement(detector: Detector) -> AbstractContextManager[None]:
    """Within this context, what replaces heads that are off has no gradient."""
    replacement: Callable[[Any], Tensor] | None = detector.replacement
    if replacement is None:
        return detector.replacing(None)
    return detector.replacing(lambda call: replacement(call).detach())
