"""A forward pass through encoder and decoder, kept so that gradients can be sent back through it, batch by batch.

P pairs of (configuration, target) go back at once; each continues one of the decoder's G runs (configurations).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.detr.detector import Detector, DetectorOutput, Features, Memory
from headoff.detr.sharing import LayerGates, SharingPlan
from headoff.detr.transformer import AttentionAddress, DecoderLayer, EncoderLayer
from headoff.gates import Gates
from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.capture import AttentionRecord, Capture, unfold_runs
from headoff.relevance.vjp import FeedForwardVjp, NormVjp, ProjectionVjp, ResidualVjp

MakeVjp = Callable[[AttentionRecord], AttentionVjp]
"""How the backward pass of a recorded attention is made."""


@dataclass
class _EncoderLayerTrace:
    attention: AttentionVjp
    projections: ProjectionVjp
    residual: ResidualVjp
    feedforward: FeedForwardVjp
    feedforward_residual: ResidualVjp


@dataclass
class EncoderTrace:
    """One image through the encoder, under one encoder gate.

    - `memory`: what the decoder reads
    - `layers`: what each layer's VJP needs
    """

    memory: Memory
    layers: list[_EncoderLayerTrace]
    final: NormVjp | None

    @classmethod
    def of(cls, detector: Detector, features: Features, gate: Tensor | None, make: MakeVjp) -> EncoderTrace:
        """Encode `features` (B = 1) under `gate` (layers, N or 1, H). Raises NonFiniteError."""
        gate = None if gate is None else gate.to(features.tokens)
        with Capture(detector) as capture:
            tokens = detector.encoder(
                features.tokens, features.positions, capture.attend, features.attn_mask, gate
            )
        capture.check(features.tokens, [tokens])
        compute = capture.compute
        layers = []
        for index, layer in enumerate(detector.encoder.layers):
            assert isinstance(layer, EncoderLayer)
            record = capture.attention[AttentionAddress("encoder_self", index)]
            layers.append(
                _EncoderLayerTrace(
                    make(record),
                    ProjectionVjp(layer.self_attention, compute),
                    ResidualVjp.of(layer.self_residual, capture.norms[layer.self_residual.norm], compute),
                    FeedForwardVjp.of(layer.feedforward, capture.hidden[layer.feedforward], compute),
                    ResidualVjp.of(
                        layer.feedforward_residual, capture.norms[layer.feedforward_residual.norm], compute
                    ),
                )
            )
        norm = detector.encoder.norm
        final = (
            NormVjp.of(norm, capture.norms[norm], compute) if isinstance(norm, torch.nn.LayerNorm) else None
        )
        memory = Memory(tokens, features.positions, features.attn_mask, features.grid)
        return cls(memory, layers, final)

    def backward(self, gradient: Tensor, keep_cams: bool) -> list[tuple[Tensor | None, Tensor]]:
        """From the gradient of the memory (P, N, d): per layer the cams (P, N, N), where kept, and dO (P, H, N, D)."""
        runs = torch.zeros(len(gradient), dtype=torch.long, device=gradient.device)
        found: list[tuple[Tensor | None, Tensor]] = []
        if self.final is not None:
            gradient = self.final(gradient, runs)
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            of_sum = layer.feedforward_residual.leave(gradient, runs)
            gradient = layer.feedforward_residual.enter(of_sum, layer.feedforward(of_sum, runs), runs)
            of_sum = layer.residual.leave(gradient, runs)
            of_context = layer.projections.context(of_sum)
            inputs = index > 0
            cams, flow = layer.attention(of_context, runs, cam=keep_cams, inputs=inputs)
            found.append((cams, of_context))
            if flow is not None:
                of_input = layer.projections.merge(*flow) @ layer.projections.of_self_attention
                gradient = layer.residual.enter(of_sum, of_input, runs)
        return found[::-1]


@dataclass
class _DecoderLayerTrace:
    own: AttentionVjp
    own_projections: ProjectionVjp
    own_residual: ResidualVjp
    cross: AttentionVjp
    cross_projections: ProjectionVjp
    cross_residual: ResidualVjp
    feedforward: FeedForwardVjp
    feedforward_residual: ResidualVjp


@dataclass(frozen=True)
class DecoderFlow:
    """What comes back through the decoder for P pairs.

    - `own` (P, Q, Q), `cross` (P, Q, N): cams per layer
    - `memory` (P, N, d): gradient of the memory, or None where not asked for
    """

    own: list[Tensor]
    cross: list[Tensor]
    memory: Tensor | None


@dataclass
class DecoderTrace:
    """G configurations through the decoder, none of them shared with another.

    - `states` (G, Q, d): normalised queries after the last layer
    - `output`: logits and boxes, (G, 1, Q, ...)
    """

    states: Tensor
    output: DetectorOutput
    layers: list[_DecoderLayerTrace]
    final: NormVjp

    @classmethod
    def of(cls, detector: Detector, memory: Memory, gates: Gates, make: MakeVjp) -> DecoderTrace:
        """Decode `memory` (B = 1) under G configurations. Raises NonFiniteError."""
        runs = len(gates)
        plan = _unshared(gates, detector.config.decoder_layers)
        positions = detector.query_embedding.weight
        with Capture(detector) as capture:
            states = detector.decoder(
                positions.new_zeros(1, 1, *positions.shape),
                positions,
                memory.tokens,
                memory.positions,
                capture.attend,
                memory.attn_mask,
                plan,
            )[-1]
        output = detector.heads(states)
        capture.check(memory.tokens, (output.logits, output.boxes))
        compute = capture.compute

        def residual(module) -> ResidualVjp:
            return ResidualVjp.of(module, capture.norms[module.norm][0], compute)

        layers = []
        for index, layer in enumerate(detector.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            own = capture.attention[AttentionAddress("decoder_self", index)]
            cross = unfold_runs(capture.attention[AttentionAddress("decoder_cross", index)], runs)
            layers.append(
                _DecoderLayerTrace(
                    make(own),
                    ProjectionVjp(layer.self_attention, compute),
                    residual(layer.self_residual),
                    make(cross),
                    ProjectionVjp(layer.cross_attention, compute),
                    residual(layer.cross_residual),
                    FeedForwardVjp.of(layer.feedforward, capture.hidden[layer.feedforward][0], compute),
                    residual(layer.feedforward_residual),
                )
            )
        final = NormVjp.of(detector.decoder.norm, capture.norms[detector.decoder.norm][-1, 0], compute)
        return cls(states[0], output, layers, final)

    def backward(self, gradient: Tensor | None, runs: Tensor, *, memory: bool) -> DecoderFlow:
        """From the gradient of the states (P, Q, d), or None for methods without gradients; `memory` asks for its."""
        own_cams: list[Tensor] = []
        cross_cams: list[Tensor] = []
        of_memory: Tensor | None = None
        if gradient is None:
            for layer in self.layers:
                own_cams.append(_cams(layer.own(None, runs, inputs=False)))
                cross_cams.append(_cams(layer.cross(None, runs, inputs=False)))
            return DecoderFlow(own_cams, cross_cams, None)
        gradient = self.final(gradient, runs)
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            of_sum = layer.feedforward_residual.leave(gradient, runs)
            gradient = layer.feedforward_residual.enter(of_sum, layer.feedforward(of_sum, runs), runs)

            of_sum = layer.cross_residual.leave(gradient, runs)
            of_context = layer.cross_projections.context(of_sum)
            cams, flow = layer.cross(of_context, runs)
            assert cams is not None and flow is not None
            cross_cams.append(cams)
            projections = layer.cross_projections
            if memory:
                update = projections.merge(*flow[1:]) @ projections.of_memory
                of_memory = update if of_memory is None else of_memory.add_(update)
            of_input = projections.merge(flow[0]) @ projections.query
            gradient = layer.cross_residual.enter(of_sum, of_input, runs)

            of_sum = layer.own_residual.leave(gradient, runs)
            of_context = layer.own_projections.context(of_sum)
            # What the first self-attention attends from does not depend on anything that is explained.
            cams, flow = layer.own(of_context, runs, inputs=index > 0)
            own_cams.append(_cams((cams, flow)))
            if flow is not None:
                projections = layer.own_projections
                of_input = projections.merge(*flow) @ projections.of_self_attention
                gradient = layer.own_residual.enter(of_sum, of_input, runs)
        return DecoderFlow(own_cams[::-1], cross_cams[::-1], of_memory)


def _cams(found: tuple[Tensor | None, object]) -> Tensor:
    assert found[0] is not None
    return found[0]


def _unshared(gates: Gates, layers: int) -> SharingPlan:
    """A plan under which every configuration is a run of its own from the start: a run's gradients are its own."""
    count = len(gates)

    def steps(gate: Tensor | None, split: bool) -> tuple[LayerGates, ...]:
        parent = torch.zeros(count, dtype=torch.long)
        return tuple(
            LayerGates(parent if split and layer == 0 else None, None if gate is None else gate[:, layer])
            for layer in range(layers)
        )

    return SharingPlan(
        steps(gates.decoder_self, True),
        steps(gates.decoder_cross, False),
        torch.arange(count),
        (count,) * layers,
    )
