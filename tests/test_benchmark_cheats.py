"""Benchmarks are not fooled: attentions that are timed for something else than their work (tests/cheats.py)."""

from __future__ import annotations

import os
import random
import secrets
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import cheats
import pytest
import torch

import headoff
from headoff.attention import eager, sdpa
from headoff.bench import pytest_runner as benchmarks
from headoff.bench.calls import AttentionShape, AttentionWorkload
from headoff.bench.pytest_runner import BenchmarkRunner
from headoff.harness.finding import WrongAttention
from headoff.harness.originals import Originals
from headoff.harness.plugin.patch import Patch
from headoff.harness.settings import Settings
from headoff.timing.clocks import CudaClock, HostClock, no_tracing
from headoff.timing.comparison import SpeedComparison

CPU = torch.device("cpu")
SHAPE = AttentionShape("cheated", 1, 40, 60)


class Benchmark:
    """What pytest-benchmark does with `pedantic`."""

    disabled = False

    def __init__(self, clock):
        self.clock, self.extra_info, self.group = clock, {}, None
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, setup, teardown, rounds):
        for _ in range(rounds):
            arguments, _ = setup()
            with no_tracing():
                start = self.clock.now()
                target(*arguments)
                end = self.clock.now()
            self.stats.stats.data.append(end - start)
            teardown(*arguments)


def workload(direction="forward", device=CPU):
    return AttentionWorkload.of(SHAPE, direction, None, "none off", device, torch.float32)


def findings(attention, direction="forward", device="cpu"):
    """What a benchmark of `attention` finds, apart from its being slow."""
    runner = BenchmarkRunner(
        Patch(attention, Settings(device=device)), SimpleNamespace(stash=pytest.Stash()), 0.01
    )
    try:
        runner.run(Benchmark(runner.clock), workload(direction, torch.device(device)), group="cheats")
    except WrongAttention as error:
        return [finding for finding in error.findings if finding.property != "time"]
    return []


@pytest.fixture
def restored(monkeypatch):
    """Everything that a cheat replaces is as before after the test."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield monkeypatch
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(1)
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


def like_compiled(query, key, value, attn_mask=None, *, head_gate=None):
    """Its result has a note of torch.compile."""
    context = sdpa(query, key, value, attn_mask, head_gate=head_gate)
    context._dynamo_dynamic_indices = {2}
    return context


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("attention", [sdpa, eager, like_compiled])
def test_honest_ones_pass(attention, direction):
    assert findings(attention, direction) == []


SAME_AGAIN = "gives the same result again for inputs with other contents in the same memory"
ONLY_TIMED = "its timed result is wrong, and right for the same inputs when it is not timed"


@pytest.mark.parametrize(
    "cheat, sentence",
    {
        "by_address": SAME_AGAIN,
        "by_size": SAME_AGAIN,
        "by_coarse_fingerprint": SAME_AGAIN,
        "late_by_thread": "returns before its result is written",
        "lazy": "returned a Lazy and a tensor with methods of its own instead of a plain tensor",
        "from_other_tensors": "the output of the timed call is wrong",
        "from_freed_memory": "the output of the timed call is wrong",
        "after_the_warm_up": "the output of the timed call is wrong",
        "every_other_call": "the output of the timed call is wrong",
        "by_the_stack": ONLY_TIMED,
        "by_threads": "the output of the timed call is wrong",
        "by_the_environment": "the output of the timed call is wrong",
        "by_the_gradient_mode": "the output of the timed call is wrong",
        "low_precision": "changes torch's float32 matmul precision from highest to medium",
        "more_threads": "changes torch's number of threads from 1 to 2",
        "by_helpers": "while it is timed, other threads of the process work",
        "slowing_the_baseline": "is timed, other threads of the process work",
    }.items(),
    ids=lambda text: text.split()[0] if text.islower() and " " not in text else "",
)
def test_cheats_are_named(cheat, sentence, restored):
    found = findings(getattr(cheats, cheat)())
    assert any(sentence in finding.message for finding in found), [finding.message for finding in found]


def test_what_remembers_by_contents_gains_nothing():
    """Its inputs never come again, so it is honest in every timed call."""
    assert findings(cheats.by_one_element()) == []


REPLACEMENTS = {
    "time.perf_counter": lambda patch: patch.setattr(time, "perf_counter", lambda: 0.0),
    "headoff.timing.clocks.HostClock.now": lambda patch: patch.setattr(HostClock, "now", lambda self: 0.0),
    "headoff.timing.comparison.SpeedComparison.of": lambda patch: patch.setattr(
        SpeedComparison, "of", lambda *_: SpeedComparison(0.01, 0.01, 0.01, (1.0,), (1.0,))
    ),
    "secrets.randbits": lambda patch: patch.setattr(secrets, "randbits", lambda bits: 7),
    "random.Random.randrange": lambda patch: patch.setattr(random.Random, "randrange", lambda *_: 0),
    "statistics.median": lambda patch: patch.setattr(statistics, "median", min),
    "torch.nn.functional.scaled_dot_product_attention": lambda patch: patch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", eager
    ),
    "headoff.bench.pytest_runner.peak_bytes": lambda patch: patch.setattr(benchmarks, "peak_bytes", len),
    "torch.Tensor.copy_": lambda patch: patch.setattr(torch.Tensor, "copy_", torch.Tensor.add_),
    "torch.cuda.streams.Event.elapsed_time": lambda patch: patch.setattr(
        torch.cuda.Event, "elapsed_time", max
    ),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_is_replaced_is_named(name, monkeypatch):
    before = Originals.now()
    assert before.replaced() == []
    REPLACEMENTS[name](monkeypatch)
    changed = before.replaced()
    monkeypatch.undo()
    assert name in changed and before.replaced() == []


def test_exchanged_code_is_named():
    def fake(self):
        return 0.0

    before, code = Originals.now(), HostClock.prepare.__code__
    HostClock.prepare.__code__ = fake.__code__
    try:
        assert before.replaced() == ["headoff.timing.clocks.HostClock.prepare"]
    finally:
        HostClock.prepare.__code__ = code


def test_a_replaced_kernel_of_torch_is_named():
    before = Originals.now()
    library = torch.library.Library("aten", "IMPL")
    library.impl("bmm", lambda one, other: one, "CPU")
    try:
        assert before.replaced() == ["torch's operator aten::bmm"]
    finally:
        library._destroy()
    assert before.replaced() == []


def test_a_clock_replaced_in_a_call_is_named(monkeypatch):
    original = HostClock.now

    def replace():
        monkeypatch.setattr(HostClock, "now", lambda self: original(self))

    (found,) = findings(cheats._changing(replace)())
    assert "it has replaced headoff.timing.clocks.HostClock.now" in found.message


IMPORTED = """
import time
from torch.nn import functional
import torch

torch.set_float32_matmul_precision("medium")  # is set back before anything is timed
sdpa, start = functional.scaled_dot_product_attention, time.perf_counter()

def slow(*args, **kwargs):
    time.sleep(0.01)
    return sdpa(*args, **kwargs)

functional.scaled_dot_product_attention = slow

def attention(query, key, value, attn_mask=None):
    return sdpa(query, key, value, attn_mask)
"""


def test_what_its_import_replaces_is_named(tmp_path):
    (tmp_path / "kernel.py").write_text(IMPORTED)
    program = "import sys, headoff.cli; sys.exit(headoff.cli.main())"
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "verify", "kernel.py:attention", "--only", "benchmark"),
            *("--", "-k", "test_attention and encoder_self and forward and 4"),
        ],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(Path(headoff.__file__).parents[1]), "HEADOFF_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "is wrong: timing: " in done.stdout
    # And nothing else: pytest and torch replace functions of their own.
    assert "it has replaced torch.nn.functional.scaled_dot_product_attention; neither" in done.stdout


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
def test_cuda_side_stream():
    found = findings(cheats.on_a_side_stream(), device="cuda")
    assert any("returns before its result is written" in finding.message for finding in found)


@needs_gpu
def test_cuda_persisting_l2_window():
    """A carve-out of the L2 cache is taken back before each timed call."""
    clock = CudaClock(torch.device("cuda"))
    clock.driver.cuCtxSetLimit(clock.PERSISTING_L2, 1 << 20)
    clock.prepare()
    assert clock.persisting_l2() == 0
