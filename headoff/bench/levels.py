"""What is timed of attention calls, of the decoder and of the sweep. (Relevance: `headoff.bench.maps`.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from headoff.attention import Attention, eager, sdpa
from headoff.attention.fused import triton_attention
from headoff.bench.cases import AttentionCase, Scale, attention_cases
from headoff.bench.contestants import (
    EAGER,
    OWN,
    SDPA_BACKENDS,
    TRITON,
    SdpaTimesGate,
    attention_contestants,
)
from headoff.bench.contests import Bench, Contestant, contest
from headoff.bench.models import BenchmarkModel, with_attention
from headoff.bench.notebook import Notebook
from headoff.bench.outputs import Expected
from headoff.bench.records import Level, Row
from headoff.bench.roofline import attention_work
from headoff.bench.workloads import DecoderWorkload, SweepWorkload, Workload
from headoff.detr.detector import DetectorOutput
from headoff.detr.graphs import DecodeGraphs
from headoff.errors import AttentionError
from headoff.gates import Configuration, all_subsets, cumulative, heads_off
from headoff.timing import workloads as timing
from headoff.timing.calls import TimedCall

NOTEBOOK = "notebook"
ONE_BY_ONE = "one by one"

OWN_ATTENTIONS: dict[str, Attention] = {OWN: sdpa, EAGER: eager, TRITON: triton_attention}

BY_GRAPH = {f"{name}, CUDA graph": OWN_ATTENTIONS[name] for name in (OWN, TRITON)}


@dataclass(frozen=True)
class Job:
    """A case that is yet to be run; `name` is for whoever waits."""

    name: str
    run: Callable[[], list[Row]]


def judged(workload: Workload, expected: Expected, attention: Attention) -> Callable[[Any], str | None]:
    """Compares what was returned with the float64 oracle's; see `headoff.bench.outputs`."""

    def judge(result: Any) -> str | None:
        findings = expected.findings(result, attention)
        return findings[0].message if findings else None

    return judge


def attention_jobs(bench: Bench, scale: Scale) -> Iterator[Job]:
    """Each backend of SDPA times the gate, which are the reference, flex_attention, eager, and the package's own."""
    for case in attention_cases(scale, bench.device, bench.dtype):
        yield Job(case.name, partial(_attention, bench, case))


def _attention(bench: Bench, case: AttentionCase) -> list[Row]:
    expected = Expected(case)
    contestants = [
        Contestant(name, case.side(attention), judged(case, expected, attention))
        for name, attention in attention_contestants().items()
    ]
    return contest(bench, "attention", case.name, contestants, SDPA_BACKENDS, attention_work(case))


def configurations_of(level: Level, scale: Scale) -> dict[str, tuple[Configuration, ...]]:
    """By name, what is decoded together."""
    sweep = {"9 configurations": cumulative()}
    subsets = {"256 configurations": all_subsets()}
    if level == "decoder":
        alone = {f"{off} heads off": (heads_off(*range(off)),) for off in (0, 4, 8)}
        return (
            {"0 heads off": alone["0 heads off"], **sweep}
            if scale == "quick"
            else {**alone, **sweep, **subsets}
        )
    if level == "sweep":
        return sweep if scale == "quick" else {**sweep, **subsets}
    few = {"3 configurations": tuple(cumulative()[k] for k in (0, 4, 8))}
    return few if scale == "quick" else sweep


def decoder_jobs(bench: Bench, scale: Scale, subject: BenchmarkModel) -> Iterator[Job]:
    """One decode, with every attention; by a CUDA graph; and one configuration after the other."""
    for name, configurations in configurations_of("decoder", scale).items():
        for direction in timing.DIRECTIONS:
            case = f"{subject.name}, {name}, {direction}"

            yield Job(case, partial(_decoder, bench, subject, configurations, direction, case))


def _decoder(
    bench: Bench,
    subject: BenchmarkModel,
    configurations: tuple[Configuration, ...],
    direction: timing.Direction,
    case: str,
) -> list[Row]:
    workload = DecoderWorkload.of(subject, configurations, direction, seed=0)
    expected = Expected(workload)
    attentions: dict[str, Attention] = {
        **{name: SdpaTimesGate(backend) for name, backend in SDPA_BACKENDS.items()},
        **OWN_ATTENTIONS,
    }
    contestants = [
        Contestant(name, workload.side(each), judged(workload, expected, each))
        for name, each in attentions.items()
    ]
    if direction == "forward":
        if bench.device.type == "cuda":
            for name, each in BY_GRAPH.items():
                judge = judged(workload, expected, each)
                contestants.append(Contestant(name, by_graph(workload, each), judge))
        if len(configurations) > 1:
            judge = judged(workload, expected, sdpa)
            contestants.append(Contestant(ONE_BY_ONE, _one_by_one(workload), judge))
    return contest(bench, "decoder", case, contestants, SDPA_BACKENDS)


def by_graph(
    workload: DecoderWorkload, attention: Attention, graphs: DecodeGraphs | None = None
) -> TimedCall:
    """Decodes by a CUDA graph. A call raises AttentionError where none could be captured: it would time another."""
    graphs = DecodeGraphs() if graphs is None else graphs
    detector = with_attention(workload.subject.detector, attention)

    def decode() -> DetectorOutput:
        output = graphs.decode(detector, workload.memory, workload.gates)
        if graphs.replays == 0:
            # The first time a decode is an ordinary one, and so it is wherever it cannot be captured.
            output = graphs.decode(detector, workload.memory, workload.gates)
        if graphs.replays == 0:
            raise AttentionError(
                f"the decode could not be captured: {', '.join(graphs.failures) or 'refused'}"
            )
        return output

    return TimedCall(decode)


def _one_by_one(workload: DecoderWorkload) -> TimedCall:
    """What a sweep's decodes cost without batching and sharing."""
    detector = with_attention(workload.subject.detector, sdpa)
    gates = [workload.gates[index] for index in range(len(workload.gates))]

    def decode() -> DetectorOutput:
        with torch.inference_mode():
            found = [detector.decode(workload.memory, each) for each in gates]
            return DetectorOutput(
                torch.cat([each.logits for each in found]), torch.cat([each.boxes for each in found])
            )

    return TimedCall(decode)


def sweep_jobs(bench: Bench, scale: Scale, subject: BenchmarkModel) -> Iterator[Job]:
    """From the picture to the outcomes, beside one whole forward pass for every configuration."""
    for name, configurations in configurations_of("sweep", scale).items():
        case = f"{subject.name}, {name}"

        yield Job(case, partial(_sweep, bench, subject, configurations, case))


def _sweep(
    bench: Bench, subject: BenchmarkModel, configurations: tuple[Configuration, ...], case: str
) -> list[Row]:
    workload = SweepWorkload(subject, configurations)
    expected = Expected(workload)
    notebook = Notebook(subject.detector, subject.picture)
    by_notebook = TimedCall(lambda: notebook.detect(configurations))
    contestants = [
        Contestant(NOTEBOOK, by_notebook, judged(workload, expected, eager)),
        *(
            Contestant(name, workload.side(each), judged(workload, expected, each))
            for name, each in OWN_ATTENTIONS.items()
        ),
    ]
    return contest(bench, "sweep", case, contestants, {NOTEBOOK})
