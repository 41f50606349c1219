"""`headoff bench`: cases, contestants, contests by a clock of our own, the roofline, tables, plots, the command."""

from __future__ import annotations

import argparse
import copy
import csv
import importlib.util
import io
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import triton_interpreter
from headoff.bench.cases import DIRECTIONS, HEADS, AttentionCase, Shape, attention_cases, gates_of
from headoff.bench.contestants import EAGER, FLEX, OWN, SDPA_BACKENDS, TRITON, attention_contestants
from headoff.bench.contests import Bench, Contestant, contest
from headoff.bench.levels import judged
from headoff.bench.maps import Extrapolated
from headoff.bench.records import Report, Row, cases_of

import headoff
from headoff.attention import eager
from headoff.bench import blocked, cases, levels, running
from headoff.bench.models import benchmark_model, with_attention
from headoff.bench.notebook import Notebook
from headoff.bench.outputs import Expected
from headoff.bench.plots import plots_of
from headoff.bench.roofline import Ceilings, Position, Work, attention_work, position
from headoff.bench.tables import markdown_of, text_of
from headoff.bench.workloads import DecoderWorkload
from headoff.cli import bench as command
from headoff.detr import Detector, DetrConfig
from headoff.detr.config import BackboneConfig
from headoff.detr.graphs import CAPTURED
from headoff.errors import SettingError
from headoff.harness.settings import Settings
from headoff.images import Preprocessing
from headoff.relevance import RelevanceEngine
from headoff.timing.calls import TimedCall
from headoff.timing.comparison import SpeedComparison
from headoff.timing.machine import describe_machine

CPU = torch.device("cpu")
TINY = Shape("cross, 9 x 2 queries, 5 keys", 2, 5, 9)
PADDED = Shape("cross, 9 x 2 queries, 8 keys, padded", 2, 8, 9, padded=True)
UNFOLDED = Shape("self, 9 x (4 queries, 4 keys)", 4, 4, 9, folded=False)


def case_of(shape, gate_name="cumulative", direction="forward + backward", dtype=torch.float32):
    return AttentionCase.of(shape, gate_name, gates_of(shape)[gate_name], direction, CPU, dtype)


# --- cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, UNFOLDED], ids=["end to end", "batch items"])
def test_gates_are_those_of_the_configurations(shape):
    gates = gates_of(shape)
    assert list(gates) == ["0 heads off", "4 heads off", "8 heads off", "cumulative"]
    assert gates["0 heads off"] is None
    for off in (4, 8):
        gate = gates[f"{off} heads off"]
        assert gate.shape == (shape.batch, HEADS, shape.rows, 1)
        assert not gate[:, :off].any() and gate[:, off:].all()
    sweep = gates["cumulative"]
    assert sweep.shape == (shape.batch, HEADS, shape.rows, 1)
    runs = sweep[0].unflatten(1, (9, -1)).transpose(0, 1) if shape.folded else sweep
    for off, run in enumerate(runs):
        assert not run[:off].any() and run[off:].all()


def test_a_subset_is_there_once():
    gate = gates_of(Shape("all", 1, 3, 256))["all subsets"]
    assert len(gate[0, :, :, 0].T.unique(dim=0)) == 256


def test_every_scale_has_gates_and_both_directions(monkeypatch):
    monkeypatch.setitem(cases.SHAPES, "quick", (TINY, PADDED))
    made = list(attention_cases("quick", CPU, torch.float32))
    assert len({case.name for case in made}) == len(made) == 2 * (4 + 1)
    assert {case.direction for case in made} == set(DIRECTIONS)
    assert all((case.attn_mask is not None) == case.shape.padded for case in made)


# --- contestants --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, PADDED, UNFOLDED], ids=["plain", "padded", "batch items"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_those_that_run_here_are_right(shape, direction):
    case = case_of(shape, direction=direction)
    expected = Expected(case)
    ran = []
    for name, attention in attention_contestants().items():
        try:
            result = case.side(attention)()
        except (headoff.AttentionError, RuntimeError, NotImplementedError):
            continue
        assert judged(case, expected, attention)(result) is None, name
        ran.append(name)
    assert {"torch SDPA, math", EAGER, OWN} <= set(ran)
    assert (FLEX in ran) == (direction == "forward"), "it has no backward pass on a CPU"


@pytest.mark.parametrize("gate", ["ignored", "before softmax"])
def test_a_wrong_contestant_is_told(gate):
    case = case_of(TINY)

    def wrong(query, key, value, attn_mask=None, *, head_gate=None):
        if gate == "ignored":
            return eager(query, key, value, attn_mask)
        return eager(query * head_gate, key, value, attn_mask)

    assert "is wrong" in judged(case, Expected(case), wrong)(case.side(wrong)())


# --- contests -----------------------------------------------------------------------------------------------


class CountingClock:
    """Tells the time that `spend` has spent."""

    name = "counted"

    def __init__(self):
        self.time = 0.0

    def now(self):
        return self.time

    def prepare(self):
        pass

    def finish(self):
        pass

    def spends(self, seconds, result=None):
        """A side that takes so long; `seconds` may be a function of how often it was called."""
        calls = itertools.count()

        def call():
            self.time += seconds(next(calls)) if callable(seconds) else seconds
            return result

        return TimedCall(call)


def right(result):
    return None


@pytest.fixture
def clock():
    return CountingClock()


@pytest.fixture
def bench(clock):
    return Bench(CPU, torch.float32, clock, 0.001, Ceilings(flops=1e9, bytes=1e8))


def test_ratios_are_to_the_fastest_reference(bench, clock):
    def failing():
        raise RuntimeError("No kernel for this. Try another.\nmore")

    rows = contest(
        bench,
        "attention",
        "a case",
        [
            Contestant("slow reference", clock.spends(3.0), right),
            Contestant("fast reference", clock.spends(2.0), right),
            Contestant("own", clock.spends(1.0), right),
            Contestant("wrong", clock.spends(0.1), lambda result: "it is off"),
            Contestant("failing", TimedCall(failing), right),
        ],
        {"slow reference", "fast reference", "failing"},
        Work(flops=10**9, bytes=10**7),
    )
    found = {row.contestant: row for row in rows}
    assert list(found) == ["slow reference", "fast reference", "own", "wrong", "failing"]
    assert {row.reference for row in rows if row.was_timed} == {"fast reference"}
    assert found["fast reference"].status == "reference" and found["fast reference"].seconds == 2
    assert found["own"].ratio == found["own"].low == found["own"].high == pytest.approx(0.5)
    assert found["slow reference"].ratio == pytest.approx(1.5)
    assert (found["wrong"].status, found["wrong"].note) == ("wrong", "it is off")
    assert (found["failing"].status, found["failing"].note) == ("unsupported", "No kernel for this")
    assert found["wrong"].seconds is None and found["failing"].ratio is None
    assert found["own"].position == Position(
        flops=1e9, bytes=1e7, limit="arithmetic", share=pytest.approx(1.0)
    )


def test_a_reference_that_was_only_slow_in_the_heats_is_chosen_after_all(bench, clock):
    rows = contest(
        bench,
        "attention",
        "a case",
        [
            Contestant("one", clock.spends(2.0), right),
            Contestant("two", clock.spends(lambda call: 9.0 if call < 6 else 1.0), right),
        ],
        {"one", "two"},
    )
    found = {row.contestant: row for row in rows}
    assert found["two"].status == "reference" and found["one"].ratio == pytest.approx(2)


def test_whatever_a_contestant_raises_it_is_listed(bench, clock):
    """Compilers have errors of their own, which have no base that others could know."""

    class OutOfResources(Exception):
        pass

    def failing():
        raise OutOfResources("shared memory, Required: 300000")

    rows = contest(
        bench,
        "sweep",
        "a case",
        [Contestant("one", clock.spends(1.0), right), Contestant("two", TimedCall(failing), right)],
        (),
    )
    assert [(row.status, row.note) for row in rows][1] == ("unsupported", "shared memory, Required: 300000")


def test_without_a_reference_the_first_is_one_and_alone_it_still_has_a_time(bench, clock):
    (row,) = contest(bench, "sweep", "a case", [Contestant("own", clock.spends(0.5), right)], {"notebook"})
    assert (row.status, row.seconds, row.ratio) == ("reference", 0.5, 1.0)


def test_nobody_is_right(bench, clock):
    (row,) = contest(
        bench, "sweep", "a case", [Contestant("own", clock.spends(1.0), lambda result: "no")], ()
    )
    assert row.status == "wrong" and not row.was_timed


# --- work and roofline --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [TINY, PADDED, UNFOLDED], ids=["plain", "padded", "batch items"])
@pytest.mark.parametrize("gate_name", ["0 heads off", "4 heads off", "8 heads off", "cumulative"])
def test_work_is_what_has_to_be_done(shape, gate_name):
    """Counted pair by pair: each (row that is on, key that is not padding) takes products of D channels."""
    case = case_of(shape, gate_name, "forward")
    batch, heads, rows, channels = case.query.shape
    gate = torch.ones(batch, heads, rows, 1) if case.head_gate is None else case.head_gate
    keys = torch.ones(shape.keys).bool() if case.attn_mask is None else case.attn_mask.flatten()
    products = numbers = 0
    for stream in gate.flatten(0, 1).flatten(1):
        on = [row for row in stream.tolist() if row]
        products += len(on) * int(keys.sum())
        numbers += len(on) * channels + (2 * int(keys.sum()) * channels if on else 0) + rows * channels
    numbers += 0 if case.head_gate is None else gate.numel()
    work = attention_work(case)
    assert work == Work(flops=2 * 2 * channels * products, bytes=4 * numbers)
    both = attention_work(case_of(shape, gate_name))
    assert both.flops == work.flops * 7 / 2, "5 products backward, 2 forward"
    assert both.bytes > work.bytes
    assert attention_work(case_of(shape, gate_name, "forward", torch.bfloat16)).bytes == work.bytes / 2


@pytest.mark.parametrize("work, limit", [(Work(100, 1), "arithmetic"), (Work(1, 100), "memory")])
def test_nothing_is_above_its_roof(work, limit):
    ceilings = Ceilings(flops=10.0, bytes=10.0)
    place = position(work, 10.0, ceilings)
    assert (place.limit, place.share) == (limit, 1.0)
    assert position(work, 40.0, ceilings).share == 0.25
    assert position(work, 40.0, ceilings).flops == work.flops / 40


# --- the notebooks' way -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    config = DetrConfig(
        backbone=BackboneConfig(block="basic", depths=(1, 1), widths=(8, 8), stem=8),
        width=16,
        heads=4,
        encoder_layers=2,
        decoder_layers=3,
        feedforward=32,
        queries=5,
        classes=3,
        preprocessing=Preprocessing(short_side=48, long_side=96),
    )
    return Detector(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def picture():
    return headoff.load_image(np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8))


@pytest.mark.parametrize("text", ["none", "first 2", "L1H0,L2H1"])
def test_the_notebook_finds_the_same(detector, picture, text):
    configuration = headoff.parse_configuration(text)
    notebook = Notebook(detector, picture)
    found = headoff.explain(detector, picture, [configuration], [3])
    answers = notebook.detect((configuration,))
    torch.testing.assert_close(answers.logits[:, 0], found.logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(answers.boxes[:, 0], found.boxes, rtol=0, atol=1e-10)
    maps = notebook.explain(configuration, 3, int(found.labels[0, 0]))
    peak = float(found.maps.max())
    torch.testing.assert_close(maps, found.maps[0, 0].flatten(1), rtol=0, atol=1e-9 * peak)
    assert not any(weight.requires_grad for weight in detector.parameters()), (
        "the notebook has its own weights"
    )


def comparison(patch, baseline):
    return SpeedComparison(
        patch / baseline, patch / baseline * 0.9, patch / baseline * 1.1, 0.99, (patch,), (baseline,)
    )


def test_extrapolation_is_the_sum_of_the_parts():
    """A whole of 3 s, beside parts of 0.5 and 2 s, for 9 configurations of 5 objects."""
    whole = Extrapolated(9, 5, comparison(3.0, 0.5), comparison(3.0, 2.0))
    assert whole.seconds == pytest.approx(9 * 0.5 + 45 * 2.0)
    assert whole.ratios["ratio"] == pytest.approx(3.0 / whole.seconds)
    assert whole.ratios["low"] == pytest.approx(0.9 * whole.ratios["ratio"])
    assert whole.ratios["high"] == pytest.approx(1.1 * whole.ratios["ratio"])


# --- cams kept and blocked ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    return benchmark_model(Settings(device="cpu", dtype="float32"), "model")


def test_budgets_keep_cams_and_do_not(subject):
    budgets = blocked.budgets_of(subject, "tiles")
    assert list(budgets) == [blocked.KEPT, blocked.LEAST, blocked.BLOCKED]
    assert budgets[blocked.KEPT] is None and budgets[blocked.BLOCKED] == budgets[blocked.LEAST] // 2
    detector = with_attention(subject.detector, "sdpa")
    kept = {
        name: RelevanceEngine(detector, subject.features, memory_budget=budget).keeps_cams
        for name, budget in budgets.items()
    }
    assert kept == {blocked.KEPT: True, blocked.LEAST: True, blocked.BLOCKED: False}


def test_blocked_maps_are_those_of_kept_cams(bench, subject, monkeypatch):
    (job,) = blocked.blocked_jobs(bench, "quick", subject)
    contested = []

    def judged_alone(bench, level, case, contestants, references):
        """In place of what is timed."""
        for each in contestants:
            assert each.judge(each.side.run()) is None
        contested.extend(each.name for each in contestants)
        base = {"level": level, "case": case, "dtype": "float32"}
        memory = {blocked.LEAST: 2**30, blocked.BLOCKED: 5 * 10**9}
        return [Row(contestant=name, status="timed", memory=memory.get(name), **base) for name in contested]

    monkeypatch.setattr(blocked, "contest", judged_alone)
    rows = {row.contestant: row for row in job.run()}
    assert list(rows) == [blocked.KEPT, blocked.LEAST, blocked.BLOCKED]
    assert rows[blocked.KEPT].note == "the device's own budget"
    assert rows[blocked.LEAST].note.startswith("a budget of 16 MiB; 1 GiB held; ")
    assert "4.66 GiB held, above the target of 4 GB; " in rows[blocked.BLOCKED].note
    assert "maps differ from those of kept cams by at most" in rows[blocked.BLOCKED].note


def test_other_maps_than_those_of_kept_cams_are_wrong(bench, subject, monkeypatch):
    """What a 1,000th part of one head's weights more would make of them is not let through."""
    real = blocked.explain

    def explain(detector, *arguments, memory_budget, **options):
        if memory_budget is not None:
            detector = copy.deepcopy(detector)
            detector.encoder.layers[0].self_attention.value.weight.data[:8] *= 1.001
        return real(detector, *arguments, memory_budget=memory_budget, **options)

    verdicts = {}

    def judged_alone(bench, level, case, contestants, references):
        verdicts.update({each.name: each.judge(each.side.run()) for each in contestants})
        return []

    monkeypatch.setattr(blocked, "explain", explain)
    monkeypatch.setattr(blocked, "contest", judged_alone)
    (job,) = blocked.blocked_jobs(bench, "quick", subject)
    assert job.run() == []
    assert verdicts.pop(blocked.KEPT) is None
    assert all("differ from those of kept cams by" in why for why in verdicts.values()), verdicts


def test_kernels_that_cannot_be_are_listed(bench, subject):
    (row,) = blocked._blocked(bench, subject, (headoff.parse_configuration("none"),), 1, "triton", "a case")
    assert (row.status, row.contestant) == ("unsupported", blocked.BLOCKED) and "CUDA" in row.note


# --- decodes by a graph -------------------------------------------------------------------------------------


class Graphs:
    """Stands for `DecodeGraphs`: captures at the second decode, or never."""

    def __init__(self, failures=(), captures=True):
        self.failures, self.captures, self.replays, self.decodes = list(failures), captures, 0, 0

    def decode(self, detector, memory, gates):
        self.decodes += 1
        self.replays += self.captures and self.decodes > 1
        return detector.decode(memory, gates)


@pytest.mark.parametrize("attention", levels.BY_GRAPH.values(), ids=levels.BY_GRAPH)
def test_what_is_timed_as_a_graph_is_one(subject, attention):
    workload = DecoderWorkload.of(subject, (headoff.parse_configuration("first 2"),), "forward", seed=0)
    captured = Graphs()
    side = levels.by_graph(workload, eager, captured)
    for calls in (2, 3):
        assert side.run().logits.isfinite().all() and captured.decodes == calls
    assert captured.replays == 2
    for graphs, why in (
        (Graphs(["RuntimeError: no memory"], captures=False), "no memory"),
        (Graphs(captures=False), "refused"),
    ):
        side = levels.by_graph(workload, eager, graphs)
        with pytest.raises(headoff.AttentionError, match=why):
            side.run()
    assert attention in CAPTURED


# --- the script that tunes kernels --------------------------------------------------------------------------

TUNING = Path(__file__).parents[1] / "tools" / "kernel_tuning.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def tuning():
    spec = importlib.util.spec_from_file_location("kernel_tuning", TUNING)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernel_tuning"] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["kernel_tuning"]


def a_task(tuning, clock, seconds):
    """Choices of 16 x 16 and some warps and stages; `seconds` and results by the choice."""
    from headoff.attention.fused import Tiling

    def choice(warps, stages):
        return tuning.Choice(Tiling(16, 16, warps, stages))

    def make(one):
        if one.tiling.warps == 16:
            return TimedCall(lambda: (_ for _ in ()).throw(headoff.AttentionError("it does not fit.")))
        return clock.spends(seconds(one.tiling), [torch.tensor([1.0 + (one.tiling.warps == 2)])])

    return tuning.Task(
        "a kernel",
        make,
        choice(4, 2),
        [torch.tensor([1.0]).double()],
        [torch.tensor([1.0])],
        [
            lambda best: [choice(warps, best.tiling.stages) for warps in (2, 4, 8, 16)],
            lambda best: [choice(best.tiling.warps, stages) for stages in (1, 2, 3)],
        ],
    )


def test_tuning_goes_on_from_the_best_and_times_nothing_that_is_wrong(tuning, clock):
    task = a_task(tuning, clock, lambda tiling: 1e-3 / tiling.warps + (tiling.stages == 3) * -5e-5)
    findings = tuning.tuned(task, clock, 3)
    assert {(each.tiling.warps, each.tiling.stages) for each in findings.seconds} == {
        (4, 2), (8, 2), (8, 1), (8, 3)
    }  # fmt: skip
    assert findings.wrong
    text = tuning.report(task, findings, 0.03, False)
    assert "-> write 16x16, 8 warps, 3 stages, 70% less time" in text
    assert "not timed: 16x16, 2 warps, 2 stages: WRONG: result 0 is off by 1.0e+00" in text
    assert "not timed: 16x16, 16 warps, 2 stages: it does not fit." in text
    assert "250.0 us  1.000 x the present  16x16, 4 warps, 2 stages" in text


def test_tuning_leaves_what_nothing_beats(tuning, clock):
    task = a_task(tuning, clock, lambda tiling: 1e-3 if tiling == (16, 16, 4, 2) else 0.99e-3)
    assert "-> leave it as it is" in tuning.report(task, tuning.tuned(task, clock, 3), 0.03, False)


@needs_triton
def test_tuning_needs_a_gpu_or_the_interpreter(tuning, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main([]) == 2 and "need" in capsys.readouterr().err
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert tuning.main(["--dry-run"]) == 2 and "set TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.skipif(triton_interpreter.problem() is not None, reason=str(triton_interpreter.problem()))
def test_every_choice_of_a_few_kernels_is_right():
    """Tiles, stages and shares; the other kernels are walked through by hand, for they take a minute."""
    few = ("--dtype", "bfloat16", "--only", "key_value_gradient, encoder", "--only", "relevance.left")
    done = subprocess.run(
        [sys.executable, str(TUNING), "--dry-run", *few],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TUNING.parents[1]), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("choices are right") == 2 and "not timed" not in done.stdout


# --- records, tables, plots ---------------------------------------------------------------------------------


def report_of(shapes=2):
    place = Position(flops=2e10, bytes=3e9, limit="arithmetic", share=0.4)
    rows = []
    for shape in range(shapes):
        for gate in ("0 heads off", "cumulative"):
            base = {
                "level": "attention",
                "case": f"cross {shape}, 5 keys, {gate}, forward",
                "dtype": "float32",
            }
            timed = {
                "status": "timed",
                "reference": "torch SDPA, flash",
                "position": place,
                "memory": 2048,
                **base,
            }
            rows += [
                Row(
                    contestant="torch SDPA, flash",
                    ratio=1.0,
                    seconds=2e-3,
                    **{**timed, "status": "reference"},
                ),
                Row(contestant=OWN, ratio=0.5, low=0.4, high=0.625, seconds=1e-3, **timed),
                Row(
                    contestant=EAGER,
                    ratio=12.5,
                    low=11.0,
                    high=14.0,
                    seconds=25e-3,
                    note="of one map" if shape == 0 else "",
                    **timed,
                ),
                Row(contestant=TRITON, status="unsupported", note="there is no GPU", **base),
            ]
    base = {"level": "sweep", "case": "scenes, 9 configurations", "dtype": "float32"}
    of_own = {"ratio": 0.017, "low": 0.016, "high": 0.02}
    rows += [
        Row(contestant="notebook", status="reference", reference="notebook", ratio=1.0, seconds=0.4, **base),
        Row(contestant=OWN, status="timed", reference="notebook", seconds=0.1, **base, **of_own),
        Row(contestant=EAGER, status="wrong", note="its logits are off", **base),
    ]  # fmt: skip
    made_with = {
        "command": "headoff bench --quick",
        "date": "2026-01-02",
        "headoff": "0",
        "torch": "2",
        "triton": "3",
        "float32 products": "highest",
    }
    return Report(tuple(rows), made_with, describe_machine("cpu", 1), {"float32": Ceilings(1e11, 1e10)})


def test_json_and_csv_have_every_row():
    report = report_of()
    loaded = json.loads(report.to_json())
    assert [row["contestant"] for row in loaded["rows"]] == [row.contestant for row in report.rows]
    assert loaded["rows"][1]["position"]["share"] == 0.4 and loaded["machine"]["device"] == "cpu"
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == len(report.rows)
    assert lines[1]["ratio"] == "0.5" and lines[1]["flops_per_second"] == "20000000000.0"
    assert lines[3]["ratio"] == "" and lines[3]["note"] == "there is no GPU"


def test_the_table_for_a_terminal():
    text = text_of(report_of())
    lines = text.splitlines()
    start = lines.index("  cross 0, 5 keys, 0 heads off, forward (float32)")
    assert [line.split("  ")[2] for line in lines[start + 2 : start + 5]] == [OWN, "torch SDPA, flash", EAGER]
    assert "    eager: of one map" in lines, "what is to be known of a time stands below it"
    assert "0.500  0.400 to 0.625" in lines[start + 2] and "arithmetic" in lines[start + 2]
    assert "a large copy reaches 10 GB/s, a matrix product 100 GFLOP/s" in text
    assert f"{TRITON}, unsupported in all 4 cases: there is no GPU" in text
    assert "eager, wrong in scenes, 9 configurations (float32): its logits are off" in text


def test_the_tables_for_a_page():
    text = markdown_of(report_of())
    assert text.startswith("    headoff bench --quick\n\n2026-01-02, ")
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables[:6])) == 1, "the lines of a table have as many cells"
    assert "- cross 0, 5 keys, 0 heads off, forward, eager: of one map" in text.splitlines()
    assert "| scenes, 9 configurations | 1 | 0.017 (0.016 to 0.02) | notebook |" in text
    assert "| 1 | 0.500 (0.400 to 0.625) | 12.5 (11 to 14) | torch SDPA, flash |" in text


def test_plots_of_each_level_and_shape():
    files = plots_of(report_of(shapes=2))
    assert sorted(files) == [
        "attention-float32-cross-0-5-keys.png",
        "attention-float32-cross-1-5-keys.png",
        "roofline-float32.png",
        "sweep-float32.png",
    ]
    for content in files.values():
        pixels = matplotlib.image.imread(io.BytesIO(content))
        assert pixels[..., :3].std() > 0.02, "there is something on it"
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border[:, :3] == 1).all(), "nothing is cut off"


def test_cases_keep_their_order():
    report = report_of()
    assert [case for _, case in cases_of(report.rows)][-1] == "scenes, 9 configurations"


# --- a run, and the command ---------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, tmp_path):
    """The command, in a folder of its own, on shapes of no size."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(cases.SHAPES, "quick", (TINY,))

    def run(*arguments):
        parser = argparse.ArgumentParser()
        command.add_parser(parser.add_subparsers(required=True))
        settings = parser.parse_args(["bench", *arguments])
        return settings.run(settings)

    return run


def test_a_run_from_the_command_line(call, tmp_path, capsys):
    code = call(
        "--device", "cpu", "--only", "attention", "--seconds", "0.001", "--out", "a/b", "--markdown", "t.md"
    )
    assert code == 0
    shown = capsys.readouterr()
    assert shown.err.count("bench: float32: cross, 9 x 2 queries") == 8
    assert "torch SDPA, math" in shown.out and "headoff triton, unsupported in all 8 cases" in shown.out
    names = {path.name for path in (tmp_path / "a/b").iterdir()}
    assert {"bench.json", "bench.csv", "bench.md", "roofline-float32.png"} <= names
    report = json.loads((tmp_path / "a/b/bench.json").read_text())
    assert {row["status"] for row in report["rows"]} == {"timed", "reference", "unsupported"}
    for row in report["rows"]:
        if row["status"] == "timed":
            assert row["low"] <= row["ratio"] <= row["high"] and row["memory"] > 0
    assert (tmp_path / "t.md").read_text() == (tmp_path / "a/b/bench.md").read_text()


def test_an_interrupted_run_writes_nothing(call, tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(levels, "contest", interrupt)
    assert call("--device", "cpu", "--only", "attention", "--out", "out", "--markdown", "t.md") == 130
    assert "nothing is written" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_to_are_refused_before_anything_is_measured(
    call, tmp_path, monkeypatch
):
    monkeypatch.setattr(running, "ceilings_of", None)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SettingError, match="--out file is a file; name a folder"):
        call("--out", "file")
    with pytest.raises(SettingError, match="--markdown folder is a folder; name a file"):
        call("--markdown", "folder")
    with pytest.raises(SettingError, match="device 'mars' cannot be used here"):
        call("--device", "mars")


def test_what_is_run_without_options(monkeypatch):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers(required=True))

    def plan(*arguments, device="cpu"):
        monkeypatch.setattr(command, "chosen_device", lambda name: torch.device(device))
        return command.plan_of(parser.parse_args(["bench", *arguments]))

    assert plan() == plan("--quick") == running.Plan(CPU, (torch.float32,), "quick", command.LEVELS, 0.05, 1)
    on_gpu = plan(device="cuda")
    assert (on_gpu.scale, on_gpu.dtypes, on_gpu.seconds) == ("standard", (torch.float32, torch.bfloat16), 1.0)
    assert plan("--quick", device="cuda").scale == "quick" and plan("--full").scale == "full"
    chosen = plan(
        "--dtype", "float16", "--dtype", "float16", "--only", "sweep", "--seconds", "2", "--threads", "2"
    )
    assert chosen == running.Plan(CPU, (torch.float16,), "quick", ("sweep",), 2.0, 2)


def test_the_dispatch_knows_each_backend_of_sdpa():
    assert set(SDPA_BACKENDS) < set(attention_contestants())
    assert {TRITON, OWN, EAGER, FLEX} < set(attention_contestants())
