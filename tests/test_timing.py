"""Timing: intervals, interleaved rounds, verdicts, clocks, memory, and the description of the machine."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headoff.errors import SettingError
from headoff.timing import (
    SpeedComparison,
    TimedCall,
    Turns,
    Verdict,
    describe_machine,
    peak_bytes,
    processor,
    time_in_turns,
    torch_threads,
)
from headoff.timing.clocks import CudaClock, HostClock, HostMoment, clock_of
from headoff.timing.comparison import CONFIDENCE, FEWEST_VALUES, MOST_BLOCKS, median_interval
from headoff.timing.machine import ask_nvidia_smi, gpu
from headoff.timing.memory import peak_of
from headoff.timing.turns import FEWEST_ROUNDS, MOST_ROUNDS, rounds_for

CPU = torch.device("cpu")


# Intervals


def test_fewest_values_is_what_the_binomial_distribution_says():
    assert 1 - 2 * 0.5**FEWEST_VALUES >= CONFIDENCE > 1 - 2 * 0.5 ** (FEWEST_VALUES - 1)


def covered(make, runs: int, length: int) -> float:
    """How often the interval of simulated measurements, whose true median is 0, holds 0."""
    generator = np.random.default_rng(0)
    found = [median_interval(make(generator, length)) for _ in range(runs)]
    return sum(interval.low <= 0 <= interval.high for interval in found) / runs


def independent(generator, length):
    """Heavy tails, as when other work interrupts a round."""
    return generator.standard_t(1.5, length)


def bursts(generator, length, memory=0.7):
    """An autoregressive process of order 1: neighbours are alike, as in a burst of other work."""
    shocks, values = generator.standard_normal(length), np.empty(length)
    values[0] = shocks[0] / math.sqrt(1 - memory**2)
    for index in range(1, length):
        values[index] = memory * values[index - 1] + shocks[index]
    return values


@pytest.mark.parametrize("length", [8, 50, 200])
def test_intervals_cover_the_median_as_often_as_they_claim(length):
    runs = 500
    luck = 3 * math.sqrt(0.99 * 0.01 / runs)
    assert covered(independent, runs, length) >= 0.99 - luck


def test_intervals_hold_under_noise_in_bursts():
    """With blocks of neighbours the coverage holds; without, the same formula covers far less."""
    runs, length = 300, 200

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


def test_too_few_measurements_give_no_interval():
    with pytest.raises(SettingError, match="at least 8"):
        median_interval([1.0] * 7)


# Patch and baseline in turns, on a simulated clock


class SimulatedClock:
    """A clock whose time passes only in calls; `speed(time, place)` is how long a second of work takes."""

    name = "simulated"

    def __init__(self, speed=lambda now, place: 1.0):
        self.time, self.place, self.order, self.speed = 0.0, 0, [], speed

    def now(self):
        return self.time

    def prepare(self):
        self.order.append("flush")

    def finish(self):
        pass

    def call(self, name: str, seconds: float) -> TimedCall:
        def run():
            self.order.append(name)
            self.time += seconds * self.speed(self.time, self.place)
            self.place += 1

        return TimedCall(run)


def compare(patch: TimedCall, baseline: TimedCall, clock, **options) -> SpeedComparison:
    """Patch and baseline timed in turns; by default in 40 rounds."""
    baseline_rounds, patch_rounds = time_in_turns(
        [baseline, patch], clock, **({"seconds": 0, "rounds": 40} | options)
    )
    return SpeedComparison.of(patch_rounds, baseline_rounds)


def simulated(patch: float, baseline: float = 1e-3, speed=lambda now, place: 1.0) -> SpeedComparison:
    clock = SimulatedClock(speed)
    return compare(clock.call("patch", patch), clock.call("baseline", baseline), clock)


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
    """A machine that slows down threefold, and an advantage of 20% for the second call change nothing."""

    def speed(now, place):
        return 1.5 ** (place / 40) * (0.8 if place % 2 else 1.0)

    found = simulated(1e-3, speed=speed)
    assert found.ratio == pytest.approx(1.0, rel=1e-9)
    assert found.high - found.low < 1e-9


@pytest.mark.parametrize("names", [["baseline", "patch"], ["one", "two", "three"]])
def test_calls_take_turns_and_each_comes_after_a_flush(names):
    clock = SimulatedClock()
    turns = Turns([clock.call(name, 1.0) for name in names], clock)
    for _ in range(4):
        turns.calls[-1].run(*turns.before())
        turns.after()
    calls = [*names, *reversed(names)] * 2
    assert [name for name in clock.order if name != "flush"] == calls
    assert clock.order[::2] == ["flush"] * len(calls) and clock.order[1::2] == calls
    assert [len(rounds) for rounds in turns.rounds] == [4] * (len(names) - 1) + [0]


def test_drift_cancels_among_any_number_of_calls():
    clock = SimulatedClock(lambda now, place: 1.0 + place / 100)
    rounds = time_in_turns([clock.call(str(n), 1.0) for n in range(5)], clock, 0, rounds=40)
    for first in rounds:
        assert sum(first) == pytest.approx(sum(rounds[0]))


def test_setup_is_not_timed():
    clock = SimulatedClock()

    def prepare():
        clock.time += 5.0
        return (0.25,)

    def work(seconds):
        clock.time += seconds

    found = compare(TimedCall(work, prepare), clock.call("baseline", 0.25), clock)
    assert found.ratio == 1.0 and set(found.patch_rounds) == {0.25}


def test_rounds_fit_the_time_and_give_an_interval():
    assert rounds_for(1.0, 10.0) == FEWEST_ROUNDS >= FEWEST_VALUES
    assert rounds_for(1.0, 10.0, patience=60.0) == 2
    assert rounds_for(1.0, 7.0, patience=60.0) == FEWEST_ROUNDS
    assert rounds_for(1.0, 1e-6) == MOST_ROUNDS
    assert rounds_for(1.0, 0.0099) == 100
    assert all(rounds_for(1.0, seconds) % 2 == 0 for seconds in (0.3, 0.031, 0.0123))


def test_impossible_comparisons():
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


def test_the_host_clock_without_that_file_counts_all_time(tmp_path):
    clock = HostClock(str(tmp_path / "none"))
    assert clock.name == "time.perf_counter"
    start = clock.now()
    end = clock.now()
    assert end - start == pytest.approx(end.before - start.after) and end - start > 0


class FakeCuda:
    """The part of torch.cuda that clocks and memory use; events log what is done to them."""

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


def test_the_cuda_clock_takes_back_what_kernels_keep_in_the_cache():
    class Driver:
        def __init__(self):
            self.calls = []

        def cuCtxSetLimit(self, limit, size):
            self.calls.append((limit, size))

        def cuCtxResetPersistingL2Cache(self):
            self.calls.append("reset")

        def cuCtxGetLimit(self, size, limit):
            size._obj.value = 5

    driver = Driver()
    clock = CudaClock(CPU, FakeCuda(), driver)
    clock.prepare()
    assert driver.calls == [(CudaClock.PERSISTING_L2, 0), "reset"] and clock.persisting_l2() == 5


def test_a_watch_sees_every_timed_call_from_outside_its_time():
    clock, seen = SimulatedClock(), []

    class Watch:
        def before(self, index):
            seen.append(("before", index))
            clock.time += 1.0

        def ready(self, index):
            seen.append(("ready", index))

        def after(self, index, result):
            seen.append(("after", index, result))
            clock.time += 1.0

    turns = Turns([TimedCall(lambda: "baseline"), clock.call("patch", 0.5)], clock, Watch())
    turns.warm_up(0)
    assert seen == [(what, index) for _ in range(2) for index in (0, 1) for what in ("before", "ready")]
    seen.clear()
    for _ in range(2):
        turns.run(*turns.before())
        turns.after()
    assert [entry[1:] for entry in seen if entry[0] == "after"] == [
        (0, "baseline"),
        (1, None),
        (1, None),
        (0, "baseline"),
    ]
    assert turns.rounds[0] == [0.0, 0.0]


def test_a_comparison_on_the_cuda_clock():
    cuda = FakeCuda()

    def takes(seconds):
        def call():
            cuda.queued += seconds

        return call

    found = compare(TimedCall(takes(0.003)), TimedCall(takes(0.001)), CudaClock(CPU, cuda))
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

    both = TimedCall(lambda _: call(), lambda: (torch.empty(1 << 19, dtype=torch.uint8),))
    assert peak_bytes(TimedCall(call), CPU) == 1 << 20
    assert peak_bytes(both, CPU) == (1 << 20) + (1 << 19)


def test_peaks_count_the_cpu_alone_in_order_of_time():
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


def test_a_processor_is_named_with_its_threads():
    assert processor({"device": "cuda", "gpu": {"name": "H200"}, "cpu": {}}) == "H200"
    assert processor(describe_machine(threads=2)) == f"{describe_machine()['cpu']['model']}, threads: 2"


# Real calls


def test_three_times_the_work_is_slower():
    matrix = torch.randn(192, 192)

    def once():
        return matrix @ matrix

    def thrice():
        return matrix @ matrix, matrix @ matrix, matrix @ matrix

    calls, clock = (TimedCall(thrice), TimedCall(once)), clock_of(CPU)
    with torch_threads():
        found = compare(*calls, clock, seconds=0.3, rounds=None)
        again = compare(*reversed(calls), clock, seconds=0.3, rounds=None)
    assert found.verdict() is Verdict.SLOWER and 2 < found.ratio < 4
    assert again.verdict() is Verdict.FASTER and 2 < 1 / again.ratio < 4
    assert MOST_BLOCKS >= FEWEST_VALUES
