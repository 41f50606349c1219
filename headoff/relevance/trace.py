"""A forward pass through encoder and decoder, recorded so that gradients can be sent back through it in batches.

The model's own modules run, with the detector's own attention; nothing is recomputed. `Recorder` keeps attention calls
by an interceptor, and the inputs of layer norms and feed-forward blocks by forward hooks.

Shapes: G runs (configurations in the decoder, 1 in the encoder); P pairs of (configuration, target), each of which
continues one of the G runs; T tokens or queries, N image tokens, Q object queries, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headoff.detr.detector import Detector, DetectorOutput, Features, Memory
from headoff.detr.sharing import separate_runs
from headoff.detr.transformer import (
    Attend,
    AttentionAddress,
    AttentionCall,
    DecoderLayer,
    EncoderLayer,
    FeedForward,
    MultiHeadAttention,
    Residual,
)
from headoff.errors import NonFiniteError
from headoff.gates import Gates
from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.records import AttentionRecord, unfold_runs
from headoff.relevance.vjp import FeedForwardVjp, NormVjp, ProjectionVjp, ResidualVjp

MakeVjp = Callable[[AttentionRecord], AttentionVjp]
"""Makes the backward pass of a recorded attention call."""


class Recorder:
    """Keeps what the backward pass of encoder or decoder needs, while the detector runs on one image.

    Attributes:
        compute: the dtype of relevance, float32 or float64.
        attention: the attention calls.
        norms: the input of each layer norm, (1, [G,] T, d); for the decoder's final norm, all layers in front.
        hidden: the hidden layer of each feed-forward block before its ReLU, (1, [G,] T, hidden).
    """

    def __init__(self, detector: Detector) -> None:
        self.detector = detector
        self.compute = torch.promote_types(detector.dtype, torch.float32)
        self.attention: dict[AttentionAddress, AttentionRecord] = {}
        self.norms: dict[nn.Module, Tensor] = {}
        self.hidden: dict[nn.Module, Tensor] = {}
        self._order: list[tuple[str, Tensor]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record within this context."""
        handles = []
        for module in (*self.detector.encoder.modules(), *self.detector.decoder.modules()):
            if isinstance(module, nn.LayerNorm):
                handles.append(module.register_forward_hook(self._keep_norm))
            elif isinstance(module, FeedForward):
                handles.append(module.expand.register_forward_hook(self._keep_hidden(module)))
        try:
            with self.detector.intercepting(self._keep_attention):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, features: Tensor, result: Iterable[Tensor]) -> None:
        """Raise NonFiniteError, naming where NaN or infinity appeared first, unless all of `result` is finite."""
        if all(bool(tensor.isfinite().all()) for tensor in result):
            return
        for where, value in (("the backbone or the input projection", features), *self._order):
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"NaN or infinity first appears in the output of {where}: check the attention, the weights "
                    "and the picture for numbers too large"
                )
        raise NonFiniteError("NaN or infinity first appears in the class or box head: check their weights")

    def projections(self, attention: MultiHeadAttention) -> ProjectionVjp:
        """The backward pass of the projections around an attention."""
        return ProjectionVjp(attention, self.compute)

    def residual(self, residual: Residual) -> ResidualVjp:
        """The backward pass of a residual connection."""
        return ResidualVjp.of(residual, _runs(self.norms[residual.norm]), self.compute)

    def feedforward(self, block: FeedForward) -> FeedForwardVjp:
        """The backward pass of a feed-forward block."""
        return FeedForwardVjp.of(block, _runs(self.hidden[block]), self.compute)

    def _keep_attention(self, call: AttentionCall, proceed: Attend) -> Tensor:
        context = proceed(call)
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

    def _keep_norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.norms[module] = inputs[0]

    def _keep_hidden(self, block: FeedForward) -> Callable[[nn.Module, Any, Tensor], None]:
        name = next(name for name, module in self.detector.named_modules() if module is block)
        stack, _, layer, *_ = name.split(".")

        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._order.append((f"the {stack}'s feed-forward block of layer {layer}", output))
            self.hidden[block] = output

        return keep


def _runs(x: Tensor) -> Tensor:
    """(1, T, d) of the encoder as it is, (1, G, T, d) of the decoder without the image's dimension."""
    return x if x.ndim == 3 else x[0]


@dataclass
class _AttentionTrace:
    """An attention block: projections, the attention itself, and the residual connection around them."""

    vjp: AttentionVjp
    projections: ProjectionVjp
    residual: ResidualVjp

    def grad_context(self, gradient: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the residual sum (P, T, d) and of the context (P, H, T, D), from that of the output."""
        grad_sum = self.residual.grad_sum(gradient, runs)
        return grad_sum, self.projections.grad_context(grad_sum)


@dataclass
class _FeedForwardTrace:
    """A feed-forward block and the residual connection around it."""

    vjp: FeedForwardVjp
    residual: ResidualVjp

    def __call__(self, gradient: Tensor, runs: Tensor) -> Tensor:
        """The gradient of the input (P, T, d) from that of the output."""
        grad_sum = self.residual.grad_sum(gradient, runs)
        return self.residual.grad_input(grad_sum, self.vjp(grad_sum, runs), runs)


@dataclass
class _EncoderLayerTrace:
    attention: _AttentionTrace
    feedforward: _FeedForwardTrace


@dataclass
class EncoderTrace:
    """One image through the encoder, under one encoder gate.

    Attributes:
        memory: what the decoder reads.
        layers: what the backward pass of each layer needs.
        final: that of the final norm, if there is one.
    """

    memory: Memory
    layers: list[_EncoderLayerTrace]
    final: NormVjp | None

    @classmethod
    def of(
        cls, detector: Detector, features: Features, gate: Tensor | None, make_vjp: MakeVjp
    ) -> EncoderTrace:
        """Encode features of one image under `gate` (layers, N or 1, H). Raises NonFiniteError."""
        recorder = Recorder(detector)
        gate = None if gate is None else gate.to(features.tokens)
        with recorder.recording():
            tokens = detector.encoder(
                features.tokens, features.positions, detector.attend, features.attn_mask, gate
            )
        recorder.check(features.tokens, [tokens])
        layers = []
        for index, layer in enumerate(detector.encoder.layers):
            assert isinstance(layer, EncoderLayer)
            record = recorder.attention[AttentionAddress("encoder_self", index)]
            layers.append(
                _EncoderLayerTrace(
                    _AttentionTrace(
                        make_vjp(record),
                        recorder.projections(layer.self_attention),
                        recorder.residual(layer.self_residual),
                    ),
                    _FeedForwardTrace(
                        recorder.feedforward(layer.feedforward), recorder.residual(layer.feedforward_residual)
                    ),
                )
            )
        norm = detector.encoder.norm
        final = (
            NormVjp.of(norm, recorder.norms[norm], recorder.compute)
            if isinstance(norm, nn.LayerNorm)
            else None
        )
        memory = Memory(tokens, features.positions, features.attn_mask, features.grid)
        return cls(memory, layers, final)

    def backward(self, gradient: Tensor, keep_cams: bool) -> list[tuple[Tensor | None, Tensor]]:
        """Send the gradient of the memory (P, N, d) back.

        Returns:
            For each layer its cams (P, N, N), None unless `keep_cams`, and the gradient of its context (P, H, N, D).
        """
        runs = torch.zeros(len(gradient), dtype=torch.long, device=gradient.device)
        results: list[tuple[Tensor | None, Tensor]] = []
        if self.final is not None:
            gradient = self.final(gradient, runs)
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            gradient = layer.feedforward(gradient, runs)
            grad_sum, grad_context = layer.attention.grad_context(gradient, runs)
            # Nothing is explained below the first layer's attention.
            cams, grads = layer.attention.vjp(grad_context, runs, cam=keep_cams, inputs=index > 0)
            results.append((cams, grad_context))
            if grads is not None:
                projections = layer.attention.projections
                grad_input = projections.merge(*grads) @ projections.query_key_value
                gradient = layer.attention.residual.grad_input(grad_sum, grad_input, runs)
        return results[::-1]


@dataclass
class _DecoderLayerTrace:
    self_attention: _AttentionTrace
    cross_attention: _AttentionTrace
    feedforward: _FeedForwardTrace


@dataclass(frozen=True)
class DecoderGradients:
    """What comes back through the decoder for P pairs.

    Attributes:
        self_cams: (P, Q, Q) for each layer.
        cross_cams: (P, Q, N) for each layer.
        memory: (P, N, d), the gradient of the memory; None if it was not asked for.
    """

    self_cams: list[Tensor]
    cross_cams: list[Tensor]
    memory: Tensor | None


@dataclass
class DecoderTrace:
    """G configurations through the decoder, each in a run of its own.

    Attributes:
        states: (G, Q, d), normalised queries after the last layer.
        output: logits and boxes, (G, 1, Q, ...).
        layers: what the backward pass of each layer needs.
        final: that of the final norm.
    """

    states: Tensor
    output: DetectorOutput
    layers: list[_DecoderLayerTrace]
    final: NormVjp

    @classmethod
    def of(cls, detector: Detector, memory: Memory, gates: Gates, make_vjp: MakeVjp) -> DecoderTrace:
        """Decode the memory of one image under G configurations. Raises NonFiniteError."""
        recorder = Recorder(detector)
        positions = detector.query_embedding.weight
        with recorder.recording():
            states = detector.decoder(
                positions.new_zeros(1, 1, *positions.shape),
                positions,
                memory.tokens,
                memory.positions,
                detector.attend,
                memory.attn_mask,
                separate_runs(
                    gates.decoder_self, gates.decoder_cross, len(detector.decoder.layers), len(gates)
                ),
            )[-1]
        output = detector.heads(states)
        recorder.check(memory.tokens, (output.logits, output.boxes))
        layers = []
        for index, layer in enumerate(detector.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            self_record = recorder.attention[AttentionAddress("decoder_self", index)]
            cross_record = unfold_runs(
                recorder.attention[AttentionAddress("decoder_cross", index)], len(gates)
            )
            layers.append(
                _DecoderLayerTrace(
                    _AttentionTrace(
                        make_vjp(self_record),
                        recorder.projections(layer.self_attention),
                        recorder.residual(layer.self_residual),
                    ),
                    _AttentionTrace(
                        make_vjp(cross_record),
                        recorder.projections(layer.cross_attention),
                        recorder.residual(layer.cross_residual),
                    ),
                    _FeedForwardTrace(
                        recorder.feedforward(layer.feedforward), recorder.residual(layer.feedforward_residual)
                    ),
                )
            )
        norm = detector.decoder.norm
        final = NormVjp.of(norm, recorder.norms[norm][-1, 0], recorder.compute)
        return cls(states[0], output, layers, final)

    def backward(self, gradient: Tensor | None, runs: Tensor, *, memory: bool) -> DecoderGradients:
        """Send the gradient of the states (P, Q, d) back.

        Args:
            gradient: None for methods without gradients: then only cams are computed.
            runs: (P,) int64, the run of each pair.
            memory: whether the gradient of the memory is wanted.
        """
        self_cams: list[Tensor] = []
        cross_cams: list[Tensor] = []
        grad_memory: Tensor | None = None
        if gradient is None:
            for layer in self.layers:
                self_cams.append(_cams(layer.self_attention.vjp(None, runs, inputs=False)))
                cross_cams.append(_cams(layer.cross_attention.vjp(None, runs, inputs=False)))
            return DecoderGradients(self_cams, cross_cams, None)
        gradient = self.final(gradient, runs)
        for index in reversed(range(len(self.layers))):
            layer = self.layers[index]
            gradient = layer.feedforward(gradient, runs)

            cross = layer.cross_attention
            grad_sum, grad_context = cross.grad_context(gradient, runs)
            cams, grads = cross.vjp(grad_context, runs)
            assert cams is not None and grads is not None
            cross_cams.append(cams)
            grad_query, grad_key, grad_value = grads
            if memory:
                update = cross.projections.merge(grad_key, grad_value) @ cross.projections.key_value
                grad_memory = update if grad_memory is None else grad_memory.add_(update)
            grad_input = cross.projections.merge(grad_query) @ cross.projections.query
            gradient = cross.residual.grad_input(grad_sum, grad_input, runs)

            attention = layer.self_attention
            grad_sum, grad_context = attention.grad_context(gradient, runs)
            # The first self-attention's input is the same whatever is explained.
            cams, grads = attention.vjp(grad_context, runs, inputs=index > 0)
            self_cams.append(_cams((cams, grads)))
            if grads is not None:
                grad_input = attention.projections.merge(*grads) @ attention.projections.query_key_value
                gradient = attention.residual.grad_input(grad_sum, grad_input, runs)
        return DecoderGradients(self_cams[::-1], cross_cams[::-1], grad_memory)


def _cams(results: tuple[Tensor | None, object]) -> Tensor:
    assert results[0] is not None
    return results[0]
