"""The suites of `headoff bench`: which cases there are, and which providers compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from headoff.attention import Attention, sdpa, skipping
from headoff.bench.attentions import (
    ATTENTIONS,
    OWN,
    OWN_ATTENTIONS,
    SDPA_ATTENTIONS,
    TRITON,
    SdpaTimesGate,
    skipping_attention,
)
from headoff.bench.calls import AttentionShape, AttentionWorkload, site_shape
from headoff.bench.cases import Case, Provider
from headoff.bench.deformable import DeformableShape, DeformableWorkload, shapes_for
from headoff.bench.faithfulness import faithfulness_cases
from headoff.bench.importance import importance_cases
from headoff.bench.methods import methods_cases
from headoff.bench.model_workloads import DecoderWorkload, RelevanceWorkload, SweepWorkload, relevance_outputs
from headoff.bench.models import BenchmarkModel, Size, with_attention
from headoff.bench.notebook import Notebook
from headoff.bench.outputs import ExpectedOutputs
from headoff.bench.workloads import Direction
from headoff.deformable import embedding_bag_attention, gather_attention, grid_sample_attention
from headoff.detector import DetectorOutput
from headoff.detr.graphs import DecodeGraphs
from headoff.errors import AttentionError
from headoff.gates import (
    Configuration,
    HeadLayout,
    Site,
    all_subsets,
    cumulative,
    heads_off,
    none_off,
    single_heads,
    stack,
)
from headoff.harness.model.relu_masks import ReluMasks
from headoff.relevance import RelevanceEngine
from headoff.timing import TimedCall
from headoff.wording import format_bytes

MOST_SUBSETS = 256
"""Subsets of heads that a sweep is timed with: those of 8 heads."""
ONE_FORWARD = "one plain forward"
ONE_BY_ONE = "one by one"
NOTEBOOK = "notebook"
PACKAGE = {name: OWN_ATTENTIONS[name] for name in (OWN, TRITON)}
"""What `headoff` is used with: eager attention is for the oracle."""

PLAIN, ALWAYS_SKIPPING = "torch SDPA", "always skipping"
SKIPPING: dict[str, Attention] = {PLAIN: SdpaTimesGate(), ALWAYS_SKIPPING: skipping_attention, OWN: sdpa}

DEFORMABLE: dict[str, Any] = {
    "grid_sample": grid_sample_attention,
    "gather": gather_attention,
    "embedding_bag": embedding_bag_attention,
}

DIRECTIONS: tuple[Direction, ...] = ("forward", "forward + backward")


def shapes_of(size: Size, model: BenchmarkModel) -> list[tuple[AttentionShape, int]]:
    """The attention calls of a model, and how many configurations share one."""
    heads = model.detector.config.heads
    calls: list[tuple[Site, int, bool]] = [
        ("decoder_cross", heads + 1, False),
        ("decoder_cross", heads + 1, True),
        ("decoder_self", heads + 1, False),
        ("encoder_self", 1, False),
    ]
    if size != "scenes" and 2**heads <= MOST_SUBSETS:
        calls.append(("decoder_cross", 2**heads, False))
    shapes = []
    for site, count, padded in calls:
        shape = site_shape(model, site, count, padded=padded)
        sizes = f"{shape.batch} x {shape.queries:,} queries, {shape.keys:,} keys"
        name = f"{model.name}, {site}, {sizes}{', padded' if padded else ''}"
        shapes.append((replace(shape, name=name), count))
    return shapes


def spread(gates: Tensor, shape: AttentionShape) -> Tensor:
    """Gates (configurations, heads) as the head gate (batch, heads, queries, 1) of a call of this shape."""
    if shape.batch > 1:
        return gates[:, :, None, None].expand(shape.batch, -1, shape.queries, -1).contiguous()
    per_query = gates.repeat_interleave(shape.queries // len(gates), dim=0)
    return per_query.T[None, :, :, None]  # a row of heads for each query, as in the decoder


def configuration_gates(configurations: tuple[Configuration, ...], heads: int) -> Tensor:
    """(configurations, heads) of configurations that gate all layers and queries of cross-attention alike."""
    gate = stack(configurations, HeadLayout(1, 1, heads, 1)).decoder_cross
    return torch.ones(len(configurations), heads) if gate is None else gate[:, 0, 0]


def first_off(count: int) -> tuple[Configuration, ...]:
    """The one configuration with the first `count` heads off."""
    return (heads_off(*range(count)),)


def gates_of(shape: AttentionShape, configurations: int) -> dict[str, Tensor | None]:
    """The head gates that a shape is timed with, by name: none, half and all of the heads off, and the sweep of its
    size.
    """
    heads = shape.heads
    chosen = {f"{off} heads off": first_off(off) for off in (heads // 2, heads)}
    if configurations == heads + 1:
        chosen["cumulative"] = cumulative(heads)
    elif configurations == 2**heads:
        chosen["all subsets"] = all_subsets(heads)
    gates = {name: spread(configuration_gates(some, heads), shape) for name, some in chosen.items()}
    return {"0 heads off": None, **gates}


def check_of(expected: ExpectedOutputs, attention: Attention) -> Callable[[Any], str | None]:
    """Compares a result with the oracle's; returns the first error as a sentence."""

    def check(result: Any) -> str | None:
        findings = expected.findings(result, attention)
        return findings[0].message if findings else None

    return check


def providers_of(
    expected: ExpectedOutputs, attentions: Mapping[str, Attention], notes: Mapping[str, str] | None = None
) -> list[Provider]:
    """The workload by each of the attentions."""
    call, notes = expected.workload.timed_call, notes or {}
    return [
        Provider.of(name, call(attention), check_of(expected, attention), notes.get(name, ""))
        for name, attention in attentions.items()
    ]


def attention_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Attention calls by torch's kernels, eager and headoff's own; the fastest backend of SDPA is the reference."""
    device, dtype = model.detector.device, model.detector.dtype
    for shape, configurations in shapes_of(size, model):
        # A kernel treats padding and gates independently: one gate is enough for a padded shape, the most mixed.
        gates = [*gates_of(shape, configurations).items()][-1 if shape.padded else 0 :]
        for (name, gate), direction in product(gates, DIRECTIONS):

            def providers(shape=shape, direction=direction, gate=gate, name=name) -> list[Provider]:
                workload = AttentionWorkload.of(shape, direction, gate, name, device, dtype)
                return providers_of(ExpectedOutputs(workload), ATTENTIONS)

            yield Case("attention", f"{shape.name}, {name}, {direction}", providers, SDPA_ATTENTIONS)


def skipping_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """What leaving out the rows of heads that are off gains, always and where headoff expects a gain. CPU only."""
    device, dtype = model.detector.device, model.detector.dtype
    if device.type != "cpu":
        return
    cross, heads = site_shape(model, "decoder_cross", 1), model.detector.config.heads
    gates = {
        "cumulative": configuration_gates(cumulative(heads), heads),
        "one head off at a time": torch.cat([torch.ones(1, heads), 1 - torch.eye(heads)]),
    }
    if size != "scenes" and 2**heads <= MOST_SUBSETS:
        gates["all subsets"] = configuration_gates(all_subsets(heads), heads)
    for off in range(1, heads):
        gates[f"first {off} off"] = configuration_gates(first_off(off), heads)
    for (name, gate), direction in product(gates.items(), DIRECTIONS):
        title = f"{model.name}, {len(gate)} x {cross.queries} queries, {cross.keys} keys"
        shape = replace(cross, name=title, queries=len(gate) * cross.queries)

        def providers(shape=shape, direction=direction, gate=gate, name=name) -> list[Provider]:
            workload = AttentionWorkload.of(shape, direction, spread(gate, shape), name, device, dtype)
            return providers_of(ExpectedOutputs(workload), SKIPPING, _skipping_notes(workload))

        yield Case("skipping", f"{title}, {name}, {direction}", providers, {PLAIN})


def _skipping_notes(workload: AttentionWorkload) -> dict[str, str]:
    """What the cost model expects and chooses."""
    gate, query, keys = workload.head_gate, workload.query, workload.key.shape[2]
    assert gate is not None
    expected = skipping.expected_ratio(skipping.group_streams(gate, query), query, keys)
    skips = skipping.plan_groups(gate, query, keys) is not None
    return {
        ALWAYS_SKIPPING: f"{expected:.2f} expected by the cost model",
        OWN: "skips" if skips else "does not skip",
    }


def sweeps_of(model: BenchmarkModel, size: Size) -> dict[str, tuple[Configuration, ...]]:
    """The sweeps that a size is timed with, by title; the bundled detector with the cumulative one only."""
    heads = model.detector.config.heads
    sweeps = {"cumulative": cumulative(heads)}
    if size != "scenes":
        sweeps["single heads"] = (none_off(), *single_heads(model.detector.config.decoder_layers, heads))
        if 2**heads <= MOST_SUBSETS:
            sweeps["all subsets"] = all_subsets(heads)
    return {f"{len(some)} configurations ({name})": some for name, some in sweeps.items()}


def decoder_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """One decode of all configurations, by every attention, by a CUDA graph, and one configuration after the other."""
    heads = model.detector.config.heads
    alone = {
        f"{off} heads off": first_off(off) for off in ((0,) if size == "scenes" else (0, heads // 2, heads))
    }
    for title, configurations in {**alone, **sweeps_of(model, size)}.items():
        yield _decoder_case(model, configurations, title, "forward")
        if len(configurations) <= heads + 1:  # eager attention keeps 25 GiB for the gradients of all subsets
            yield _decoder_case(model, configurations, title, "backward")


def _decoder_case(
    model: BenchmarkModel,
    configurations: tuple[Configuration, ...],
    title: str,
    direction: Literal["forward", "backward"],
) -> Case:
    def providers() -> list[Provider]:
        workload = DecoderWorkload.of(model, configurations, direction, title=title)
        expected = ExpectedOutputs(workload)
        found = providers_of(expected, {**SDPA_ATTENTIONS, **OWN_ATTENTIONS})
        if direction == "backward":
            return found
        if model.detector.device.type == "cuda":
            for name, attention in PACKAGE.items():
                graph = graph_call(workload, attention)
                found.append(Provider.of(f"{name}, CUDA graph", graph, check_of(expected, attention)))
        if len(configurations) > 1:
            found.append(Provider.of(ONE_BY_ONE, one_by_one(workload), check_of(expected, sdpa)))
        return found

    return Case("decoder", f"{model.name}, {title}, {direction}", providers, SDPA_ATTENTIONS)


def graph_call(
    workload: DecoderWorkload, attention: Attention, graphs: DecodeGraphs | None = None
) -> TimedCall:
    """Decodes by replaying a CUDA graph. A call raises AttentionError where none could be captured."""
    graphs = DecodeGraphs() if graphs is None else graphs
    detector = with_attention(workload.model.detector, attention)

    def decode() -> DetectorOutput:
        output = graphs.decode(detector, workload.memory, workload.gates)
        if graphs.replays == 0:
            # The first decode is an ordinary one, as is every decode that cannot be captured.
            output = graphs.decode(detector, workload.memory, workload.gates)
        if graphs.replays == 0:
            reason = ", ".join(graphs.failures) or "not captured for this attention or memory"
            raise AttentionError(f"the decode could not be captured: {reason}")
        return output

    return TimedCall(decode)


def one_by_one(workload: DecoderWorkload) -> TimedCall:
    """The same decodes without batching and sharing."""
    detector = with_attention(workload.model.detector, sdpa)
    gates = [workload.gates[index] for index in range(len(workload.gates))]

    def decode() -> DetectorOutput:
        with torch.inference_mode():
            found = [detector.decode(workload.memory, gate) for gate in gates]
        logits, boxes = torch.cat([one.logits for one in found]), torch.cat([one.boxes for one in found])
        return DetectorOutput(logits, boxes)

    return TimedCall(decode)


def sweep_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Sweeps from the image to the outcomes, relative to one plain forward pass of the detector."""

    def providers(configurations: tuple[Configuration, ...]) -> list[Provider]:
        notebook = Notebook(model.detector, model.image)
        detect = TimedCall(lambda: notebook.detect(none_off()))
        expected = ExpectedOutputs(SweepWorkload(model, configurations))
        check = check_of(expected.of_first(SweepWorkload(model, configurations[:1])), sdpa)
        note = f"{len(configurations)} times a forward pass of eager attention, of which one was timed"
        return [
            Provider.of(ONE_FORWARD, plain_forward(model), check),
            *providers_of(expected, PACKAGE),
            Provider(NOTEBOOK, ((detect, len(configurations)),), lambda: check(detect()), note),
        ]

    for title, configurations in sweeps_of(model, size).items():
        yield Case("sweep", f"{model.name}, {title}", partial(providers, configurations), {ONE_FORWARD})


def plain_forward(model: BenchmarkModel) -> TimedCall:
    """The detector with SDPA, from the image to logits and boxes, as without headoff."""
    detector = with_attention(model.detector, sdpa)

    def forward() -> DetectorOutput:
        with torch.inference_mode():
            pixels, _ = detector.preprocess([model.image])
            return detector(pixels)

    return TimedCall(forward)


def relevance_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Relevance maps from the image on, relative to headoff's; with cams kept, and recomputed in tiles."""
    heads = model.detector.config.heads
    if size == "scenes":
        configurations, objects = tuple(cumulative(heads)[k] for k in (0, heads // 2, heads)), 2
    else:
        configurations, objects = cumulative(heads), 5
    title = f"{len(configurations)} configurations"
    yield Case(
        "relevance",
        f"{model.name}, {title} x {objects} objects",
        partial(_relevance_providers, model, configurations, objects),
        {OWN},
    )


def _relevance_providers(
    model: BenchmarkModel, configurations: tuple[Configuration, ...], objects: int
) -> list[Provider]:
    workload = RelevanceWorkload.of(model, configurations, objects)
    # Checked for one map, timed for all: the float64 oracle takes many times as long as what is timed.
    middle = configurations[len(configurations) // 2]
    checked = replace(workload, configurations=(middle,), queries=workload.queries[:1])
    expected = ExpectedOutputs(checked)

    def provider(name: str, attention: Attention, note: str = "", **options: Any) -> Provider:
        check, small = check_of(expected, attention), checked.explain_call(attention, **options)
        call = workload.explain_call(attention, **options)
        return Provider(name, ((call, 1),), lambda: check(small()), note)

    providers = [provider(name, attention) for name, attention in PACKAGE.items()]
    on_cpu = model.detector.device.type == "cpu"
    for kernels in ("auto",) if on_cpu else ("torch", "triton"):
        name = OWN if on_cpu else f"{OWN}, {kernels} kernels"
        if not on_cpu:
            providers.append(provider(name, sdpa, kernels=kernels))
        budget = recomputing_budget(model, kernels)
        note = f"with a memory budget of {format_bytes(budget)}"
        providers.append(
            provider(f"{name}, cams recomputed", sdpa, note, memory_budget=budget, kernels=kernels)
        )
    return [*providers, _notebook_provider(workload, middle, expected)]


def _notebook_provider(
    workload: RelevanceWorkload, checked: Configuration, expected: ExpectedOutputs
) -> Provider:
    """Two forward passes for each configuration, and one with a backward pass for each map."""
    model, query = workload.model, workload.queries[0]
    notebook = Notebook(model.detector, model.image)
    label = int(notebook.detect(none_off()).logits[0, 0, query, :-1].argmax())
    count, maps = len(workload.configurations), len(workload.configurations) * len(workload.queries)
    detect = TimedCall(lambda: (notebook.detect(none_off()), notebook.detect(none_off())))
    explain = TimedCall(lambda: notebook.explain(none_off(), query, label))

    def check() -> str | None:
        masks = ReluMasks()
        with masks.recording(notebook.detector):
            notebook.detect(none_off())  # the baseline comes first in `headoff.explain`, too
            answers = notebook.detect(checked)
            found = notebook.explain(checked, query, label)
        outputs = relevance_outputs(answers.logits, answers.boxes, found)
        findings = expected.findings_in(outputs, masks)
        return findings[0].message if findings else None

    note = f"extrapolated from one configuration and one of {maps} maps"
    return Provider(NOTEBOOK, ((detect, count), (explain, maps)), check, note)


def recomputing_budget(model: BenchmarkModel, kernels: str) -> int:
    """Bytes with which `explain` recomputes the encoder's cams: half of the least power of 2 that keeps them.

    Raises SettingError for kernels that cannot be used on the device.
    """
    detector = with_attention(model.detector, sdpa)

    def keeps(budget: int) -> bool:
        engine = RelevanceEngine(detector, model.features, kernels=kernels, memory_budget=budget)  # type: ignore[arg-type]
        return engine.keeps_cams

    return next(2**power // 2 for power in range(1, 60) if keeps(2**power))


def faithfulness_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Perturbation curves, relative to one plain forward pass of the detector."""
    expected = ExpectedOutputs(SweepWorkload(model, (none_off(),)))
    check = check_of(expected, sdpa)
    yield from faithfulness_cases(size, model, Provider.of(ONE_FORWARD, plain_forward(model), check))


def importance_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Scores of all heads of cross-attention, relative to one plain forward pass of the detector."""
    expected = ExpectedOutputs(SweepWorkload(model, (none_off(),)))
    check = check_of(expected, sdpa)
    yield from importance_cases(size, model, Provider.of(ONE_FORWARD, plain_forward(model), check))


def methods_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Maps by every relevance method, from the image on, relative to one plain forward pass of the detector."""
    expected = ExpectedOutputs(SweepWorkload(model, (none_off(),)))
    check = check_of(expected, sdpa)
    yield from methods_cases(size, model, Provider.of(ONE_FORWARD, plain_forward(model), check), check)


def deformable_suite(size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Single calls of deformable attention by two formulations in PyTorch, at the sizes of known detectors."""

    def providers(shape: DeformableShape, direction: Direction, off: int) -> list[Provider]:
        device, dtype = model.detector.device, model.detector.dtype
        expected = ExpectedOutputs(DeformableWorkload.of(shape, direction, off, device, dtype))
        return providers_of(expected, DEFORMABLE)

    for shape in shapes_for(small=size == "scenes"):
        sizes = f"{shape.queries:,} queries, {sum(h * w for h, w in shape.levels):,} tokens"
        for direction, off in product(DIRECTIONS, (0,) if size == "scenes" else (0, shape.heads // 2)):
            title = f"{shape.name}, {sizes}, {off} heads off, {direction}"
            yield Case("deformable", title, partial(providers, shape, direction, off), {"grid_sample"})


SUITES = {
    "attention": attention_suite,
    "skipping": skipping_suite,
    "decoder": decoder_suite,
    "sweep": sweep_suite,
    "relevance": relevance_suite,
    "methods": methods_suite,
    "importance": importance_suite,
    "faithfulness": faithfulness_suite,
    "deformable": deformable_suite,
}
