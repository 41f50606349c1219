"""Benchmarks under pytest: the table, the JSON, wrong and slow patches, saved runs of another machine."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import torch._inductor.test_operators  # noqa: F401  a nested run that imports it leaves it half registered

from headoff.attention import eager, register_attention, registry, sdpa
from headoff.bench.pytest_runner import model_for
from headoff.errors import SettingError
from headoff.harness.report.terminal import benchmark_lines
from headoff.harness.settings import Settings
from headoff.timing import SpeedComparison

pytest_plugins = ["pytester"]


def thrice(query, key, value, attn_mask=None, *, head_gate=None):
    for _ in range(2):
        sdpa(query, key, value, attn_mask, head_gate=head_gate)
    return sdpa(query, key, value, attn_mask, head_gate=head_gate)


def ignores_the_gate(query, key, value, attn_mask=None, *, head_gate=None):
    return sdpa(query, key, value, attn_mask)


def raises(query, key, value, attn_mask=None, *, head_gate=None):
    if head_gate is None or (head_gate == 0).sum() < 2:  # the plugin's first calls are to succeed
        return eager(query, key, value, attn_mask, head_gate=head_gate)
    raise RuntimeError("no such block size")


ONE = "encoder_self-forward-4"


@pytest.fixture
def suite(pytester, request, at_a_desk):
    """Run one benchmark of the suite in a folder of its own; the attentions above are known by name."""
    source = request.path.with_name("test_heads_off_benchmark.py")
    pytester.makepyfile(test_heads_off_benchmark=source.read_text())
    known = dict(registry._registered)
    for attention in (thrice, ignores_the_gate, raises):
        register_attention(attention.__name__, attention)

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
    histogram = ["--benchmark-histogram=found"] if importlib.util.find_spec("pygal") else []
    result = suite("--benchmark-json=found.json", "--attention=eager", "--max-slowdown=9", *histogram)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*eager against sdpa*", "| encoder_self, 4 heads off, forward*"])
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
    assert len(list(pytester.path.glob("found*.svg"))) == len(histogram)


def test_what_a_patch_raises_is_reported(suite):
    result = suite("--attention=raises")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*crash: encoder_self*raises raised RuntimeError: no such block size*"])


def test_benchmarks_can_be_skipped(suite):
    suite("--benchmark-skip").assert_outcomes(skipped=1)


@pytest.mark.filterwarnings("ignore:the saved run was timed on Fake H200")
def test_saved_runs_of_another_processor_are_not_compared_silently(suite, pytester):
    assert suite("--benchmark-save=one").ret == 0
    (saved,) = pytester.path.glob(".benchmarks/*/0001_one.json")
    document = json.loads(saved.read_text())
    document["headoff"]["machine"] |= {"device": "cuda", "gpu": {"name": "Fake H200"}}
    saved.write_text(json.dumps(document))
    other = suite("--benchmark-compare")
    assert other.ret == 0
    other.stdout.fnmatch_lines(["*timed on Fake H200, this one runs on *cannot be compared*"])
    refused = suite("--benchmark-compare", "--benchmark-compare-fail=min:100000%")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    refused.stderr.fnmatch_lines(["*--benchmark-compare-fail cannot be used here*Fake H200*"])


def test_other_benchmarks_are_left_alone(pytester, at_a_desk):
    pytester.makepyfile("def test_other(benchmark): benchmark.pedantic(int, rounds=2)")
    result = pytester.runpytest_inprocess("-p", "headoff.harness.plugin.hooks", "--benchmark-json=found.json")
    assert result.ret == 0 and "against" not in result.stdout.str()
    assert "headoff" not in json.loads((pytester.path / "found.json").read_text())


def test_the_table_says_what_is_wrong():
    found = SpeedComparison.of([2e-3] * 8, [1e-3] * 8)
    memory = {"patch_memory": 2048, "baseline_memory": None}
    record = (
        found.as_dict()
        | memory
        | {"name": "one", "verdict": "faster", "outputs": "wrong", "patch": "mine.py:f", "baseline": "sdpa"}
    )
    title, head, rule, row = benchmark_lines([record])
    assert "mine.py:f against sdpa" in title
    assert "benchmark" in head and set(rule) == set("|- :")
    assert "faster, and wrong" in row and "2.00 ms" in row and row.endswith("2.00 KiB |        - |")


def test_a_slower_patch_fails(suite):
    # Longer than by default: a busy machine would make the default inconclusive.
    result = suite("--attention=thrice", "--headoff-bench-seconds=1")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*thrice takes * times the time of sdpa*slower than the 1.1 allowed*"])


@pytest.mark.parametrize("timing", [[], ["--benchmark-disable"]], ids=["timed", "disabled"])
def test_a_wrong_patch_fails_whether_or_not_it_is_timed(suite, timing):
    """pytest-xdist disables benchmarks, because a worker shares its machine."""
    result = suite("--attention=ignores_the_gate", *timing)
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*the output of the timed call is wrong: its context*"])
    assert ("and wrong" in result.stdout.str()) == ("against sdpa" in result.stdout.str()) == (not timing)


def test_unknown_sizes():
    with pytest.raises(SettingError, match="auto, model, scenes or r50 or dc5"):
        model_for(Settings(bench_size="huge"))
