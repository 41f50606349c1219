"""Detectors of transformers with the attention under test in them, compared with the float64 oracle.

A two-stage model takes its queries from the memory, those with the highest scores, and rounding may exchange two of
them. So the decoder under test starts from the oracle's memory and queries, under every configuration; the encoder is
compared by itself, by the memory that it gives. Gradients are those of the decoder's output with respect to that memory
and those queries.

The attention under test is called at the sites of its contract: dense or deformable. It is called in the dtype under
test, and all else computes in float32 at least, as in `headoff.harness.model.patched`.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headoff.ablation.references import fingerprint_of
from headoff.calls import Attend, AttentionAddress, Call, DeformableCall
from headoff.detections import Detections, detections_from
from headoff.detr.checkpoints import ModelChoice
from headoff.detr.checkpoints.load import BUNDLED_FAMILY
from headoff.errors import SettingError
from headoff.family.detector import FamilyDetector
from headoff.family.memory import FamilyFeatures, FamilyMemory
from headoff.gates import SITES, Clause, Configuration, cumulative, heads_off, stack
from headoff.harness.contracts import DEFORMABLE, Contract
from headoff.harness.deformable.implementations import STANDARD
from headoff.harness.finding import Finding
from headoff.harness.model.patched import InDtype, counting_calls, failures_as, model_dtype
from headoff.harness.reference.implementations import right_implementations
from headoff.harness.reference.oracle import sha256_of
from headoff.harness.tolerance import Tolerance, peak_error
from headoff.images import load_image
from headoff.relevance import Target, class_logit
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import chefer
from headoff.scenes.samples import sample_images
from headoff.wording import counted

CONFIDENCE = 0.5
MEMORY, LOGITS, BOXES = "memory", "logits", "boxes"
OF_MEMORY, OF_QUERIES = "gradient of the memory", "gradient of the queries"
"""What is compared."""

GRADIENT_FLOOR = 0.01
"""Of a gradient's norm. Where rounding changes sides of ReLUs and sampling points, single numbers of a gradient change
much, and its norm little. What is smaller than this, the suite of single calls finds.
"""


@dataclass(frozen=True, eq=False)
class FamilyCase:
    """An image for a model of transformers, and what the float64 oracle computes there.

    Attributes:
        name: of the image.
        model: what the detector is loaded from.
        image: a path.
    """

    name: str
    model: ModelChoice
    image: Path

    @functools.cached_property
    def detector(self) -> FamilyDetector:
        """The oracle: float64, eager attention, on the CPU."""
        return _load(self.model, torch.device("cpu"), torch.float64, "eager")

    @functools.cached_property
    def features(self) -> FamilyFeatures:
        with torch.no_grad():
            pixels, _ = self.detector.preprocess([load_image(self.image)])
            return self.detector.features(pixels)

    @functools.cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """The cumulative ones, and others that gate single heads, queries, parts of heads and self-attention."""
        layout = self.detector.head_layout
        last, query = layout.decoder_layers - 1, layout.queries // 2
        half = Configuration(clauses=(Clause(layers=(last // 2,), heads=(0,), gate=0.5),))
        half_self = Configuration(
            clauses=(Clause("decoder_self", layers=(last // 2,), heads=(1,), gate=0.5),)
        )
        return (
            *cumulative(layout.heads),
            half.named("half a head off"),
            heads_off(1, layers=[last]).for_queries(query).named("one head off for one query"),
            # Not heads that change places where a gate is reversed.
            heads_off(0, 1, site="decoder_self").named("heads of decoder_self off"),
            half_self.for_queries(query).named("half a head of decoder_self off for one query"),
        )

    @property
    def differentiated(self) -> tuple[Configuration, Configuration]:
        """With none off, and with the first half of the heads off."""
        return self.configurations[0], self.configurations[self.detector.head_layout.heads // 2]

    @property
    def bundled(self) -> bool:
        """Whether there are golden files: of the bundled model on a bundled scene."""
        return self.model == ModelChoice(BUNDLED_FAMILY) and self.image in sample_images()

    @functools.cached_property
    def detections(self) -> dict[str, Detections]:
        """The oracle's under every configuration, by its name."""
        picture = load_image(self.image)
        names, scoring = self.detector.class_names, self.detector.scoring
        outputs = zip(self.configurations, self.expected[LOGITS], self.expected[BOXES], strict=True)
        return {
            configuration.name: detections_from(
                logits, boxes, (picture.height, picture.width), names, CONFIDENCE, scoring
            )
            for configuration, logits, boxes in outputs
        }

    @property
    def inputs(self) -> dict[str, str]:
        """What results depend on: each entry is a text that changes with it."""
        return {"image": sha256_of(self.image), "weights": fingerprint_of(self.detector)}

    def explained(self, objects: int = 2) -> tuple[Detections, list[Target]]:
        """The objects with the highest scores with none off, and their class logits."""
        found = self.detections[self.configurations[0].name]
        found = found.subset(range(min(objects, len(found))))
        return found, [class_logit(one.query, one.label) for one in found]

    def maps(self, configuration: Configuration) -> Tensor:
        """Relevance maps (objects, layers, h, w) of `explained` by the dense oracle, float64."""
        found, targets = self.explained()
        gates = stack([configuration], self.detector.head_layout)
        rows = [
            chefer(dense_evidence(self.detector, self.features, gates, target)).relevance[:, target.query]
            for target in targets
        ]
        return self.features.to_grid(torch.stack(rows))

    @functools.cached_property
    def addresses(self) -> dict[AttentionAddress, bool]:
        """Every attention call of the model, and whether it is deformable."""
        found: dict[AttentionAddress, bool] = {}

        def record(call: Call, proceed: Attend) -> Tensor:
            found[call.address] = isinstance(call, DeformableCall)
            return proceed(call)

        with torch.no_grad(), self.detector.intercepting(record):
            self.detector.decode(self.detector.encode_features(self.features))
        return found

    def sites(self, contract: Contract) -> list[AttentionAddress]:
        """Where the model calls an attention of the contract."""
        return [
            address
            for address, deformable in self.addresses.items()
            if deformable == (contract is DEFORMABLE)
        ]

    @functools.cached_property
    def expected(self) -> dict[str, Tensor]:
        """The oracle's memory (n, N, d) with none off and with heads of the encoder off, and its logits and boxes
        (C, Q, ...) under all configurations.
        """
        return _outputs(self.detector, self, self.features)


def family_case(name: str, model: ModelChoice, image: Path) -> FamilyCase:
    """The same object for the same arguments."""
    return _case(name, model, image)


@functools.cache
def _case(name: str, model: ModelChoice, image: Path) -> FamilyCase:
    return FamilyCase(name, model, image)


@functools.cache
def _load(model: ModelChoice, device: torch.device, dtype: torch.dtype, attention: str) -> FamilyDetector:
    detector = model.load(attention=attention, device=device, dtype=dtype)
    if not isinstance(detector, FamilyDetector):
        raise SettingError(f"{model.source} is not a model of transformers: the other suites check it")
    return detector


@contextmanager
def _patched(
    case: FamilyCase, attention: Any, contract: Contract, device: torch.device, dtype: torch.dtype
) -> Iterator[FamilyDetector]:
    """The model on `device`, with the attention called in `dtype` at the sites of its contract."""
    detector = _load(case.model, device, model_dtype(dtype), "sdpa")
    before = detector.attention, detector.deformable_attention
    in_dtype: Any = InDtype(contract.resolve(attention), dtype)
    if contract is DEFORMABLE:
        detector.deformable_attention = in_dtype
    else:
        detector.attention = in_dtype
    try:
        yield detector
    finally:
        detector.attention, detector.deformable_attention = before


def _outputs(detector: FamilyDetector, case: FamilyCase, features: FamilyFeatures) -> dict[str, Tensor]:
    """Memories, logits and boxes of a detector, float64 on the CPU; the decoder starts from the oracle's memory."""
    memories = []
    layout = detector.head_layout
    with torch.no_grad():
        if layout.encoder_layers:
            off = heads_off(0, 1, site="encoder_self")
            gates = stack([off], layout).encoder_self
            assert gates is not None
            for gate in (None, gates[0]):
                memories.append(_tokens(detector.encode_features(features, gate)))
        memory, _ = case.features.memory
        output = detector.decode(memory.to(detector.device, detector.dtype), case.configurations)
    found = {LOGITS: output.logits[:, 0], BOXES: output.boxes[:, 0], **_gradients(detector, case)}
    if memories:
        found[MEMORY] = torch.cat(memories)
    return {name: x.double().cpu() for name, x in found.items()}


def _gradients(detector: FamilyDetector, case: FamilyCase) -> dict[str, Tensor]:
    """Gradients (n, ...) of the same weighted sum of logits and boxes, under each configuration of
    `FamilyCase.differentiated`.
    """
    memory = case.features.memory[0].to(detector.device, detector.dtype).clone()
    queries = detector.adapter.per_query[0]
    inputs = [memory.arguments[name].requires_grad_() for name in ("encoder_hidden_states", queries)]
    found = []
    for configuration in case.differentiated:
        with torch.enable_grad():
            output = detector.decode(memory, configuration)
            numbers = torch.cat((output.logits, output.boxes), -1)
            weights = torch.randn(
                numbers.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            found.append(torch.autograd.grad((numbers * weights.to(numbers)).sum(), inputs))
    return {
        name: torch.cat(x) for name, x in zip((OF_MEMORY, OF_QUERIES), zip(*found, strict=True), strict=True)
    }


def _tokens(memory: FamilyMemory) -> Tensor:
    return memory.arguments["encoder_hidden_states"]


def family_findings(
    attention: Any,
    contract: Contract,
    case: FamilyCase,
    device: torch.device,
    dtype: torch.dtype,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where the model with `attention` is wrong: memory, logits or boxes, and sites at which it was not called."""
    findings: list[Finding] = []
    results: list[dict[str, Tensor]] = []

    counts: Counter[AttentionAddress] = Counter()
    with failures_as(findings, "detections", f"detections of {case.name}"):
        with (
            _patched(case, attention, contract, device, dtype) as detector,
            counting_calls(detector, 1, 1) as made,
        ):
            counts = made.of
            results.append(_outputs(detector, case, case.features.to(device, detector.dtype)))
    addresses = case.sites(contract)
    if calls is not None:
        calls.update({site: sum(counts[a] for a in addresses if a.site == site) for site in SITES})
    for found in results:
        missing = [address for address in addresses if not counts[address]]
        if missing:
            site, layer = missing[0]
            message = f"{site}: never called in layer {layer}"
            findings.append(Finding("calls", message, case=case.name, site=site, layer=layer))
        findings += _compare(case, found, tolerances(case, contract, device, dtype))
    return findings


def _compare(case: FamilyCase, found: dict[str, Tensor], allowed: dict[str, Tolerance]) -> list[Finding]:
    findings = []
    for name, expected in case.expected.items():
        errors = _errors(name, found[name], expected)
        wrong = (errors > allowed[name].allowed).nonzero().flatten().tolist()
        if not wrong:
            continue
        worst = max(wrong, key=lambda index: float(errors[index]))
        tried = case.differentiated if name in (OF_MEMORY, OF_QUERIES) else case.configurations
        configuration = None if name == MEMORY else tried[worst].name
        others = f" (and {counted(len(wrong) - 1, 'other configuration')})" if len(wrong) > 1 else ""
        under = (
            f"with {'heads of the encoder off' if worst else 'none off'}"
            if name == MEMORY
            else f"under '{configuration}'{others}"
        )
        findings.append(
            Finding(
                "detections",
                f"{case.name}: {name} {under} off by {float(errors[worst]):.1e} of "
                f"{'its norm' if name in (OF_MEMORY, OF_QUERIES) else 'the largest number'} (allowed "
                f"{allowed[name].allowed:.1e})",
                case=case.name,
                error=float(errors[worst]),
                budget=allowed[name].allowed,
                configuration=configuration,
            )
        )
    return findings


def _errors(name: str, found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference in each item, relative to the largest number; of gradients, that of norms."""
    if name in (OF_MEMORY, OF_QUERIES):
        return (found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
    return peak_error(found, expected, tuple(range(1, expected.ndim)))


@functools.cache
def tolerances(
    case: FamilyCase, contract: Contract, device: torch.device, dtype: torch.dtype
) -> dict[str, Tolerance]:
    """By the largest errors of right implementations under any configuration; the floor is one rounding."""
    implementations: Iterable[Callable[..., Tensor]] = (
        STANDARD.values() if contract is DEFORMABLE else right_implementations()
    )
    largest: dict[str, float] = {name: 0.0 for name in case.expected}
    for implementation in implementations:
        with _patched(case, implementation, contract, device, dtype) as detector:
            found = _outputs(detector, case, case.features.to(device, detector.dtype))
        for name, expected in case.expected.items():
            largest[name] = max(largest[name], float(_errors(name, found[name], expected).max()))
    unit = torch.finfo(dtype).eps
    floors = {name: GRADIENT_FLOOR if name in (OF_MEMORY, OF_QUERIES) else unit for name in largest}
    return {name: Tolerance(error, floors[name]) for name, error in largest.items()}


def undetected(case: FamilyCase, contract: Contract, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Wrong outputs that the tolerance accepts: those under k heads off as those under k + 1."""
    logits = case.expected[LOGITS]
    allowed = tolerances(case, contract, device, dtype)[LOGITS].allowed
    pairs: Sequence[tuple[int, int]] = [(k, k + 1) for k in range(case.detector.head_layout.heads)]
    return [
        f"the logits under '{case.configurations[other].name}' pass as those under '{case.configurations[one].name}'"
        for one, other in pairs
        if float(_errors(LOGITS, logits[other : other + 1], logits[one : one + 1])[0]) <= allowed
    ]
