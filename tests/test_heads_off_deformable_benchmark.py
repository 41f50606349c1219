"""Time of the deformable attention under test relative to the baseline, and whether what was timed is right.

Run with `--contract deformable`, and left out otherwise. On a CPU the encoder is that of a small image.
"""

from __future__ import annotations

import pytest

from headoff.bench.deformable import DeformableWorkload, shapes_for
from headoff.bench.pytest_runner import BenchmarkRunner

pytest.importorskip(
    "pytest_benchmark", reason="benchmarks need pytest-benchmark: pip install pytest-benchmark"
)


PLACES = ("rt-detr decoder", "decoder", "encoder")


@pytest.fixture(scope="session")
def bench(under_test, pytestconfig):
    return BenchmarkRunner(under_test, pytestconfig, under_test.settings.bench_seconds)


@pytest.fixture(autouse=True)
def ready(request, bench, under_test):
    if under_test.settings.forward_only and "backward" in request.node.callspec.params.values():
        pytest.skip("its forward pass alone is timed")
    bench.mark(request.node)


@pytest.mark.parametrize("off", [0, 4], ids=lambda off: f"{off} off")
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("place", PLACES)
def test_deformable_attention(benchmark, bench, under_test, place, direction, off):
    shape = shapes_for(small=under_test.device.type == "cpu")[PLACES.index(place)]
    workload = DeformableWorkload.of(
        shape, direction, off, under_test.device, under_test.dtype, under_test.seed
    )
    bench.run(benchmark, workload, group=f"{shape.name} {direction}", heads_off=off)
