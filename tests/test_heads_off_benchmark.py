"""Time of the attention under test relative to the baseline, and whether what was timed is right.

Patch and baseline take turns in the same run. A test fails where the outputs are wrong, or where the whole interval of
the ratio is above `--max-slowdown`. On a CPU the bundled model's small shapes are timed; on a GPU those of a ResNet-50
at 800x1066.
"""

from __future__ import annotations

import pytest
import torch

import headoff
from headoff.bench.calls import AttentionWorkload, site_shape
from headoff.bench.model_workloads import DecoderWorkload, RelevanceWorkload, SweepWorkload
from headoff.bench.pytest_runner import BenchmarkRunner, model_for
from headoff.gates import SITES

pytest.importorskip(
    "pytest_benchmark", reason="benchmarks need pytest-benchmark: pip install pytest-benchmark"
)

OBJECTS = {"cpu": 1, "cuda": 5}
"""How many objects are explained."""

every_direction = pytest.mark.parametrize("direction", ["forward", "backward"])
every_number_off = pytest.mark.parametrize("off", [0, 4, 8], ids=lambda off: f"{off} off")


@pytest.fixture(scope="session")
def bench(under_test, pytestconfig):
    return BenchmarkRunner(under_test, pytestconfig, under_test.settings.bench_seconds)


@pytest.fixture(scope="session")
def model(under_test):
    return model_for(under_test.settings)


@pytest.fixture(autouse=True)
def ready(request, bench, under_test, model, off):
    """What has to be settled before pytest-benchmark's fixture is made."""
    heads = model.detector.config.heads
    if off > heads:
        pytest.skip(f"this detector has {heads} heads")
    backward = (
        request.node.name.startswith("test_relevance") or "backward" in request.node.callspec.params.values()
    )
    if backward and under_test.settings.forward_only:
        pytest.skip("its forward pass alone is timed")
    bench.mark(request.node)


@every_number_off
@every_direction
@pytest.mark.parametrize("site", SITES)
def test_attention(benchmark, bench, model, under_test, site, direction, off):
    shape = site_shape(model, site)
    gate = torch.ones(shape.batch, shape.heads, shape.queries, 1)
    gate[:, :off] = 0
    # With none off the detector passes no gate at all.
    workload = AttentionWorkload.of(
        shape,
        direction,
        gate if off else None,
        f"{off} heads off",
        under_test.device,
        under_test.dtype,
        under_test.seed,
    )
    bench.run(benchmark, workload, group=f"{site} {direction}", heads_off=off)


@every_number_off
@every_direction
def test_decoder(benchmark, bench, model, under_test, direction, off):
    """One decode of `none off`, ..., `first k off` together."""
    workload = DecoderWorkload.of(model, headoff.cumulative()[: off + 1], direction, under_test.seed)
    bench.run(benchmark, workload, group=f"decoder {direction}", heads_off=off)


@every_number_off
def test_sweep(benchmark, bench, model, off):
    """From an image to the outcomes of `none off`, ..., `first k off`."""
    workload = SweepWorkload(model, headoff.cumulative()[: off + 1])
    bench.run(benchmark, workload, group="sweep", heads_off=off)


@every_number_off
def test_relevance(benchmark, bench, model, under_test, off):
    """From an image to the maps of the highest-scoring queries with `first k off`."""
    workload = RelevanceWorkload.of(model, (headoff.cumulative()[off],), OBJECTS[under_test.device.type])
    bench.run(benchmark, workload, group="relevance", heads_off=off)
