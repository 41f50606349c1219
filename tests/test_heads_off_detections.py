"""For every cumulative configuration, the bundled model gives the expected detections on the bundled scenes.

Parametrized over configuration, scene, device and attention. CUDA cases are collected everywhere and skipped where
there is no GPU, so that the list of cases is the same on every machine.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import headoff
from headoff.harness.expected import Tolerance, expectation, mismatches, tolerance_from
from headoff.harness.golden import GoldenDetections, golden_folder
from headoff.sweeps import SweepResult

SCENES = [path.stem for path in headoff.sample_images()]
CONFIGURATIONS = [configuration.name for configuration in headoff.cumulative()]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
    ),
]


@functools.cache
def sweep_of(scene: str, attention: str, dtype: torch.dtype, device: str) -> SweepResult:
    detector = headoff.load("scenes", attention=attention, dtype=dtype, device=device)
    return headoff.sweep(detector, headoff.sample_image(SCENES.index(scene)))


@functools.cache
def golden_of(scene: str) -> dict:
    folder = golden_folder(Path(__file__)) / Path(__file__).stem
    return json.loads((folder / f"test_oracle[{scene}].json").read_text())


@functools.cache
def tolerance_of(scene: str, device: str) -> Tolerance:
    truth = sweep_of(scene, "eager", torch.float64, "cpu")
    return tolerance_from(truth, sweep_of(scene, "eager", torch.float32, device))


@pytest.fixture
def golden(snapshot):
    return snapshot.use_extension(GoldenDetections)


@pytest.mark.parametrize("scene", SCENES)
def test_oracle(golden, scene):
    """The float64 oracle gives the golden file, and writes it under --snapshot-update."""
    assert golden == expectation(sweep_of(scene, "eager", torch.float64, "cpu"))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("device", DEVICES)
def test_expected_detections(device, attention, scene, configuration):
    result = sweep_of(scene, attention, torch.float32, device)
    problems = mismatches(golden_of(scene), result, configuration, tolerance_of(scene, device))
    assert not problems, f"{scene}, {configuration}, {attention} on {device}:\n" + "\n".join(problems)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scene", SCENES)
def test_the_tolerance_tells_configurations_apart(scene, device):
    """Under the tolerance used above, the answer for k heads off is refused as the answer for k + 1.

    So a patch that applies one head's gate wrongly cannot pass. Where both are empty there is nothing to tell.
    """
    result = sweep_of(scene, "eager", torch.float32, device)
    expected = golden_of(scene)
    told = 0
    for one, next_one in zip(CONFIGURATIONS, CONFIGURATIONS[1:], strict=False):
        rows = expected["configurations"]
        if not rows[one] and not rows[next_one]:
            continue
        shifted = {**expected, "configurations": {one: rows[next_one]}}
        assert mismatches(shifted, result, one, tolerance_of(scene, device)), f"{next_one} passes as {one}"
        told += 1
    assert told, "all configurations are empty: this scene tests nothing"


def test_everything_off_sees_nothing_of_the_image():
    """With all cross-attention off the answer is the same for every image."""
    answers = [sweep_of(scene, "eager", torch.float64, "cpu") for scene in SCENES]
    for answer in answers[1:]:
        assert torch.equal(answer.logits[-1], answers[0].logits[-1])
        assert torch.equal(answer.boxes[-1], answers[0].boxes[-1])


def test_scenes_are_found_with_nothing_off():
    """The bundled model really detects: nearly every true object of the bundled scenes is found in its place."""
    from torchvision.ops import box_convert, box_iou

    from headoff.scenes.samples import sample_annotations

    annotations = sample_annotations()
    found = total = 0
    for scene, image in zip(SCENES, annotations["images"], strict=True):
        baseline = sweep_of(scene, "sdpa", torch.float32, "cpu").baseline
        for truth in (a for a in annotations["annotations"] if a["image_id"] == image["id"]):
            box = box_convert(torch.tensor([truth["bbox"]]), "xywh", "xyxy")
            hits = (box_iou(box, baseline.boxes)[0] > 0.5) & (baseline.labels == truth["category_id"])
            found, total = found + bool(hits.any()), total + 1
    assert found >= 0.95 * total, f"{found} of {total} true objects found"
