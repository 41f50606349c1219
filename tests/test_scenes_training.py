"""Losses compared with independent computations, and training that continues an interrupted run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_convert, generalized_box_iou

import headoff
from headoff.detr import DetrConfig
from headoff.detr.config import BackboneConfig
from headoff.errors import CheckpointError, NonFiniteError
from headoff.images import Preprocessing
from headoff.scenes import detr_training
from headoff.scenes.deformable_training import DeformableRecipe
from headoff.scenes.detr_training import DetrRecipe, DetrTrainer
from headoff.scenes.losses import (
    GIOU_WEIGHT,
    L1_WEIGHT,
    NO_OBJECT_WEIGHT,
    Targets,
    dense_loss,
    generalized_iou,
    match,
    set_loss,
)
from headoff.scenes.training import Moment, train

TINY = DetrConfig(
    backbone=BackboneConfig(block="basic", depths=(1, 1), widths=(8, 8), stem=8),
    width=16,
    heads=2,
    encoder_layers=1,
    decoder_layers=2,
    feedforward=16,
    queries=6,
    classes=8,
    preprocessing=Preprocessing(short_side=32, long_side=64),
)
RECIPE = DetrRecipe(steps=6, batch=4, warmup=1, small_size=24, small_until=0.4, dense_only_until=0.2, pool=12)


def predictions(seed=0, sets=2, batch=3, queries=6, classes=8):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sets, batch, queries, classes + 1, generator=generator)
    centre = torch.rand(sets, batch, queries, 2, generator=generator) * 0.6 + 0.2
    size = torch.rand(sets, batch, queries, 2, generator=generator) * 0.3 + 0.05
    return logits, torch.cat((centre, size), -1)


def targets(seed=1):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.cat(
        (
            torch.rand(3, 4, 2, generator=generator) * 0.6 + 0.2,
            torch.rand(3, 4, 2, generator=generator) * 0.3 + 0.1,
        ),
        -1,
    )
    labels = torch.randint(0, 8, (3, 4), generator=generator)
    valid = torch.arange(4) < torch.tensor([[4], [1], [3]])
    return Targets(boxes, labels, valid)


def test_giou_is_torchvisions():
    first, second = predictions()[1].flatten(0, 2), targets().boxes.flatten(0, 1)
    ours = generalized_iou(first[:, None], second[None])
    theirs = generalized_box_iou(box_convert(first, "cxcywh", "xyxy"), box_convert(second, "cxcywh", "xyxy"))
    torch.testing.assert_close(ours, theirs)


def test_the_matching_is_the_best_of_all():
    """Against every possible assignment."""
    (logits, boxes), truth = predictions(), targets()
    matched = match(logits, boxes, truth)
    for prediction, image in itertools.product(range(2), range(3)):
        count = int(truth.valid[image].sum())
        wanted, labels = truth.boxes[image, :count], truth.labels[image, :count]
        cost = (
            -logits[prediction, image].softmax(-1)[:, labels]
            + L1_WEIGHT * torch.cdist(boxes[prediction, image], wanted, p=1)
            - GIOU_WEIGHT
            * generalized_box_iou(
                box_convert(boxes[prediction, image], "cxcywh", "xyxy"), box_convert(wanted, "cxcywh", "xyxy")
            )
        )
        best = min(
            itertools.permutations(range(6), count),
            key=lambda rows: sum(cost[q, o].item() for o, q in enumerate(rows)),
        )
        assert matched[prediction, image, :count].tolist() == list(best)


def test_the_set_loss_is_the_papers_read_plainly():
    (logits, boxes), truth = predictions(), targets()
    matched = match(logits, boxes, truth)
    expected = 0.0
    for prediction in range(2):
        weighted = weights = 0.0
        for image, query in itertools.product(range(3), range(6)):
            owner = [o for o in range(4) if truth.valid[image, o] and matched[prediction, image, o] == query]
            label = int(truth.labels[image, owner[0]]) if owner else 8
            weight = 1.0 if owner else NO_OBJECT_WEIGHT
            weighted += weight * -F.log_softmax(logits[prediction, image, query], -1)[label]
            weights += weight
        expected += weighted / weights
        for image, o in itertools.product(range(3), range(4)):
            if truth.valid[image, o]:
                box, goal = boxes[prediction, image, matched[prediction, image, o]], truth.boxes[image, o]
                corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (box, goal)]
                expected += L1_WEIGHT * (box - goal).abs().sum() / truth.valid.sum()
                expected += GIOU_WEIGHT * (1 - generalized_box_iou(*corners)[0, 0]) / truth.valid.sum()
    torch.testing.assert_close(set_loss(logits, boxes, truth, matched), expected)


def test_the_dense_loss_asks_each_token_for_the_object_it_lies_in():
    """Tokens in the middle of an object that answer it rightly, and others "no object", leave no loss."""
    truth = Targets(
        torch.tensor([[[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.25, 0.25]]]),
        torch.tensor([[3, 5]]),
        torch.tensor([[True, True]]),
    )
    wanted = torch.full((8, 8), 8)
    wanted[1:3, 1:3] = 3  # centres 0.19 and 0.31 are within 0.35 * 0.5 of 0.25, 0.06 and 0.44 are not
    wanted[5:7, 5:7] = 5
    logits = F.one_hot(wanted.flatten(), 9)[None] * 100.0
    boxes = torch.where((wanted == 3).flatten()[:, None], truth.boxes[0, 0], truth.boxes[0, 1])[None]
    assert dense_loss(logits, boxes, (8, 8), truth) < 1e-5
    assert dense_loss(logits.roll(1, 1), boxes, (8, 8), truth) > 1


def test_noisy_queries_denote_objects_near_them():
    trainer = DetrTrainer(TINY)
    truth = targets()
    _, positions, denoted = trainer.queries(trainer.detector, truth, torch.Generator().manual_seed(0))
    assert positions.shape == (3, 3, 6, 16)
    assert denoted.tolist() == [[0, 1, 2, 3, -1, -1], [0, -1, -1, -1, -1, -1], [0, 1, 2, -1, -1, -1]]
    # The first two runs are the same for every image: the real queries and the second group.
    assert torch.equal(positions[0, :2], positions[1, :2])
    assert torch.equal(positions[2, 0], trainer.detector.query_embedding.weight)


def test_box_positions_are_those_of_the_tokens():
    """A box centred on a token's far edge has that token's embedding: the grid counts tokens from 1."""
    from headoff.detr.positions import sine_positions

    tokens = sine_positions(torch.ones(1, 4, 4, dtype=torch.bool), 16, torch.float32).unflatten(1, (4, 4))
    centres = torch.tensor([[0.5, 0.25], [1.0, 1.0]])
    torch.testing.assert_close(
        detr_training._box_positions(centres, 16)[0], tokens[0, 0, 1], atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        detr_training._box_positions(centres, 16)[1], tokens[0, 3, 3], atol=1e-4, rtol=0
    )


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path, monkeypatch):
    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    whole = train(tmp_path / "whole", RECIPE, TINY, workers=1, progress=False)

    original = DetrTrainer.forward
    seen = []

    def stopping(self, images, *arguments):
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, images, *arguments)

    monkeypatch.setattr(DetrTrainer, "forward", stopping)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", RECIPE, TINY, workers=1, progress=False)
    assert not (tmp_path / "parts" / RECIPE.written).exists()
    state = torch.load(tmp_path / "parts" / "state.pt", weights_only=True)
    assert 0 < state["elapsed"] < time.monotonic() - began, "of this training, not of the machine"
    torch.save(state | {"elapsed": 1e6}, tmp_path / "parts" / "state.pt")  # as after a long first part
    resumed = train(tmp_path / "parts", RECIPE, TINY, workers=1, progress=False)
    assert 1e6 < torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["elapsed"] < 1e6 + 600
    first = json.loads((tmp_path / "parts" / "log.jsonl").read_text().splitlines()[0])
    assert 0 <= first["elapsed"] < time.monotonic() - began
    assert len(seen) == RECIPE.steps, "no step is lost, none is done twice"
    for (name, one), other in zip(
        headoff.load(whole).state_dict().items(), headoff.load(resumed).state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, msg=name)
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C is the interpreter's again"


@pytest.mark.slow  # four processes, each of which imports torch
def test_two_processes_train_together(tmp_path):
    weights = train(tmp_path, RECIPE, TINY, workers=2, progress=False)
    detector = headoff.load(weights)
    assert detector.class_names == headoff.load("scenes").class_names
    assert all(value.isfinite().all() for value in detector.state_dict().values())


def test_a_folder_belongs_to_one_recipe(tmp_path):
    train(tmp_path, RECIPE, TINY, workers=1, progress=False)
    with pytest.raises(CheckpointError, match="another recipe"):
        train(tmp_path, replace(RECIPE, steps=7), TINY, workers=1, progress=False)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_loss_that_explodes_is_said(tmp_path, workers):
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        train(tmp_path, replace(RECIPE, learning_rate=1e30), TINY, workers=workers, progress=False)


def test_learning_happens(tmp_path):
    """Twenty steps on the same few scenes lower the loss."""
    from headoff.scenes.pool import ScenePool

    torch.manual_seed(0)
    pool = ScenePool(tmp_path, 32, 8)
    trainer = DetrTrainer(TINY)
    recipe = replace(RECIPE, steps=1000)
    optimiser = torch.optim.AdamW(trainer.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        images, truth = pool.batch(8, torch.Generator().manual_seed(0))
        loss, parts = trainer(images, truth, recipe, Moment(500, 0.5), torch.Generator().manual_seed(0))
        assert set(parts) == {"dense", "set", "denoise"}
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


@pytest.mark.parametrize("recipe", [DetrRecipe(), DeformableRecipe(), DeformableRecipe(steps=900, hours=0)])
def test_the_rate_warms_up_and_falls(recipe):
    """Of a run of ten thousand seconds."""
    steps = recipe.steps or 3000
    moments = [recipe.moment(step, 3600 * recipe.hours * step / steps) for step in range(0, steps, 20)]
    rates = [recipe.rate(moment) for moment in moments]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) <= recipe.learning_rate and rates[-1] < 0.02 * recipe.learning_rate


def test_the_dense_weight_falls_to_zero():
    recipe = DetrRecipe()
    assert recipe.dense_weight(0) == 1 and recipe.dense_weight(recipe.steps - 1) == 0
