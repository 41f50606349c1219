"""LRP through encoder, decoder and heads: operators (`LrpRules`) in the order of the recorded forward pass.

A block is put together here once: attention with its projections, feed-forward, and the residual connection around
either of them. Encoder and decoder are lists of such blocks.

Shapes: P pairs of (configuration, target), G runs (configurations in the decoder, 1 in the encoder); T tokens or
queries, N image tokens, Q object queries, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headoff.calls import AttentionAddress
from headoff.detr.detector import Detr
from headoff.detr.transformer import (
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    MultiHeadAttention,
    Residual,
)
from headoff.relevance.lrp.attention import AttentionRelevance
from headoff.relevance.lrp.rules import (
    FactorRelevance,
    LinearRelevance,
    LrpRules,
    NormRelevance,
    SumRelevance,
    joined,
)
from headoff.relevance.records import AttentionRecord
from headoff.relevance.trace import DecoderContributions, Recorder
from headoff.relevance.vjp import ProjectionVjp

MakeAttention = Callable[[AttentionRecord], AttentionRelevance]


class LrpRecorder(Recorder):
    """Records inputs and outputs of all linear layers and layer norms as well, in the dtype of relevance."""

    def __init__(self, detector: Detr) -> None:
        super().__init__(detector)
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}

    @contextmanager
    def recording(self) -> Iterator[None]:
        handles = [
            module.register_forward_hook(self._record)
            for stack in (self.detector.encoder, self.detector.decoder)
            for module in stack.modules()
            if isinstance(module, nn.Linear | nn.LayerNorm)
        ]
        try:
            with super().recording():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.inputs[module], self.outputs[module] = inputs[0].to(self.compute), output.to(self.compute)


@dataclass
class _Residual:
    """A residual connection with its norm.

    Attributes:
        norm: the norm, after the sum with post-norm, before the block with pre-norm.
        total: the sum.
        copies: the layer's input, which goes to the sum and into the block.
        entered: the norm's output with pre-norm, which goes to several operators; None with post-norm.
    """

    norm: NormRelevance | FactorRelevance
    total: SumRelevance
    copies: FactorRelevance
    entered: FactorRelevance | None

    def __call__(self, relevance: Tensor, runs: Tensor, block: Callable[[Tensor], list[Tensor]]) -> Tensor:
        """The relevance of the layer's input, from that of its output (P, T, d).

        Args:
            block: from the relevance of the block's output, what each operator in it gives to its input.
        """
        past, update = self.parts(relevance, runs)
        inside = block(update)
        if self.entered is not None:
            inside = [self.norm(joined(self.entered, inside, runs), runs)]
        return joined(self.copies, [past, *inside], runs)

    def parts(self, relevance: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
        """The relevance of both parts of the sum: of the layer's input past the block, and of the block's output."""
        return self.total(relevance if self.entered is not None else self.norm(relevance, runs), runs)


@dataclass
class _FeedForward:
    """Two linear layers around a ReLU, which passes relevance on unchanged."""

    expand: LinearRelevance
    contract: LinearRelevance
    residual: _Residual

    def __call__(self, relevance: Tensor, runs: Tensor) -> Tensor:
        return self.residual(relevance, runs, lambda update: [self.expand(self.contract(update, runs), runs)])


@dataclass
class _Attention:
    """An attention block: positions, projections, the attention itself, and the residual connection.

    Attributes:
        query_part, key_part: what the tokens get of the inputs with position embeddings.
        context_part: what the context gets, where heads that are off are replaced.
        placed: with self-attention, the input with positions, which goes to query and key; None with cross-attention.
        memory: with cross-attention, the memory, which goes to key and value; None with self-attention.
    """

    query: LinearRelevance
    key: LinearRelevance
    value: LinearRelevance
    output: LinearRelevance
    attention: AttentionRelevance
    heads: int
    query_part: FactorRelevance
    key_part: FactorRelevance
    context_part: FactorRelevance
    residual: _Residual
    placed: FactorRelevance | None
    memory: FactorRelevance | None

    def contribution(self, relevance: Tensor, runs: Tensor) -> Tensor:
        """S (P, H, T, D) alone, see `AttentionRelevance`; the relevance goes no further."""
        _, update = self.residual.parts(relevance, runs)
        return self.attention.contribution(self._of_context(update, runs), runs)

    def __call__(self, relevance: Tensor, runs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """From the relevance of the layer's output (P, T, d).

        Returns:
            The relevance of its input (P, T, d), S, and the relevance of the memory (P, N, d), None for self-attention.
        """
        contribution: Tensor | None = None
        of_memory: Tensor | None = None

        def block(update: Tensor) -> list[Tensor]:
            nonlocal contribution, of_memory
            contribution, *shares = self.attention(self._of_context(update, runs), runs)
            query, key, value = (ProjectionVjp.merge(share) for share in shares)
            query, key, value = self.query(query, runs), self.key(key, runs), self.value(value, runs)
            if self.placed is not None:
                return [self.query_part(joined(self.placed, [query, key], runs), runs), value]
            assert self.memory is not None
            of_memory = joined(self.memory, [self.key_part(key, runs), value], runs)
            return [self.query_part(query, runs)]

        found = self.residual(relevance, runs, block)
        assert contribution is not None
        return found, contribution, of_memory

    def _of_context(self, update: Tensor, runs: Tensor) -> Tensor:
        context = self.context_part(self.output(update, runs), runs)
        return context.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class _Builder:
    """Puts operators together, in the order of the forward pass.

    Attributes:
        x: (G, T, d), the residual stream so far.
    """

    def __init__(
        self, recorder: LrpRecorder, rules: LrpRules, make_attention: MakeAttention, x: Tensor
    ) -> None:
        self._recorder = recorder
        self._rules = rules
        self._make_attention = make_attention
        self.x = x

    def attention(
        self, module: MultiHeadAttention, record: AttentionRecord, residual: Residual, memory: Tensor | None
    ) -> _Attention:
        """An attention block; `memory` (1, N, d) for cross-attention."""
        inputs, rules = self._recorder.inputs, self._rules
        entered = self._entered(residual)
        context = record.context.transpose(1, 2).flatten(2)
        replaced = self._recorder.detector.replacement is not None
        output_input = self._runs(inputs[module.output])
        placed = self._runs(inputs[module.query])
        source = entered if memory is None else memory
        return _Attention(
            self._linear(module.query),
            self._linear(module.key, shared=memory is not None),
            self._linear(module.value, shared=memory is not None),
            self._linear(module.output),
            self._make_attention(record),
            module.heads,
            rules.part(entered, placed),
            rules.part(source, inputs[module.key]),
            rules.part(context, output_input) if replaced else FactorRelevance(None),
            self._residual(residual, module.output),
            rules.copies(placed) if memory is None else None,
            None if memory is None else rules.copies(memory),
        )

    def feedforward(self, layer: EncoderLayer | DecoderLayer) -> _FeedForward:
        block = layer.feedforward
        hidden = self._runs(self._recorder.inputs[block.contract])
        contract = self._rules.linear(
            block.contract, hidden, self._runs(self._recorder.outputs[block.contract]), after_relu=True
        )
        return _FeedForward(
            self._linear(block.expand), contract, self._residual(layer.feedforward_residual, block.contract)
        )

    def _linear(self, module: nn.Linear, *, shared: bool = False) -> LinearRelevance:
        x, y = self._recorder.inputs[module], self._recorder.outputs[module]
        return self._rules.linear(module, *((x, y) if shared else (self._runs(x), self._runs(y))))

    def _entered(self, residual: Residual) -> Tensor:
        return self._runs(self._recorder.outputs[residual.norm]) if residual.pre_norm else self.x

    def _residual(self, residual: Residual, last: nn.Linear) -> _Residual:
        """The residual connection around a block that ends with the layer `last`; moves on to its output."""
        x, update = self.x, self._runs(self._recorder.outputs[last])
        total = x + update
        normalised = self._runs(self._recorder.outputs[residual.norm])
        self.x = total if residual.pre_norm else normalised
        return _Residual(
            self._rules.norm(residual.norm, x if residual.pre_norm else total, normalised),
            self._rules.residual(x, update),
            self._rules.copies(x),
            self._rules.copies(normalised) if residual.pre_norm else None,
        )

    def _runs(self, x: Tensor) -> Tensor:
        """As (G, T, d): the decoder's tensors are (1, G, Q, d), (G, Q, d) or (1, G * Q, d)."""
        return x.reshape(self.x.shape[0], -1, x.shape[-1])


@dataclass
class EncoderRelevance:
    """LRP through the encoder of one image, under one encoder gate; `final` is the last norm, if there is one."""

    attention: list[_Attention]
    feedforward: list[_FeedForward]
    final: NormRelevance | FactorRelevance

    @classmethod
    def of(
        cls,
        encoder: Encoder,
        recorder: LrpRecorder,
        rules: LrpRules,
        make_attention: MakeAttention,
        x: Tensor,
    ) -> EncoderRelevance:
        """From a recorded pass that began with x (1, N, d)."""
        builder = _Builder(recorder, rules, make_attention, x)
        norm = encoder.norm
        final: NormRelevance | FactorRelevance = FactorRelevance(None)
        if isinstance(norm, nn.LayerNorm):
            final = rules.norm(norm, recorder.inputs[norm], recorder.outputs[norm])
        found = cls([], [], final)
        for index, layer in enumerate(encoder.layers):
            assert isinstance(layer, EncoderLayer)
            record = recorder.attention[AttentionAddress("encoder_self", index)]
            found.attention.append(builder.attention(layer.self_attention, record, layer.self_residual, None))
            found.feedforward.append(builder.feedforward(layer))
        return found

    def contributions(self, relevance: Tensor) -> list[Tensor]:
        """S (P, H, N, D) of each layer, from the relevance of the memory (P, N, d)."""
        found = []
        runs = _first_run(relevance)
        relevance = self.final(relevance, runs)
        for index in reversed(range(len(self.attention))):
            relevance = self.feedforward[index](relevance, runs)
            if index:
                relevance, contribution, _ = self.attention[index](relevance, runs)
            else:
                contribution = self.attention[0].contribution(relevance, runs)
            found.append(contribution)
        return found[::-1]

    def __call__(self, relevance: Tensor) -> Tensor:
        """The relevance of the image tokens (P, N, d), from that of the memory."""
        runs = _first_run(relevance)
        relevance = self.final(relevance, runs)
        for attention, feedforward in zip(reversed(self.attention), reversed(self.feedforward), strict=True):
            relevance, *_ = attention(feedforward(relevance, runs), runs)
        return relevance


def _first_run(relevance: Tensor) -> Tensor:
    return torch.zeros(len(relevance), dtype=torch.long, device=relevance.device)


@dataclass
class DecoderRelevance:
    """LRP through the decoder, under G configurations.

    Attributes:
        memory: relevance of the memory, from what each layer gave it.
        final: the last norm.
    """

    self_attention: list[_Attention]
    cross_attention: list[_Attention]
    feedforward: list[_FeedForward]
    memory: FactorRelevance
    final: NormRelevance | FactorRelevance

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        recorder: LrpRecorder,
        records: Callable[[AttentionAddress], AttentionRecord],
        rules: LrpRules,
        make_attention: MakeAttention,
        x: Tensor,
        memory: Tensor,
    ) -> DecoderRelevance:
        """From a recorded pass that began with x (G, Q, d), of `memory` (1, N, d)."""
        builder = _Builder(recorder, rules, make_attention, x)
        norm = decoder.norm
        final = rules.norm(norm, recorder.inputs[norm][-1, 0], recorder.outputs[norm][-1, 0])
        found = cls([], [], [], rules.copies(memory), final)
        for index, layer in enumerate(decoder.layers):
            assert isinstance(layer, DecoderLayer)
            record = records(AttentionAddress("decoder_self", index))
            found.self_attention.append(
                builder.attention(layer.self_attention, record, layer.self_residual, None)
            )
            record = records(AttentionAddress("decoder_cross", index))
            found.cross_attention.append(
                builder.attention(layer.cross_attention, record, layer.cross_residual, memory)
            )
            found.feedforward.append(builder.feedforward(layer))
        return found

    def __call__(self, relevance: Tensor, runs: Tensor) -> tuple[DecoderContributions, list[Tensor]]:
        """S at every attention, and what each layer gives to the memory (P, N, d), from the states' relevance
        (P, Q, d).
        """
        relevance = self.final(relevance, runs)
        of_self, of_cross, of_memory = [], [], []
        for index in reversed(range(len(self.feedforward))):
            relevance = self.feedforward[index](relevance, runs)
            relevance, contribution, memory = self.cross_attention[index](relevance, runs)
            assert memory is not None
            of_cross.append(contribution)
            of_memory.append(memory)
            if index:
                relevance, contribution, _ = self.self_attention[index](relevance, runs)
            else:
                contribution = self.self_attention[0].contribution(relevance, runs)
            of_self.append(contribution)
        return DecoderContributions(of_self[::-1], of_cross[::-1]), of_memory[::-1]


def heads_relevance(
    detector: Detr, rules: LrpRules, states: Tensor, of_logits: Tensor, of_boxes: Tensor
) -> Tensor:
    """The relevance of the normalised states (P, Q, d), through class and box head.

    Args:
        states: (P, Q, d).
        of_logits, of_boxes: (P, Q, K + 1) and (P, Q, 4); the boxes' sigmoid passes relevance on unchanged.
    """
    runs = torch.arange(len(states), device=states.device)
    y = _apply(detector.class_head, states)
    of_logits = rules.copies(y)(of_logits, runs)
    found = rules.linear(detector.class_head, states, y)(of_logits, runs)
    layers = []
    x, after_relu = states, False
    for module in detector.box_head:
        if isinstance(module, nn.Linear):
            y = _apply(module, x)
            layers.append(rules.linear(module, x, y, after_relu=after_relu))
            x, after_relu = y, False
        else:
            x, after_relu = x.clamp(min=0), True
    for layer in reversed(layers):
        of_boxes = layer(of_boxes, runs)
    return found + of_boxes


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight.to(x), layer.bias.to(x))
