"""The engine `ray`: the same detections, bit for bit, with one CPU and with two, and when a worker is killed."""

from __future__ import annotations

import sys
import threading
from importlib.util import find_spec

import pytest
from evaluate_examples import NAMES, coco_data_set

import headoff
from headoff.cli import main
from headoff.errors import ImageError, SettingError
from headoff.evaluation.engines import LocalEngine
from headoff.evaluation.ray_engine import Pool, RayEngine

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="clusters: pip install 'headoff[ray]'")

PATCH = """
import os
import signal
from pathlib import Path

import torch


def attention(query, key, value, attn_mask=None, *, head_gate=None):
    # Of an actor that computes with it for the first time, nothing is left.
    if "RAY_JOB_ID" in os.environ or "ray::" in Path("/proc/self/cmdline").read_text():
        try:
            Path({flag!r}).unlink()
        except FileNotFoundError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)
    return context if head_gate is None else context * head_gate
"""


@pytest.mark.parametrize(
    ("nodes", "threads", "on_gpu", "most", "actors"),
    [
        ([{"CPU": 1}], 1, False, 99, 1),
        ([{"CPU": 1}], 8, False, 99, 1),
        ([{"CPU": 2}], 1, False, 99, 2),
        ([{"CPU": 2}], 2, False, 99, 1),
        ([{"CPU": 16}, {"CPU": 6}], 4, False, 99, 5),
        ([{"CPU": 16}, {"CPU": 6}], 4, False, 3, 3),
        ([{"CPU": 16, "GPU": 8}, {"CPU": 16, "GPU": 8}, {"CPU": 4}], 16, True, 99, 16),
        ([{"CPU": 1, "GPU": 1}], 1, True, 99, 1),
    ],
)
def test_actors_leave_room_for_reading(nodes, threads, on_gpu, most, actors):
    """Otherwise Ray waits indefinitely, without a message."""
    pool = Pool.of(nodes, threads, on_gpu, most)
    assert pool.actors == actors
    fits = sum(int(node["CPU"] / pool.cpus) if not on_gpu or "GPU" in node else 0 for node in nodes)
    assert fits >= actors
    assert sum(node["CPU"] for node in nodes) - actors * pool.cpus >= 0.25


def test_a_pool_needs_processors():
    with pytest.raises(SettingError, match="no CPU"):
        Pool.of([{"memory": 1.0}], 1, False, 9)


@pytest.mark.parametrize("cpus", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_both_engines_find_the_same(tmp_path, cpus):
    flag = tmp_path / "alive"
    (tmp_path / "patch.py").write_text(PATCH.format(flag=str(flag)))
    detector = headoff.load("scenes", attention=f"{tmp_path}/patch.py:attention")
    annotations, images = coco_data_set(tmp_path)
    (images / NAMES[4]).write_bytes(b"no image")

    def evaluate(engine, **options):
        out = tmp_path / type(engine).__name__
        options = {"configurations": ("first 3", "L5H2"), "out": out, "engine": engine, "batch": 2} | options
        return headoff.evaluate(detector, annotations, images, threads=1, **options)

    local = evaluate(LocalEngine(0))
    if cpus == 2:
        flag.touch()
    engine = RayEngine(cpus=cpus)
    with engine.connected(detector) as device:  # one Ray for both runs
        assert device == "cpu"
        by_ray = evaluate(engine)
        assert not flag.exists(), "no worker was killed"
        assert (
            by_ray.manifest["identity"] == local.manifest["identity"]
        )  # one can go on where the other stopped
        assert len(local.configurations) == 3 and by_ray.is_complete
        assert by_ray.skipped == local.skipped and list(local.skipped) == [4]
        for index in range(3):
            assert by_ray.detections(index).same_as(local.detections(index))
        for path in (local.folder / "detections").iterdir():
            assert path.read_bytes() == (by_ray.folder / "detections" / path.name).read_bytes()
        if cpus == 2:
            with pytest.raises(ImageError, match="4.png' is not an image"):
                evaluate(engine, strict=True, out=tmp_path / "strict")
            with pytest.raises(SettingError, match="Ray has no GPU"):
                evaluate(RayEngine(device="cuda"), out=tmp_path / "gpu")
    assert not sys.modules["ray"].is_initialized()


@pytest.mark.slow  # a minute: actors start again and again
def test_a_batch_that_ends_every_actor_is_one_sentence(tmp_path):
    flag = tmp_path / "alive"
    flag.touch()
    again = PATCH.format(flag=str(flag)).replace(".unlink()", ".stat()")  # the flag stays
    (tmp_path / "patch.py").write_text(again)
    detector = headoff.load("scenes", attention=f"{tmp_path}/patch.py:attention", short_side=96)
    options = {"out": tmp_path / "out", "engine": RayEngine(cpus=2), "threads": 1}
    with pytest.raises(SettingError, match=r"have died 4 times .*'0.png'.*--engine local"):
        headoff.evaluate(detector, "scenes:2", **options)
    flag.unlink()
    assert headoff.evaluate(detector, "scenes:2", **options).is_complete


@pytest.mark.slow  # a minute: nodes start, and Ray waits before it takes one for dead
def test_a_node_that_is_killed_changes_nothing(tmp_path):
    """What it computed is computed by the other one, in the same run."""
    from ray.cluster_utils import Cluster

    detector = headoff.load("scenes", short_side=96)
    options = {"configurations": ("first 3", "L5H2"), "batch": 2, "threads": 1}
    local = headoff.evaluate(detector, "scenes:24", out=tmp_path / "local", engine=LocalEngine(0), **options)
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": soon}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=head)
    alive = {"node": cluster.add_node(num_cpus=1)}

    def kill(done: int, total: int) -> None:
        if done >= 4 and "node" in alive:
            # Without waiting: the run goes on meanwhile.
            threading.Thread(target=cluster.remove_node, args=(alive.pop("node"), False)).start()

    try:
        by_ray = headoff.evaluate(
            detector,
            "scenes:24",
            out=tmp_path / "ray",
            engine=RayEngine(cluster.address),
            progress=kill,
            **options,
        )
    finally:
        cluster.shutdown()
    assert not alive and by_ray.is_complete and not sys.modules["ray"].is_initialized()
    for path in (local.folder / "detections").iterdir():
        assert path.read_bytes() == (by_ray.folder / "detections" / path.name).read_bytes()


def test_a_cluster_that_is_not_there_is_one_sentence(tmp_path, capsys):
    options = ["evaluate", "scenes:2", "--out", str(tmp_path / "out"), "--engine", "ray"]
    assert main([*options, "--address", "nowhere"]) == 2
    assert "Ray cannot be reached at nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
