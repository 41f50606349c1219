"""Methods, targets, and `explain` with what it returns."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from relevance_examples import (
    HEADS,
    QUERIES,
    TARGETS,
    assert_matches_oracle,
    features_of,
    random_gates,
    tiny_detector,
)

from headoff.choices import BEST_METHOD
from headoff.detr.detector import Detr
from headoff.errors import GateError, OutputError, SettingError
from headoff.gates import cumulative, first_off, heads_off, none_off, stack
from headoff.images import load_image
from headoff.relevance import (
    EngineMethod,
    Explanation,
    RelevanceEngine,
    cam_method_names,
    class_logit,
    explain,
    load_explanation,
    make_target,
    resolve_cam_method,
)
from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import centred_cam, gradient_cam
from headoff.relevance.trace import DecoderTrace, EncoderTrace


@pytest.fixture(scope="module")
def detector() -> Detr:
    return tiny_detector(0)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def explanation(detector, picture) -> Explanation:
    return explain(detector, picture, queries=[3, 0])


# Methods.


@pytest.mark.parametrize("memory_budget", [1, 2**30])
@pytest.mark.parametrize("name", cam_method_names())
def test_every_method_agrees_with_the_oracle(name, memory_budget):
    detector = tiny_detector(1, decoder_layers=2)
    features = features_of(detector, padded=True)
    gates = random_gates(detector, 3, per_query=True, seed=4)
    options = {"method": name, "memory_budget": memory_budget}
    assert assert_matches_oracle(detector, features, gates, specs=TARGETS[:3], **options)
    assert assert_matches_oracle(detector, features, stack([none_off()], detector.head_layout), **options)


def test_the_default_comes_first():
    assert cam_method_names()[0] == "chefer" and resolve_cam_method("chefer").needs_gradient
    assert not resolve_cam_method("raw").needs_gradient
    assert resolve_cam_method("best").name == BEST_METHOD


def test_a_method_can_have_an_engine_of_its_own(detector, picture):
    class Twice(RelevanceEngine):
        def __init__(self, detector, features, *, method, picture, memory_budget):
            super().__init__(detector, features, memory_budget=memory_budget)
            self.factor = 2 if picture.size == (100, 70) and method.signed else 1

        def run(self, *arguments, **options):
            for found in super().run(*arguments, **options):
                yield replace(
                    found, pairs=[replace(pair, rows=pair.rows * self.factor) for pair in found.pairs]
                )

    method = EngineMethod("twice", "", Twice, signed=True)
    once = explain(detector, picture, queries=[3])
    assert torch.equal(explain(detector, picture, queries=[3], method=method).maps, once.maps * 2)
    with pytest.raises(SettingError, match="zero_rows cannot be 'reference' for twice"):
        explain(detector, picture, queries=[3], method=method, zero_rows="reference")
    with pytest.raises(SettingError, match="'twice' computes no cams"):
        RelevanceEngine(detector, features_of(detector), method=method)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_centred_gives_nothing_to_attention_that_cannot_matter(dtype):
    """In the first decoder layer all queries have the same value, so their attention to each other has no effect."""
    detector = tiny_detector(2, dtype)
    features = features_of(detector)
    gates = stack([none_off(), first_off(2)], detector.head_layout)

    def first_cams(rule):
        def make(record):
            return AttentionVjp(record, rule)

        with torch.no_grad():
            memory = EncoderTrace.run(detector, features, None, make).memory
            decoder = DecoderTrace.run(detector, memory, gates, make)
            gradient = torch.randn(2, QUERIES, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
            flow = decoder.backward(gradient, torch.tensor([0, 1]), memory=False)
        return flow.self_cams

    centred, plain = first_cams("centred"), first_cams("gradient")
    assert plain[0].gt(0).any() and centred[0].eq(0).all()
    assert centred[1].gt(0).any()


def test_centred_gives_nothing_to_it_in_the_oracle_either(detector):
    evidence = dense_evidence(detector, features_of(detector), None, class_logit(1, 0))
    assert gradient_cam(evidence.decoder_self[0]).gt(0).any()
    assert centred_cam(evidence.decoder_self[0]).eq(0).all()
    assert centred_cam(evidence.decoder_self[1]).gt(0).any()


def test_raw_is_the_mean_of_the_heads(detector, picture):
    found = explain(detector, picture, ["none", "H0"], [1], "raw", heads=True)
    torch.testing.assert_close(found.heads.mean(3), found.maps, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.masses[0], torch.ones(1, 3).double())
    torch.testing.assert_close(found.masses[1], torch.full((1, 3), (HEADS - 1) / HEADS).double())


@pytest.mark.parametrize(
    ("name", "near"), [("chefr", "chefer"), ("roll_out", "rollout"), ("gradcam", "gradcam_backbone")]
)
def test_a_misspelt_method_is_answered_with_the_nearest(name, near, detector, picture):
    with pytest.raises(SettingError, match=f"there is no relevance method '{name}'.*did you mean '{near}'"):
        explain(detector, picture, method=name)


# Targets.


def test_targets():
    logits = torch.arange(12.0).view(3, 4).requires_grad_()
    boxes = torch.arange(12.0).view(3, 4).requires_grad_()
    assert make_target("class", 2, 1).value(logits, boxes) == 9
    assert make_target("w", 1, 0).value(logits, boxes) == 6
    assert make_target(lambda logits, _: logits[:2].sum(), 1, 0).value(logits, boxes) == 28
    with pytest.raises(SettingError, match="no target 'clas' .did you mean 'class'"):
        make_target("clas", 0, 0)
    for wrong in (
        lambda logits, boxes: 3.0,
        lambda logits, boxes: logits,
        lambda logits, boxes: boxes[0, 0].detach(),
    ):
        with pytest.raises(SettingError, match="must be one number"):
            make_target(wrong, 0, 0).value(logits, boxes)


# explain.


def test_an_explanation_is_what_the_oracle_says(detector, picture, explanation):
    pixels, _ = detector.preprocess([load_image(picture)])
    features = detector.features(pixels)
    gates = stack(explanation.configurations, detector.head_layout)
    for index in (0, 2):
        for slot, query in enumerate((3, 0)):
            label = int(explanation.objects.labels[slot])
            assert (int(explanation.queries[index, slot]), int(explanation.labels[index, slot])) == (
                query,
                label,
            )
            target = class_logit(query, label)
            expected = resolve_cam_method("chefer").dense(
                dense_evidence(detector, features, gates[index], target)
            )
            torch.testing.assert_close(
                explanation.maps[index, slot].flatten(1), expected.relevance[:, query], rtol=1e-10, atol=0
            )
            assert explanation.values[index, slot] == pytest.approx(
                float(explanation.logits[index, query, label]), rel=1e-12
            )


def test_axes(explanation):
    assert explanation.maps.shape == (HEADS + 1, 2, 3, 4, 6)
    assert explanation.grid == (4, 6) and explanation.image_size == (70, 100)
    assert [len(labels) for labels in explanation.axes.values()] == list(explanation.maps.shape)
    assert explanation.axes["configuration"][:2] == ("none off", "first 1 off")
    assert explanation.axes["object"][0].startswith("query 3: class ")
    assert explanation.objects.queries.tolist() == [3, 0]


def test_statuses_and_masses(explanation):
    assert explanation.masses.shape == (HEADS + 1, 2, 3)
    assert {status for row in explanation.statuses[0] for status in row} == {"ok"}
    assert {status for row in explanation.statuses[-1] for status in row} == {"no image evidence"}
    assert explanation.masses[-1].eq(0).all() and explanation.peaks[-1].isnan().all()
    assert explanation.box_shares[-1].isnan().all()


def with_maps(explanation, maps, boxes=None):
    objects = explanation.objects
    if boxes is not None:
        objects = replace(objects, boxes=torch.tensor(boxes))
    return replace(explanation, maps=maps, objects=objects)


def test_share_of_a_box_counts_tokens_in_part(explanation):
    """70 x 100 pixels become 64 x 91: tokens of 16 pixels, the last column cut to 11."""
    assert explanation.resized == (64, 91) and explanation.stride == 16
    even = torch.ones_like(explanation.maps)
    everything, quarter = [0.0, 0.0, 100.0, 70.0], [0.0, 0.0, 100.0, 70.0 / 4]
    shares = with_maps(explanation, even, [everything, quarter]).box_shares
    torch.testing.assert_close(shares[:, 0], torch.ones_like(shares[:, 0]))
    torch.testing.assert_close(shares[:, 1], torch.full_like(shares[:, 1], 0.25))
    one = torch.zeros_like(explanation.maps)
    one[..., 1, 5] = 2.0
    half = [100 * 85.5 / 91, 0.0, 100.0, 70.0]  # the right half of the last column
    found = with_maps(explanation, one, [half, everything])
    torch.testing.assert_close(
        found.box_shares[:, 0], torch.full((HEADS + 1, 3), 0.5).double(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(found.peaks[0, 0, 0], torch.tensor([85.5 / 91 * 100, 24 / 64 * 70]).double())


def test_scaling_never_makes_a_picture_of_nothing(explanation):
    sweep, single = explanation.scaled(), explanation.scaled("map")
    assert sweep.max() == 1 and sweep[-1].eq(0).all()
    torch.testing.assert_close(sweep * explanation.maps.max(), explanation.maps)
    assert single[:-1].amax((-2, -1)).eq(1).all() and single[:-1].amin((-2, -1)).eq(0).all()
    assert single[-1].eq(0).all()
    constant = with_maps(explanation, torch.full_like(explanation.maps, 0.3)).scaled("map")
    assert constant.eq(0).all()
    assert explanation.scaled("object").amax((0, 2, 3, 4)).eq(1).all()
    with pytest.raises(SettingError, match="per 'layer'"):
        explanation.scaled("layer")


def test_negative_relevance_is_neither_drawn_nor_in_shares(explanation):
    signed = with_maps(explanation, torch.full_like(explanation.maps, -3.0))
    assert signed.is_signed and not explanation.is_signed
    assert signed.scaled("map").eq(0).all() and signed.box_shares.isnan().all() and signed.masses.lt(0).all()
    signed.maps[..., 1, 2], signed.maps[..., 2, 1] = 6.0, 3.0
    for per in ("map", "object", "sweep"):
        assert signed.scaled(per).sum((-2, -1)).eq(1.5).all()
    full = with_maps(signed, signed.maps.clamp(min=0))
    assert torch.equal(signed.box_shares, full.box_shares)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_save_and_load(ending, detector, picture, tmp_path):
    both = first_off(1) & heads_off(2, layers=[1], site="decoder_self")
    found = explain(detector, picture, ["none", both], [1, 4], heads=True, target=["class", "cy"])
    again = load_explanation(found.save(tmp_path / f"maps.{ending}"))
    assert again.axes == found.axes and again.configurations == found.configurations
    assert again.as_dict() == found.as_dict() and again.image_size == found.image_size
    for name in ("maps", "heads", "logits", "boxes", "values", "queries"):
        assert getattr(again, name).equal(getattr(found, name))
    assert again.target == ("class", "cy") and again.stride == found.stride


def test_files_that_are_invalid(explanation, tmp_path):
    with pytest.raises(SettingError, match="end its name in .npz"):
        explanation.save(tmp_path / "maps.txt")
    with pytest.raises(OutputError, match="cannot be written"):
        explanation.save(tmp_path / "nowhere" / "maps.npz")
    (tmp_path / "broken.npz").write_text("no archive")
    for name in ("broken.npz", "missing.npz", "missing.safetensors"):
        with pytest.raises(SettingError, match=f"{name} cannot be read as an explanation"):
            load_explanation(tmp_path / name)


def test_no_detection_is_an_empty_result(detector, picture, tmp_path):
    found = explain(detector, picture, confidence=1.0)
    assert found.maps.shape == (HEADS + 1, 0, 3, 4, 6) and len(found.objects) == 0
    assert found.masses.numel() == 0 and found.statuses == ((),) * (HEADS + 1)
    assert found.scaled().shape == found.maps.shape and found.box_shares.numel() == 0
    assert found.as_dict()["queries"] == [[]] * (HEADS + 1)
    assert load_explanation(found.save(tmp_path / "maps.npz")).maps.shape == found.maps.shape


def test_detections_are_explained_by_default(detector, picture):
    found = explain(detector, picture, ["none"], confidence=0.3, layers="last", method="raw")
    assert len(found.objects) > 0 and found.objects.scores.min() > 0.3
    assert found.layers == (2,) and found.maps.shape[2] == 1
    torch.testing.assert_close(found.scores[0].float(), found.objects.scores)


def test_layers_are_picked(detector, picture, explanation):
    found = explain(detector, picture, queries=[3], layers=[2, 0])
    torch.testing.assert_close(found.maps[:, 0], explanation.maps[:, 0][:, [2, 0]], rtol=1e-10, atol=0)
    assert explain(detector, picture, ["none"], [3], layers=1, method="raw").layers == (1,)


def test_classes_and_queries_are_frozen_unless_asked(picture):
    detector = tiny_detector(6)
    frozen, own, following = (
        explain(
            detector, picture, queries=range(QUERIES), method="raw", layers="last", pick=pick, confidence=0.4
        )
        for pick in ("baseline", "class", "object")
    )
    assert frozen.queries.equal(torch.arange(QUERIES).expand(HEADS + 1, -1))
    assert frozen.labels.eq(frozen.objects.labels).all()
    assert own.queries.equal(frozen.queries)
    assert own.labels.equal(own.logits[..., :-1].argmax(-1)) and not own.labels.equal(frozen.labels)
    lost = following.queries < 0
    assert lost.any() and following.values.isnan().equal(lost) and following.scores.isnan().equal(lost)
    assert following.statuses[-1][int(lost[-1].nonzero()[0])] == ("not found",)
    assert following.maps[lost].eq(0).all() and following.as_dict()["scores"][0] is not None


def test_where_the_reference_differs():
    detector = tiny_detector(0, decoder_layers=1)
    picture = np.zeros((64, 64, 3), np.uint8)
    ours = explain(detector, picture, ["none"], range(QUERIES))
    theirs = explain(detector, picture, ["none"], range(QUERIES), zero_rows="reference")
    differs = (ours.maps != theirs.maps).flatten(3).any(-1)
    assert differs.any() and (ours.reference_differs | ~differs).all()


def test_where_the_reference_differs_does_not_depend_on_the_layers_asked_for(picture):
    """A zero row in the first layer is missing from the last map as well."""
    found = {
        layers: explain(tiny_detector(1), picture, ["decoder_self H0-2"], range(QUERIES), layers=layers)
        for layers in ("all", "last")
    }
    assert found["all"].reference_differs[..., -1].any()
    assert found["last"].reference_differs[..., 0].equal(found["all"].reference_differs[..., -1])


def test_progress_is_told(detector, picture):
    calls = []
    explain(detector, picture, cumulative(HEADS)[:3], [0], "raw", progress=lambda *now: calls.append(now))
    assert calls == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"queries": [5]}, "there is no query 5: this detector's go from 0 to 4"),
        ({"queries": [-1]}, "there is no query -1"),
        ({"queries": [1, 1]}, "not all different"),
        ({"queries": 3}, "queries cannot be 3"),
        ({"queries": ["x"]}, "queries cannot be"),
        ({"layers": "first"}, "layers cannot be 'first'"),
        ({"layers": [3]}, "there is no decoder layer 3"),
        ({"layers": [0, 0]}, "not all different"),
        ({"target": "width"}, "no target 'width'"),
        ({"target": ["class"], "queries": [0, 1]}, "1 targets were given for 2 objects"),
        ({"pick": "other"}, "pick cannot be 'other'"),
        ({"confidence": 2.0}, "confidence 2.0"),
    ],
)
def test_arguments_that_are_invalid(arguments, message, detector, picture):
    with pytest.raises(SettingError, match=message):
        explain(detector, picture, **{"method": "raw", **arguments})


def test_configurations_that_are_invalid(detector, picture):
    with pytest.raises(GateError, match="H7|head 7"):
        explain(detector, picture, ["H7"])
    with pytest.raises(GateError, match="there is no configuration"):
        explain(detector, picture, [])


def test_as_dict_knows_no_nan(explanation):
    text = json.dumps(explanation.as_dict(), allow_nan=False)
    assert json.loads(text)["statuses"][-1][0] == ["no image evidence"] * 3
    assert not math.isnan(json.loads(text)["masses"][0][0][0])
