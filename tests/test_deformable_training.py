"""Training of the deformable detector: its losses are transformers' own, runs are continued, what is written loads."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection
from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

import headoff
from headoff.errors import CheckpointError
from headoff.evaluation.scenes import evaluate
from headoff.scenes import dataset
from headoff.scenes.dataset import CLASS_NAMES, draw_scene
from headoff.scenes.deformable_training import DeformableRecipe, DeformableTrainer, rt_detr_config
from headoff.scenes.losses import Targets
from headoff.scenes.pool import ScenePool
from headoff.scenes.training import Moment, train

TINY = rt_detr_config(
    widths=(8, 8, 16, 16), encoder_width=16, width=16, feedforward=16, layers=2, heads=2, queries=6
)
RECIPE = DeformableRecipe(steps=6, hours=0, batch=4, warmup=1, phases=((0, 32), (0.5, 64)), pool=12)


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """A folder with the pools of RECIPE."""
    folder = tmp_path_factory.mktemp("pools")
    for side in RECIPE.sides(TINY):
        ScenePool(folder, side, RECIPE.pool)
    return folder


@pytest.fixture
def run_folder(pools, tmp_path):
    """Makes folders for runs, which have the pools already."""

    def make(name):
        (tmp_path / name).mkdir()
        for path in pools.iterdir():
            (tmp_path / name / path.name).symlink_to(path)
        return tmp_path / name

    return make


def trainer():
    torch.manual_seed(0)
    return DeformableTrainer(TINY, 64)


def test_the_losses_are_those_of_transformers(pools):
    """Matching, varifocal, box and denoising losses of all layers, on batches with different numbers of objects."""
    model = trainer()
    images, truth = ScenePool(pools, 64, RECIPE.pool).batch(6, torch.Generator().manual_seed(1))
    assert len(set(truth.valid.sum(1).tolist())) > 1
    outputs = []
    model.model.model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    _, parts = model(images, truth, RECIPE, Moment(0, 0.0), torch.Generator().manual_seed(2))
    (output,) = outputs
    labels = [
        {"class_labels": labels[valid], "boxes": boxes[valid]}
        for labels, boxes, valid in zip(truth.labels, truth.boxes, truth.valid, strict=True)
    ]
    logits, boxes = output.intermediate_logits, output.intermediate_reference_points
    _, theirs, _ = RTDetrForObjectDetectionLoss(
        logits[:, -1],
        labels,
        torch.device("cpu"),
        boxes[:, -1],
        TINY,
        logits,
        boxes,
        enc_topk_logits=output.enc_topk_logits,
        enc_topk_bboxes=output.enc_topk_bboxes,
        denoising_meta_values=output.denoising_meta_values,
    )
    noisy = sum(value for name, value in theirs.items() if "_dn_" in name)
    # The last auxiliary output is the encoder's.
    real = sum(value for name, value in theirs.items() if "_dn_" not in name and "_aux_1" not in name)
    assert parts["denoise"] == pytest.approx(noisy.item(), rel=1e-4)
    assert parts["set"] == pytest.approx(real.item(), rel=1e-4)


def test_every_token_has_a_gradient_from_the_first_step(pools):
    model = trainer()
    images, truth = ScenePool(pools, 64, RECIPE.pool).batch(2, torch.Generator().manual_seed(1))
    outputs = []
    model.model.model.register_forward_hook(lambda *call: outputs.append(call[-1]))
    loss, _ = model(images, truth, RECIPE, Moment(5, 0.9), torch.Generator())
    (gradient,) = torch.autograd.grad(loss, outputs[0].enc_outputs_class)
    assert (gradient.abs().amax(-1) > 0).all()


def test_learning_happens(pools):
    """Twenty steps on the same few scenes lower the loss."""
    model = trainer()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images, truth = ScenePool(pools, 32, RECIPE.pool).batch(8, torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss, parts = model(images, truth, RECIPE, Moment(3, 0.0), torch.Generator().manual_seed(0))
        assert set(parts) == {"set", "encoder", "denoise", "dense"}
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


def test_a_run_that_was_stopped_ends_like_one_that_was_not(run_folder, monkeypatch):
    """And what it writes is a folder of transformers, in float16."""
    whole = train(run_folder("whole"), RECIPE, TINY, workers=1, progress=False)
    original = DeformableTrainer.forward
    seen = []

    def stopping(self, images, *arguments):
        seen.append(images.shape[-1])
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, images, *arguments)

    monkeypatch.setattr(DeformableTrainer, "forward", stopping)
    parts = run_folder("parts")
    with pytest.raises(KeyboardInterrupt):
        train(parts, RECIPE, TINY, workers=1, progress=False)
    assert not (parts / RECIPE.written).exists()
    resumed = train(parts, RECIPE, TINY, workers=1, progress=False)
    assert seen == [32, 32, 32, 64, 64, 64], "no step is lost, none is done twice"
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, msg=name)
        if one[name].is_floating_point():
            assert one[name].dtype is (torch.float32 if "running" in name else torch.float16)

    model, problems = AutoModelForObjectDetection.from_pretrained(whole, output_loading_info=True)
    assert not any(problems.values())
    assert model.dtype is torch.float32
    torch.testing.assert_close(
        dict(model.named_parameters())["model.enc_score_head.weight"].half(),
        one["model.enc_score_head.weight"],
    )


def test_the_written_processor_prepares_images_as_training_does(tmp_path):
    model = trainer()
    model.write(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    theirs = AutoImageProcessor.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    ours = []
    model.model.model.backbone.register_forward_pre_hook(lambda _, inputs: ours.append(inputs[0]))
    truth = Targets(torch.full((1, 1, 4), 0.5), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).bool())
    model(torch.from_numpy(image).permute(2, 0, 1)[None], truth, RECIPE, Moment(0, 0.0), torch.Generator())
    torch.testing.assert_close(theirs, ours[0], rtol=1e-5, atol=1e-5)


def test_headoff_loads_and_evaluates_what_is_written(tmp_path, monkeypatch):
    """On scenes of the size that the image processor says."""
    trainer().write(tmp_path)
    detector = headoff.load(tmp_path)
    assert detector.class_names == CLASS_NAMES and detector.preprocessing.size == (64, 64)
    drawn = []
    monkeypatch.setattr(dataset, "draw_scene", lambda *scene: drawn.append(scene) or draw_scene(*scene))
    (precision,) = evaluate(detector, count=2, configurations=[headoff.none_off()])
    assert 0 <= precision.ap <= precision.ap50 <= 1
    assert set(drawn) == {(0, 64, "held_out"), (1, 64, "held_out")}


def test_a_run_of_hours_follows_the_time_and_may_be_prolonged(run_folder):
    recipe = replace(RECIPE, steps=0, hours=1 / 3600)
    assert recipe.moment(10, 0.25) == Moment(10, 0.25)
    folder = run_folder("hours")
    written = train(folder, recipe, TINY, workers=1, progress=False)
    first = torch.load(folder / "state.pt", weights_only=True)
    assert first["elapsed"] >= 1 and written.exists()

    # On a busy machine the first run's last step can have ended long after its second.
    longer = replace(recipe, hours=(first["elapsed"] + 0.5) / 3600)
    train(folder, longer, TINY, workers=1, progress=False)
    second = torch.load(folder / "state.pt", weights_only=True)
    assert second["elapsed"] >= first["elapsed"] + 0.5 and second["step"] > first["step"]
    assert json.loads((folder / "recipe.json").read_text())["recipe"]["hours"] == longer.hours
    with pytest.raises(CheckpointError, match="another recipe"):
        train(folder, replace(longer, batch=5), TINY, workers=1, progress=False)
