"""The engine for detectors that headoff did not write: their forward pass is differentiated by autograd.

It does what `RelevanceEngine` does for headoff's DETR, by the same rules (`headoff.relevance.aggregation`), and needs
nothing of the detector but its attention calls. Autograd gives the gradient of the context at every attention; cams are
computed from that and from the recorded call, for dense attention (`AttentionVjp`) and for deformable attention
(`SampledVjp`). Where relevance ends at the memory (`Detector.encoder_is_attention`), one backward pass serves an
object under all configurations that are decoded together; otherwise every pair has its own, through the encoder.

Shapes: G configurations, P pairs of (configuration, target), Q object queries, N memory tokens, H heads, D channels of
a head, M decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from headoff.calls import Attend, AttentionAddress, Call, DeformableCall
from headoff.detector import Detector, DetectorOutput
from headoff.errors import AttentionError, NonFiniteError, SettingError
from headoff.gates import Gates, Site
from headoff.relevance.aggregation import DecoderCams, Rows
from headoff.relevance.attention_vjp import AttentionVjp, CamRule
from headoff.relevance.encoder_cams import RecomputedCams
from headoff.relevance.engine import (
    Backward,
    ConfigurationRelevance,
    PairRelevance,
    TargetsOf,
    at_targets,
    check_choice,
    check_finite_rows,
    check_one_image,
    head_weights,
    sees_image,
)
from headoff.relevance.kernels import Kernels
from headoff.relevance.memory import chosen_memory_budget
from headoff.relevance.methods import Method, resolve_cam_method
from headoff.relevance.records import AttentionRecord, unfold_runs
from headoff.relevance.rules import ZeroRows
from headoff.relevance.sampled_vjp import SampledVjp
from headoff.relevance.targets import Target
from headoff.sweeps import by_encoder_gate

GRAPH = 3
"""The memory of a forward pass that autograd can differentiate, in that of one that it cannot; about."""

Vjp = AttentionVjp | SampledVjp


@dataclass
class Recorder:
    """Records attention calls, and adds zeros to their contexts, whose gradients are those of the contexts."""

    sites: tuple[Site, ...] = ()
    calls: dict[AttentionAddress, tuple[Call, Tensor]] = field(default_factory=dict)
    zeros: dict[AttentionAddress, Tensor] = field(default_factory=dict)

    def __call__(self, call: Call, proceed: Attend) -> Tensor:
        context = proceed(call)
        if call.requires_grad and not context.requires_grad:
            raise AttentionError(
                "the attention has no backward pass, as autograd knows of no way from its inputs to its context: give "
                "it one (torch.autograd.Function)"
            )
        if call.address.site not in self.sites:
            return context
        zeros = self.zeros[call.address] = torch.zeros_like(context, requires_grad=True)
        self.calls[call.address] = call, context.detach()
        return context + zeros


@dataclass
class _Encoded:
    """A memory, and what relevance through its encoder needs."""

    memory: Any
    recorder: Recorder
    vjps: dict[AttentionAddress, Vjp]


class AutogradEngine:
    """Relevance of one image for any number of configurations and targets, for any detector.

    Args:
        detector: in evaluation mode, with frozen weights.
        features: of one image (`Detector.features`).
        method, zero_rows, memory_budget: see `RelevanceEngine`.
        backward: `auto` or `callable`: gradients come from the attention's backward pass.
        kernels: `auto`.

    Raises:
        SettingError: an option is unknown, or there is more than one image.
    """

    def __init__(
        self,
        detector: Detector,
        features: Any,
        *,
        method: Method | str = "chefer",
        zero_rows: ZeroRows = "identity",
        backward: Backward = "auto",
        kernels: Kernels = "auto",
        memory_budget: int | None = None,
    ) -> None:
        check_one_image(features)
        check_choice("zero_rows", zero_rows, get_args(ZeroRows))
        if backward not in ("auto", "callable"):
            raise SettingError(
                f"backward cannot be {backward!r} for this detector, whose gradients autograd computes: use auto"
            )
        if kernels != "auto":
            raise SettingError(
                f"kernels cannot be {kernels!r} for this detector, whose gradients autograd computes: use auto"
            )
        self.detector = detector
        self.features = features.clone()  # tensors of inference mode cannot be saved for a backward pass
        self.method = resolve_cam_method(method)
        self.zero_rows: ZeroRows = zero_rows
        self._compute = torch.promote_types(detector.dtype, torch.float32)
        self._through_encoder = self.method.encoder is not None and detector.encoder_is_attention
        self._budget = chosen_memory_budget(detector.device, memory_budget)

    def run(
        self, gates: Gates, targets: TargetsOf, *, layers: Sequence[int] | None = None, heads: bool = False
    ) -> Iterator[ConfigurationRelevance]:
        """Decode and explain every configuration; see `RelevanceEngine.run`."""
        count = self.detector.head_layout.decoder_layers
        chosen = list(range(count)) if layers is None else list(layers)
        per_configuration = GRAPH * self.detector.decoder_bytes(self.features)
        at_once = 1 if self._through_encoder else max(1, self._budget // 2 // per_configuration)
        for encoder_gate, members in by_encoder_gate(gates):
            encoder = self._encode(encoder_gate)
            for batch in members.split(at_once):
                yield from self._batch(encoder, gates[batch], batch.tolist(), targets, chosen, heads)

    def _encode(self, gate: Tensor | None) -> _Encoded:
        """Encode the image; the graph is kept if relevance goes through the encoder."""
        if not self._through_encoder:
            with torch.no_grad():
                return _Encoded(self.detector.encode_features(self.features, gate), Recorder(), {})
        recorder = Recorder(("encoder_self",))
        with torch.enable_grad(), self.detector.intercepting(recorder):
            memory = self.detector.encode_features(self.features, gate)
        return _Encoded(memory, recorder, self._vjps(recorder, 1))

    def _batch(
        self,
        encoder: _Encoded,
        gates: Gates,
        indices: list[int],
        targets: TargetsOf,
        layers: list[int],
        heads: bool,
    ) -> list[ConfigurationRelevance]:
        """The results of configurations that are decoded together."""
        runs = len(gates)
        recorder = Recorder(("decoder_self", "decoder_cross"))
        decoder_gates = Gates(gates.names, None, gates.decoder_self, gates.decoder_cross)
        with torch.enable_grad(), self.detector.intercepting(recorder):
            output = self.detector.decode(encoder.memory, self.detector.plan(decoder_gates, share=False))
        logits, boxes = (x[:, 0].detach().cpu() for x in (output.logits, output.boxes))
        check_finite((encoder.recorder, recorder), logits, boxes)
        zeros = {**encoder.recorder.zeros, **recorder.zeros}
        vjps = {**encoder.vjps, **self._vjps(recorder, runs)}
        targets_of_runs = [targets(index, logits[run], boxes[run]) for run, index in enumerate(indices)]
        found: list[list[PairRelevance | None]] = [[None] * len(slots) for slots in targets_of_runs]
        for slot in range(max(map(len, targets_of_runs), default=0)):
            pairs = [
                (run, target)
                for run, slots in enumerate(targets_of_runs)
                if slot < len(slots) and (target := slots[slot]) is not None
            ]
            if pairs:
                results = self._pairs(output, zeros, vjps, gates, pairs, layers)
                for (run, _), result in zip(pairs, results, strict=True):
                    found[run][slot] = result
        cross = [vjps[AttentionAddress("decoder_cross", layer)] for layer in layers]
        return [
            ConfigurationRelevance(
                index,
                logits[run],
                boxes[run],
                found[run],
                head_weights(cross, run, targets_of_runs[run]) if heads else None,
                points_at_targets(cross, run, targets_of_runs[run]) if heads else None,
            )
            for run, index in enumerate(indices)
        ]

    @torch.no_grad()
    def _vjps(self, recorder: Recorder, runs: int) -> dict[AttentionAddress, Vjp]:
        return {
            address: make_vjp(call, context, runs, self.method.rule, self._compute)
            for address, (call, context) in recorder.calls.items()
        }

    def _pairs(
        self,
        output: DetectorOutput,
        zeros: dict[AttentionAddress, Tensor],
        vjps: dict[AttentionAddress, Vjp],
        gates: Gates,
        pairs: list[tuple[int, Target]],
        layers: list[int],
    ) -> list[PairRelevance]:
        """The relevance of one target for each of some runs."""
        with torch.enable_grad():
            values = torch.stack(
                [target.value(output.logits[run, 0], output.boxes[run, 0]) for run, target in pairs]
            )
            total = values.sum()
        gradients: dict[AttentionAddress, Tensor] = {}
        if self.method.needs_gradient:
            # Runs do not depend on each other, so the gradient of the sum is that of each run's value.
            given = torch.autograd.grad(total, list(zeros.values()), retain_graph=True, allow_unused=True)
            for (address, zero), gradient in zip(zeros.items(), given, strict=True):
                gradients[address] = (zero.detach() if gradient is None else gradient).to(self._compute)
        layout = self.detector.head_layout
        tokens = vjps[AttentionAddress("decoder_cross", 0)].tokens
        size = self._compute.itemsize * layout.decoder_layers * layout.queries * (layout.queries + tokens)
        at_once = max(1, self._budget // 2 // size)
        blind = [not seen for seen in sees_image(gates)]
        results = []
        for start in range(0, len(pairs), at_once):
            part = pairs[start : start + at_once]
            runs = torch.tensor([run for run, _ in part], device=values.device)
            queries = torch.tensor([target.query for _, target in part], device=values.device)
            rows, differs = self._rows(vjps, gradients, runs, queries, layers)
            check_finite_rows(rows.rows, [(target, gates.names[run]) for run, target in part], layers)
            for index, (run, _) in enumerate(part):
                # With all cross-attention off nothing comes from the image, and nothing was normalised.
                seen = 0 if blind[run] else 1
                results.append(
                    PairRelevance(
                        rows.rows[index].cpu(),
                        float(values[start + index].detach()),
                        rows.decoder_identity_rows[index].cpu() * seen,
                        int(rows.encoder_identity_rows[index]) * seen,
                        differs[index].cpu() & bool(seen),
                    )
                )
        return results

    @torch.no_grad()
    def _rows(
        self,
        vjps: dict[AttentionAddress, Vjp],
        gradients: dict[AttentionAddress, Tensor],
        runs: Tensor,
        queries: Tensor,
        layers: list[int],
    ) -> tuple[Rows, Tensor]:
        """Rows after `layers`, and `reference_differs` (P, M)."""
        options = self.method.options(self.zero_rows)

        def cams(site: Site) -> list[Tensor]:
            found = []
            for layer in range(self.detector.head_layout.decoder_layers):
                address = AttentionAddress(site, layer)
                gradient = gradients.get(address)
                if gradient is not None:
                    if site == "decoder_cross":  # runs are concatenated along the query axis
                        gradient = (
                            gradient[0].unflatten(1, (-1, self.detector.head_layout.queries)).transpose(0, 1)
                        )
                    gradient = gradient.index_select(0, runs)
                cam = vjps[address](gradient, runs, inputs=False)[0]
                assert cam is not None
                found.append(cam)
            return found

        rows = self.method.decoder(
            DecoderCams(cams("decoder_self"), cams("decoder_cross"), queries), **options
        )
        differs = (rows.decoder_identity_rows.cumsum(1) > 0)[:, layers]
        rows = Rows(rows.rows[:, layers], rows.decoder_identity_rows[:, layers], rows.encoder_identity_rows)
        has_evidence = rows.rows.flatten(1).any(1)
        if self._through_encoder and self.method.encoder is not None and bool(has_evidence.any()):
            encoder = [(address, vjp) for address, vjp in vjps.items() if address.site == "encoder_self"]
            cams_of_encoder = RecomputedCams(
                [vjp for _, vjp in encoder],
                [gradients[address] for address, _ in encoder] if gradients else None,
            )
            first = encoder[0][1]
            tokens = first.record.keys if isinstance(first, AttentionVjp) else None
            rows = self.method.encoder(rows, cams_of_encoder, tokens, **options)
            rows = replace(rows, encoder_identity_rows=rows.encoder_identity_rows * has_evidence)
        return rows, differs | (rows.encoder_identity_rows > 0)[:, None]


def make_vjp(call: Call, context: Tensor, runs: int, rule: CamRule, compute: torch.dtype) -> Vjp:
    """What computes the cams of one attention call of `runs` runs, and what it returned, in `compute`."""
    if isinstance(call, DeformableCall):
        return SampledVjp(call, runs, rule, compute)
    record = AttentionRecord(
        call.address,
        call.query.detach().to(compute),
        call.key.detach().to(compute),
        call.value.detach().to(compute),
        None if call.head_gate is None else call.head_gate.detach().to(compute),
        None if call.attn_mask is None else call.attn_mask.flatten(),
        context.to(compute),
    )
    return AttentionVjp(unfold_runs(record, runs) if call.address.site == "decoder_cross" else record, rule)


def points_at_targets(
    cross_attention: Sequence[Vjp], run: int, targets: Sequence[Target | None]
) -> Tensor | None:
    """Sampling points at the targets' queries, (targets, M, H, K, 3); zero for a target of None."""
    layers = [partial(vjp.points_at, run) for vjp in cross_attention if isinstance(vjp, SampledVjp)]
    return at_targets(layers, targets, cross_attention[0].device) if layers else None


def check_finite(recorders: Sequence[Recorder], *results: Tensor) -> None:
    """Raise NonFiniteError, which says where NaN or infinity appeared first, unless all results are finite."""
    if all(bool(result.isfinite().all()) for result in results):
        return
    for recorder in recorders:
        for address, (_, context) in recorder.calls.items():
            if not bool(context.isfinite().all()):
                raise NonFiniteError(
                    f"NaN or infinity first appears in the output of the {address.site} attention of layer "
                    f"{address.layer}: check the attention, the weights and the picture for numbers too large"
                )
    raise NonFiniteError("NaN or infinity first appears in the class or box head: check their weights")
