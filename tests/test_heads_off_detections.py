"""With the attention under test the model gives the oracle's logits, boxes and detections, for every configuration.

The model is the bundled one on the bundled scenes, or what `--model` and `--image` name. Its backbone, which has no
attention, is always the oracle's; around the attention it computes in float32 at least.
"""

from __future__ import annotations

import pytest
import torch

import headoff
from headoff.detr.checkpoints.load import BUNDLED
from headoff.detr.detector import Features
from headoff.gates import stack
from headoff.harness.finding import Finding, fail_on
from headoff.harness.model.attention_calls import faulty_layers
from headoff.harness.model.detections import (
    detection_findings,
    detection_mismatches,
    expected_detections,
    output_tolerance,
    output_with,
)
from headoff.harness.model.mutations import require_rejected, some_heads, with_wrong_heads
from headoff.harness.model.patched import features_on, findings_about, patched
from headoff.harness.plugin.options import settings_from
from headoff.harness.plugin.scenes import STALE, golden_detections, golden_files, parametrize_scenes
from headoff.harness.reference.cases import (
    BUNDLED_MODEL,
    CONFIDENCE,
    case_names,
    configuration_names,
    reference_case,
)
from headoff.harness.reference.golden import GoldenDetections
from headoff.harness.settings import Settings

CALLS_SCENES = 1
"""Images whose attention calls are tested one by one: those of the others have the same sizes."""


def pytest_generate_tests(metafunc):
    parametrize_scenes(metafunc, oracle_scene=None, some_scene=CALLS_SCENES)


@pytest.fixture
def case(scene, under_test):
    return reference_case(under_test.settings, scene)


def findings_of(under_test, case):
    return under_test.in_model(detection_findings, case, pictures=under_test.settings.failures)


@pytest.mark.oracle
def test_oracle(snapshot, pytestconfig, oracle_scene):
    """The float64 oracle gives the golden file, and writes it under --snapshot-update."""
    case = reference_case(settings_from(pytestconfig), oracle_scene)
    golden = golden_files(snapshot, case.golden, GoldenDetections)
    found = {one.name: expected_detections(case, one) for one in case.cumulative}
    assert golden == golden_detections(CONFIDENCE, found), STALE


@pytest.mark.parametrize("configuration", configuration_names())
def test_expected_detections(case, under_test, configuration):
    """The logits and boxes of all queries are the oracle's, and the detections too."""
    fail_on(findings_about(findings_of(under_test, case), configuration))


def test_attention_is_called_at_every_site(case, under_test):
    """Once in every layer, for every encoding and every decoding."""
    fail_on(findings_about(findings_of(under_test, case), None))


def test_heads_off_layers(some_scene, under_test):
    """Every attention call of the model, with the oracle's inputs, has the right context and gradients."""
    case = reference_case(under_test.settings, some_scene)
    fail_on(faulty_layers(under_test.attention, case, case.cumulative, under_test.device, under_test.dtype))


def test_the_tolerance_tells_configurations_apart(case, under_test):
    """Under the tolerances used above, the output for k heads off is rejected as the output for k + 1.

    So a patch that applies one head's gate wrongly cannot pass. Where no detections are expected of either there are
    the logits to tell them apart.
    """
    tolerance = output_tolerance(case, under_test.device, under_test.dtype)
    logits = case.output.logits
    accepted, with_detections, tested = [], 0, 0
    for index, (one, other) in enumerate(zip(case.cumulative, case.cumulative[1:], strict=False)):
        if (logits[index] - logits[index + 1]).abs().max() <= tolerance.logits.allowed:
            accepted.append(f"the logits under '{other.name}' pass as those under '{one.name}'")
        expected, wrong = expected_detections(case, one), expected_detections(case, other)
        if len(expected) or len(wrong):
            with_detections += 1
            if not detection_mismatches(expected, wrong, tolerance):
                accepted.append(f"the detections under '{other.name}' pass as those under '{one.name}'")
        tested += 1
    assert with_detections or case.model != BUNDLED_MODEL, (
        "all configurations are empty: this scene tests nothing"
    )
    require_rejected(under_test, case, "wrong outputs", accepted, tested + with_detections)


def test_the_tolerance_rejects_one_head_errors(case, under_test):
    """The gate of one head in one layer wrong: rejected, under one configuration an image, others for other seeds."""
    names = case_names(under_test.settings)
    turn = names.index(case.name) + under_test.seed
    index = turn % len(case.cumulative)
    configuration = case.cumulative[index]
    heads = some_heads(case.layout, turn, case.layout.heads * case.layout.decoder_layers)
    gates = with_wrong_heads(
        stack([configuration.named(f"L{layer}H{head} wrong") for layer, head in heads], case.layout),
        case.layout,
        heads,
    )
    wrong = output_with(case.detector.attention, case, under_test.device, under_test.dtype, gates)
    allowed = output_tolerance(case, under_test.device, under_test.dtype).logits.allowed
    errors = (wrong.logits - case.output.logits[index]).abs().amax((1, 2)).tolist()
    accepted = [
        f"logits under '{configuration.name}' with the gate of head {head} in layer {layer} wrong "
        f"(off by {error:.1e}, allowed {allowed:.1e})"
        for (layer, head), error in zip(heads, errors, strict=True)
        if error <= allowed
    ]
    require_rejected(under_test, case, "one-head errors in logits", accepted, len(heads))


def test_everything_off_sees_nothing_of_the_image(case, under_test):
    """With all cross-attention off the output is the same for every image: for this one and for another."""
    gates = stack([case.cumulative[-1]], case.layout)
    features = features_on(case, under_test.device, under_test.dtype)
    others = Features(features.tokens.flip(1) + 1, features.positions, None, features.grid)
    one, other = (
        output_with(under_test.attention, case, under_test.device, under_test.dtype, gates, some)
        for some in (features, others)
    )
    if not (torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)):
        apart = (one.logits - other.logits).abs().max().item()
        message = (
            f"with all cross-attention off the output depends on the image: logits differ by {apart:.1e}"
        )
        fail_on([Finding("gate", message, case.name, configuration=case.cumulative[-1].name)])


def test_scenes_are_found_with_nothing_off(under_test):
    """The bundled model really detects: nearly every true object of the bundled scenes is found in its place."""
    from headoff.boxes import pairwise_iou
    from headoff.scenes.samples import sample_annotations

    if under_test.settings.model != BUNDLED:
        pytest.skip("the true objects are known for the bundled scenes only")
    annotations = sample_annotations()
    cases = [reference_case(Settings(), name) for name in case_names(Settings())]
    found = total = 0
    for case, image in zip(cases, annotations["images"], strict=True):
        with patched(case, under_test.attention, under_test.device, under_test.dtype) as detector:
            baseline = headoff.detect(detector, case.image)
        for truth in (a for a in annotations["annotations"] if a["image_id"] == image["id"]):
            left, top, width, height = truth["bbox"]
            box = torch.tensor([[left, top, left + width, top + height]])
            hits = (pairwise_iou(box, baseline.boxes)[0] > 0.5) & (baseline.labels == truth["category_id"])
            found, total = found + bool(hits.any()), total + 1
    if found < 0.95 * total:
        message = f"{found} of {total} true objects are found with none off"
        fail_on([Finding("detections", message, "all scenes")])
