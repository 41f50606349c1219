"""A recorded forward pass through encoder and decoder, and its backward pass for batches of targets.

The detector's modules and its attention compute the forward pass. `Recorder` records attention calls by an interceptor,
and the inputs of layer norms and feed-forward blocks by forward hooks.

Shapes: G runs (configurations in the decoder, 1 in the encoder); P pairs of (configuration, target), every one of which
belongs to one of the G runs; T tokens or queries, N image tokens, Q object queries, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headoff.calls import Attend, AttentionAddress, AttentionCall
from headoff.detector import DetectorOutput
from headoff.detr.detector import Detr, Features, Memory
from headoff.detr.sharing import separate_runs
from headoff.detr.transformer import DecoderLayer, EncoderLayer, FeedForward, MultiHeadAttention, Residual
from headoff.errors import NonFiniteError
from headoff.gates import Gates
from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.records import AttentionRecord, unfold_runs
from headoff.relevance.vjp import FeedForwardVjp, NormVjp, ProjectionVjp, ResidualVjp

MakeVjp = Callable[[AttentionRecord], AttentionVjp]
"""Makes the backward pass of a recorded attention call."""


class Recorder:
    """Records what the backward pass of encoder or decoder needs, while the detector runs on one image.

    Attributes:
        compute: the dtype of relevance, float32 or float64.
        attention: the attention calls.
        norms: the input of each layer norm, (1, [G,] T, d); for the decoder's final norm, with a dimension for layers
            first.
        hidden: the hidden layer of each feed-forward block before its ReLU, (1, [G,] T, hidden).
    """

    def __init__(self, detector: Detr) -> None:
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
                handles.append(module.register_forward_hook(self._record_norm))
            elif isinstance(module, FeedForward):
                handles.append(module.expand.register_forward_hook(self._record_hidden(module)))
        try:
            with self.detector.intercepting(self._record_attention):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def check(self, features: Tensor, result: Iterable[Tensor]) -> None:
        """Raise NonFiniteError, which says where NaN or infinity appeared first, unless all of `result` is finite."""
        if all(bool(tensor.isfinite().all()) for tensor in result):
            return
        for where, value in (("the backbone or the input projection", features), *self._order):
            if not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"NaN or infinity first appears in the output of {where}: check the attention, the weights "
                    "and the picture for numbers too large"
                )
        raise NonFiniteError("NaN or infinity first appears in the class or box head: check their weights")

    def attention_trace(
        self, vjp: AttentionVjp, attention: MultiHeadAttention, residual: Residual
    ) -> _AttentionTrace:
        """What the backward pass of an attention block needs; `vjp` is that of its attention call."""
        return _AttentionTrace(vjp, ProjectionVjp(attention, self.compute), self._residual(residual))

    def feedforward_trace(self, layer: EncoderLayer | DecoderLayer) -> _FeedForwardTrace:
        """What the backward pass of a layer's feed-forward block needs."""
        hidden = _without_image_dimension(self.hidden[layer.feedforward])
        vjp = FeedForwardVjp.from_hidden(layer.feedforward, hidden, self.compute)
        return _FeedForwardTrace(vjp, self._residual(layer.feedforward_residual))

    def _residual(self, residual: Residual) -> ResidualVjp:
        x = _without_image_dimension(self.norms[residual.norm])
        return ResidualVjp.from_input(residual, x, self.compute)

    def _record_attention(self, call: AttentionCall, proceed: Attend) -> Tensor:
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

    def _record_norm(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.norms[module] = inputs[0]

    def _record_hidden(self, block: FeedForward) -> Callable[[nn.Module, Any, Tensor], None]:
        name = next(name for name, module in self.detector.named_modules() if module is block)
        stack, _, layer, *_ = name.split(".")

        def record(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._order.append((f"the {stack}'s feed-forward block of layer {layer}", output))
            self.hidden[block] = output

        return record


def _without_image_dimension(x: Tensor) -> Tensor:
    """(G, T, d): in the encoder x is (1, T, d), and G = 1; in the decoder x is (1, G, T, d)."""
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

    def self_attention_backward(
        self,
        gradient: Tensor,
        runs: Tensor,
        *,
        cam: bool,
        inputs: bool,
        contribution: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """The backward pass of a self-attention block, from the gradient of its output (P, T, d).

        Returns:
            Cams (P, T, T), None unless `cam`; the gradient of the context (P, H, T, D); the gradient of the block's
            input (P, T, d), None unless `inputs`.
        """
        grad_sum, grad_context = self.grad_context(gradient, runs)
        cams, grads = self.vjp(grad_context, runs, cam=cam, inputs=inputs, contribution=contribution)
        if grads is None:
            return cams, grad_context, None
        grad_block = self.projections.merge(*grads) @ self.projections.query_key_value
        return cams, grad_context, self.residual.grad_input(grad_sum, grad_block, runs)


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
    """An encoder layer."""

    attention: _AttentionTrace
    feedforward: _FeedForwardTrace


@dataclass
class EncoderTrace:
    """The recorded encoder pass of one image, under one encoder gate.

    Attributes:
        memory: the encoder's output.
        layers: what the backward pass of each layer needs.
        final: the backward pass of the final norm, if there is one.
    """

    memory: Memory
    layers: list[_EncoderLayerTrace]
    final: NormVjp | None

    @classmethod
    def run(
        cls,
        detector: Detr,
        features: Features,
        gate: Tensor | None,
        make_vjp: MakeVjp,
        recorder: Recorder | None = None,
    ) -> EncoderTrace:
        """Encode the features of one image under `gate` (layers, N or 1, H); `recorder` keeps what it records.

        Raises:
            NonFiniteError: the memory is not finite.
        """
        recorder = recorder or Recorder(detector)
        gate = None if gate is None else gate.to(features.tokens)
        with recorder.recording():
            tokens = detector.encoder(
                features.tokens, features.positions, detector.context_of, features.attn_mask, gate
            )
        recorder.check(features.tokens, [tokens])
        layers = []
        for index, layer in enumerate(detector.encoder.layers):
            assert isinstance(layer, EncoderLayer)
            record = recorder.attention[AttentionAddress("encoder_self", index)]
            layers.append(
                _EncoderLayerTrace(
                    recorder.attention_trace(make_vjp(record), layer.self_attention, layer.self_residual),
                    recorder.feedforward_trace(layer),
                )
            )
        norm = detector.encoder.norm
        final = (
            NormVjp.from_input(norm, recorder.norms[norm], recorder.compute)
            if isinstance(norm, nn.LayerNorm)
            else None
        )
        memory = Memory(tokens, features.positions, features.attn_mask, features.grid)
        return cls(memory, layers, final)

    def backward(
        self, gradient: Tensor, keep_cams: bool, contributions: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor | None, Tensor]]:
        """Send the gradient of the memory (P, N, d) back.

        Args:
            keep_cams: whether to compute cams.
            contributions: (P, H, N, D) per layer, see `AttentionVjp`.

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
            # No gradient is needed before the first layer's attention.
            cams, grad_context, grad_input = layer.attention.self_attention_backward(
                gradient,
                runs,
                cam=keep_cams,
                inputs=index > 0,
                contribution=None if contributions is None else contributions[index],
            )
            results.append((cams, grad_context))
            if grad_input is not None:
                gradient = grad_input
        return results[::-1]


@dataclass
class _DecoderLayerTrace:
    """A decoder layer."""

    self_attention: _AttentionTrace
    cross_attention: _AttentionTrace
    feedforward: _FeedForwardTrace


@dataclass(frozen=True)
class DecoderGradients:
    """The results of the decoder's backward pass for P pairs.

    Attributes:
        self_cams: (P, Q, Q) for each layer.
        cross_cams: (P, Q, N) for each layer.
        memory: (P, N, d), the gradient of the memory; None if not requested.
    """

    self_cams: list[Tensor]
    cross_cams: list[Tensor]
    memory: Tensor | None


@dataclass(frozen=True)
class DecoderContributions:
    """What a second backward pass, by other rules, found at the decoder's attention.

    Attributes:
        self_attention, cross_attention: (P, H, Q, D) per layer; see `contribution` of `AttentionVjp`.
    """

    self_attention: list[Tensor]
    cross_attention: list[Tensor]


@dataclass
class DecoderTrace:
    """The recorded decoder pass of G configurations, every one in a separate run.

    Attributes:
        states: (G, Q, d), the normalised decoder states after the last layer.
        output: logits and boxes, (G, 1, Q, ...).
        layers: what the backward pass of each layer needs.
        final: the backward pass of the final norm.
    """

    states: Tensor
    output: DetectorOutput
    layers: list[_DecoderLayerTrace]
    final: NormVjp

    @classmethod
    def run(
        cls,
        detector: Detr,
        memory: Memory,
        gates: Gates,
        make_vjp: MakeVjp,
        recorder: Recorder | None = None,
    ) -> DecoderTrace:
        """Decode the memory of one image under G configurations; `recorder` keeps what it records.

        Raises:
            NonFiniteError: a logit or box is not finite.
        """
        recorder = recorder or Recorder(detector)
        positions = detector.query_embedding.weight
        with recorder.recording():
            states = detector.decoder(
                positions.new_zeros(1, 1, *positions.shape),
                positions,
                memory.tokens,
                memory.positions,
                detector.context_of,
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
                    recorder.attention_trace(
                        make_vjp(self_record), layer.self_attention, layer.self_residual
                    ),
                    recorder.attention_trace(
                        make_vjp(cross_record), layer.cross_attention, layer.cross_residual
                    ),
                    recorder.feedforward_trace(layer),
                )
            )
        norm = detector.decoder.norm
        final = NormVjp.from_input(norm, recorder.norms[norm][-1, 0], recorder.compute)
        return cls(states[0], output, layers, final)

    def backward(
        self,
        gradient: Tensor | None,
        runs: Tensor,
        *,
        memory: bool,
        contributions: DecoderContributions | None = None,
    ) -> DecoderGradients:
        """Send the gradient of the states (P, Q, d) back.

        Args:
            gradient: None for methods that need no gradients; only cams are computed then.
            runs: (P,) int64, the run of each pair.
            memory: whether to compute the gradient of the memory.
            contributions: what cams are weighted with.
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
            cams, grads = cross.vjp(
                grad_context,
                runs,
                contribution=None if contributions is None else contributions.cross_attention[index],
            )
            assert cams is not None and grads is not None
            cross_cams.append(cams)
            grad_query, grad_key, grad_value = grads
            if memory:
                update = cross.projections.merge(grad_key, grad_value) @ cross.projections.key_value
                grad_memory = update if grad_memory is None else grad_memory.add_(update)
            grad_block = cross.projections.merge(grad_query) @ cross.projections.query
            gradient = cross.residual.grad_input(grad_sum, grad_block, runs)

            # No gradient is needed before the first layer's self-attention.
            cams, _, grad_input = layer.self_attention.self_attention_backward(
                gradient,
                runs,
                cam=True,
                inputs=index > 0,
                contribution=None if contributions is None else contributions.self_attention[index],
            )
            assert cams is not None
            self_cams.append(cams)
            if grad_input is not None:
                gradient = grad_input
        return DecoderGradients(self_cams[::-1], cross_cams[::-1], grad_memory)


def _cams(results: tuple[Tensor | None, object]) -> Tensor:
    assert results[0] is not None
    return results[0]
