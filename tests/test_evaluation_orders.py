"""Cumulative sweeps over a data set by importance: an order that is measured once, and kept."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import headoff
from headoff.cli import main
from headoff.errors import SettingError
from headoff.evaluation import orders
from headoff.evaluation.orders import bound_orders, measured_order, orders_in, read_order
from headoff.evaluation.results import Results
from headoff.evaluation.run import open_data_set
from headoff.gates import order_of
from headoff.scenes.dataset import draw_scene

pytest.importorskip("pyarrow", reason="detections are stored by pyarrow: pip install 'headoff[evaluate]'")

SIDE, IMAGES, SAMPLE = 96, 6, 2
COMMAND = ["evaluate", f"scenes:{IMAGES}", "--short-side", str(SIDE), "--threads", "1", "--workers", "0"]
COMMAND += ["--figures", "none", "--resamples", "0"]
BY_IMPORTANCE = [*COMMAND, "--order", "importance", "--importance-images", str(SAMPLE)]


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes", short_side=SIDE)


@pytest.fixture(scope="module")
def data(detector):
    return open_data_set(f"scenes:{IMAGES}", None, detector)


@pytest.fixture(scope="module")
def measured(detector, data):
    return measured_order(detector, data, "decoder_cross", "least", images=SAMPLE)


def evaluate(out, *options) -> Results:
    assert main([*BY_IMPORTANCE, "--out", str(out), *options]) == 0
    return Results(out)


def switched_off(results: Results) -> tuple[int, ...]:
    return order_of(results.configurations)


def test_an_order_is_that_of_the_mean_over_a_sample(detector, measured):
    drawn = np.random.default_rng(0).permutation(IMAGES)[:SAMPLE]
    scores = [
        headoff.heads(
            detector,
            draw_scene(int(seed), SIDE, "held_out").image,
            measures="shapley_columns",
            values="found",
            ablations="zero",
        ).mean_scores()[0]
        for seed in drawn
    ]
    mean = np.mean([one.numpy() for one in scores], 0)
    np.testing.assert_allclose(measured.scores, mean, rtol=1e-12)
    assert measured.heads == tuple(np.argsort(mean, kind="stable").tolist())
    assert measured.images == SAMPLE and measured.sample == tuple(f"{seed}.png" for seed in sorted(drawn))
    assert "of those that are judged" in measured.describe()


def test_shards_and_a_run_that_goes_on_have_the_order_that_was_measured(
    tmp_path, measured, capsys, monkeypatch
):
    out = tmp_path / "out"
    first = evaluate(out, "--shard", "1/2", "--batch", "2")
    assert switched_off(first) == measured.heads
    assert "go off in the order " + ", ".join(map(str, measured.heads)) in capsys.readouterr().err

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(orders, "heads", fail)
    # The order stays what it is where detections of another confidence are counted.
    results = evaluate(out, "--batch", "2", "--confidence", "0.4")
    assert results.is_complete and switched_off(results) == measured.heads
    contents = json.loads((out / "summary.json").read_text())
    (found,) = contents["orders"]
    assert found["heads"] == list(measured.heads) and found["scores"] == list(measured.scores)
    assert f"; {', '.join(f'H{head}' for head in measured.heads[:4])} off cost " in contents["verdict"]
    assert main([*BY_IMPORTANCE, "--out", str(out), "--batch", "2", "--importance-images", "3"]) == 2
    assert "measured otherwise: images was 2 and is 3" in capsys.readouterr().err
    (out / "importance.json").unlink()
    assert main([*BY_IMPORTANCE, "--out", str(out), "--batch", "2"]) == 2
    assert "has the results of another run" in capsys.readouterr().err and not orders_in(out)


def test_an_interrupted_measurement_goes_on(detector, data, measured, tmp_path, monkeypatch):
    about = {"images": SAMPLE}
    heads = orders.heads
    calls = []

    def measure():
        return [
            measured_order(detector, data, "decoder_cross", "least", images=SAMPLE, store=tmp_path / "store")
        ]

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return heads(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(orders, "heads", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bound_orders(tmp_path, about, measure)
    assert orders_in(tmp_path) == () and len(list((tmp_path / "store").rglob("*.safetensors"))) == 1
    (found,) = bound_orders(tmp_path, about, measure)
    assert found == measured and orders_in(tmp_path) == (measured,)
    # Of two processes that measure at the same time, the second one takes what the first one has written.
    late = [measured_order(detector, data, "decoder_cross", "most", images=1)]
    (tmp_path / "importance.json").rename(tmp_path / "kept")

    def race():
        (tmp_path / "kept").rename(tmp_path / "importance.json")
        return late

    assert bound_orders(tmp_path, about, race) == (measured,)


def test_an_order_can_be_measured_on_other_images(detector, tmp_path, capsys):
    import PIL.Image

    images = tmp_path / "images"
    images.mkdir()
    for seed in (20, 21):
        PIL.Image.fromarray(draw_scene(seed, SIDE, "held_out").image).save(images / f"{seed}.png")
    options = [
        "--measure",
        "shapley_columns",
        "--value",
        "found",
        "--ablate",
        "zero",
        "--figures",
        "none",
    ]
    heads = ["heads", "--short-side", str(SIDE), "--threads", "1", *options]
    assert main([*heads, str(images), "--out", str(tmp_path / "several")]) == 0
    assert main([*heads, str(images / "20.png"), "--out", str(tmp_path / "one")]) == 0
    several = read_order(tmp_path / "several", "decoder_cross", "most")
    one = read_order(tmp_path / "one", "decoder_cross", "least")
    assert (
        several.images == 2 and not np.isnan(several.low).any() and several.describe().endswith("several'.")
    )
    alone = headoff.heads(
        detector,
        images / "20.png",
        measures="shapley_columns",
        values="found",
        ablations="zero",
    )
    np.testing.assert_allclose(one.scores, alone.mean_scores()[0], rtol=1e-4, atol=1e-6)
    assert np.isnan(one.low).all() and type(one).of(one.as_dict()).scores == one.scores
    command = [*COMMAND, "--limit", "2", "--out", str(tmp_path / "out"), "--order", "importance:most"]
    command += ["--importance", str(tmp_path / "several")]
    assert main(command) == 0
    assert switched_off(Results(tmp_path / "out")) == several.heads
    # The folder that it came from is not needed any more.
    (tmp_path / "several" / "heads.csv").unlink()
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path / "other")]) == 2
    assert "there is no heads.csv" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_shapley_values_of_ap_make_an_order_too(tmp_path):
    columns = (
        "site",
        "images",
        "of",
        "layer",
        "head",
        "ablation",
        "measure",
        "value",
        "score",
        "low",
        "high",
    )
    with (tmp_path / "heads.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for head, score in enumerate((0.2, -0.1, 0.4)):
            for measure in ("removal", "shapley_columns"):
                row = (
                    "decoder_cross",
                    50,
                    "data set",
                    "all",
                    head,
                    "zero",
                    measure,
                    "AP",
                    score,
                    score,
                    score,
                )
                writer.writerow(row)
    found = read_order(tmp_path, "decoder_cross", "least")
    assert found.heads == (1, 0, 2) and found.value == "AP" and found.images == 50
    with pytest.raises(
        SettingError,
        match="no Shapley values of found or AP of encoder_self under zero .*decoder_cross",
    ):
        read_order(tmp_path, "encoder_self", "least")
    with pytest.raises(SettingError, match="no Shapley values of iou of decoder_cross .* --value iou"):
        read_order(tmp_path, "decoder_cross", "least", value="iou")
    with pytest.raises(SettingError, match="under mean ablation"):
        read_order(tmp_path, "decoder_cross", "least", "mean")
    lines = (tmp_path / "heads.csv").read_text().splitlines()
    (tmp_path / "heads.csv").write_text("\n".join(line for line in lines if ",1,zero," not in line))
    with pytest.raises(SettingError, match="scores of some heads are missing"):
        read_order(tmp_path, "decoder_cross", "least")
    (tmp_path / "heads.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SettingError, match="is no table of `headoff heads`"):
        read_order(tmp_path, "decoder_cross", "least")


def test_images_without_objects_have_no_importance(detector, data):
    with pytest.raises(SettingError, match="nothing is detected in any of 2 images"):
        measured_order(detector, data, "decoder_cross", "least", images=2, confidence=1.0)
    by_iou = measured_order(detector, data, "decoder_cross", "most", images=1, value="iou")
    assert by_iou.value == "iou" and by_iou.heads != tuple(range(8))
    with pytest.raises(SettingError, match="on 0 images"):
        measured_order(detector, data, "decoder_cross", "least", images=0)
