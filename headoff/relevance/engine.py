"""The engine: encode once, decode all configurations together, compute the gradients of all targets in batches.

It computes only what relevance needs: the gradient of the context at every attention, without gradients of weights or
of the backbone. A pair of (configuration, target) costs the backward passes of decoder and encoder, and a few
products of cams with vectors (`headoff.relevance.aggregation`). The memory budget determines

- how many configurations are decoded together, and how many pairs have their backward pass together;
- whether attention weights and encoder cams (N x N per layer) are stored or recomputed tile by tile. Without them the
  memory of a pair is O(N).

The implementations of an attention's backward pass (`Kernels`) give the same results up to rounding. On accelerators
the host reads no tensor's values between a target's gradient and the finished maps, which are copied back together.

Results come one configuration at a time, in the order of the gates if the encoder is not gated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headoff.detr.detector import Detr, Features
from headoff.detr.transfers import copy_to_device
from headoff.errors import NonFiniteError, SettingError
from headoff.gates import Gates
from headoff.relevance.aggregation import DecoderCams, Rows
from headoff.relevance.attention_vjp import AttentionVjp, is_builtin
from headoff.relevance.encoder_cams import EncoderCams, RecomputedCams, StoredCams
from headoff.relevance.fused_vjp import FusedVjp, Precision
from headoff.relevance.kernels import Kernels, chosen_kernels
from headoff.relevance.memory import MemoryPlan, chosen_memory_budget
from headoff.relevance.methods import Method, resolve_cam_method
from headoff.relevance.records import AttentionRecord
from headoff.relevance.rules import ZeroRows
from headoff.relevance.sampled_vjp import SampledVjp
from headoff.relevance.targets import Target
from headoff.relevance.trace import DecoderTrace, EncoderTrace
from headoff.sweeps import by_encoder_gate

Backward = Literal["auto", "analytic", "callable"]

TargetsOf = Callable[[int, Tensor, Tensor], Sequence[Target | None]]
"""The targets of a configuration, from its index, its logits (Q, K + 1) and its boxes (Q, 4), both on the CPU."""


@dataclass(frozen=True)
class PairRelevance:
    """The relevance of one target under one configuration, on the CPU.

    Attributes:
        rows: (M, N) float32 or float64, after each decoder layer.
        value: the target's value.
        decoder_identity_rows: (M,) int64, rows that sum to zero and were normalised to identity rows; 0 if nothing was
            normalised.
        encoder_identity_rows: the same for the encoder.
        reference_differs: (M,) bool, whether the paper's published code drops a contribution to that map, because of a
            row that sums to zero.
    """

    rows: Tensor
    value: float
    decoder_identity_rows: Tensor
    encoder_identity_rows: int
    reference_differs: Tensor


@dataclass(frozen=True)
class ConfigurationRelevance:
    """The results of one configuration.

    Attributes:
        index: of the configuration, in the gates.
        logits: (Q, K + 1).
        boxes: (Q, 4).
        pairs: one result for each target; None for a target of None.
        heads: (targets, M, H, N), cross-attention weights after the gate; None unless requested.
        points: (targets, M, H, K, 3), sampling points of deformable cross-attention, see `Explanation`; None unless
            requested.
    """

    index: int
    logits: Tensor
    boxes: Tensor
    pairs: list[PairRelevance | None]
    heads: Tensor | None
    points: Tensor | None = None


@dataclass(frozen=True)
class _Pair:
    """A target of the configuration with index `run` in a batch; `slot` is its index among that configuration's
    targets.
    """

    run: int
    slot: int
    target: Target


@dataclass(frozen=True)
class TargetGradients:
    """The gradients of P targets.

    Attributes:
        states: (P, Q, d), with respect to the decoder's normalised states.
        logits, boxes: (P, Q, K + 1) and (P, Q, 4), with respect to the detector's outputs.
    """

    states: Tensor
    logits: Tensor
    boxes: Tensor

    def select(self, pairs: Tensor) -> TargetGradients:
        """Those of some pairs."""
        return TargetGradients(*(x.index_select(0, pairs) for x in (self.states, self.logits, self.boxes)))


class RelevanceEngine:
    """Relevance of one image for any number of configurations and targets.

    Args:
        detector: in evaluation mode; its attention callable computes every forward pass.
        features: of one image (`Detector.features`), padded or not.
        method: a name or a `Method`.
        zero_rows: see `headoff.relevance.rules`.
        backward: how the gradients of an attention's inputs are computed: by the attention's backward pass
            (`callable`), which tests of a patch need, or by a formula (`analytic`), which is faster. `auto` is
            `analytic` for this package's attentions and `callable` for others. Cams are computed from the recorded
            tensors in both cases.
        kernels: see `Kernels`. `triton` needs CUDA, relevance in float32, and a method whose cams are products with a
            gradient.
        precision: of the products in the Triton kernels: `ieee` is full float32; `tf32` is faster, and its maps differ
            by up to 1e-2 of their maximum.
        memory_budget: bytes; a smaller budget than the minimum is exceeded. By default half of the free memory of a
            CUDA device, and `MEMORY_BUDGET` on other devices.

    Raises:
        SettingError: an option is unknown, or cannot be combined with the others.
    """

    def __init__(
        self,
        detector: Detr,
        features: Features,
        *,
        method: Method | str = "chefer",
        zero_rows: ZeroRows = "identity",
        backward: Backward = "auto",
        kernels: Kernels = "auto",
        precision: Precision = "ieee",
        memory_budget: int | None = None,
    ) -> None:
        check_one_image(features)
        memory_budget = chosen_memory_budget(detector.device, memory_budget)
        for name, value, known in (
            ("backward", backward, get_args(Backward)),
            ("kernels", kernels, get_args(Kernels)),
            ("precision", precision, get_args(Precision)),
            ("zero_rows", zero_rows, get_args(ZeroRows)),
        ):
            check_choice(name, value, known)
        self.detector = detector
        self.features = features
        self.method = resolve_cam_method(method)
        self.zero_rows: ZeroRows = zero_rows
        self.analytic = backward == "analytic" or (
            backward == "auto" and not detector.is_intercepted and is_builtin(detector.attention)
        )
        self._compute = torch.promote_types(detector.dtype, torch.float32)
        self.kernels = chosen_kernels(kernels, detector, self._compute, self.method)
        if precision != "ieee" and self.kernels != "triton":
            raise SettingError(
                f"precision {precision!r} is for the Triton kernels, and these are {self.kernels!r}: leave it out, "
                "or use kernels='triton'"
            )
        self._precision: Precision = precision
        self.memory = MemoryPlan(detector, features, self.method, self.kernels, memory_budget)
        self._encoded: tuple[Tensor | None, EncoderTrace] | None = None

    @property
    def keeps_cams(self) -> bool:
        """Whether the encoder's cams of a pair fit into the memory budget; otherwise they are recomputed tile by
        tile.
        """
        return self.memory.keep_cams

    @torch.no_grad()
    def encode(self, gate: Tensor | None = None) -> EncoderTrace:
        """Encode the image under `gate` (layers, N or 1, H). The latest result is cached."""
        if self._encoded is not None:
            cached, trace = self._encoded
            if cached is gate or (cached is not None and gate is not None and torch.equal(cached, gate)):
                return trace
        self._encoded = None
        trace = self._run_encoder(gate)
        if self.memory.keep_weights:
            for layer in trace.layers:
                layer.attention.vjp.record.keep_weights()
        self._encoded = (gate, trace)
        return trace

    @torch.no_grad()
    def run(
        self, gates: Gates, targets: TargetsOf, *, layers: Sequence[int] | None = None, heads: bool = False
    ) -> Iterator[ConfigurationRelevance]:
        """Decode and explain every configuration.

        Args:
            gates: the gates of all sites, including the encoder.
            targets: called for each configuration after it is decoded.
            layers: decoder layers after which maps are computed; all of them by default.
            heads: whether to return per-head cross-attention weights.

        Raises:
            NonFiniteError: NaN or infinity appears.
            AttentionError: a patched attention has no backward pass.
            SettingError: a target is not a differentiable number.
        """
        chosen = list(range(self.detector.config.decoder_layers)) if layers is None else list(layers)
        for encoder_gate, members in by_encoder_gate(gates):
            encoder = self.encode(encoder_gate)
            for batch in members.split(self.memory.configurations_at_once):
                yield from self._batch(encoder, gates[batch], batch.tolist(), targets, chosen, heads)

    def _run_encoder(self, gate: Tensor | None) -> EncoderTrace:
        return EncoderTrace.run(self.detector, self.features, gate, self._make_vjp)

    def _run_decoder(self, encoder: EncoderTrace, gates: Gates) -> DecoderTrace:
        return DecoderTrace.run(self.detector, encoder.memory, gates, self._make_vjp)

    def _make_vjp(self, record: AttentionRecord) -> AttentionVjp:
        attend = None if self.analytic else self.detector.attend
        arguments = record, self.method.rule, attend, self.detector.dtype
        if self.kernels == "tiles":
            return AttentionVjp(*arguments)
        if self.kernels == "torch":
            return AttentionVjp(*arguments, self.memory.tile, batched=True)
        return FusedVjp(*arguments, self.memory.tile, precision=self._precision)

    def _batch(
        self,
        encoder: EncoderTrace,
        gates: Gates,
        indices: list[int],
        targets: TargetsOf,
        layers: list[int],
        heads: bool,
    ) -> Iterator[ConfigurationRelevance]:
        decoder = self._run_decoder(encoder, gates)
        if self.kernels != "triton":
            for layer in decoder.layers:
                layer.self_attention.vjp.record.keep_weights()
                layer.cross_attention.vjp.record.keep_weights()
        logits, boxes = decoder.output.logits[:, 0].cpu(), decoder.output.boxes[:, 0].cpu()
        targets_of_runs = [targets(index, logits[run], boxes[run]) for run, index in enumerate(indices)]
        pairs = [
            _Pair(run, slot, target)
            for run, targets_of_run in enumerate(targets_of_runs)
            for slot, target in enumerate(targets_of_run)
            if target is not None
        ]
        results: dict[tuple[int, int], PairRelevance] = {}
        for start in range(0, len(pairs), self.memory.pairs_at_once):
            chunk = pairs[start : start + self.memory.pairs_at_once]
            for pair, result in zip(chunk, self._pairs(encoder, decoder, gates, chunk, layers), strict=True):
                results[pair.run, pair.slot] = result
        for run, (index, targets_of_run) in enumerate(zip(indices, targets_of_runs, strict=True)):
            yield ConfigurationRelevance(
                index,
                logits[run],
                boxes[run],
                [results.get((run, slot)) for slot in range(len(targets_of_run))],
                head_weights(
                    [decoder.layers[layer].cross_attention.vjp for layer in layers], run, targets_of_run
                )
                if heads
                else None,
            )

    def _pairs(
        self,
        encoder: EncoderTrace,
        decoder: DecoderTrace,
        gates: Gates,
        pairs: list[_Pair],
        layers: list[int],
    ) -> list[PairRelevance]:
        values, gradients = self._target_gradients(decoder, pairs)
        shape = len(pairs), len(layers)
        rows = torch.zeros(*shape, self.features.tokens.shape[1], dtype=self._compute)
        decoder_zeros = torch.zeros(shape, dtype=torch.long)
        encoder_zeros = torch.zeros(len(pairs), dtype=torch.long)
        differs = torch.zeros(shape, dtype=torch.bool)
        # With all cross-attention off, no evidence comes from the image: the map is zero and need not be computed.
        seen = sees_image(gates)
        live = [index for index, pair in enumerate(pairs) if seen[pair.run]]
        if live:
            numbers = [
                torch.tensor(indices, dtype=torch.long)
                for indices in (
                    live,
                    [pairs[index].run for index in live],
                    [pairs[index].target.query for index in live],
                    layers,
                )
            ]
            live_index, runs, queries, layer_index = copy_to_device(numbers, gradients.states.device)
            found, differing = self._backward(
                encoder, decoder, gradients.select(live_index), runs, queries, layer_index
            )
            rows[live], decoder_zeros[live] = found.rows.cpu(), found.decoder_identity_rows.cpu()
            encoder_zeros[live], differs[live] = found.encoder_identity_rows.cpu(), differing.cpu()
        check_finite_rows(rows, [(pair.target, gates.names[pair.run]) for pair in pairs], layers)
        return [
            PairRelevance(*fields)
            for fields in zip(
                rows, values.tolist(), decoder_zeros, encoder_zeros.tolist(), differs, strict=True
            )
        ]

    def _backward(
        self,
        encoder: EncoderTrace,
        decoder: DecoderTrace,
        gradients: TargetGradients,
        runs: Tensor,
        queries: Tensor,
        layers: Tensor,
    ) -> tuple[Rows, Tensor]:
        """Rows after `layers`, and `reference_differs` (P, M).

        All tensors stay on the detector's device. On accelerators the host reads no tensor's values.
        """
        self_cams, cross_cams, of_memory = self._through_decoder(decoder, gradients, runs)
        options = self.method.options(self.zero_rows)
        cams = DecoderCams(self_cams, cross_cams, queries)
        in_decoder = self.method.decoder(cams, **options)
        # A contribution dropped at a layer is missing from the maps after all later layers.
        differs = (in_decoder.decoder_identity_rows.cumsum(1) > 0).index_select(1, layers)
        in_decoder = Rows(
            in_decoder.rows.index_select(1, layers),
            in_decoder.decoder_identity_rows.index_select(1, layers),
            in_decoder.encoder_identity_rows,
        )
        del self_cams, cross_cams, cams  # frees memory for the encoder
        parts = []
        for start in range(0, len(runs), self.memory.encoder_pairs_at_once):
            batch = slice(start, start + self.memory.encoder_pairs_at_once)
            of_pairs = tuple(tensor[batch] for tensor in of_memory)
            parts.append(self._through_encoder(encoder, in_decoder.select(batch), of_pairs, options))
        rows = Rows(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.decoder_identity_rows for part in parts]),
            torch.cat([part.encoder_identity_rows for part in parts]),
        )
        return rows, differs | (rows.encoder_identity_rows > 0)[:, None]

    def _through_decoder(
        self, decoder: DecoderTrace, gradients: TargetGradients, runs: Tensor
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
        """The decoder's cams, and what `_encoder_cams` needs: the gradient of the memory (P, N, d), if anything."""
        needed = self.method.needs_gradient
        found = decoder.backward(
            gradients.states if needed else None, runs, memory=needed and self.method.encoder is not None
        )
        return found.self_cams, found.cross_cams, () if found.memory is None else (found.memory,)

    def _through_encoder(
        self,
        encoder: EncoderTrace,
        rows: Rows,
        of_memory: tuple[Tensor, ...],
        options: dict[str, object],
    ) -> Rows:
        """The decoder's rows times the encoder's factor."""
        if self.method.encoder is None:
            return rows
        has_evidence = rows.rows.flatten(1).any(1)
        # Only on the CPU: waiting for an accelerator would cost more than it saves.
        if has_evidence.device.type == "cpu" and not has_evidence.any():
            return rows
        mask = self.features.attn_mask
        tokens = None if mask is None else mask.flatten()
        result = self.method.encoder(rows, self._encoder_cams(encoder, of_memory), tokens, **options)
        # Without evidence from the decoder, nothing was normalised.
        return replace(result, encoder_identity_rows=result.encoder_identity_rows * has_evidence)

    def _encoder_cams(self, encoder: EncoderTrace, of_memory: tuple[Tensor, ...]) -> EncoderCams:
        """The encoder's cams of pairs, from the gradient of the memory (P, N, d); without it, cams are the same for all
        pairs.
        """
        attention = [layer.attention.vjp for layer in encoder.layers]
        keep = self.memory.keep_cams
        if not of_memory:
            if not keep:
                return RecomputedCams(attention, None)
            run = torch.zeros(1, dtype=torch.long, device=self.features.tokens.device)
            kept = [vjp(None, run, inputs=False)[0] for vjp in attention]
        else:
            layers = encoder.backward(of_memory[0], keep)
            if not keep:
                return RecomputedCams(attention, [grad_context for _, grad_context in layers])
            kept = [cams for cams, _ in layers]
        return StoredCams([cams for cams in kept if cams is not None])

    def _target_gradients(self, decoder: DecoderTrace, pairs: list[_Pair]) -> tuple[Tensor, TargetGradients]:
        """The targets' values (P,), and their gradients."""
        (runs,) = copy_to_device([torch.tensor([pair.run for pair in pairs])], decoder.states.device)
        with torch.enable_grad():
            # By autograd, as class and box heads are small and contain no attention.
            states = decoder.states.index_select(0, runs).detach().requires_grad_()
            output = self.detector.heads(states[None])
            values = torch.stack(
                [
                    pair.target.value(output.logits[index, 0], output.boxes[index, 0])
                    for index, pair in enumerate(pairs)
                ]
            )
            inputs = states, output.logits, output.boxes
            gradients = torch.autograd.grad(values.sum(), inputs, allow_unused=True, materialize_grads=True)
        of_states, of_logits, of_boxes = (gradient.to(self._compute) for gradient in gradients)
        return values.detach(), TargetGradients(of_states, of_logits[:, 0], of_boxes[:, 0])


def check_one_image(features: Any) -> None:
    """Raise SettingError unless the features are of one image."""
    if len(features) != 1:
        raise SettingError(f"relevance is computed for one image at a time: give one, not {len(features)}")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise SettingError unless the option `name` can have that value."""
    if value not in known:
        raise SettingError(f"{name} cannot be {value!r}: use one of {', '.join(known)}")


def check_finite_rows(rows: Tensor, pairs: Sequence[tuple[Target, str]], layers: Sequence[int]) -> None:
    """Raise NonFiniteError unless rows (P, M, N) are finite; `pairs` are targets and names of configurations."""
    bad = (~rows.isfinite()).any(-1)
    if not bool(bad.any()):
        return
    pair, place = (int(index) for index in bad.nonzero()[0])
    target, configuration = pairs[pair]
    raise NonFiniteError(
        f"NaN or infinity in the relevance of query {target.query} under "
        f"'{configuration}', first after decoder layer {layers[place]}, though logits and boxes "
        "are finite: check the backward pass of the attention and the target's gradient"
    )


def sees_image(gates: Gates) -> list[bool]:
    """Whether each configuration leaves any head of the cross-attention on."""
    if gates.decoder_cross is None:
        return [True] * len(gates)
    return [bool(gate.any()) for gate in gates.decoder_cross]


def head_weights(
    cross_attention: Sequence[AttentionVjp | SampledVjp], run: int, targets: Sequence[Target | None]
) -> Tensor:
    """Cross-attention weights after the gate at the targets' queries: (targets, M, H, N); zero for a target of None."""
    return at_targets(
        [partial(vjp.weights_at, run) for vjp in cross_attention], targets, cross_attention[0].device
    )


def at_targets(
    layers: Sequence[Callable[[Tensor], Tensor]], targets: Sequence[Target | None], device: torch.device
) -> Tensor:
    """What each layer gives for the targets' queries (q,), on the CPU: (targets, M, ...); zero for a target of None."""
    queries = [0 if target is None else target.query for target in targets]
    (query_index,) = copy_to_device([torch.tensor(queries, dtype=torch.long)], device)
    result = torch.stack([at(query_index) for at in layers], dim=1).cpu()
    result[torch.tensor([target is None for target in targets], dtype=torch.bool)] = 0
    return result
