"""The engine: one encode, all configurations decoded together, all targets' gradients sent back in batches.

Only what relevance is made of is computed: contexts' gradients at each attention, no gradients of weights, nothing of
the backbone. A pair of (configuration, target) costs the VJPs of decoder and encoder and a few products of cams with
vectors (`headoff.relevance.aggregation`). Memory is bounded by a budget, which decides

- how many configurations are decoded, and how many pairs sent back, at once;
- whether attention weights and encoder cams (N x N per layer) are kept, or made anew tile by tile. Without them the
  memory of a pair is O(N).

Three ways through an attention lead to the same numbers (`Kernels`): pair by pair in tiles that fit a CPU's caches, all
pairs at once in plain PyTorch, and all pairs at once in Triton. Off the CPU the host reads no value of a tensor between
a target's gradient and the finished maps, which are copied back together.

Results come one configuration at a time, in the order of the gates where the encoder is not gated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from headoff.detr.detector import Detector, Features
from headoff.detr.transfers import sent
from headoff.errors import NonFiniteError, SettingError
from headoff.gates import Gates
from headoff.relevance.aggregation import DecoderCams, EncoderCams, Rows
from headoff.relevance.attention_vjp import AttentionVjp, is_builtin
from headoff.relevance.batched_vjp import TEMPORARIES, BatchedVjp
from headoff.relevance.capture import AttentionRecord
from headoff.relevance.fused_vjp import FusedVjp, Precision, unsupported
from headoff.relevance.methods import Method, resolve_method
from headoff.relevance.rules import ZeroRows
from headoff.relevance.targets import Target
from headoff.relevance.traces import DecoderTrace, EncoderTrace
from headoff.sweeps import by_encoder_gate

Backward = Literal["auto", "analytic", "callable"]

Kernels = Literal["auto", "tiles", "torch", "triton"]
"""How an attention is gone back through: `tiles`, pair by pair (`attention_vjp`); `torch`, all pairs at once in plain
PyTorch (`batched_vjp`); `triton`, all pairs at once in fused kernels (`fused_vjp`); `auto`, `tiles` on the CPU and
`torch` on other devices."""

MEMORY_BUDGET = 2**30
"""Bytes that the engine may use beside the model, by default, where the device does not say what it has."""

TargetsOf = Callable[[int, Tensor, Tensor], Sequence[Target | None]]
"""(index of a configuration, its logits (Q, K + 1), its boxes (Q, 4), both on the CPU) to what is to be explained of
it."""


@dataclass(frozen=True)
class PairRelevance:
    """The relevance of one target under one configuration, on the CPU.

    - `rows` (M, N): after each decoder layer, float32 or float64
    - `value`: the target's
    - `decoder_identity_rows` (M,) int64 and `encoder_identity_rows`: identity rows that normalisation took; 0 where
      there was nothing to normalise
    - `reference_differs` (M,) bool: whether the paper's published code drops a contribution to that map, for a row
      that normalisation could not divide
    """

    rows: Tensor
    value: float
    decoder_identity_rows: Tensor
    encoder_identity_rows: int
    reference_differs: Tensor


@dataclass(frozen=True)
class ConfigurationRelevance:
    """One configuration: its index in the gates, logits (Q, K + 1), boxes (Q, 4), and one result per target asked for
    (None for None). `heads` (targets, M, H, N): cross-attention weights after the gate, where they were asked for.
    """

    index: int
    logits: Tensor
    boxes: Tensor
    pairs: list[PairRelevance | None]
    heads: Tensor | None


@dataclass(frozen=True)
class _Pair:
    run: int
    slot: int
    target: Target


class KeptCams:
    """Encoder cams as matrices (P or 1, N, N)."""

    def __init__(self, cams: list[Tensor]) -> None:
        self._cams = cams

    def __len__(self) -> int:
        return len(self._cams)

    def right(self, layer: int, vectors: Tensor) -> Tensor:
        return (self._cams[layer] @ vectors[:, :, None])[:, :, 0]

    def left(self, layer: int, rows: Tensor) -> Tensor:
        return rows @ self._cams[layer]


class RecomputedCams:
    """Encoder cams that are made anew, tile by tile, each time they are multiplied by: dO is all that is kept."""

    def __init__(self, attention: list[AttentionVjp], gradients: list[Tensor] | None) -> None:
        self._attention = attention
        self._gradients = gradients

    def __len__(self) -> int:
        return len(self._attention)

    def right(self, layer: int, vectors: Tensor) -> Tensor:
        return self._attention[layer].right(*self._of(layer, vectors), vectors)

    def left(self, layer: int, rows: Tensor) -> Tensor:
        return self._attention[layer].left(*self._of(layer, rows), rows)

    def _of(self, layer: int, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """dO of the layer, and the runs: the encoder has one."""
        gradient = None if self._gradients is None else self._gradients[layer]
        return gradient, torch.zeros(len(like), dtype=torch.long, device=like.device)


class RelevanceEngine:
    """Relevance of one image for any number of configurations and targets.

    Args:
        detector: in evaluation mode; its attention callable computes every forward pass.
        features: of one image (`Detector.features`), padded or not.
        method: a name or a `Method`.
        zero_rows: see `headoff.relevance.rules`.
        backward: how gradients pass an attention: by its own backward pass (`callable`), which a patch under test is
            to be judged by, or by the formula (`analytic`), which is faster. `auto` is analytic for this package's
            attentions and callable for any other. Cams are made of the captured tensors either way.
        kernels: see `Kernels`. `auto` is `tiles` on the CPU and `torch` on any other device. `triton` has to be asked
            for; it needs CUDA, relevance in float32, and a method whose cams are products with a gradient.
        precision: of the products in `triton`'s kernels: `ieee` keeps all bits of float32. `tf32` is faster, and its
            maps differ by up to 1e-2 of their maximum.
        memory_budget: bytes; what cannot be made smaller is taken regardless. None is half of the free memory of a
            CUDA device, `MEMORY_BUDGET` on any other.

    Raises SettingError for options that cannot be; see `run` for the rest.
    """

    def __init__(
        self,
        detector: Detector,
        features: Features,
        *,
        method: Method | str = "chefer",
        zero_rows: ZeroRows = "identity",
        backward: Backward = "auto",
        kernels: Kernels = "auto",
        precision: Precision = "ieee",
        memory_budget: int | None = None,
    ) -> None:
        if len(features) != 1:
            raise SettingError(f"relevance is of one image at a time: give one, not {len(features)}")
        if memory_budget is None:
            memory_budget = default_memory_budget(detector.device)
        if memory_budget <= 0:
            raise SettingError(f"a memory budget of {memory_budget} bytes holds nothing; give a positive one")
        for name, value, known in (
            ("backward", backward, get_args(Backward)),
            ("kernels", kernels, get_args(Kernels)),
            ("precision", precision, get_args(Precision)),
            ("zero_rows", zero_rows, get_args(ZeroRows)),
        ):
            if value not in known:
                raise SettingError(f"{name} cannot be {value!r}: use one of {', '.join(known)}")
        self.detector = detector
        self.features = features
        self.method = resolve_method(method)
        self.zero_rows: ZeroRows = zero_rows
        self.analytic = backward == "analytic" or (
            backward == "auto" and not detector.is_intercepted and is_builtin(detector.attention)
        )
        self._compute = torch.promote_types(detector.dtype, torch.float32)
        self.kernels = _chosen_kernels(kernels, detector, self._compute, self.method)
        if precision != "ieee" and self.kernels != "triton":
            raise SettingError(
                f"precision {precision!r} is of the Triton kernels, and these are of {self.kernels!r}: leave it out, "
                "or use kernels='triton'"
            )
        self._precision: Precision = precision
        self._budget = _Budget(detector, features, self.method, self.kernels, memory_budget)
        self._encoded: tuple[Tensor | None, EncoderTrace] | None = None

    @property
    def keeps_cams(self) -> bool:
        """Whether the memory budget holds the encoder's cams of a pair; else they are made anew, tile by tile."""
        return self._budget.keep_cams

    @torch.no_grad()
    def encode(self, gate: Tensor | None = None) -> EncoderTrace:
        """The image through the encoder under `gate` (layers, N or 1, H); the last one is remembered."""
        if self._encoded is not None:
            known, trace = self._encoded
            if known is gate or (known is not None and gate is not None and torch.equal(known, gate)):
                return trace
        self._encoded = None
        trace = EncoderTrace.of(self.detector, self.features, gate, self._make)
        if self._budget.keep_weights:
            for layer in trace.layers:
                layer.attention.record.keep_weights()
        self._encoded = (gate, trace)
        return trace

    @torch.no_grad()
    def run(
        self, gates: Gates, targets: TargetsOf, *, layers: Sequence[int] | None = None, heads: bool = False
    ) -> Iterator[ConfigurationRelevance]:
        """Decode and explain every configuration.

        Args:
            gates: all sites, the encoder's included.
            targets: called for each configuration once it is decoded.
            layers: decoder layers after which maps are wanted; None = all.
            heads: whether to add per-head cross-attention weights.

        Raises NonFiniteError where NaN or infinity appears, AttentionError where a patched attention has no backward
        pass, SettingError for a target that is no differentiable number.
        """
        chosen = list(range(self.detector.config.decoder_layers)) if layers is None else list(layers)
        for encoder_gate, members in by_encoder_gate(gates):
            encoder = self.encode(encoder_gate)
            for batch in members.split(self._budget.configurations_at_once):
                yield from self._batch(encoder, gates[batch], batch.tolist(), targets, chosen, heads)

    def _make(self, record: AttentionRecord) -> AttentionVjp:
        attend = None if self.analytic else self.detector.attend
        given = record, self.method.rule, attend, self.detector.dtype
        if self.kernels == "tiles":
            return AttentionVjp(*given)
        if self.kernels == "torch":
            return BatchedVjp(*given, self._budget.tile)
        return FusedVjp(*given, self._budget.tile, precision=self._precision)

    def _batch(
        self,
        encoder: EncoderTrace,
        gates: Gates,
        indices: list[int],
        targets: TargetsOf,
        layers: list[int],
        heads: bool,
    ) -> Iterator[ConfigurationRelevance]:
        decoder = DecoderTrace.of(self.detector, encoder.memory, gates, self._make)
        if self.kernels != "triton":
            for layer in decoder.layers:
                layer.own.record.keep_weights()
                layer.cross.record.keep_weights()
        logits, boxes = decoder.output.logits[:, 0].cpu(), decoder.output.boxes[:, 0].cpu()
        asked = [targets(index, logits[run], boxes[run]) for run, index in enumerate(indices)]
        pairs = [
            _Pair(run, slot, target)
            for run, wanted in enumerate(asked)
            for slot, target in enumerate(wanted)
            if target is not None
        ]
        found: dict[tuple[int, int], PairRelevance] = {}
        for start in range(0, len(pairs), self._budget.pairs_at_once):
            chunk = pairs[start : start + self._budget.pairs_at_once]
            results = self._pairs(encoder, decoder, gates, chunk, layers)
            found.update({(pair.run, pair.slot): each for pair, each in zip(chunk, results, strict=True)})
        for run, (index, wanted) in enumerate(zip(indices, asked, strict=True)):
            yield ConfigurationRelevance(
                index,
                logits[run],
                boxes[run],
                [found.get((run, slot)) for slot in range(len(wanted))],
                _head_weights(decoder, run, wanted, layers) if heads else None,
            )

    def _pairs(
        self,
        encoder: EncoderTrace,
        decoder: DecoderTrace,
        gates: Gates,
        pairs: list[_Pair],
        layers: list[int],
    ) -> list[PairRelevance]:
        values, gradient = self._seed(decoder, pairs)
        shape = len(pairs), len(layers)
        rows = torch.zeros(*shape, self.features.tokens.shape[1], dtype=self._compute)
        decoder_zeros = torch.zeros(shape, dtype=torch.long)
        encoder_zeros = torch.zeros(len(pairs), dtype=torch.long)
        differs = torch.zeros(shape, dtype=torch.bool)
        # With all cross-attention off no evidence comes from the image: the map is zero, and known without computing.
        seeing = _seeing(gates)
        live = [index for index, pair in enumerate(pairs) if seeing[pair.run]]
        if live:
            numbers = [
                torch.tensor(each, dtype=torch.long)
                for each in (
                    live,
                    [pairs[index].run for index in live],
                    [pairs[index].target.query for index in live],
                    layers,
                )
            ]
            there, runs, queries, wanted = sent(numbers, gradient.device)
            seed = gradient.index_select(0, there) if self.method.needs_gradient else None
            found, differing = self._flow(encoder, decoder, seed, runs, queries, wanted)
            rows[live], decoder_zeros[live] = found.rows.cpu(), found.decoder_identity_rows.cpu()
            encoder_zeros[live], differs[live] = found.encoder_identity_rows.cpu(), differing.cpu()
        if not bool(rows.isfinite().all()):
            raise _non_finite(rows, pairs, gates, layers)
        return [
            PairRelevance(*each)
            for each in zip(
                rows, values.tolist(), decoder_zeros, encoder_zeros.tolist(), differs, strict=True
            )
        ]

    def _flow(
        self,
        encoder: EncoderTrace,
        decoder: DecoderTrace,
        seed: Tensor | None,
        runs: Tensor,
        queries: Tensor,
        layers: Tensor,
    ) -> tuple[Rows, Tensor]:
        """From gradients of the decoder's states to rows after `layers`, and `reference_differs` (P, M).

        All on the device of the detector. Off the CPU no value of a tensor is read on the way.
        """
        flow = decoder.backward(
            seed, runs, memory=self.method.encoder is not None and self.method.needs_gradient
        )
        options = self.method.options(self.zero_rows)
        below = self.method.decoder(DecoderCams(flow.own, flow.cross, queries), **options)
        # What is dropped at a layer is missing from every map after it, whichever of them are asked for.
        differs = (below.decoder_identity_rows.cumsum(1) > 0).index_select(1, layers)
        below = Rows(
            below.rows.index_select(1, layers),
            below.decoder_identity_rows.index_select(1, layers),
            below.encoder_identity_rows,
        )
        of_memory = flow.memory
        del flow
        parts = []
        for start in range(0, len(runs), self._budget.encoder_pairs_at_once):
            some = slice(start, start + self._budget.encoder_pairs_at_once)
            gradient = None if of_memory is None else of_memory[some]
            parts.append(self._encoder_part(encoder, below.of(some), gradient, options))
        above = Rows(
            torch.cat([part.rows for part in parts]),
            torch.cat([part.decoder_identity_rows for part in parts]),
            torch.cat([part.encoder_identity_rows for part in parts]),
        )
        return above, differs | (above.encoder_identity_rows > 0)[:, None]

    def _encoder_part(
        self, encoder: EncoderTrace, rows: Rows, of_memory: Tensor | None, options: dict[str, object]
    ) -> Rows:
        if self.method.encoder is None:
            return rows
        evident = rows.rows.flatten(1).any(1)
        # Not worth waiting for, elsewhere.
        if evident.device.type == "cpu" and not evident.any():
            return rows
        mask = self.features.attn_mask
        tokens = None if mask is None else mask.flatten()
        found = self.method.encoder(rows, self._encoder_cams(encoder, of_memory), tokens, **options)
        # Where no evidence comes from the decoder there was nothing to normalise.
        return replace(found, encoder_identity_rows=found.encoder_identity_rows * evident)

    def _encoder_cams(self, encoder: EncoderTrace, of_memory: Tensor | None) -> EncoderCams:
        """Of all pairs that the gradient of the memory (P, N, d) is of; without one, the same for all."""
        attention = [layer.attention for layer in encoder.layers]
        keep = self._budget.keep_cams
        if of_memory is None:
            if not keep:
                return RecomputedCams(attention, None)
            one = torch.zeros(1, dtype=torch.long, device=self.features.tokens.device)
            kept = [each(None, one, inputs=False)[0] for each in attention]
        else:
            flow = encoder.backward(of_memory, keep)
            if not keep:
                return RecomputedCams(attention, [gradient for _, gradient in flow])
            kept = [cams for cams, _ in flow]
        return KeptCams([cams for cams in kept if cams is not None])

    def _seed(self, decoder: DecoderTrace, pairs: list[_Pair]) -> tuple[Tensor, Tensor]:
        """The targets' values (P,), and their gradients with respect to the decoder's states, (P, Q, d)."""
        (runs,) = sent([torch.tensor([pair.run for pair in pairs])], decoder.states.device)
        with torch.enable_grad():
            # The heads are small and no part of what may be patched: autograd will do.
            states = decoder.states.index_select(0, runs).detach().requires_grad_()
            output = self.detector.heads(states[None])
            values = torch.stack(
                [
                    pair.target.value(output.logits[index, 0], output.boxes[index, 0])
                    for index, pair in enumerate(pairs)
                ]
            )
            (gradient,) = torch.autograd.grad(values.sum(), states)
        return values.detach(), gradient.to(self._compute)


def _non_finite(rows: Tensor, pairs: list[_Pair], gates: Gates, layers: list[int]) -> NonFiniteError:
    bad = (~rows.isfinite()).any(-1)
    pair, place = (int(index) for index in bad.nonzero()[0])
    return NonFiniteError(
        f"NaN or infinity in the relevance of query {pairs[pair].target.query} under "
        f"'{gates.names[pairs[pair].run]}', first after decoder layer {layers[place]}, though logits and boxes "
        "are finite: check the backward pass of the attention and the target's gradient"
    )


def default_memory_budget(device: torch.device) -> int:
    """Bytes: half of what is free on a CUDA device, torch's own reserve included, `MEMORY_BUDGET` on any other."""
    if device.type != "cuda":
        return MEMORY_BUDGET
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + reserve) // 2


def _chosen_kernels(kernels: Kernels, detector: Detector, compute: torch.dtype, method: Method) -> Kernels:
    """The implementation that `kernels` stands for. Raises SettingError if `triton` is asked for and cannot run."""
    if kernels == "auto":
        return "tiles" if detector.device.type == "cpu" else "torch"
    if kernels == "triton":
        channels = detector.config.width // detector.config.heads
        reason = unsupported(detector.device, compute, method.rule, channels)
        if reason is not None:
            raise SettingError(f"{reason}: use kernels='auto', or leave it out")
    return kernels


class _Budget:
    """How a number of bytes is spent. `tile`: see `BatchedVjp` and `FusedVjp`."""

    def __init__(
        self, detector: Detector, features: Features, method: Method, kernels: Kernels, memory_budget: int
    ) -> None:
        config = detector.config
        size = torch.promote_types(detector.dtype, torch.float32).itemsize
        tokens, queries, heads = features.tokens.shape[1], config.queries, config.heads
        one_by_one = kernels == "tiles"
        # The encoder's activations, and one layer's gradients of one pair, are needed whatever the budget.
        left = memory_budget - size * tokens * config.encoder_layers * (config.feedforward + 8 * config.width)
        self.tile = int(max(1, left // 4 // (TEMPORARIES * size)))
        if not one_by_one:
            left -= self.tile * TEMPORARIES * size
        weights = size * heads * tokens**2 * config.encoder_layers
        self.keep_weights = kernels != "triton" and method.encoder is not None and weights <= left / 2
        if self.keep_weights:
            left -= weights
        states = size * queries * (2 * config.feedforward + 20 * config.width)
        configuration = config.decoder_layers * (states + size * queries * heads * (tokens + queries))
        self.configurations_at_once = int(max(1, min(64, left / 2 // configuration)))
        left -= self.configurations_at_once * configuration

        below = size * (config.decoder_layers * queries * (tokens + queries) + tokens * (6 * config.width))
        # Enough rows for a matrix product to be worth it; on a GPU, as many as there are.
        enough = max(1, 1024 // queries) if one_by_one else 256
        self.pairs_at_once = int(max(1, min(enough, left / 2 // below)))
        left -= self.pairs_at_once * below

        flow = size * tokens * (config.feedforward + 10 * config.width)
        cams = size * tokens**2 * config.encoder_layers
        self.keep_cams = cams + flow <= left
        above = flow + (cams if self.keep_cams else size * tokens * config.width * config.encoder_layers)
        enough = max(1, 1024 // tokens) if one_by_one else 64
        self.encoder_pairs_at_once = int(max(1, min(enough, left // above)))


def _seeing(gates: Gates) -> list[bool]:
    """Whether each configuration leaves any head of the cross-attention on."""
    if gates.decoder_cross is None:
        return [True] * len(gates)
    return [bool(each.any()) for each in gates.decoder_cross]


def _head_weights(
    decoder: DecoderTrace, run: int, wanted: Sequence[Target | None], layers: list[int]
) -> Tensor:
    """Cross-attention weights after the gate, of the targets' queries: (targets, M, H, N); zero where there is None."""
    queries = [0 if target is None else target.query for target in wanted]
    (there,) = sent([torch.tensor(queries, dtype=torch.long)], decoder.states.device)
    found = []
    for layer in layers:
        record = decoder.layers[layer].cross.record
        weights = record.weights(run).index_select(1, there)
        if record.gate is not None:
            gate = record.gate[run]
            weights = weights * (gate if gate.shape[1] == 1 else gate.index_select(1, there))
        found.append(weights.transpose(0, 1))
    result = torch.stack(found, dim=1).cpu()
    result[torch.tensor([target is None for target in wanted], dtype=torch.bool)] = 0
    return result
