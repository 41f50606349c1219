"""What the attention under test costs beside the baseline, and whether what was timed is right.

Patch and baseline take turns in the same run. A test fails where the outputs are wrong, or where the whole interval of
the ratio is above `--max-slowdown`. On a CPU the bundled model's small shapes are timed, quickly; on a GPU those of a
ResNet-50 at 800 x 1066.
"""

from __future__ import annotations

import pytest

import headoff
from headoff.bench.models import benchmark_model
from headoff.bench.workloads import (
    DIRECTIONS,
    DecoderWorkload,
    OperatorWorkload,
    RelevanceWorkload,
    SweepWorkload,
)
from headoff.gates import SITES
from headoff.harness.benchmark import BenchmarkRunner
from headoff.harness.plugin.options import seconds_chosen, value_of

pytest.importorskip(
    "pytest_benchmark", reason="benchmarks need pytest-benchmark: pip install pytest-benchmark"
)

OBJECTS = {"cpu": 1, "cuda": 5}
"""Explained in one picture."""

every_direction = pytest.mark.parametrize("direction", DIRECTIONS)
every_number_off = pytest.mark.parametrize("off", [0, 4, 8], ids=lambda off: f"{off} off")


@pytest.fixture(scope="session")
def bench(under_test, pytestconfig):
    return BenchmarkRunner(under_test, pytestconfig, seconds_chosen(pytestconfig))


@pytest.fixture(scope="session")
def subject(under_test, pytestconfig):
    return benchmark_model(under_test.settings, value_of(pytestconfig, "bench-size"))


@pytest.fixture(autouse=True)
def ready(request, bench, subject, off):
    """What has to be settled before pytest-benchmark's fixture is made."""
    heads = subject.detector.config.heads
    if off > heads:
        pytest.skip(f"this detector has {heads} heads")
    bench.mark(request.node)


@every_number_off
@every_direction
@pytest.mark.parametrize("site", SITES)
def test_attention(benchmark, bench, subject, under_test, site, direction, off):
    workload = OperatorWorkload.of(subject, site, direction, off, under_test.seed)
    bench.run(benchmark, workload, group=f"{site} {direction}", heads_off=off)


@every_number_off
@every_direction
def test_decoder(benchmark, bench, subject, under_test, direction, off):
    """One decode of `none off`, ..., `first k off` together."""
    workload = DecoderWorkload.of(subject, headoff.cumulative()[: off + 1], direction, under_test.seed)
    bench.run(benchmark, workload, group=f"decoder {direction}", heads_off=off)


@every_number_off
def test_sweep(benchmark, bench, subject, off):
    """From a picture to the outcomes of `none off`, ..., `first k off`."""
    workload = SweepWorkload(subject, headoff.cumulative()[: off + 1])
    bench.run(benchmark, workload, group="sweep", heads_off=off)


@every_number_off
def test_relevance(benchmark, bench, subject, under_test, off):
    """From a picture to the maps of its surest objects with `first k off`."""
    workload = RelevanceWorkload.of(subject, (headoff.cumulative()[off],), OBJECTS[under_test.device.type])
    bench.run(benchmark, workload, group="relevance", heads_off=off)
