"""Average precision of the bundled model, its model card, and the bundled scenes."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import RTDetrImageProcessor

import headoff
from headoff.boxes import corners_of
from headoff.errors import SettingError
from headoff.evaluation.candidates import candidates
from headoff.evaluation.scenes import evaluate, table
from headoff.scenes.dataset import CLASS_NAMES, draw_scene
from headoff.scenes.samples import sample_annotations, sample_folder, write_scenes
from headoff.scoring import Scoring

WEIGHTS = importlib.resources.files("headoff.scenes") / "weights"


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes")


@pytest.fixture(scope="module")
def precisions(detector):
    return evaluate(detector, count=100)


def test_the_model_detects_and_loses_it_with_its_heads(precisions):
    """A sample of 100 of the card's 1,000 scenes: well above what a lucky 100 of a worse model would give."""
    first, *_, last = precisions
    assert first.configuration == "none off" and first.ap50 > 0.95 and first.ap > 0.75
    assert last.configuration == "first 8 off" and last.ap50 < 0.02


def test_ap_is_pycocotools(detector, precisions):
    """The same detections judged by another implementation of COCO's average precision."""
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    from headoff.scenes.samples import coco_annotations

    scenes = [draw_scene(seed, 192, "held_out") for seed in range(100)]
    truth = pycocotools.COCO()
    truth.dataset = {"info": {}, **coco_annotations((i, f"{i}.png", s) for i, s in enumerate(scenes))}
    truth.createIndex()
    rows = [
        {
            "image_id": index,
            "category_id": found.label,
            "score": found.score,
            "bbox": [found.box[0], found.box[1], found.box[2] - found.box[0], found.box[3] - found.box[1]],
        }
        for index, scene in enumerate(scenes)
        for found in headoff.detect(detector, scene.image, confidence=0.0)
    ]
    judge = COCOeval(truth, truth.loadRes(rows), "bbox")
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    assert judge.stats[0] == pytest.approx(precisions[0].ap, abs=2e-3)
    assert judge.stats[1] == pytest.approx(precisions[0].ap50, abs=2e-3)


def test_perfect_answers_have_perfect_precision(monkeypatch):
    """A detector that answers the truth: AP 1; one that answers it off by one class: AP 0."""
    detector = headoff.load("scenes")
    truth = [draw_scene(seed, detector.preprocessing.short_side, "held_out") for seed in range(4)]

    def answer(shift):
        def decode_all(detector, features, gates, **_):
            logits = torch.zeros(len(gates), len(truth), 20, 9)
            logits[..., 8] = 20
            boxes = torch.full((len(gates), len(truth), 20, 4), 0.5)
            for image, scene in enumerate(truth):
                for query, (box, label) in enumerate(zip(scene.boxes, scene.labels, strict=True)):
                    left, top, right, bottom = box / scene.image.shape[0]
                    boxes[:, image, query] = torch.tensor(
                        [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
                    )
                    logits[:, image, query, (label + shift) % 8] = 40
            return headoff.DetectorOutput(logits, boxes)

        return decode_all

    for shift, expected in ((0, 1.0), (1, 0.0)):
        monkeypatch.setattr("headoff.evaluation.work.decode_all", answer(shift))
        (precision,) = evaluate(detector, count=4, configurations=[headoff.none_off()])
        assert precision.ap == pytest.approx(expected, abs=0.02)


def test_candidates_by_sigmoid_are_transformers():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 8, generator=generator)
    boxes = torch.rand(3, 6, 4, generator=generator)
    theirs = RTDetrImageProcessor().post_process_object_detection(
        SimpleNamespace(logits=logits, pred_boxes=boxes), threshold=-1, target_sizes=[(1, 1)] * 3
    )
    ours = candidates(Scoring("sigmoid", most=6), logits, boxes)
    for image, expected in enumerate(theirs):
        assert torch.equal(ours[0][image], expected["scores"])
        assert torch.equal(ours[1][image], expected["labels"])
        assert torch.equal(corners_of(ours[2][image]), expected["boxes"])


def test_other_classes_cannot_be_evaluated():
    detector = headoff.load("scenes")
    detector.class_names = tuple(f"other {index}" for index in range(8))
    with pytest.raises(SettingError, match="other classes"):
        evaluate(detector, count=1)


def test_the_card_is_about_these_weights(detector):
    card = (WEIGHTS / "README.md").read_text()
    digest = hashlib.sha256((WEIGHTS / "scenes.safetensors").read_bytes()).hexdigest()
    assert digest in card
    assert f"{sum(p.numel() for p in detector.parameters()):,}" in card
    assert (
        detector.config.encoder_layers == detector.config.decoder_layers == 6 and detector.config.heads == 8
    )
    side = detector.preprocessing.short_side
    assert (side // detector.config.backbone.stride) >= 12, "maps of 12 x 12 tokens or more"
    figures = re.search(r"\| none off \| ([\d.]+) \| ([\d.]+) \|", card)
    assert figures and float(figures[1]) >= 0.78 and float(figures[2]) >= 0.98


def test_the_deformable_model_detects_and_has_its_card():
    detector = headoff.load("scenes-deformable")
    (precision,) = evaluate(detector, count=50, configurations=[headoff.none_off()])
    assert precision.ap > 0.75 and precision.ap50 > 0.9, "well below what the card has"
    folder = WEIGHTS / "scenes-deformable"
    card, weights = (folder / "README.md").read_text(), (folder / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in card and len(weights) <= 6_000_000
    assert f"{sum(p.numel() for p in detector.parameters()):,}" in card
    assert detector.head_layout.decoder_layers == 6 and detector.head_layout.heads == 8
    assert detector.class_names == CLASS_NAMES
    figures = re.search(r"\| none off \| ([\d.]+) \| ([\d.]+) \|", card)
    assert figures and float(figures[1]) >= 0.8 and float(figures[2]) >= 0.95


def test_the_table_is_markdown(precisions):
    lines = table(precisions).splitlines()
    assert len(lines) == 2 + 9 and all(line.count("|") == 6 for line in lines)


def test_samples_are_held_out_scenes_and_can_be_drawn_again(tmp_path):
    annotations = sample_annotations()
    assert [category["name"] for category in annotations["categories"]] == list(CLASS_NAMES)
    assert len(annotations["images"]) == len(headoff.sample_images())
    seeds = [image["id"] for image in annotations["images"]]
    assert min(seeds) >= 1000, "the card's 1,000 scenes are others"
    write_scenes(tmp_path, seeds, 192)
    assert json.loads((tmp_path / "annotations.json").read_text()) == annotations
    for path in headoff.sample_images():
        assert headoff.load_image(path).tobytes() == headoff.load_image(tmp_path / path.name).tobytes()
    assert sample_folder().is_dir()


def test_a_sample_that_is_not_there():
    with pytest.raises(SettingError, match="sample 99"):
        headoff.sample_image(99)
