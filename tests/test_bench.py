"""`headoff bench`: workloads and their checks, providers, comparisons, suites, the report, the command."""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from relevance_examples import tiny_detector
from test_checkpoints import original_names

import headoff
from headoff.attention import eager, sdpa
from headoff.bench import runner as running
from headoff.bench import suites
from headoff.bench.attentions import ATTENTIONS, EAGER, FLEX, OWN, SDPA_BACKENDS, TRITON, skipping_attention
from headoff.bench.calls import AttentionShape, AttentionWorkload, site_shape
from headoff.bench.cases import Case, Provider
from headoff.bench.model_workloads import DecoderWorkload, RelevanceWorkload, SweepWorkload
from headoff.bench.models import SIZES, BenchmarkModel, benchmark_model, with_attention
from headoff.bench.notebook import Notebook
from headoff.bench.outputs import ExpectedOutputs, outputs_and_masks, truth_of
from headoff.bench.report import TITLES, Measurement, Report
from headoff.bench.runner import Plan, Runner
from headoff.bench.suites import check_of, gates_of
from headoff.cli import bench as command
from headoff.detr import Detr, DetrConfig
from headoff.detr.config import BackboneConfig
from headoff.detr.graphs import CAPTURED
from headoff.errors import OutputError, SettingError
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.tolerance import peak_error
from headoff.images import Preprocessing
from headoff.importance.games import Game
from headoff.relevance import RelevanceEngine
from headoff.timing import TimedCall, describe_machine, torch_threads, turns

HEADS = 8

CPU = torch.device("cpu")
TINY = AttentionShape("cross, 9 x 2 queries, 5 keys", 1, 18, 5)
PADDED = AttentionShape("cross, 9 x 2 queries, 8 keys, padded", 1, 18, 8, padded=True)
UNFOLDED = AttentionShape("self, 9 x (4 queries, 4 keys)", 9, 4, 4)
SHAPES = pytest.mark.parametrize("shape", [TINY, PADDED, UNFOLDED], ids=["plain", "padded", "batch items"])


def workload_of(shape, gate_name="cumulative", direction="forward + backward", dtype=torch.float32):
    gate = gates_of(shape, 9)[gate_name]
    return AttentionWorkload.of(shape, direction, gate, gate_name, CPU, dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As when timing: on a busy machine several threads make small operators many times slower."""
    with torch_threads():
        yield


@pytest.fixture(scope="module")
def model():
    """A small detector with random weights; the bundled one would take seconds for each check."""
    torch.manual_seed(0)
    config = DetrConfig(
        backbone=BackboneConfig(block="basic", depths=(1, 1), widths=(8, 8), stem=8),
        width=32,
        heads=HEADS,
        encoder_layers=2,
        decoder_layers=3,
        feedforward=32,
        queries=5,
        classes=3,
        preprocessing=Preprocessing(short_side=48, long_side=96),
    )
    detector = Detr(config).eval().requires_grad_(False)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    return BenchmarkModel("small", detector, headoff.load_image(pixels))


# --- workloads, and the check of their outputs --------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, UNFOLDED], ids=["end to end", "batch items"])
def test_gates_are_those_of_the_configurations(shape):
    gates = gates_of(shape, 9)
    assert list(gates) == ["0 heads off", "4 heads off", "8 heads off", "cumulative"]
    assert gates["0 heads off"] is None
    for off in (4, 8):
        gate = gates[f"{off} heads off"]
        assert gate.shape == (shape.batch, HEADS, shape.queries, 1)
        assert not gate[:, :off].any() and gate[:, off:].all()
    sweep = gates["cumulative"]
    configurations = sweep[0].unflatten(1, (9, -1)).transpose(0, 1) if shape.batch == 1 else sweep
    for off, gate in enumerate(configurations):
        assert not gate[:off].any() and gate[off:].all()


def test_every_subset_occurs_once():
    gate = gates_of(AttentionShape("all", 1, 256 * 3, 3), 256)["all subsets"]
    assert len(gate[0, :, :, 0].T.unique(dim=0)) == 256


def test_cases_have_names_of_their_own_and_both_directions(model):
    assert SIZES == command.SIZE_NAMES
    for suite in (suites.attention_suite, suites.skipping_suite):
        names = [case.name for case in suite("r50", model)]
        assert len(set(names)) == len(names)
        assert sum(name.endswith("backward") for name in names) * 2 == len(names)


@pytest.fixture(scope="module")
def workloads(model):
    some = headoff.cumulative()[:3]
    gate = torch.ones(1, HEADS, 45, 1)
    gate[:, :4] = 0
    cross, self_attention = site_shape(model, "decoder_cross"), site_shape(model, "decoder_self")
    return {
        "context": AttentionWorkload.of(cross, "forward", gate, "4 heads off", CPU, torch.float32),
        "gradients": AttentionWorkload.of(
            self_attention, "backward", gate[:, :, :1].expand(9, -1, 5, -1), "4 heads off", CPU, torch.float32
        ),
        "decoder": DecoderWorkload.of(model, some, "forward"),
        "memory": DecoderWorkload.of(model, some, "backward"),
        "sweep": SweepWorkload(model, some),
        "relevance": RelevanceWorkload.of(model, some[2:], 1),
    }


def ignores_the_gate(query, key, value, attn_mask=None, *, head_gate=None):
    return sdpa(query, key, value, attn_mask)


def swaps_two_heads(query, key, value, attn_mask=None, *, head_gate=None):
    order = [*range(query.shape[1] - 2), query.shape[1] - 1, query.shape[1] - 2]
    return sdpa(query, key[:, order], value[:, order], attn_mask, head_gate=head_gate)


def slightly_hotter(query, key, value, attn_mask=None, *, head_gate=None):
    return sdpa(query * 1.001, key, value, attn_mask, head_gate=head_gate)


KINDS = ["context", "gradients", "decoder", "memory", "sweep", "relevance"]


@pytest.mark.parametrize("kind", KINDS)
def test_right_outputs_pass_and_wrong_ones_do_not(workloads, kind):
    workload = workloads[kind]
    expected = ExpectedOutputs(workload)
    assert expected.findings(workload.timed_call(sdpa)(), sdpa) == []
    for wrong in (ignores_the_gate, swaps_two_heads, slightly_hotter):
        found = expected.findings(workload.timed_call(wrong)(), wrong)
        assert found, f"{wrong.__name__} passes"
        assert all("timed call is wrong" in one.message and one.error > one.budget for one in found)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_can_be_filled_with_other_inputs(workloads, kind):
    """In the same memory; the workload itself stays as it is."""
    workload = workloads[kind]
    call, other = workload.timed_call(sdpa), workload.varied(7)

    def rows(result):
        return {name: one.rows.clone() for name, one in workload.outputs(result).items()}

    before, expected = rows(call()), rows(other.timed_call(sdpa)())
    call.fill(other)
    filled = rows(call())
    call.fill(workload)
    for name in before:
        near = 1e-4 * before[name].abs().amax()  # between runs, other kernels may round otherwise
        assert (filled[name] - expected[name]).abs().amax() < near, name
        assert (filled[name] - before[name]).abs().amax() > near, name
        assert (rows(call())[name] - before[name]).abs().amax() < near, name
    assert ExpectedOutputs(other).findings(other.timed_call(sdpa)(), sdpa) == []


@pytest.mark.parametrize("kind", ["context", "gradients"])
def test_zeros_nan_and_other_shapes_are_wrong(workloads, kind):
    workload = workloads[kind]
    right, expected = workload.timed_call(sdpa)(), ExpectedOutputs(workload)
    for wrong in (torch.zeros_like, lambda tensor: tensor[..., :-1], lambda tensor: tensor * math.nan):
        assert expected.findings(tuple(map(wrong, right)), sdpa)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_tolerances_follow_the_dtype(dtype):
    workload = workload_of(UNFOLDED, "4 heads off", "forward", dtype)
    expected = ExpectedOutputs(workload)
    assert expected.findings(workload.timed_call(sdpa)(), sdpa) == []
    unit = torch.finfo(dtype).eps
    assert unit <= expected.allowed("context") < 100 * unit
    assert expected.findings(workload.timed_call(swaps_two_heads)(), swaps_two_heads)


def test_rows_that_are_truly_zero_must_be_zero():
    truth = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 4.0]])
    errors = peak_error(torch.tensor([[0.0, 1e-30], [1.0, 2.5], [0.0, 4.0]]), truth)
    assert errors.tolist() == [math.inf, 0.25, 0.0]


def test_the_oracle_follows_a_relu_that_rounding_decides(workloads, model):
    """Where rounding decides, a unit's mask changes the true gradient; elsewhere the oracle keeps its own mask."""
    workload = workloads["memory"]
    _, masks = outputs_and_masks(workload, eager)
    plain = truth_of(workload, masks)["gradient of the memory"].rows
    opposite = ReluMasks({name: ~mask for name, mask in masks.masks.items()})
    assert peak_error(truth_of(workload, opposite)["gradient of the memory"].rows, plain) < 1e-2
    exact = workload.in_dtype(torch.float64)
    with opposite.pinned(exact.model.detector, resolution=math.inf):
        turned = exact.outputs(exact.timed_call(eager)())["gradient of the memory"].rows
    assert peak_error(turned, plain) > 0.1


def test_detectors_share_weights_and_not_attentions(model):
    one, two = with_attention(model.detector, "sdpa"), with_attention(model.detector, eager)
    assert one.attention is sdpa and two.attention is eager
    assert one.class_head.weight is two.class_head.weight is model.detector.class_head.weight


def test_unknown_sizes():
    with pytest.raises(SettingError, match="scenes, r50, dc5"):
        benchmark_model("huge", CPU, torch.float32)


# --- providers ----------------------------------------------------------------------------------------------


@SHAPES
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_attentions_that_run_here_are_right(shape, direction):
    workload = workload_of(shape, direction=direction)
    expected = ExpectedOutputs(workload)
    ran = []
    for name, attention in ATTENTIONS.items():
        try:
            result = workload.timed_call(attention)()
        except (headoff.AttentionError, RuntimeError, NotImplementedError):
            continue
        assert check_of(expected, attention)(result) is None, name
        ran.append(name)
    assert {"torch SDPA, math", EAGER, OWN} <= set(ran)
    assert (FLEX in ran) == (direction == "forward"), "it has no backward pass on a CPU"


def test_attention_that_always_skips_is_right():
    workload = workload_of(TINY)
    expected = ExpectedOutputs(workload)
    assert check_of(expected, skipping_attention)(workload.timed_call(skipping_attention)()) is None


def test_the_names_are_unique():
    assert set(SDPA_BACKENDS) | {TRITON, OWN, EAGER, FLEX} == set(ATTENTIONS)


@pytest.mark.parametrize("text", ["none", "first 2", "L1H0,L2H1"])
def test_the_notebook_finds_the_same(model, text):
    exact = model.in_dtype(torch.float64)
    configuration = headoff.parse_configuration(text)
    notebook = Notebook(exact.detector, model.image)
    found = headoff.explain(exact.detector, model.image, [configuration], [3])
    answers = notebook.detect(configuration)
    torch.testing.assert_close(answers.logits[:, 0], found.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(answers.boxes[:, 0], found.boxes, rtol=0, atol=1e-10)
    maps = notebook.explain(configuration, 3, int(found.labels[0, 0]))
    torch.testing.assert_close(maps, found.maps[0, 0].flatten(1), rtol=0, atol=1e-9 * float(found.maps.max()))
    assert not any(weight.requires_grad for weight in exact.detector.parameters())


class Graphs:
    """Stands for `DecodeGraphs`: captures at the second decode, or never."""

    def __init__(self, failures=(), captures=True):
        self.failures, self.captures, self.replays, self.decodes = list(failures), captures, 0, 0

    def decode(self, detector, memory, gates):
        self.decodes += 1
        self.replays += self.captures and self.decodes > 1
        return detector.decode(memory, gates)


def test_what_is_timed_as_a_graph_is_one(model):
    workload = DecoderWorkload.of(model, (headoff.parse_configuration("first 2"),), "forward")
    captured = Graphs()
    call = suites.graph_call(workload, eager, captured)
    for decodes in (2, 3):
        assert call().logits.isfinite().all() and captured.decodes == decodes
    for graphs, why in (
        (Graphs(["RuntimeError: no memory"], captures=False), "no memory"),
        (Graphs(captures=False), "not captured for this attention"),
    ):
        with pytest.raises(headoff.AttentionError, match=why):
            suites.graph_call(workload, eager, graphs)()
    assert set(suites.PACKAGE.values()) <= set(CAPTURED)


# --- comparisons on a simulated clock -----------------------------------------------------------------------


class SimulatedClock:
    """Time passes only in the calls that `spends` makes."""

    name = "simulated"

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def prepare(self):
        pass

    def finish(self):
        pass

    def spends(self, seconds, result=None):
        """A call that takes so long; `seconds` may be a function of how often it was called."""
        calls = itertools.count()

        def run():
            self.time += seconds(next(calls)) if callable(seconds) else seconds
            return result

        return TimedCall(run)


@pytest.fixture
def clock():
    return SimulatedClock()


@pytest.fixture
def bench(clock, monkeypatch):
    """How many rounds there are follows from the simulated time as well."""
    monkeypatch.setattr(turns, "time", SimpleNamespace(perf_counter=lambda: clock.time))
    return Runner(CPU, torch.float32, clock, 100.0)


@pytest.fixture
def provider(clock):
    def make(name, seconds, problem=None):
        return Provider.of(name, clock.spends(seconds), lambda result: problem)

    return make


def raising(error):
    def run():
        raise error

    return TimedCall(run)


def measured(bench, providers, references):
    case = Case("attention", "a case", lambda: providers, references)
    return bench.measure(case, lambda stage: None)


def test_ratios_refer_to_the_fastest_reference(bench, provider):
    class OutOfResources(Exception):
        """Compilers have exceptions of their own."""

    failing = Provider.of(
        "failing", raising(RuntimeError("No kernel for this. Try another.")), lambda result: None
    )
    compiling = Provider.of(
        "compiling", raising(OutOfResources("shared memory, 300000")), lambda result: None
    )
    found = measured(
        bench,
        [
            provider("slow reference", 3.0),
            provider("fast reference", 2.0),
            provider("own", 1.0),
            provider("wrong", 0.1, "it is off"),
            failing,
            compiling,
        ],
        {"slow reference", "fast reference", "failing"},
    )
    by_name = {one.provider: one for one in found}
    assert [one.provider for one in found if one.was_timed] == ["slow reference", "fast reference", "own"]
    assert [one.provider for one in found if one.status == "reference"] == ["fast reference"]
    assert by_name["fast reference"].seconds == 2
    own = by_name["own"]
    assert own.ratio == own.low == own.high == pytest.approx(0.5)
    assert by_name["slow reference"].ratio == pytest.approx(1.5)
    assert (by_name["wrong"].status, by_name["wrong"].note) == ("wrong", "it is off")
    assert (by_name["failing"].status, by_name["failing"].note) == ("unsupported", "No kernel for this")
    assert by_name["compiling"].note == "shared memory, 300000"
    assert by_name["wrong"].seconds is None and by_name["failing"].ratio is None


def test_a_single_provider_has_a_time_and_a_wrong_one_none(bench, provider):
    (alone,) = measured(bench, [provider("own", 0.5)], {"notebook"})
    assert (alone.status, alone.seconds, alone.ratio) == ("reference", 0.5, 1.0)
    (wrong,) = measured(bench, [provider("own", 1.0, "no")], ())
    assert wrong.status == "wrong" and not wrong.was_timed


def test_slow_calls_keep_to_the_time_and_have_no_interval(bench, provider):
    found = measured(replace(bench, seconds=20.0), [provider("slow", 30.0), provider("fast", 10.0)], {"fast"})
    assert found[0].ratio == pytest.approx(3) and found[0].low is None and found[0].cells[2] == "-"
    assert [one.rounds for one in found] == [turns.FEWEST_OF_SLOW] * 2
    found = measured(replace(bench, seconds=20.0), [provider("slow", 3.0), provider("fast", 1.0)], {"fast"})
    assert [one.rounds for one in found] == [10] * 2 and found[0].low == pytest.approx(3)
    found = measured(replace(bench, seconds=1.0), [provider("slow", 3.0), provider("fast", 1.0)], {"fast"})
    assert [one.rounds for one in found] == [turns.FEWEST_ROUNDS] * 2, "they take less than a minute"


@pytest.mark.parametrize("reference", ["whole", "notebook"])
def test_an_extrapolated_provider_is_the_sum_of_its_parts(bench, clock, provider, reference):
    """9 times 0.5 s and 45 times 2 s, against a whole of 3 s; either may be the reference."""
    notebook = Provider(
        "notebook", ((clock.spends(0.5), 9), (clock.spends(2.0), 45)), lambda: None, "two parts"
    )
    found = measured(bench, [notebook, provider("whole", 3.0)], {reference})
    by_name = {one.provider: one for one in found}
    total = 9 * 0.5 + 45 * 2.0
    assert by_name["notebook"].seconds == pytest.approx(total) and by_name["whole"].seconds == pytest.approx(
        3.0
    )
    other = "notebook" if reference == "whole" else "whole"
    expected = total / 3.0 if reference == "whole" else 3.0 / total
    assert by_name[reference].ratio == 1.0 and by_name[other].ratio == pytest.approx(expected)
    assert by_name["notebook"].note == "two parts"


# --- suites -------------------------------------------------------------------------------------------------


def without_timing(monkeypatch):
    """Providers are checked, and every call takes a second."""
    monkeypatch.setattr(running, "time_in_turns", lambda calls, *_, **__: [[1.0] * 8 for _ in calls])
    monkeypatch.setattr(running, "peak_bytes", lambda *_: None)


def measure_all(bench, cases):
    return [one for case in cases for one in bench.measure(case, lambda stage: None)]


def test_every_provider_of_every_suite_is_right_or_needs_a_gpu(bench, model, monkeypatch):
    without_timing(monkeypatch)
    # So small a model recomputes cams in tiles so small that it takes seconds; see the tests below.
    monkeypatch.setattr(suites, "recomputing_budget", lambda model, kernels: 2**20)
    of_all = [suite("scenes", model) for suite in suites.SUITES.values()]
    # Two cases of each suite, forward and with gradients: the others differ in sizes and gates.
    found = measure_all(bench, [case for suite in of_all for case in [*suite][-2:]])
    assert {one.suite for one in found} == set(command.SUITES)
    assert not [one for one in found if one.status == "wrong"]
    unsupported = {one.provider for one in found if one.status == "unsupported"}
    assert unsupported <= {TRITON, FLEX, "torch SDPA, efficient", "torch SDPA, cuDNN"}
    names = {one.provider for one in found}
    assert {
        "one plain forward",
        "notebook",
        "one by one",
        "always skipping",
        f"{OWN}, cams recomputed",
    } <= names


def test_of_many_configurations_the_detections_of_some_are_checked(model):
    """Evenly spaced ones, in what all of them together compute."""
    workload = SweepWorkload(model, headoff.all_subsets(HEADS)[:40])
    assert workload.checked == [0, 5, 10, 15, 20, 24, 29, 34, 39]
    expected, result = ExpectedOutputs(workload), workload.timed_call(sdpa)()
    assert expected.findings(result, sdpa) == []
    logits = result.logits.clone()
    logits[24] += 1e-2
    result = replace(result, logits=logits)
    assert expected.findings(result, sdpa)


def test_the_plain_forward_pass_is_compared_with_the_first_configuration(model):
    one = SweepWorkload(model, (headoff.none_off(),))
    expected = ExpectedOutputs(SweepWorkload(model, headoff.cumulative())).of_first(one)
    assert expected.findings(suites.plain_forward(model)(), sdpa) == []
    wrong = SweepWorkload(model, headoff.cumulative()[1:2]).timed_call(sdpa)()
    assert expected.findings(wrong, sdpa)


def test_a_wrong_attention_is_reported_and_not_timed(bench, model, monkeypatch):
    monkeypatch.setitem(suites.PACKAGE, OWN, ignores_the_gate)
    without_timing(monkeypatch)
    found = {one.provider: one for one in measure_all(bench, suites.sweep_suite("scenes", model))}
    assert found[OWN].status == "wrong" and "logits" in found[OWN].note and found[OWN].seconds is None
    assert found["one plain forward"].status == "reference" and found["notebook"].status == "timed"


def test_wrong_importance_is_reported(bench, model, monkeypatch):
    from headoff.bench import importance

    without_timing(monkeypatch)
    monkeypatch.setattr(importance, "MEASURES", ("removal", "gradient", "shapley_columns"))
    found = {one.provider: one for one in measure_all(bench, suites.importance_suite("scenes", model))}
    assert {one.status for one in found.values()} == {"reference", "timed"}
    gradients = Game.gradients
    monkeypatch.setattr(
        Game,
        "gradients",
        lambda game, gates: [
            1.1 * x if game.detector.dtype == torch.float32 else x for x in gradients(game, gates)
        ],
    )
    found = {one.provider: one for one in measure_all(bench, suites.importance_suite("scenes", model))}
    assert found["heads, gradient"].status == "wrong" and "float64" in found["heads, gradient"].note
    assert found["heads, removal"].status == "timed"


def test_a_wrong_notebook_is_reported(bench, model, monkeypatch):
    without_timing(monkeypatch)
    monkeypatch.setattr(suites, "recomputing_budget", lambda model, kernels: 2**20)
    explain = Notebook.explain
    monkeypatch.setattr(Notebook, "explain", lambda *arguments: explain(*arguments) * 1.01)
    found = {one.provider: one for one in measure_all(bench, suites.relevance_suite("scenes", model))}
    assert found["notebook"].status == "wrong" and "maps" in found["notebook"].note
    assert found[OWN].status == "reference"


def test_the_budget_that_recomputes_cams_is_half_of_one_that_keeps_them(model):
    budget = suites.recomputing_budget(model, "auto")
    detector = with_attention(model.detector, "sdpa")
    keeps = [
        RelevanceEngine(detector, model.features, memory_budget=size).keeps_cams
        for size in (budget, 2 * budget)
    ]
    assert keeps == [False, True]
    with pytest.raises(headoff.HeadoffError, match="CUDA"):
        suites.recomputing_budget(model, "triton")


def test_recomputed_cams_give_the_same_maps(model):
    workload = RelevanceWorkload.of(model, headoff.cumulative()[4:5], 1)
    budget = suites.recomputing_budget(model, "auto")
    kept, recomputed = (workload.explain_call(sdpa, memory_budget=size)().maps for size in (None, budget))
    torch.testing.assert_close(recomputed, kept, rtol=0, atol=1e-5 * float(kept.max()))


# --- the report ---------------------------------------------------------------------------------------------


def report_of():
    found = []
    for gate in ("0 heads off", "cumulative"):
        one = Measurement(
            "attention", f"cross, 5 keys, {gate}, forward", "float32", "torch SDPA, flash", "reference",
            ratio=1.0, low=1.0, high=1.0, seconds=2e-3, memory=2048, rounds=8,
        )  # fmt: skip
        own = replace(one, provider=OWN, status="timed", ratio=0.5, low=0.4, high=0.625, seconds=1e-3)
        slow = replace(one, provider=EAGER, status="timed", ratio=12.5, low=None, high=None, seconds=25e-3)
        absent = Measurement("attention", one.case, "float32", TRITON, "unsupported", "there is no GPU")
        found += [one, own, replace(slow, note="of one map"), absent]
    wrong = Measurement("sweep", "scenes, 9 configurations", "float32", EAGER, "wrong", "its logits are off")
    made_with = {"command": "headoff bench", "date": "2026-01-02", "headoff": "0", "torch": "2"}
    return Report((*found, wrong), made_with, describe_machine("cpu", 1))


def test_json_and_csv_have_every_measurement():
    report = report_of()
    loaded = json.loads(report.to_json())
    names = [one.provider for one in report.measurements]
    assert [one["provider"] for one in loaded["measurements"]] == names
    assert loaded["measurements"][1]["low"] == 0.4 and loaded["machine"]["device"] == "cpu"
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [line["provider"] for line in lines] == names
    assert lines[1]["ratio"] == "0.5" and lines[2]["low"] == "" and lines[3]["note"] == "there is no GPU"


def test_the_tables():
    lines = report_of().to_markdown().splitlines()
    assert lines[0] == "    headoff bench" and lines[2].startswith("2026-01-02, ")
    start = lines.index("cross, 5 keys, 0 heads off, forward (float32):") + 2
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start : start + 5]]
    assert [row[0] for row in cells[2:]] == [OWN, "torch SDPA, flash", EAGER]
    assert cells[2] == [OWN, "0.5", "0.4 to 0.625", "1.00 ms", "2.00 KiB", "8"]
    assert cells[3][2] == "reference" and cells[4][2] == "-"
    assert len({len(line) for line in lines[start : start + 5]}) == 1, "aligned"
    assert lines.count("- eager: of one map") == 2
    assert f"- {TRITON}, unsupported in 2 cases: there is no GPU" in lines
    assert "- eager, wrong in scenes, 9 configurations (float32): its logits are off" in lines


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture
def call(model, monkeypatch, tmp_path):
    """The command, in a folder of its own, on a small model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "benchmark_model", lambda *_: model)
    monkeypatch.setattr(suites, "shapes_of", lambda *_: [(TINY, 9)])

    def run(*arguments):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers(required=True))
        settings = parser.parse_args(["bench", *arguments])
        return settings.run(settings)

    return run


def test_a_run_from_the_command_line(call, tmp_path, capsys):
    assert call("--device", "cpu", "--only", "attention", "--seconds", "0.001", "--out", "a/b") == 0
    shown = capsys.readouterr()
    assert shown.err.count("attention, cross, 9 x 2 queries, 5 keys") == 8
    assert "torch SDPA, math" in shown.out and "headoff triton, unsupported in 8 cases" in shown.out
    names = {path.name for path in (tmp_path / "a/b").iterdir()}
    assert {"bench.json", "bench.csv", "bench.md"} == names
    report = json.loads((tmp_path / "a/b/bench.json").read_text())
    assert {one["status"] for one in report["measurements"]} == {"timed", "reference", "unsupported"}
    for one in report["measurements"]:
        if one["status"] == "timed" and one["low"] is not None:
            assert one["low"] <= one["ratio"] <= one["high"] and one["memory"] > 0
    assert (tmp_path / "a/b/bench.md").read_text() in shown.out


def test_a_model_of_your_own(call, tmp_path, capsys):
    """With four heads, of which its file does not tell: what was assumed is in the report."""
    torch.save({"model": original_names(tiny_detector(dtype=torch.float32).state_dict())}, "my.pth")
    options = (
        "--device",
        "cpu",
        "--model",
        "my.pth",
        "--only",
        "sweep",
        "--seconds",
        "0.001",
        "--out",
        "out",
    )
    assert call(*options, "--heads-per-layer", "4", "--no-dc5", "--short-side", "64") == 0
    shown = capsys.readouterr().out
    assert (
        "my.pth, 5 configurations (cumulative)" in shown
        and "my.pth, 16 configurations (all subsets)" in shown
    )
    assert "heads 4 in each layer" in shown and "assumed" not in shown
    assert call(*options, "--short-side", "64", "--no-dc5") == 0
    assert "8 heads assumed" in capsys.readouterr().out
    assert "8 heads assumed" in json.loads(Path("out/bench.json").read_text())["made_with"]["assumed"]
    for wrong in (("--model", "my.pth", "--size", "r50"), ("--heads-per-layer", "4"), ("--image", "x.png")):
        with pytest.raises(SettingError, match="--model"):
            call(*wrong)


def test_an_interrupted_run_writes_nothing(call, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Runner, "measure", interrupt)
    assert call("--device", "cpu", "--only", "attention", "--out", "out") == 130
    assert "no results were written" in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_impossible_settings_are_rejected_before_anything_is_measured(call, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "clock_of", None)
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingError, match="--out file is a file: name a folder"):
        call("--out", "file")
    with pytest.raises(OutputError, match="file/below cannot be created"):
        call("--out", "file/below")
    with pytest.raises(SettingError, match="mars"):
        call("--device", "mars")


def test_defaults(monkeypatch):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))

    def plan(*arguments, device="cpu"):
        monkeypatch.setattr(command, "chosen_device", lambda name: torch.device(device))
        return command.plan_of(parser.parse_args(["bench", *arguments]))

    assert plan() == Plan(CPU, (torch.float32,), ("scenes",), command.SUITES, 0.05, 1)
    on_gpu = plan(device="cuda")
    assert (on_gpu.sizes, on_gpu.dtypes, on_gpu.seconds) == (("r50",), (torch.float32, torch.bfloat16), 1.0)
    chosen = plan(
        "--dtype", "float16", "--dtype", "float16", "--only", "sweep", "--seconds", "2", "--threads", "2"
    )
    assert chosen == Plan(CPU, (torch.float16,), ("scenes",), ("sweep",), 2.0, 2)
    assert set(command.SUITES) == set(suites.SUITES) == set(TITLES)


def test_help_does_not_import_torch():
    code = (
        "import argparse, sys; from headoff.cli import bench; "
        "bench.add_parser(argparse.ArgumentParser().add_subparsers()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
