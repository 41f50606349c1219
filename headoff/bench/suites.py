"""The suites of `headoff bench`: which cases there are, and which providers compute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from headoff.attention import Attention, eager, sdpa, skipping
from headoff.bench.attentions import (
    ATTENTIONS,
    OWN,
    OWN_ATTENTIONS,
    SDPA_ATTENTIONS,
    TRITON,
    SdpaTimesGate,
    skipping_attention,
)
from headoff.bench.models import BenchmarkModel, Size, with_attention
from headoff.bench.notebook import Notebook
from headoff.bench.outputs import ExpectedOutputs, truth_of
from headoff.bench.results import Measurement
from headoff.bench.roofline import attention_work
from headoff.bench.runner import Case, Provider, Runner
from headoff.bench.workloads import (
    AttentionShape,
    AttentionWorkload,
    DecoderWorkload,
    Direction,
    RelevanceWorkload,
    SweepWorkload,
    Workload,
)
from headoff.detr.detector import DetectorOutput
from headoff.detr.graphs import DecodeGraphs
from headoff.errors import AttentionError
from headoff.gates import (
    Configuration,
    HeadLayout,
    all_subsets,
    cumulative,
    heads_off,
    none_off,
    single_heads,
    stack,
)
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.tolerance import peak_error
from headoff.relevance import RelevanceEngine
from headoff.timing import TimedCall
from headoff.wording import format_bytes

HEADS = 8
ONE_FORWARD = "one plain forward"
ONE_BY_ONE = "one by one"
NOTEBOOK = "notebook"
GRAPH_ATTENTIONS = {f"{name}, CUDA graph": OWN_ATTENTIONS[name] for name in (OWN, TRITON)}

SHAPES: dict[Size, tuple[tuple[AttentionShape, int], ...]] = {
    "scenes": (
        (AttentionShape("cross, 9 x 25 queries, 221 keys", 1, 225, 221), 9),
        (AttentionShape("cross, 9 x 25 queries, 221 keys, padded", 1, 225, 221, padded=True), 9),
    ),
    "r50": (
        (AttentionShape("cross R50, 9 x 100 queries, 850 keys", 1, 900, 850), 9),
        (AttentionShape("cross R50, 9 x 100 queries, 850 keys, padded", 1, 900, 850, padded=True), 9),
        (AttentionShape("cross R50, 256 x 100 queries, 850 keys", 1, 25600, 850), 256),
        (AttentionShape("decoder self, 9 x (100 queries, 100 keys)", 9, 100, 100), 9),
        (AttentionShape("encoder self R50, 850 queries, 850 keys", 1, 850, 850), 1),
    ),
    "dc5": (
        (AttentionShape("cross DC5, 9 x 100 queries, 3,400 keys", 1, 900, 3400), 9),
        (AttentionShape("cross DC5, 256 x 100 queries, 3,400 keys", 1, 25600, 3400), 256),
        (AttentionShape("encoder self DC5, 3,400 queries, 3,400 keys", 1, 3400, 3400), 1),
    ),
}
"""Attention calls, and how many configurations share one. They are laid end to end along the queries of a batch of 1
(cross-attention), or are the batch items."""


def spread(gates: Tensor, shape: AttentionShape) -> Tensor:
    """Gates (configurations, heads) as the head gate (batch, heads, queries, 1) of a call of this shape."""
    if shape.batch > 1:
        return gates[:, :, None, None].expand(shape.batch, -1, shape.queries, -1).contiguous()
    per_query = gates.repeat_interleave(shape.queries // len(gates), dim=0)
    return per_query.T[None, :, :, None].contiguous()


def configuration_gates(configurations: tuple[Configuration, ...]) -> Tensor:
    """(configurations, heads) of configurations that gate all layers and queries of cross-attention alike."""
    gate = stack(configurations, HeadLayout(1, 1, HEADS, 1)).decoder_cross
    return torch.ones(len(configurations), HEADS) if gate is None else gate[:, 0, 0]


def gates_of(shape: AttentionShape, configurations: int) -> dict[str, Tensor | None]:
    """The head gates that a shape is timed with, by name: none, 4 and 8 heads off, and the sweep of its size."""
    few = {f"{off} heads off": (heads_off(*range(off)),) for off in (4, 8)}
    sweeps = {9: {"cumulative": cumulative(HEADS)}, 256: {"all subsets": all_subsets(HEADS)}}
    chosen = {**few, **sweeps.get(configurations, {})}
    return {
        "0 heads off": None,
        **{name: spread(configuration_gates(some), shape) for name, some in chosen.items()},
    }


def check_of(expected: ExpectedOutputs, attention: Attention) -> Callable[[Any], str | None]:
    """Compares a result with the oracle's; returns the first error as a sentence."""

    def check(result: Any) -> str | None:
        findings = expected.findings(result, attention)
        return findings[0].message if findings else None

    return check


def providers_of(
    workload: Workload, expected: ExpectedOutputs, attentions: dict[str, Attention], note: str = ""
) -> list[Provider]:
    """The workload by each of the attentions."""
    return [
        Provider.of(name, workload.timed_call(attention), check_of(expected, attention), note)
        for name, attention in attentions.items()
    ]


def attention_suite(runner: Runner, size: Size) -> Iterator[Case]:
    """Attention calls by torch's kernels, eager and headoff's own; the fastest backend of SDPA is the reference."""
    for shape, configurations in SHAPES[size]:
        # A kernel treats padding and gates independently: one gate is enough for a padded shape, the most mixed.
        gates = [*gates_of(shape, configurations).items()][-1 if shape.padded else 0 :]
        for gate_name, gate in gates:
            for direction in ("forward", "forward + backward"):
                name = f"{shape.name}, {gate_name}, {direction}"
                yield Case(name, partial(_attention, runner, shape, direction, gate, gate_name))


def _attention(
    runner: Runner, shape: AttentionShape, direction: Direction, gate: Tensor | None, gate_name: str
) -> list[Measurement]:
    workload = AttentionWorkload.of(shape, direction, gate, gate_name, runner.device, runner.dtype)
    providers = providers_of(workload, ExpectedOutputs(workload), ATTENTIONS)
    return runner.measure("attention", workload.name, providers, SDPA_ATTENTIONS, attention_work(workload))


def skipping_suite(runner: Runner, size: Size) -> Iterator[Case]:
    """What leaving out the rows of heads that are off gains, always and where headoff expects a gain. CPU only."""
    if runner.device.type != "cpu":
        return
    shape = SHAPES[size][0][0]
    queries = shape.queries // (HEADS + 1)
    ones, one_off = torch.ones(1, HEADS), 1 - torch.eye(HEADS)
    gates = {
        "cumulative": configuration_gates(cumulative(HEADS)),
        "one head off at a time": torch.cat([ones, one_off]),
        **({} if size == "scenes" else {"all subsets": configuration_gates(all_subsets(HEADS))}),
        **{f"first {off} off": configuration_gates((heads_off(*range(off)),)) for off in range(1, HEADS)},
    }
    for name, gate in gates.items():
        title = f"{len(gate)} x {queries} queries, {shape.keys} keys"
        one = AttentionShape(title, 1, len(gate) * queries, shape.keys)
        for direction in ("forward", "forward + backward"):
            run = partial(_skipping, runner, one, direction, spread(gate, one), name)
            yield Case(f"skipping, {title}, {name}, {direction}", run)


def _skipping(
    runner: Runner, shape: AttentionShape, direction: Direction, gate: Tensor, gate_name: str
) -> list[Measurement]:
    workload = AttentionWorkload.of(shape, direction, gate, gate_name, runner.device, runner.dtype)
    expected = ExpectedOutputs(workload)
    ratio = skipping.expected_ratio(skipping.groups_of(gate, workload.query), workload.query, shape.keys)
    chosen = "skips" if skipping.plan(gate, workload.query, shape.keys) is not None else "does not skip"
    providers = [
        *providers_of(workload, expected, {"torch SDPA": SdpaTimesGate()}),
        *providers_of(
            workload,
            expected,
            {"always skipping": skipping_attention},
            f"{ratio:.2f} expected by the cost model",
        ),
        *providers_of(workload, expected, {OWN: sdpa}, chosen),
    ]
    return runner.measure("skipping", workload.name, providers, {"torch SDPA"})


def decoder_suite(runner: Runner, size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """One decode of all configurations, by every attention, by a CUDA graph, and one configuration after the other."""
    alone = {
        f"{off} heads off": (heads_off(*range(off)),) for off in ((0,) if size == "scenes" else (0, 4, 8))
    }
    sizes = {**alone, **sweeps_of(model, size)}
    for title, configurations in sizes.items():
        for direction in ("forward", "backward"):
            case = f"{model.name}, {title}, {direction}"
            run = partial(_decoder, runner, model, configurations, direction, title, case)
            yield Case(f"decoder, {case}", run)


def sweeps_of(model: BenchmarkModel, size: Size) -> dict[str, tuple[Configuration, ...]]:
    """The sweeps that a size is timed with, by title; the bundled detector with the cumulative one only."""
    single = (none_off(), *single_heads(model.detector.config.decoder_layers, HEADS))
    others = {
        f"{len(single)} configurations (single heads)": single,
        "256 configurations (all subsets)": all_subsets(HEADS),
    }
    return {"9 configurations (cumulative)": cumulative(HEADS), **({} if size == "scenes" else others)}


def _decoder(
    runner: Runner,
    model: BenchmarkModel,
    configurations: tuple[Configuration, ...],
    direction: Literal["forward", "backward"],
    title: str,
    case: str,
) -> list[Measurement]:
    workload = DecoderWorkload.of(model, configurations, direction, title=title)
    expected = ExpectedOutputs(workload)
    providers = providers_of(workload, expected, {**SDPA_ATTENTIONS, **OWN_ATTENTIONS})
    if direction == "forward" and runner.device.type == "cuda":
        providers += [
            Provider.of(name, graph_call(workload, attention), check_of(expected, attention))
            for name, attention in GRAPH_ATTENTIONS.items()
        ]
    if direction == "forward" and len(configurations) > 1:
        providers.append(Provider.of(ONE_BY_ONE, _one_by_one(workload), check_of(expected, sdpa)))
    return runner.measure("decoder", case, providers, SDPA_ATTENTIONS)


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


def _one_by_one(workload: DecoderWorkload) -> TimedCall:
    """The same decodes without batching and sharing."""
    detector = with_attention(workload.model.detector, sdpa)
    gates = [workload.gates[index] for index in range(len(workload.gates))]

    def decode() -> DetectorOutput:
        with torch.inference_mode():
            found = [detector.decode(workload.memory, gate) for gate in gates]
        logits, boxes = torch.cat([one.logits for one in found]), torch.cat([one.boxes for one in found])
        return DetectorOutput(logits, boxes)

    return TimedCall(decode)


def sweep_suite(runner: Runner, size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Sweeps from the image to the outcomes, relative to one plain forward pass of the detector."""
    for title, configurations in sweeps_of(model, size).items():
        case = f"{model.name}, {title}"
        yield Case(f"sweep, {case}", partial(_sweep, runner, model, configurations, title, case))


def _sweep(
    runner: Runner, model: BenchmarkModel, configurations: tuple[Configuration, ...], title: str, case: str
) -> list[Measurement]:
    workload = SweepWorkload(model, configurations, title)
    one = ExpectedOutputs(SweepWorkload(model, (none_off(),)))
    expected = ExpectedOutputs(workload)
    notebook, count = Notebook(model.detector, model.image), len(configurations)
    detect = TimedCall(lambda: notebook.detect(none_off()))
    providers = [
        Provider.of(ONE_FORWARD, plain_forward(model), check_of(one, sdpa)),
        *providers_of(workload, expected, OWN_ATTENTIONS),
        Provider(
            NOTEBOOK,
            ((detect, count),),
            lambda: check_of(one, eager)(detect()),
            f"{count} times a forward pass of eager attention, of which one was timed",
        ),
    ]
    return runner.measure("sweep", case, providers, {ONE_FORWARD})


def plain_forward(model: BenchmarkModel) -> TimedCall:
    """The detector with SDPA, from the image to logits and boxes, as without headoff."""
    detector = with_attention(model.detector, sdpa)

    def forward() -> DetectorOutput:
        with torch.inference_mode():
            pixels, _ = detector.preprocess([model.image])
            return detector(pixels)

    return TimedCall(forward)


def relevance_suite(runner: Runner, size: Size, model: BenchmarkModel) -> Iterator[Case]:
    """Relevance maps from the image on, relative to the notebooks' way; with cams kept, and recomputed in tiles."""
    if size == "scenes":
        title, configurations, objects = "3 configurations", tuple(cumulative()[k] for k in (0, 4, 8)), 2
    else:
        title, configurations, objects = "9 configurations", cumulative(HEADS), 5
    case = f"{model.name}, {title} x {objects} objects"
    yield Case(f"relevance, {case}", partial(_relevance, runner, model, configurations, objects, case))


def _relevance(
    runner: Runner, model: BenchmarkModel, configurations: tuple[Configuration, ...], objects: int, case: str
) -> list[Measurement]:
    workload = RelevanceWorkload.of(model, configurations, objects)
    # Checked for one configuration, timed for all: the float64 oracle takes many times as long as what is timed.
    checked = replace(workload, configurations=configurations[len(configurations) // 2 :][:1])
    expected = ExpectedOutputs(checked)

    def provider(name: str, attention: Attention, note: str = "", **options: Any) -> Provider:
        check, small = check_of(expected, attention), checked.explain_call(attention, **options)
        return Provider(
            name, ((workload.explain_call(attention, **options), 1),), lambda: check(small()), note
        )

    providers = [
        _notebook(model, workload),
        *(provider(name, attention) for name, attention in OWN_ATTENTIONS.items()),
    ]
    names = ("auto",) if runner.device.type == "cpu" else ("torch", "triton")
    for kernels in names:
        suffix = "" if kernels == "auto" else f", {kernels} kernels"
        if suffix:
            providers.append(provider(f"{OWN}{suffix}", sdpa, kernels=kernels))
        budget = recomputing_budget(model, kernels)
        note = f"with a memory budget of {format_bytes(budget)}"
        name = f"{OWN}{suffix}, cams recomputed"
        providers.append(provider(name, sdpa, note, memory_budget=budget, kernels=kernels))
    return runner.measure("relevance", case, providers, {NOTEBOOK})


def _notebook(model: BenchmarkModel, workload: RelevanceWorkload) -> Provider:
    """Two forward passes for each configuration, and one with a backward pass for each map."""
    notebook, query = Notebook(model.detector, model.image), workload.queries[0]
    label = int(notebook.detect(none_off()).logits[0, 0, query, :-1].argmax())
    count, maps = len(workload.configurations), len(workload.configurations) * len(workload.queries)
    detect = TimedCall(lambda: (notebook.detect(none_off()), notebook.detect(none_off())))
    explain = TimedCall(lambda: notebook.explain(none_off(), query, label))

    def check() -> str | None:
        one = replace(workload, configurations=(none_off(),), queries=(query,))
        masks = ReluMasks()
        with masks.recording(notebook.detector):
            for _ in range(3):  # as often as the oracle's `explain` calls the decoder
                found = explain()
        truth, allowed = truth_of(one, masks)["maps"].rows, ExpectedOutputs(one).allowed("maps")
        error = float(peak_error(found, truth).amax())
        return (
            None
            if error <= allowed
            else f"its maps are off by {error:.1e} of their peaks, allowed is {allowed:.1e}"
        )

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

    budget = 2**20
    while not keeps(budget):
        budget *= 2
    while budget > 1 and keeps(budget):
        budget //= 2
    return budget


ATTENTION_SUITES = {"attention": attention_suite, "skipping": skipping_suite}
MODEL_SUITES = {"decoder": decoder_suite, "sweep": sweep_suite, "relevance": relevance_suite}
