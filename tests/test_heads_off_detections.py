"""With the attention under test the model gives the oracle's logits, boxes and detections, for every configuration.

The model is the bundled one on the bundled scenes, or whatever `--model` and `--image` name. Its backbone, which has no
attention, is always the oracle's; around the attention it computes in float32 at least.
"""

from __future__ import annotations

import functools

import pytest
import torch

import headoff
from headoff.detr.detector import Features
from headoff.gates import stack
from headoff.harness.finding import Finding, fail_on
from headoff.harness.model.attention_calls import faulty_layers
from headoff.harness.model.detections import (
    answer_budget,
    answer_of,
    detection_findings,
    expected_rows_of,
    tolerance_of,
)
from headoff.harness.model.mutations import share_of_heads, wrong_by_one_head
from headoff.harness.model.patched import features_on, patched
from headoff.harness.plugin.options import settings_from
from headoff.harness.reference import cases as subjects
from headoff.harness.reference.cases import CONFIDENCE, configuration_names
from headoff.harness.reference.expected import expectation, mismatches
from headoff.harness.reference.golden import GoldenDetections, kept_in

LAYERS_SCENES = 1
"""Images whose attention calls are looked at one by one: the others' are of the same sizes."""


def pytest_generate_tests(metafunc):
    if "some_scene" in metafunc.fixturenames:
        metafunc.parametrize("some_scene", subjects.names(settings_from(metafunc.config))[:LAYERS_SCENES])


@pytest.fixture
def subject(scene, under_test):
    return subjects.subject(under_test.settings, scene)


@pytest.fixture(scope="module")
def findings_of(under_test):
    """All that is wrong on a subject, found once."""

    @functools.cache
    def find(subject):
        return detection_findings(
            under_test.attention,
            subject,
            under_test.device,
            under_test.dtype,
            pictures=under_test.settings.failures,
            calls=under_test.calls,
        )

    return find


def test_oracle(snapshot, subject):
    """The float64 oracle gives the golden file, and writes it under --snapshot-update."""
    if subject.golden is None:
        pytest.skip("there are no golden files for this model and image: the oracle's answer is the truth")
    answers = subject.answers
    found = {
        configuration.name: subject.detections(logits, boxes)
        for configuration, logits, boxes in zip(
            subject.cumulative, answers.logits, answers.boxes, strict=False
        )
    }
    golden = snapshot.use_extension(kept_in(subject.golden, GoldenDetections))
    assert golden == expectation(CONFIDENCE, subject.image_size, found)


@pytest.mark.parametrize("configuration", configuration_names())
def test_expected_detections(subject, configuration, findings_of):
    """All queries' logits and boxes are the oracle's, and the detections those of the golden file."""
    fail_on([each for each in findings_of(subject) if is_about(each, configuration)])


def test_attention_is_called_at_every_site(subject, findings_of):
    """Once in every layer, for every encoding and every decoding."""
    fail_on([each for each in findings_of(subject) if each.configuration is None])


def test_heads_off_layers(some_scene, under_test):
    """Every attention call of the model with the oracle's inputs, by itself, has the right context and gradients."""
    subject = subjects.subject(under_test.settings, some_scene)
    fail_on(
        faulty_layers(under_test.attention, subject, subject.cumulative, under_test.device, under_test.dtype)
    )


def test_the_tolerance_tells_configurations_apart(subject, under_test):
    """Under the tolerances used above, the answer for k heads off is refused as the answer for k + 1.

    So a patch that applies one head's gate wrongly cannot pass. Where no detections are expected of either there are
    the logits to tell them apart.
    """
    budget = answer_budget(subject, under_test.device, under_test.dtype)
    tolerance = tolerance_of(subject, budget)
    accepted, told = [], 0
    for index, (one, other) in enumerate(zip(subject.cumulative, subject.cumulative[1:], strict=False)):
        logits, boxes = subject.answers.logits, subject.answers.boxes
        if (logits[index] - logits[index + 1]).abs().max() <= budget.logits:
            accepted.append(f"{other.name} passes as {one.name}")
        expected, wrong = expected_rows_of(subject, one), expected_rows_of(subject, other)
        if expected or wrong:
            found = subject.detections(logits[index + 1], boxes[index + 1])
            if mismatches(expected, found, CONFIDENCE, tolerance):
                told += 1
            else:
                accepted.append(f"the detections of {other.name} pass as those of {one.name}")
    not_proved_for_others(subject, under_test, accepted)
    assert told or not is_bundled(subject), "all configurations are empty: this scene tests nothing"


def test_the_tolerance_refuses_one_head_errors(subject, under_test):
    """The gate of one head in one layer wrong: refused, under one configuration an image, others for other seeds."""
    names = subjects.names(under_test.settings)
    turn = names.index(subject.name) + under_test.seed
    configuration = subject.cumulative[turn % len(subject.cumulative)]
    heads = share_of_heads(subject.layout, turn, subject.layout.heads * subject.layout.decoder_layers)
    gates = wrong_by_one_head(configuration, subject.layout, heads)
    answer = answer_of(subject.detector.attention, subject, under_test.device, under_test.dtype, gates)
    allowed = answer_budget(subject, under_test.device, under_test.dtype).logits
    truth = subject.answers.logits[subject.cumulative.index(configuration)]
    errors = (answer.logits - truth).abs().amax((1, 2))
    not_proved_for_others(
        subject,
        under_test,
        [
            f"{configuration.name}: with the gate of head {head} in layer {layer} wrong, logits pass "
            f"(off by {error:.1e}, allowed {allowed:.1e})"
            for (layer, head), error in zip(heads, errors.tolist(), strict=True)
            if error <= allowed
        ],
    )


def test_everything_off_sees_nothing_of_the_image(subject, under_test):
    """With all cross-attention off the answer is the same for every image: for this one and for another."""
    gates = stack([subject.cumulative[-1]], subject.layout)
    features = features_on(subject, under_test.device, under_test.dtype)
    others = Features(features.tokens.flip(1) + 1, features.positions, None, features.grid)
    one, other = (
        answer_of(under_test.attention, subject, under_test.device, under_test.dtype, gates, each)
        for each in (features, others)
    )
    if not (torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)):
        apart = (one.logits - other.logits).abs().max().item()
        message = (
            f"with all cross-attention off the answer depends on the image: logits differ by {apart:.1e}"
        )
        fail_on([Finding("gate", message, subject.name, configuration=subject.cumulative[-1].name)])


def test_scenes_are_found_with_nothing_off(under_test):
    """The bundled model really detects: nearly every true object of the bundled scenes is found in its place."""
    from torchvision.ops import box_convert, box_iou

    from headoff.scenes.samples import sample_annotations

    if under_test.settings.model != "scenes":
        pytest.skip("what there is to be found is known of the bundled scenes only")
    annotations = sample_annotations()
    bundled = [subjects.subject(subjects.Settings(), path.stem) for path in headoff.sample_images()]
    found = total = 0
    for subject, image in zip(bundled, annotations["images"], strict=True):
        with patched(subject, under_test.attention, under_test.device, under_test.dtype) as detector:
            baseline = headoff.detect(detector, subject.image)
        for truth in (a for a in annotations["annotations"] if a["image_id"] == image["id"]):
            box = box_convert(torch.tensor([truth["bbox"]]), "xywh", "xyxy")
            hits = (box_iou(box, baseline.boxes)[0] > 0.5) & (baseline.labels == truth["category_id"])
            found, total = found + bool(hits.any()), total + 1
    if found < 0.95 * total:
        fail_on(
            [
                Finding(
                    "detections", f"{found} of {total} true objects are found with nothing off", "all scenes"
                )
            ]
        )


def is_about(finding, configuration: str) -> bool:
    """Findings of no configuration at all, but for those of call counts, are about each."""
    return finding.configuration == configuration or (
        finding.configuration is None and finding.property != "calls"
    )


def is_bundled(subject) -> bool:
    return subject.model == subjects.BUNDLED


def not_proved_for_others(subject, under_test, accepted: list[str]) -> None:
    """Fail where something wrong is accepted.

    A model of somebody's own may have heads that do nothing, and a dtype of few digits tolerances that they stay
    within. Then nothing is proved, which is said.
    """
    if accepted and (not is_bundled(subject) or torch.finfo(under_test.dtype).bits < 32):
        pytest.skip(
            f"tolerances cannot tell {len(accepted)} wrong answers from rounding, such as: {accepted[0]}"
        )
    assert not accepted, "\n".join(accepted)
