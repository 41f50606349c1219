"""Relevance methods with LRP, and their engines, for headoff's own DETR.

Three methods put what LRP says of each attention weight, R_A, in the place of the weight A; R_A comes from
`PositiveRules`. X_m is the mean over heads of relu(dA * R_A) in the cross-attention of decoder layer m:

- `chefer_lrp`: equations 5 to 11 with R_A for A in equation 5. After layer M: the aggregation of layers 0 ... M.
- `transformer_attribution`: row t of X_M, with t the target's query.
- `partial_lrp`: row t of the mean over heads of R_A in the cross-attention of layer M, without gradient or relu.

The fourth, `attn_lrp`, computes the relevance of the image tokens themselves, by `EpsilonRules`: after layer M, of that
part of it that enters the memory through the cross-attention of layers 0 ... M. After the last layer it is all.

The maps equal those of the published code (hila-chefer/Transformer-MM-Explainability, folder DETR, after the last
layer) to 1e-9 of their maximum in float64, with these differences:

- It has no head gates, no key masks, no pre-norm encoder and no targets but class logits. A gate is a constant factor
  of the weights, which gets no relevance; the gradient of equation 5 is that of gated weights.
- It clears a layer's whole contribution where equation 9 divides 0 by 0; see `headoff.relevance.rules`.
- `partial_lrp` ends there with (map - min) / (max - min) over the queries x tokens matrix. It is left out: maps of
  different configurations can be compared only without it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from headoff.calls import AttentionAddress
from headoff.detector import Detector
from headoff.detr.detector import Detr, Features
from headoff.errors import SettingError
from headoff.gates import Gates
from headoff.relevance import aggregation, rules
from headoff.relevance.aggregation import Rows
from headoff.relevance.attention_vjp import BATCHED_TILE, CPU_TILE
from headoff.relevance.encoder_cams import EncoderCams, RecomputedCams, StoredCams
from headoff.relevance.engine import RelevanceEngine, TargetGradients
from headoff.relevance.lrp.attention import AttentionRelevance
from headoff.relevance.lrp.rules import EpsilonRules, LrpRules, PositiveRules
from headoff.relevance.lrp.trace import DecoderRelevance, EncoderRelevance, LrpRecorder, heads_relevance
from headoff.relevance.memory import chosen_memory_budget
from headoff.relevance.methods import CamMethod, EngineMethod, method_names, register_method
from headoff.relevance.records import AttentionRecord, unfold_runs
from headoff.relevance.trace import DecoderContributions, DecoderTrace, EncoderTrace

LEAST_TOTAL = 1e-5
"""The least sum of a target's gradient, in the sum of its absolute values, that `PositiveRules` are used for."""


@dataclass
class _EncoderTrace(EncoderTrace):
    relevance: EncoderRelevance | None = None


@dataclass
class _DecoderTrace(DecoderTrace):
    relevance: DecoderRelevance | None = None


@dataclass(frozen=True)
class LrpMethod(EngineMethod):
    """A method with LRP.

    Attributes:
        rules: of LRP.
        cams: what cams are made of, and maps of cams.
    """

    rules: LrpRules = PositiveRules()
    cams: CamMethod | None = None

    def suits(self, detector: Detector) -> bool:
        return isinstance(detector, Detr)


class LrpEngine(RelevanceEngine):
    """`RelevanceEngine` with R_A in the place of attention weights; it runs LRP before the backward pass.

    Args:
        detector, features, memory_budget, options: see `RelevanceEngine`; there are no fused kernels.
        method: an `LrpMethod`.
        picture: not needed.

    Raises:
        SettingError: the detector is not headoff's own DETR, or there is more than one image.
    """

    def __init__(
        self,
        detector: Detector,
        features: Features,
        *,
        method: LrpMethod,
        picture: Image.Image | None = None,
        memory_budget: int | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(detector, Detr):
            raise SettingError(
                f"{method.name} knows the layers of headoff's own DETR only: for this detector use one of "
                f"{', '.join(method_names(detector))}"
            )
        assert method.cams is not None
        config = detector.config
        # Inputs, and reciprocals of outputs, of all layers of the encoder.
        numbers = (
            features.tokens.shape[1] * config.encoder_layers * (3 * config.feedforward + 28 * config.width)
        )
        size = torch.promote_types(detector.dtype, torch.float32).itemsize
        used = size * numbers
        budget = chosen_memory_budget(detector.device, memory_budget)
        weights = size * config.heads * features.tokens.shape[1] ** 2 * config.encoder_layers
        self._keep = used + 4 * weights <= budget
        used += weights * self._keep
        super().__init__(
            detector,
            features,
            method=method.cams,
            memory_budget=max(1, budget - (0 if method.cams.encoder is None else used)),
            **options,
        )
        self._rules = method.rules

    def _run_encoder(self, gate: Tensor | None) -> EncoderTrace:
        recorder = LrpRecorder(self.detector)
        trace = _EncoderTrace.run(self.detector, self.features, gate, self._make_vjp, recorder)
        assert isinstance(trace, _EncoderTrace)
        if self.method.encoder is not None:
            trace.relevance = EncoderRelevance.of(
                self.detector.encoder,
                recorder,
                self._rules,
                self._make_attention,
                self.features.tokens.to(self._compute),
            )
        return trace

    def _run_decoder(self, encoder: EncoderTrace, gates: Gates) -> DecoderTrace:
        recorder = LrpRecorder(self.detector)
        trace = _DecoderTrace.run(self.detector, encoder.memory, gates, self._make_vjp, recorder)
        assert isinstance(trace, _DecoderTrace)

        def record_of(address: AttentionAddress) -> AttentionRecord:
            record = recorder.attention[address]
            return unfold_runs(record, len(gates)) if address.site == "decoder_cross" else record

        trace.relevance = DecoderRelevance.of(
            self.detector.decoder,
            recorder,
            record_of,
            self._rules,
            self._make_attention,
            torch.zeros_like(trace.states, dtype=self._compute),
            encoder.memory.tokens.to(self._compute),
        )
        return trace

    def _target_gradients(self, decoder: DecoderTrace, pairs: list[Any]) -> tuple[Tensor, TargetGradients]:
        values, gradients = super()._target_gradients(decoder, pairs)
        if isinstance(self._rules, PositiveRules):
            # Their rescaling to the total would multiply rounding errors.
            parts = torch.cat((gradients.logits.flatten(1), gradients.boxes.flatten(1)), dim=1)
            lost = parts.sum(1).abs() <= LEAST_TOTAL * parts.abs().sum(1)
            for pair, is_lost in zip(pairs, lost.tolist(), strict=True):
                if is_lost:
                    raise SettingError(
                        f"the gradient of the target {pair.target.name!r} sums to zero over logits and boxes, as that "
                        "of a difference or of a probability does, and this LRP keeps only sums: explain a class logit "
                        "or a box coordinate, or use attn_lrp"
                    )
        return values, gradients

    def _make_attention(self, record: AttentionRecord) -> AttentionRelevance:
        in_encoder = record.address.site == "encoder_self"
        if self.memory.keep_weights or not in_encoder:
            record.keep_weights()
        keep = self._keep or not in_encoder
        if self.kernels == "tiles":
            return AttentionRelevance(record, self._rules, CPU_TILE, False, keep)
        return AttentionRelevance(record, self._rules, min(BATCHED_TILE, self.memory.tile), True, keep)

    def _through_decoder(
        self, decoder: DecoderTrace, gradients: TargetGradients, runs: Tensor
    ) -> tuple[list[Tensor], list[Tensor], tuple[Tensor, ...]]:
        contributions, of_memory = self._decoder_relevance(decoder, gradients, runs)
        if self.method.rule == "signed":
            cams = [
                layer.cross_attention.vjp(contribution, runs, inputs=False)[0]
                for layer, contribution in zip(decoder.layers, contributions.cross_attention, strict=True)
            ]
            return [], [cam for cam in cams if cam is not None], ()
        through_encoder = self.method.encoder is not None
        found = decoder.backward(gradients.states, runs, memory=through_encoder, contributions=contributions)
        if found.memory is None:
            return found.self_cams, found.cross_cams, ()
        return found.self_cams, found.cross_cams, (found.memory, self._of_memory(decoder, of_memory, runs))

    def _decoder_relevance(
        self, decoder: DecoderTrace, gradients: TargetGradients, runs: Tensor
    ) -> tuple[DecoderContributions, list[Tensor]]:
        """What `DecoderRelevance` finds."""
        assert isinstance(decoder, _DecoderTrace) and decoder.relevance is not None
        return decoder.relevance(self._of_states(decoder, gradients, runs), runs)

    def _of_states(self, decoder: DecoderTrace, gradients: TargetGradients, runs: Tensor) -> Tensor:
        """The relevance of the decoder's states, (P, Q, d)."""
        states = decoder.states.index_select(0, runs)
        output = self.detector.heads(states[None])
        return heads_relevance(
            self.detector,
            self._rules,
            states.to(self._compute),
            self._rules.initial(output.logits[:, 0].to(self._compute), gradients.logits),
            self._rules.initial(output.boxes[:, 0].to(self._compute), gradients.boxes),
        )

    def _of_memory(self, decoder: DecoderTrace, of_layers: list[Tensor], runs: Tensor) -> Tensor:
        """The relevance of the memory (P, N, d), from what each layer gives it."""
        assert isinstance(decoder, _DecoderTrace) and decoder.relevance is not None
        copies = decoder.relevance.memory
        # The memory goes to the decoder and, in the published code, to a head for masks: two operators.
        return copies(copies(torch.stack(of_layers).sum(0), runs), runs)

    def _encoder_cams(self, encoder: EncoderTrace, of_memory: tuple[Tensor, ...]) -> EncoderCams:
        gradient, relevance = of_memory
        assert isinstance(encoder, _EncoderTrace) and encoder.relevance is not None
        contributions = encoder.relevance.contributions(relevance)
        keep = self.memory.keep_cams
        layers = encoder.backward(gradient, keep, contributions)
        if keep:
            return StoredCams([cams for cams, _ in layers if cams is not None])
        attention = [layer.attention.vjp for layer in encoder.layers]
        return RecomputedCams(attention, [gradient for _, gradient in layers], contributions)


class TokenRelevanceEngine(LrpEngine):
    """The relevance of the image tokens by LRP alone, summed over their channels."""

    def _backward(
        self,
        encoder: EncoderTrace,
        decoder: DecoderTrace,
        gradients: TargetGradients,
        runs: Tensor,
        queries: Tensor,
        layers: Tensor,
    ) -> tuple[Rows, Tensor]:
        assert isinstance(encoder, _EncoderTrace) and encoder.relevance is not None
        _, of_layers = self._decoder_relevance(decoder, gradients, runs)
        upto = torch.stack(of_layers, dim=1).cumsum(1).index_select(1, layers)
        parts = upto.flatten(0, 1).split(self.memory.encoder_pairs_at_once)
        rows = torch.cat([encoder.relevance(part).sum(-1) for part in parts]).unflatten(0, upto.shape[:2])
        zeros = torch.zeros(upto.shape[:2], dtype=torch.long, device=rows.device)
        return Rows(rows, zeros, zeros[:, 0]), zeros.bool()


_CHEFER = CamMethod(
    "chefer_lrp",
    "as chefer, with LRP's relevance of attention in the place of the weights",
    "gradient",
    aggregation.chefer_decoder,
    aggregation.chefer_encoder,
    rules.chefer,
    takes_zero_rows=True,
)

register_method(
    LrpMethod(_CHEFER.name, _CHEFER.summary, LrpEngine, takes=("zero_rows", "backward"), cams=_CHEFER)
)
register_method(
    LrpMethod(
        "transformer_attribution",
        "Transformer Attribution (CVPR 2021): relu of gradient times LRP's relevance of each layer's cross-attention",
        LrpEngine,
        takes=("backward",),
        cams=replace(
            _CHEFER,
            name="transformer_attribution",
            decoder=aggregation.cross_only,
            encoder=None,
            takes_zero_rows=False,
        ),
    )
)
register_method(
    LrpMethod(
        "partial_lrp",
        "partial LRP (Voita et al., 2019): LRP's relevance of each layer's cross-attention, mean over heads; signed",
        LrpEngine,
        signed=True,
        cams=replace(
            _CHEFER,
            name="partial_lrp",
            rule="signed",
            decoder=aggregation.cross_only,
            encoder=None,
            takes_zero_rows=False,
        ),
    )
)
register_method(
    LrpMethod(
        "attn_lrp",
        "AttnLRP (2024): relevance of the image tokens, through the whole transformer; signed",
        TokenRelevanceEngine,
        signed=True,
        rules=EpsilonRules(),
        cams=replace(_CHEFER, name="attn_lrp"),
    )
)
