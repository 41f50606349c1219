"""How the harness times: intervals, order, clocks, memory, machines, checks of what was timed, and pytest's options."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import headoff
from headoff.attention import eager, register_attention, registry, sdpa
from headoff.bench.models import benchmark_model, with_attention
from headoff.bench.outputs import Expected, once_noting, row_errors, truth_of
from headoff.bench.relus import ReluSides
from headoff.bench.workloads import (
    DecoderWorkload,
    OperatorWorkload,
    RelevanceWorkload,
    SweepWorkload,
)
from headoff.errors import SettingError
from headoff.harness.benchmark import table
from headoff.harness.settings import Settings
from headoff.timing import SpeedComparison, TimedCall, Verdict, compare, describe_machine
from headoff.timing.clocks import CudaClock, HostClock, HostMoment, clock_of
from headoff.timing.interleaving import FEWEST_ROUNDS, MOST_ROUNDS, InterleavedRounds, rounds_for
from headoff.timing.intervals import MOST_BLOCKS, fewest_values, median_interval
from headoff.timing.machine import ask_nvidia_smi, gpu, incomparable
from headoff.timing.memory import peak_bytes, peak_of

pytest_plugins = ["pytester"]

CPU = torch.device("cpu")


# Intervals


def test_fewest_values_is_what_the_binomial_distribution_says():
    fewest = fewest_values(0.99)
    assert 1 - 2 * 0.5**fewest >= 0.99 > 1 - 2 * 0.5 ** (fewest - 1)


def covered(make, runs: int, length: int) -> float:
    """How often the interval of simulated measurements, whose true median is 0, holds 0."""
    generator = np.random.default_rng(0)
    found = [median_interval(make(generator, length)) for _ in range(runs)]
    return sum(each.low <= 0 <= each.high for each in found) / runs


def independent(generator, length):
    """Heavy tails: rounds that something else got in the way of."""
    return generator.standard_t(1.5, length)


def bursts(generator, length, memory=0.7):
    """An autoregressive process of order 1: neighbours are alike, as under a burst of other work."""
    shocks, values = generator.standard_normal(length), np.empty(length)
    values[0] = shocks[0] / math.sqrt(1 - memory**2)
    for index in range(1, length):
        values[index] = memory * values[index - 1] + shocks[index]
    return values


@pytest.mark.parametrize("length", [8, 50, 200])
def test_intervals_cover_the_median_as_often_as_they_claim(length):
    runs = 1000
    luck = 3 * math.sqrt(0.99 * 0.01 / runs)
    assert covered(independent, runs, length) >= 0.99 - luck


def test_intervals_stand_noise_in_bursts():
    """Blocks of 12 lose little by a memory of 0.7; without blocks, the same formula covers far less."""
    runs, length = 500, 200

    def unblocked(generator, length):
        values = np.sort(bursts(generator, length))
        rank = 1
        while 1 - 2 * sum(math.comb(length, k) for k in range(rank + 1)) / 2**length >= 0.99:
            rank += 1
        return values[rank - 1] <= 0 <= values[-rank]

    generator = np.random.default_rng(0)
    without = sum(unblocked(generator, length) for _ in range(runs)) / runs
    assert covered(bursts, runs, length) > 0.95 > without + 0.05


def test_intervals_narrow_with_more_measurements():
    generator = np.random.default_rng(0)

    def width(length):
        found = median_interval(generator.standard_normal(length))
        assert found.low <= found.estimate <= found.high
        return found.high - found.low

    few, many = (statistics.median(width(length) for _ in range(30)) for length in (32, 32 * 25))
    assert many < few / 3


@pytest.mark.parametrize(
    "values, confidence, says", [([1.0] * 7, 0.99, "at least 8"), ([1.0] * 30, 1.0, "between 0 and 1")]
)
def test_intervals_that_cannot_be(values, confidence, says):
    with pytest.raises(SettingError, match=says):
        median_interval(values, confidence)


# Patch and baseline in turns, on a clock of our own


class Timeline:
    """A clock whose time passes only in calls; `speed(time, place)` is what a second of work takes."""

    name = "simulated"

    def __init__(self, speed=lambda now, place: 1.0):
        self.time, self.place, self.order, self.speed = 0.0, 0, [], speed

    def now(self):
        return self.time

    def prepare(self):
        self.order.append("flush")

    def finish(self):
        pass

    def side(self, name: str, seconds: float) -> TimedCall:
        def call():
            self.order.append(name)
            self.time += seconds * self.speed(self.time, self.place)
            self.place += 1

        return TimedCall(call)


def simulated(
    patch: float, baseline: float = 1e-3, speed=lambda now, place: 1.0, rounds=40
) -> SpeedComparison:
    clock = Timeline(speed)
    return compare(
        clock.side("patch", patch),
        clock.side("baseline", baseline),
        clock=clock,
        rounds=rounds,
        seconds=0,
        memory=False,
    )


@pytest.mark.parametrize(
    "factor, verdict",
    [(3.0, Verdict.SLOWER), (0.5, Verdict.FASTER), (1.0, Verdict.NO_SLOWER), (1.05, Verdict.NO_SLOWER)],
)
def test_verdicts_on_a_quiet_machine(factor, verdict):
    found = simulated(factor * 1e-3)
    assert found.ratio == pytest.approx(factor) and found.low <= found.ratio <= found.high
    assert found.verdict(1.10) is verdict
    assert found.sentence("mine", "sdpa").startswith(f"mine takes {found.ratio:.3f} times the time of sdpa")


def test_a_threshold_within_the_interval_is_inconclusive():
    generator = np.random.default_rng(0)
    found = simulated(1.1e-3, speed=lambda now, place: generator.lognormal(0, 0.2))
    assert found.low < 1.1 < found.high
    assert found.verdict(1.1) is Verdict.INCONCLUSIVE and "inconclusive" in found.sentence("a", "b", 1.1)


def test_order_and_drift_cancel():
    """A machine that slows down threefold, and an advantage of 20 % for whoever comes second, change nothing."""

    def speed(now, place):
        return 1.5 ** (place / 40) * (0.8 if place % 2 else 1.0)

    found = simulated(1e-3, speed=speed)
    assert found.ratio == pytest.approx(1.0, rel=1e-9)
    assert found.high - found.low < 1e-9


def test_calls_take_turns_and_each_comes_after_a_flush():
    clock = Timeline()
    pair = InterleavedRounds(clock.side("patch", 1.0), clock.side("baseline", 1.0), clock)
    for _ in range(4):
        pair.patch.run(*pair.before())
        pair.after()
    calls = ["baseline", "patch", "patch", "baseline"] * 2
    assert [each for each in clock.order if each != "flush"] == calls
    assert clock.order[::2] == ["flush"] * 8 and clock.order[1::2] == calls
    assert len(pair.baseline_rounds) == 4


def test_preparation_is_not_timed():
    clock = Timeline()

    def prepare():
        clock.time += 5.0
        return (0.25,)

    def work(seconds):
        clock.time += seconds

    found = compare(
        TimedCall(work, prepare), clock.side("baseline", 0.25), clock=clock, rounds=16, memory=False
    )
    assert found.ratio == 1.0 and set(found.patch_rounds) == {0.25}


def test_rounds_fit_the_time_and_give_an_interval():
    assert rounds_for(1.0, 10.0) == FEWEST_ROUNDS >= fewest_values()
    assert rounds_for(1.0, 1e-6) == MOST_ROUNDS
    assert rounds_for(1.0, 0.0099) == 100
    assert all(rounds_for(1.0, each) % 2 == 0 for each in (0.3, 0.031, 0.0123))


def test_what_cannot_be_compared():
    with pytest.raises(SettingError, match="even number"):
        compare(int, int, rounds=9)
    with pytest.raises(SettingError, match="cpu or cuda"):
        compare(int, int, "meta")
    with pytest.raises(SettingError, match="same even number"):
        SpeedComparison.of([1.0] * 8, [1.0] * 10)
    with pytest.raises(SettingError, match="no time"):
        SpeedComparison.of([0.0] * 8, [1.0] * 8)
    with pytest.raises(SettingError, match="largest slowdown"):
        simulated(1.0).verdict(0.0)


def test_a_comparison_turns_to_json():
    found = simulated(2e-3)
    record = json.loads(json.dumps(found.as_dict()))
    assert record["ratio"] == pytest.approx(2.0) and record["rounds"] == len(found.patch_rounds)
    assert SpeedComparison.of(found.patch_rounds, found.baseline_rounds) == found


# Clocks


def test_the_host_clock_leaves_out_waiting_for_a_processor(tmp_path):
    assert HostMoment(10.0, 1.5, 10.1) - HostMoment(4.0, 0.5, 4.1) == pytest.approx(10.0 - 4.1 - 1.0)
    file = tmp_path / "schedstat"
    file.write_text("0 0 1\n")
    clock = HostClock(str(file))
    start = clock.now()
    while clock.now() - start < 0.02:
        pass
    file.write_text("0 15000000 1\n")
    assert 0 < clock.now() - start < clock.now().before - start.after - 0.0149


def test_a_call_that_seems_to_have_waited_throughout_took_the_time_that_passed():
    start = HostMoment(4.0, 0.5, 4.1)
    assert HostMoment(5.1, 1.5, 5.2) - start == pytest.approx(1.0)
    assert HostMoment(5.1, 2.5, 5.2) - start == pytest.approx(1.0)
    assert HostMoment(5.1, 1.4, 5.2) - start == pytest.approx(0.1)


def test_the_host_clock_without_such_a_file_tells_all_time(tmp_path):
    clock = HostClock(str(tmp_path / "none"))
    assert clock.name == "time.perf_counter"
    start = clock.now()
    end = clock.now()
    assert end - start == pytest.approx(end.before - start.after) and end - start > 0


class FakeCuda:
    """As much of torch.cuda as clocks and memory use; events note what is done to them."""

    def __init__(self, l2: int = 1000) -> None:
        self.l2, self.log, self.queued, self.held, self.peak = l2, [], 0.0, 500, 500
        cuda = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self, stream):
                self.at = cuda.queued
                cuda.log.append(("record", stream))

            def synchronize(self):
                cuda.log.append(("synchronize",))

            def elapsed_time(self, end):
                return (end.at - self.at) * 1e3

        self.Event = Event

    def get_device_properties(self, device):
        return SimpleNamespace(
            name="Fake H200",
            major=9,
            minor=0,
            total_memory=1,
            L2_cache_size=self.l2,
            multi_processor_count=132,
        )

    def current_stream(self, device):
        return "stream"

    def synchronize(self, device):
        self.log.append(("all",))

    def reset_peak_memory_stats(self, device):
        self.peak = self.held

    def memory_allocated(self, device):
        return self.held

    def max_memory_allocated(self, device):
        return self.peak


def test_the_cuda_clock_waits_only_in_the_subtraction():
    cuda = FakeCuda()
    clock = CudaClock(CPU, cuda)
    start = clock.now()
    cuda.queued += 0.002
    end = clock.now()
    assert cuda.log == [("record", "stream")] * 2
    assert end - start == pytest.approx(0.002)
    assert cuda.log[-1] == ("synchronize",)


def test_the_cuda_clock_flushes_more_than_the_cache():
    clock = CudaClock(CPU, FakeCuda(l2=4096))
    clock._buffer.fill_(1)
    clock.prepare()
    assert clock._buffer.numel() > 4096 and not clock._buffer.any()


def test_a_comparison_on_the_cuda_clock():
    cuda = FakeCuda()

    def takes(seconds):
        def call():
            cuda.queued += seconds

        return call

    found = compare(takes(0.003), takes(0.001), clock=CudaClock(CPU, cuda), rounds=16, memory=False)
    assert found.ratio == pytest.approx(3.0) and found.verdict() is Verdict.SLOWER


def test_devices_have_clocks():
    assert isinstance(clock_of(CPU), HostClock)
    with pytest.raises(SettingError, match="cpu or cuda"):
        clock_of(torch.device("meta"))


# Memory


def test_peak_memory_on_a_gpu_is_the_allocators():
    cuda = FakeCuda()

    def call():
        cuda.peak = max(cuda.peak, cuda.held + 300)

    assert peak_bytes(TimedCall(call), torch.device("cuda"), cuda) == 300


def test_peak_memory_on_a_cpu_is_what_was_held_at_once():
    def call():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        return torch.empty(3 << 18, dtype=torch.uint8)

    both = TimedCall(lambda kept: call(), lambda: (torch.empty(1 << 19, dtype=torch.uint8),))
    assert peak_bytes(TimedCall(call), CPU) == 1 << 20
    assert peak_bytes(both, CPU) == (1 << 20) + (1 << 19)


def test_peaks_are_of_the_host_alone_and_in_order_of_time():
    def event(ts, count, device=0):
        return {"name": "[memory]", "ts": ts, "args": {"Device Type": device, "Bytes": count}}

    assert (
        peak_of([event(2, -5), event(1, 5), event(3, 4), event(4, 90, device=1), {"name": "aten::mm"}]) == 5
    )


# Machines


def test_a_machine_is_described_in_json():
    described = describe_machine()
    assert json.loads(json.dumps(described)) == described
    assert described["gpu"] is None and described["cpu"]["model"] and described["torch"] == torch.__version__
    assert describe_machine(threads=7)["cpu"]["threads"] == 7


def test_a_gpu_is_described_without_nvidia_smi(monkeypatch):
    monkeypatch.setenv("PATH", "")
    described = gpu(torch.device("cuda"), FakeCuda())
    assert (
        described["name"] == "Fake H200" and described["capability"] == "9.0" and described["driver"] is None
    )
    assert set(ask_nvidia_smi("GPU-1").values()) == {None}


def test_nvidia_smi_is_asked_for_the_very_gpu(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text('#!/bin/sh\n[ "$1" = --id=GPU-7 ] && echo "575.1, 1980, 3201, 1980, 3201, [N/A], 41"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    found = ask_nvidia_smi("GPU-7")
    assert (found["driver"], found["sm_clock"], found["power_limit"], found["temperature"]) == (
        "575.1",
        "1980",
        None,
        "41",
    )
    assert ask_nvidia_smi("GPU-8")["driver"] is None


def test_machines_that_cannot_be_compared_are_named():
    now = {"device": "cuda", "gpu": {"name": "H200"}, "cpu": {}}
    assert incomparable(now, now) is None
    said = incomparable(now, {**now, "gpu": {"name": "A100"}})
    assert "A100" in said and "H200" in said
    here = describe_machine(threads=1)
    other = {**here, "cpu": {**here["cpu"], "model": "Another"}}
    assert incomparable(here, here) is None and "Another" in incomparable(here, other)
    assert "threads: 2" in incomparable(here, describe_machine(threads=2))
    assert "does not say" in incomparable(here, None)


# What was timed is right


@pytest.fixture(scope="module")
def subject():
    return benchmark_model(Settings())


@pytest.fixture(scope="module")
def workloads(subject):
    some = headoff.cumulative()[:3]
    return {
        "context": OperatorWorkload.of(subject, "decoder_cross", "forward", 4, 0),
        "gradients": OperatorWorkload.of(subject, "decoder_self", "backward", 4, 0),
        "decoder": DecoderWorkload.of(subject, some, "forward", 0),
        "memory": DecoderWorkload.of(subject, some, "backward", 0),
        "sweep": SweepWorkload(subject, some),
        "relevance": RelevanceWorkload.of(subject, some[2:], 1),
    }


KINDS = ["context", "gradients", "decoder", "memory", "sweep", "relevance"]


def ignores_the_gate(query, key, value, attn_mask=None, *, head_gate=None):
    return sdpa(query, key, value, attn_mask)


def swaps_two_heads(query, key, value, attn_mask=None, *, head_gate=None):
    order = [*range(query.shape[1] - 2), query.shape[1] - 1, query.shape[1] - 2]
    return sdpa(query, key[:, order], value[:, order], attn_mask, head_gate=head_gate)


def slightly_hotter(query, key, value, attn_mask=None, *, head_gate=None):
    return sdpa(query * 1.001, key, value, attn_mask, head_gate=head_gate)


@pytest.mark.parametrize("kind", KINDS)
def test_right_outputs_pass_and_wrong_ones_do_not(workloads, kind):
    workload = workloads[kind]
    expected = Expected(workload)
    assert expected.findings(workload.side(sdpa)(), sdpa) == []
    slow = kind in ("sweep", "relevance")
    for wrong in (swaps_two_heads,) if slow else (ignores_the_gate, swaps_two_heads, slightly_hotter):
        found = expected.findings(workload.side(wrong)(), wrong)
        assert found, f"{wrong.__name__} passes"
        assert all("what was timed is wrong" in each.message and each.error > each.budget for each in found)


@pytest.mark.parametrize("kind", ["context", "gradients"])
def test_outputs_of_zeros_and_of_another_shape_are_refused(workloads, kind):
    workload = workloads[kind]
    right = workload.side(sdpa)()
    expected = Expected(workload)
    for wrong in (torch.zeros_like, lambda each: each[..., :-1], lambda each: each * math.nan):
        assert expected.findings(
            wrong(right) if isinstance(right, torch.Tensor) else tuple(map(wrong, right)), sdpa
        )


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_budgets_follow_the_dtype(dtype):
    subject = benchmark_model(Settings(dtype=dtype))
    workload = OperatorWorkload.of(subject, "decoder_self", "forward", 4, 0)
    expected = Expected(workload)
    assert expected.findings(workload.side(sdpa)(), sdpa) == []
    unit = torch.finfo(workload.dtype).eps
    assert unit <= expected.allowed("context") < 100 * unit
    assert expected.findings(workload.side(swaps_two_heads)(), swaps_two_heads)


def test_rows_that_are_truly_zero_must_be_zero():
    truth = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 4.0]])
    errors = row_errors(truth, torch.tensor([[0.0, 1e-30], [1.0, 2.5], [0.0, 4.0]]))
    assert errors.tolist() == [math.inf, 0.25, 0.0]


def test_the_oracle_follows_a_relu_that_rounding_decides(workloads, subject):
    """Where rounding decides, a unit's side changes the true gradient; where it does not, the oracle keeps its own."""
    workload = workloads["memory"]
    _, sides = once_noting(workload, eager)
    name, masks = next(iter(sides._on.items()))
    assert name.startswith("decoder.layers.0") and masks[0].dtype == torch.bool
    plain = truth_of(workload, sides)["gradient of the memory"].rows
    opposite = ReluSides()
    opposite._on = {name: [~mask for mask in each] for name, each in sides._on.items()}
    assert row_errors(plain, truth_of(workload, opposite)["gradient of the memory"].rows) < 1e-2
    exact = workload.in_dtype(torch.float64)
    with opposite.followed(exact.subject.detector, resolution=math.inf):
        turned = exact.outputs(exact.side(eager)())["gradient of the memory"].rows
    assert row_errors(plain, turned) > 0.1
    assert not exact.subject.detector.decoder.layers[0].feedforward.expand._forward_hooks


def test_detectors_share_weights_and_not_attentions(subject):
    one, two = with_attention(subject.detector, "sdpa"), with_attention(subject.detector, eager)
    assert one.attention is sdpa and two.attention is eager
    assert one.class_head.weight is two.class_head.weight is subject.detector.class_head.weight


def test_sizes_that_are_not_known():
    with pytest.raises(SettingError, match="auto, model, r50, dc5"):
        benchmark_model(Settings(), "huge")


# Real calls


def thrice(query, key, value, attn_mask=None, *, head_gate=None):
    for _ in range(2):
        sdpa(query, key, value, attn_mask, head_gate=head_gate)
    return sdpa(query, key, value, attn_mask, head_gate=head_gate)


def test_a_patch_that_calls_attention_three_times_is_slower(workloads):
    workload = workloads["context"]
    found = compare(workload.side(thrice), workload.side(sdpa), seconds=0.2, memory=False)
    assert found.verdict() is Verdict.SLOWER and 2 < found.ratio < 4
    again = compare(workload.side(sdpa), workload.side(thrice), seconds=0.2, memory=False)
    assert again.verdict() is Verdict.FASTER and 2 < 1 / again.ratio < 4


def raises(query, key, value, attn_mask=None, *, head_gate=None):
    if head_gate is None or (head_gate == 0).sum() < 2:  # as in the first calls, which are to succeed
        return eager(query, key, value, attn_mask, head_gate=head_gate)
    raise RuntimeError("no such block size")


# Under pytest

ONE = "encoder_self-forward-4"


@pytest.fixture
def suite(pytester, request, at_a_desk):
    """Run the benchmark suite in a folder of its own, one benchmark of it, with the attentions above by name."""
    source = request.path.with_name("test_heads_off_benchmark.py")
    pytester.makepyfile(test_heads_off_benchmark=source.read_text())
    known = dict(registry._registered)
    for wrong in (thrice, ignores_the_gate, raises):
        register_attention(wrong.__name__, wrong)

    def run(*options, only=ONE):
        threads = torch.get_num_threads()
        try:
            return pytester.runpytest_inprocess(
                "--import-mode=importlib",  # the suite itself may be imported already, under the same name
                "-p",
                "headoff.harness.plugin.hooks",
                "-k",
                only,
                "-q",
                *options,
            )
        finally:
            torch.set_num_threads(threads)

    yield run
    registry._registered.clear()
    registry._registered.update(known)


def test_results_are_in_the_table_and_the_json(suite, pytester):
    result = suite("--benchmark-json=found.json", "--attention=eager", "--max-slowdown=9")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*eager against sdpa*", "encoder_self forward, 4 heads off*"])
    document = json.loads((pytester.path / "found.json").read_text())
    (benchmark,) = document["benchmarks"]
    found = benchmark["extra_info"]
    assert found["low"] <= found["ratio"] <= found["high"] and found["outputs"] == "right"
    assert found["rounds"] == benchmark["stats"]["rounds"] == len(benchmark["stats"]["data"])
    assert found["patch_seconds"] == pytest.approx(benchmark["stats"]["median"])
    assert found["patch_memory"] > found["baseline_memory"] > 0
    assert benchmark["group"] == "encoder_self forward" and "perf_counter" in benchmark["options"]["timer"]
    assert document["headoff"]["machine"]["cpu"]["threads"] == 1
    assert document["headoff"]["verdicts"] == {found["verdict"]: 1}


def test_a_slower_patch_fails_and_a_wrong_one_says_that_it_is_wrong(suite):
    result = suite("--attention=thrice")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*thrice takes * times the time of sdpa*slower than the 1.1 allowed*"])
    result = suite("--attention=ignores_the_gate")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*what was timed is wrong, its context*", "*and wrong*"])


def test_a_patch_that_raises_is_said_to(suite):
    result = suite("--attention=raises")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*crash: encoder_self*raises raised RuntimeError: no such block size*"])


def test_without_timing_outputs_are_checked(suite):
    assert suite("--benchmark-disable", "--attention=eager").ret == 0
    result = suite("--benchmark-disable", "--attention=ignores_the_gate")
    assert result.ret == 1 and "against sdpa" not in result.stdout.str()


def test_benchmarks_can_be_skipped(suite):
    suite("--benchmark-skip").assert_outcomes(skipped=1)


def test_workers_check_outputs(suite, pytester):
    """pytest-xdist switches benchmarks off: a worker shares its machine."""
    pytester.makeconftest(
        """
        from headoff.attention import register_attention, sdpa

        def ignores_the_gate(query, key, value, attn_mask=None, *, head_gate=None):
            return sdpa(query, key, value, attn_mask)

        register_attention("ignores_the_gate", ignores_the_gate)
        """
    )
    result = suite("-n", "2", "--attention=ignores_the_gate")
    result.assert_outcomes(failed=1)
    assert "what was timed is wrong" in result.stdout.str()


@pytest.mark.filterwarnings("ignore:the saved run was timed on Fake H200")
def test_saved_runs_of_another_processor_are_not_compared_silently(suite, pytester):
    assert suite("--benchmark-save=one").ret == 0
    (saved,) = pytester.path.glob(".benchmarks/*/0001_one.json")
    same = suite("--benchmark-compare", "--benchmark-compare-fail=min:100000%")
    assert same.ret == 0 and "cannot be compared" not in same.stdout.str()
    document = json.loads(saved.read_text())
    document["headoff"]["machine"] |= {"device": "cuda", "gpu": {"name": "Fake H200"}}
    saved.write_text(json.dumps(document))
    other = suite("--benchmark-compare")
    assert other.ret == 0
    other.stdout.fnmatch_lines(["*timed on Fake H200, this one runs on *cannot be compared*"])
    refused = suite("--benchmark-compare", "--benchmark-compare-fail=min:100000%")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--benchmark-compare-fail cannot be used here*Fake H200*"])


def test_histograms_are_drawn(suite, pytester):
    pytest.importorskip("pygal")
    assert suite("--benchmark-histogram=found").ret == 0
    assert list(pytester.path.glob("found*.svg"))


def test_other_benchmarks_are_left_alone(pytester, at_a_desk):
    pytester.makepyfile("def test_other(benchmark): benchmark.pedantic(int, rounds=2)")
    result = pytester.runpytest_inprocess("-p", "headoff.harness.plugin.hooks", "--benchmark-json=found.json")
    assert result.ret == 0 and "against" not in result.stdout.str()
    assert "headoff" not in json.loads((pytester.path / "found.json").read_text())


def test_the_table_says_what_is_wrong():
    record = simulated(2e-3).as_dict() | {"name": "one", "verdict": "faster", "outputs": "wrong"}
    head, rule, row = table([record])
    assert head.startswith("benchmark") and set(rule) == {"-"}
    assert "faster, and wrong" in row and "2.00 ms" in row and row.endswith("-")
    assert MOST_BLOCKS >= fewest_values()
