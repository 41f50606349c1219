"""The maintainers' tools for Triton kernels: how a tiling is chosen, and what is reported."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter

import headoff
from headoff.attention import fused
from headoff.relevance import fused_vjp
from headoff.timing import TimedCall

TOOL = Path(__file__).parents[1] / "tools" / "triton_kernels.py"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


@pytest.fixture(scope="module")
def tuning():
    spec = importlib.util.spec_from_file_location("triton_kernels", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["triton_kernels"] = module  # dataclasses look their module up by its name
    spec.loader.exec_module(module)
    yield module
    del sys.modules["triton_kernels"]


class SimulatedClock:
    """Time passes only in the calls that `spends` makes."""

    time = 0.0

    def now(self):
        return self.time

    def prepare(self):
        pass

    def finish(self):
        pass

    def spends(self, seconds, result):
        def run():
            self.time += seconds
            return result

        return TimedCall(run)


@pytest.fixture
def clock():
    return SimulatedClock()


def a_task(tuning, clock, seconds):
    """Choices of 16 x 16 with some warps and stages; 2 warps are wrong, and 16 do not fit."""

    def choice(warps, stages):
        return tuning.Choice(16, 16, warps, stages)

    def make(one):
        if one.warps == 16:
            return TimedCall(lambda: (_ for _ in ()).throw(headoff.AttentionError("it does not fit.")))
        return clock.spends(seconds(one), [torch.tensor([1.0 + (one.warps == 2)])])

    return tuning.Task(
        "a kernel",
        make,
        functools.partial(tuning.mismatch, [torch.tensor([1.0]).double()], [torch.tensor([1.0])]),
        choice(4, 2),
        [
            [{"warps": warps} for warps in (2, 4, 8, 16)],
            [{"stages": stages} for stages in (1, 2, 3)],
        ],
    )


def test_tuning_goes_on_from_the_best_and_times_nothing_that_is_wrong(tuning, clock):
    task = a_task(tuning, clock, lambda one: 1e-3 / one.warps + (one.stages == 3) * -5e-5)
    findings = tuning.tuned(task, clock, 3)
    timed = {(choice.warps, choice.stages) for choice in findings.seconds}
    assert timed == {(4, 2), (8, 2), (8, 1), (8, 3)}
    assert findings.wrong
    text = tuning.report(task, findings, 0.03, False)
    assert "-> write 16x16, 8 warps, 3 stages, 70% less time" in text
    assert "not timed: 16x16, 2 warps, 2 stages: WRONG: result 0 is off by 1.0e+00" in text
    assert "not timed: 16x16, 16 warps, 2 stages: it does not fit." in text
    assert "250.0 us  1.000 x the present  16x16, 4 warps, 2 stages" in text


def test_tuning_keeps_what_nothing_beats(tuning, clock):
    task = a_task(tuning, clock, lambda one: 1e-3 if one == tuning.Choice(16, 16, 4, 2) else 0.99e-3)
    assert "-> leave it as it is" in tuning.report(task, tuning.tuned(task, clock, 3), 0.03, False)


@needs_triton
def test_a_choice_takes_the_place_of_the_packages_own(tuning):
    query, key = torch.empty(1, 8, 900, 32), torch.empty(1, 8, 850, 32)
    own, of_relevance = fused.tilings(query, key), fused_vjp.tiling(32)
    with tuning.choosing(tuning.Choice(rows=128, stages=3, enough_programs=7), "query_gradient"):
        changed = fused.tilings(query, key)
        assert changed.query_gradient == (128, own.query_gradient.keys, own.query_gradient.warps, 3)
        assert changed.forward == own.forward and fused.ENOUGH_PROGRAMS == fused_vjp.ENOUGH_PROGRAMS == 7
    with tuning.choosing(tuning.Choice(warps=2)):
        assert {tiling.warps for tiling in (*fused.tilings(query, key), fused_vjp.tiling(32))} == {2}
    assert (fused.tilings(query, key), fused_vjp.tiling(32)) == (own, of_relevance)


@needs_triton
def test_resources_are_of_what_would_be_launched(tuning, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "compiled", lambda launch, capability: tuning.Resources(capability, 0, 1024))
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter compiles nothing")
    assert tuning.main(["resources", "--only", "attention.forward", "--tile", "128x64", "--warps", "8"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| attention.forward")]
    assert len(rows) == 6 and all("128x64x32 |" in row and "80 / 90" in row for row in rows)


@needs_triton
def test_tuning_needs_a_gpu_or_the_interpreter(tuning, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tuning.main(["tune"]) == 2 and "need" in capsys.readouterr().err
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert tuning.main(["tune", "--dry-run"]) == 2 and "set TRITON_INTERPRET=1" in capsys.readouterr().err


@pytest.mark.skipif(triton_interpreter.problem() is not None, reason=str(triton_interpreter.problem()))
def test_every_choice_of_one_kernel_is_right():
    """Tiles, stages and shares; the other kernels are checked by hand, because they take a minute."""
    done = subprocess.run(
        [sys.executable, str(TOOL), "tune", "--dry-run", "--dtype", "bfloat16", "--only", "relevance.left"],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TOOL.parents[1]), *sys.path]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("choices are right") == 1 and "not timed" not in done.stdout
