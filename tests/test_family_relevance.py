"""Relevance of the DETR family: equation 5 on the dense equivalent of deformable attention, levels, sampling points."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from family_examples import DEFORMABLE, IN_FLOAT64, LAYERS, batch, folder_of, loaded
from relevance_examples import TARGETS, features_of, random_gates, targets_of, tiny_detector

import headoff
from headoff.deformable import gather_attention
from headoff.errors import AttentionError, NonFiniteError, SettingError
from headoff.family.levels import on_finest_grid
from headoff.gates import Gates, parse_configuration, stack
from headoff.relevance.autograd_engine import AutogradEngine
from headoff.relevance.engine import RelevanceEngine
from headoff.relevance.explanations import load_explanation
from headoff.relevance.methods import cam_method_names, resolve_cam_method
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.targets import box_coordinate, class_logit
from headoff.scenes.samples import sample_image

ONE_LEVEL = ("conditional_detr", "table-transformer", "lw_detr")


def features(detector):
    pixels, _ = batch(detector.dtype)
    with torch.inference_mode():
        return detector.features(pixels[:1])


@functools.cache
def on_small_images(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no preprocessor_config.json
        return headoff.load(folder_of(kind), dtype=torch.float64, short_side=128)


def some_gates(detector) -> Gates:
    texts = ["none", "first 2; L1H0 = 0.5", "query 2: L2H1; decoder_self: L1H1"]
    if detector.head_layout.encoder_layers:
        texts[2] += "; encoder_self: L0H1"
    return stack(map(parse_configuration, texts), detector.head_layout)


@pytest.mark.parametrize("kind", IN_FLOAT64)
def test_every_method_equals_the_dense_oracle(kind):
    detector = loaded(kind)
    image, gates = features(detector), some_gates(detector)
    targets = [class_logit(2, 1), box_coordinate(4, "cx")]
    evidence = [
        [dense_evidence(detector, image, gates[index], target) for target in targets]
        for index in range(len(gates))
    ]
    for name in cam_method_names():
        method = resolve_cam_method(name)
        for found in AutogradEngine(detector, image, method=name).run(gates, lambda *_: targets):
            for target, pair, dense in zip(targets, found.pairs, evidence[found.index], strict=True):
                expected = method.dense(dense, **method.options("identity"))
                rows = expected.relevance[:, target.query]
                torch.testing.assert_close(pair.rows, rows, rtol=1e-10, atol=1e-12 * float(rows.abs().max()))
                if method.takes_zero_rows:
                    assert rows.max() > 0
                    assert torch.equal(pair.decoder_identity_rows, expected.decoder_identity_rows)
                    assert pair.encoder_identity_rows == expected.encoder_identity_rows


@pytest.mark.parametrize("kind", ("rt_detr", "deformable_detr", "conditional_detr"))
def test_all_configurations_together_are_those_alone(kind):
    detector = loaded(kind)
    image, gates = features(detector), some_gates(detector)
    targets = [class_logit(query, query % 3) for query in range(3)]
    together = {
        found.index: found for found in AutogradEngine(detector, image).run(gates, lambda *_: targets)
    }
    for index in range(len(gates)):
        (alone,) = AutogradEngine(detector, image, memory_budget=1).run(gates[index], lambda *_: targets)
        for one, other in zip(alone.pairs, together[index].pairs, strict=True):
            torch.testing.assert_close(one.rows, other.rows, rtol=1e-10, atol=1e-16)


def test_the_engine_by_autograd_is_that_of_headoffs_own_detr():
    detector = tiny_detector()
    image, gates = features_of(detector, padded=True), random_gates(detector, 3)
    for method in cam_method_names():
        engines = [kind(detector, image, method=method) for kind in (RelevanceEngine, AutogradEngine)]
        results = [
            sorted(
                engine.run(gates, lambda _, logits, __: targets_of(logits, TARGETS), heads=True),
                key=lambda found: found.index,
            )
            for engine in engines
        ]
        for own, other in zip(*results, strict=True):
            torch.testing.assert_close(own.heads, other.heads)
            for one, two in zip(own.pairs, other.pairs, strict=True):
                torch.testing.assert_close(one.rows, two.rows, rtol=1e-9, atol=1e-14)
                assert torch.equal(one.decoder_identity_rows, two.decoder_identity_rows)
                assert one.encoder_identity_rows == two.encoder_identity_rows
                assert torch.equal(one.reference_differs, two.reference_differs)


def test_a_wrong_weight_of_one_corner_is_seen(monkeypatch):
    # The comparison with the oracle could not fail if both used the same weights.
    detector = loaded("rt_detr")
    image = features(detector)
    right = headoff.calls.corners

    def wrong(shapes, locations):
        tokens, weights = right(shapes, locations)
        return tokens, weights * torch.tensor([1.0, 1.0, 1.0, 1.01])

    target = class_logit(2, 1)
    gates = some_gates(detector)[0]
    expected = (
        resolve_cam_method("chefer").dense(dense_evidence(detector, image, gates, target)).relevance[:, 2]
    )
    monkeypatch.setattr("headoff.calls.corners", wrong)
    (found,) = AutogradEngine(detector, image).run(gates, lambda *_: [target])
    assert (found.pairs[0].rows - expected).abs().max() > 1e-6 * expected.abs().max()


@pytest.mark.parametrize("kind", DEFORMABLE)
def test_weights_and_points_agree_with_the_dense_equivalent(kind):
    detector = loaded(kind)
    image = features(detector)
    gates = stack([parse_configuration("L1H0 = 0.5; L2H3")], detector.head_layout)
    target = class_logit(3, 0)
    (found,) = AutogradEngine(detector, image, method="raw").run(gates, lambda *_: [target], heads=True)
    evidence = dense_evidence(detector, image, gates, target)
    dense = torch.stack([layer.weights[:, 3] for layer in evidence.decoder_cross])
    torch.testing.assert_close(found.heads[0], dense)
    x, y, weight = found.points[0].unbind(-1)  # (M, H, K)
    inside = (x > 0) & (x < 1) & (y > 0) & (y < 1)
    sums = weight.sum(-1)
    torch.testing.assert_close(sums[1, 0], torch.tensor(0.5).double())
    assert not sums[2, 3] and inside.any()
    # What is missing from the sum of the weights lies outside the image.
    assert (dense.sum(-1) <= sums + 1e-12).all()


def test_relevance_does_not_depend_on_the_attention_that_computes_it():
    detector = loaded("rt_detr_v2")
    image, gates, target = features(detector), some_gates(detector), class_logit(1, 1)
    expected = list(AutogradEngine(detector, image).run(gates, lambda *_: [target]))
    detector.deformable_attention = gather_attention
    try:
        found = list(AutogradEngine(detector, features(detector)).run(gates, lambda *_: [target]))
    finally:
        detector.deformable_attention = "grid_sample"
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one.pairs[0].rows, other.pairs[0].rows, rtol=1e-9, atol=1e-15)


def test_attention_without_a_backward_pass_is_named():
    detector = loaded("rt_detr")

    def detached(value, spatial_shapes, locations, weights):
        with torch.no_grad():
            return gather_attention(value, spatial_shapes, locations, weights)

    detector.deformable_attention = detached
    try:
        engine = AutogradEngine(detector, features(detector))
        with pytest.raises(AttentionError, match="no backward pass"):
            list(engine.run(some_gates(detector), lambda *_: [class_logit(0, 0)]))
    finally:
        detector.deformable_attention = "grid_sample"


def test_nan_is_traced_to_its_attention():
    detector = loaded("rt_detr")

    def broken(value, spatial_shapes, locations, weights):
        return gather_attention(value, spatial_shapes, locations, weights) * torch.nan

    detector.deformable_attention = broken
    try:
        with pytest.raises(NonFiniteError, match="decoder_cross attention of layer 0"):
            list(
                AutogradEngine(detector, features(detector)).run(
                    some_gates(detector), lambda *_: [class_logit(0, 0)]
                )
            )
    finally:
        detector.deformable_attention = "grid_sample"


@pytest.mark.parametrize(
    "options", ({"backward": "analytic"}, {"kernels": "triton"}, {"zero_rows": "nan"}, {"memory_budget": 0})
)
def test_options_that_this_engine_has_not(options):
    detector = loaded("rt_detr")
    with pytest.raises(SettingError, match="cannot be|too small"):
        AutogradEngine(detector, features(detector), **options)


def test_levels_are_added_up_on_the_finest_grid():
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 7), (3, 4), (2, 2))
    x = torch.rand(2, 3, 35 + 12 + 4, generator=generator, dtype=torch.float64)
    maps = on_finest_grid(x, shapes)
    assert maps.shape == (2, 3, 5, 7)
    torch.testing.assert_close(maps.sum((-2, -1)), x.sum(-1))
    # A level of equal density is spread evenly, and a token over the cells that it covers.
    even = torch.zeros(51, dtype=torch.float64)
    even[35:47] = 1 / 12
    torch.testing.assert_close(on_finest_grid(even, shapes), torch.full((5, 7), 1 / 35).double())
    one = torch.zeros(16 + 4)
    one[16] = 4.0
    assert on_finest_grid(one, ((4, 4), (2, 2))).tolist() == [[1, 1, 0, 0]] * 2 + [[0] * 4] * 2


@pytest.mark.parametrize("kind", ("rt_detr", "deformable_detr two-stage", "lw_detr", "conditional_detr"))
def test_explanations_hold_levels_and_points(kind, tmp_path):
    detector = on_small_images(kind)
    picture = sample_image(0)
    explanation = headoff.explain(detector, picture, ["none", "first 4", "all"], [2, 5], heads=True)
    assert explanation.through_encoder == (kind not in ("rt_detr", "lw_detr"))
    assert len(explanation.levels) == len(explanation.shapes)
    total = sum(level.double().sum((-2, -1)) for level in explanation.levels)
    torch.testing.assert_close(total, explanation.masses)
    assert explanation.masses[0].min() > 0
    assert (explanation.tokens is None) == (kind in ONE_LEVEL)
    heads = detector.head_layout.heads
    assert explanation.heads.shape[:4] == (3, 2, LAYERS, heads)
    if kind == "conditional_detr":
        assert explanation.points is None
    else:
        assert explanation.points.shape[:4] == (3, 2, LAYERS, heads)
        assert explanation.points[0, ..., 2].min() > 0 and not explanation.points[1, :, :, :4, :, 2].any()
    path = explanation.save(tmp_path / "explanation.safetensors")
    again = load_explanation(path)
    assert again.shapes == explanation.shapes and again.objects.scoring == detector.scoring
    for one, other in zip(again.levels, explanation.levels, strict=True):
        assert torch.equal(one, other)


def test_the_grad_mode_of_the_caller_does_not_matter():
    detector, picture = on_small_images("rt_detr"), sample_image(0)
    expected = headoff.explain(detector, picture, ["first 1"], [2]).maps
    with torch.no_grad():
        assert torch.equal(headoff.explain(detector, picture, ["first 1"], [2]).maps, expected)


def test_with_everything_off_no_evidence_comes_from_the_image():
    detector = on_small_images("rt_detr")
    heads = detector.head_layout.heads
    explanation = headoff.explain(detector, sample_image(0), [f"first {heads}"], [2])
    assert not explanation.maps.any() and not explanation.decoder_identity_rows.any()
    assert explanation.statuses[0][0][0] == "no image evidence"


def test_detections_can_be_explained_that_share_a_query():
    detector = on_small_images("deformable_detr")
    picture = sample_image(0)
    swept = headoff.sweep(detector, picture, ["none"], confidence=0.0)
    queries = swept.baseline.queries.tolist()
    repeated = next(query for query in queries if queries.count(query) > 1)
    both = swept.baseline.subset([index for index, query in enumerate(queries) if query == repeated])
    explanation = headoff.explain(detector, picture, ["none"], both)
    assert explanation.labels[0].tolist() == both.labels.tolist()
    assert not torch.equal(explanation.maps[0, 0], explanation.maps[0, 1])


def test_the_picture_of_sampling_points(tmp_path):
    detector = on_small_images("rt_detr")
    picture = sample_image(0)
    explanation = headoff.explain(detector, picture, ["first 2"], [2], heads=True)
    axes = headoff.plot_sampling_points(explanation, 0, 0, image=picture)
    drawn = sum(len(collection.get_offsets()) for collection in axes.collections)
    x, y, weight = explanation.points[0, 0].unbind(-1)
    shown = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1) & (weight > 0)
    heads = detector.head_layout.heads
    assert drawn == int(shown.sum()) + heads  # and the legend
    without = replace(explanation, points=None)
    with pytest.raises(SettingError, match="no sampling points"):
        headoff.plot_sampling_points(without, image=picture)
    with pytest.raises(SettingError, match="no object 1"):
        headoff.plot_sampling_points(explanation, 0, 1, image=picture)


@pytest.mark.parametrize(
    ("kind", "said"),
    (
        ("rt_detr", ("Relevance ends at the memory", "The 3 levels", "sampling points")),
        ("deformable_detr", ("The 3 levels", "sampling points")),
        ("conditional_detr", ()),
    ),
)
def test_the_page_says_where_relevance_ends(kind, said, tmp_path):
    detector, picture = on_small_images(kind), sample_image(0)
    best = headoff.sweep(detector, picture, ["none"], confidence=0.0).baseline[0]
    swept = headoff.sweep(detector, picture, ["none"], confidence=best.score - 1e-6)
    explanation = headoff.explain(detector, picture, ["none"], swept.baseline, heads=True)
    headoff.write_report(tmp_path / "report", picture, swept, explanation=explanation, provenance={})
    page = (tmp_path / "report" / "index.html").read_text()
    for sentence in ("Relevance ends at the memory", "The 3 levels", "sampling points"):
        assert (sentence in page) == (sentence in said), sentence
