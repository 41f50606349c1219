"""Localisation, weak segmentation, sanity checks and causal agreement, with planted truths."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coco_oracle import synthetic
from family_examples import KINDS, loaded
from relevance_examples import tiny_detector
from torch import Tensor

import headoff
from headoff.errors import NonFiniteError, SettingError
from headoff.evaluation.matching import TrueObjects, match, overlaps
from headoff.faithfulness import (
    CausalAgreement,
    ExplainedImage,
    Randomisation,
    Scores,
    Segmentation,
    faithfulness,
    resolve_measure,
)
from headoff.faithfulness.causal import agreement, random_configurations
from headoff.faithfulness.ranks import centred_ranks, rank_correlation
from headoff.faithfulness.sanity import cascade, other_classes, stages
from headoff.faithfulness.segmentation import enlarged, otsu_masks, otsu_threshold
from headoff.faithfulness.truth import truth_of_scene
from headoff.scenes.dataset import draw_scene

SIZE = 192


@dataclass(eq=False)
class Planted(ExplainedImage):
    """With planted maps: by method, a function of the configurations, the objects and the encoded image."""

    planted: dict[str, Callable[..., Tensor]] = field(default_factory=dict)

    def explain(self, method, configurations=None, *, encoded=None, objects=None, target="class"):
        chosen = (self.configuration,) if configurations is None else configurations
        if method not in self.planted:
            return super().explain(method, configurations, encoded=encoded, objects=objects, target=target)
        return self.planted[method](chosen, self.objects if objects is None else objects, encoded)


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes")


@pytest.fixture(scope="module")
def scene(detector) -> Planted:
    """With four objects, all of them found."""
    return Planted.of(detector, draw_scene(4, SIZE, "held_out").image, truth=truth_of_scene(4, SIZE))


def planted(image: Planted, **maps: Tensor) -> dict[str, Callable[..., Tensor]]:
    """The same maps (O, h, w) under all configurations."""
    image._maps.clear()
    image.planted = {
        name: lambda chosen, objects, encoded, one=one: one.expand(len(chosen), *one.shape)
        for name, one in maps.items()
    }
    return image.planted


def values_of(image: Planted, measure, **maps: Tensor) -> dict[str, Tensor]:
    found = resolve_measure(measure).scores(image, list(planted(image, **maps)))
    return {name: scores.values for name, scores in found.items()}


# Localisation.


@pytest.mark.parametrize("measure", ["detected_box", "true_box", "true_mask"])
def test_relevance_on_the_object_scores_one_and_uniform_relevance_the_share_of_area(measure, scene):
    cover, inside, known = resolve_measure(measure).regions(scene)
    full = cover > 1 - 1e-9
    known = known & full.flatten(1).any(1)  # a thin object covers no cell
    assert known.sum() > 1
    generator = torch.Generator().manual_seed(0)
    count = 400
    noise = torch.rand(count, *cover.shape, generator=generator).double()
    found = values_of(
        scene,
        measure,
        perfect=full.double(),
        uniform=torch.ones_like(cover),
        outside=(cover == 0).double(),
        nothing=torch.zeros_like(cover),
        against=full.double() - 5 * (cover == 0),
        **{f"random {index}": one for index, one in enumerate(noise)},
    )
    area = cover.mean((1, 2))
    assert torch.equal(found["perfect"][known], torch.ones(int(known.sum()), 2).double())
    torch.testing.assert_close(found["uniform"][known, 0], area[known])
    torch.testing.assert_close(found["uniform"][known, 1], inside.double().mean((1, 2))[known])
    for name in ("outside", "nothing"):
        assert torch.equal(found[name][known], torch.zeros(int(known.sum()), 2).double())
    assert torch.equal(found["against"][known], found["perfect"][known])  # evidence against is not counted
    drawn = torch.stack([found[f"random {index}"] for index in range(count)])[:, known]
    for column, expected in ((0, area), (1, inside.double().mean((1, 2)))):
        error = drawn[..., column].std(0) / count**0.5
        assert ((drawn[..., column].mean(0) - expected[known]).abs() < 4 * error).all()


def test_regions_are_in_the_pixels_of_the_picture(scene):
    """Against masks drawn pixel by pixel."""
    cover, _, _ = resolve_measure("true_box").regions(scene)
    for index, (left, top, right, bottom) in enumerate(scene.truth.boxes[scene.matched].tolist()):
        drawn = torch.zeros(SIZE, SIZE)
        drawn[round(top) : round(bottom), round(left) : round(right)] = 1
        h, w = scene.grid.shape
        cells = F.avg_pool2d(drawn[None], (SIZE // h, SIZE // w))[0]
        assert (
            cells - cover[index]
        ).abs().max() < 0.13  # two edges by half a pixel of 16 each, and their product
    cover, inside, _ = resolve_measure("true_mask").regions(scene)
    masks = scene.truth.masks[scene.matched].double()
    torch.testing.assert_close(cover.sum((1, 2)) * 256, masks.sum((1, 2)))
    assert torch.equal(inside, masks[:, 8::16, 8::16].bool())


def test_a_detection_of_nothing_has_no_true_region(scene):
    lost = replace(scene, matched=torch.full_like(scene.matched, -1))
    for measure in ("true_box", "true_mask"):
        assert values_of(lost, measure, any=torch.ones(len(lost), *lost.grid.shape))["any"].isnan().all()
    assert (
        values_of(lost, "detected_box", any=torch.ones(len(lost), *lost.grid.shape))["any"].isfinite().all()
    )


# Weak segmentation.


def test_otsu_separates_best():
    generator = torch.Generator().manual_seed(0)
    for spread in (5, 30, 255):
        grey = torch.randint(0, spread + 1, (13, 11), generator=generator).to(torch.uint8)
        grey[:4] += 255 - spread

        def between(threshold, grey=grey):
            above = grey > threshold
            if above.all() or not above.any():
                return 0.0
            one, other = grey[above].double(), grey[~above].double()
            return len(one) * len(other) * float(one.mean() - other.mean()) ** 2

        best = max(range(256), key=between)
        assert between(otsu_threshold(grey)) == pytest.approx(between(best), rel=1e-12)
    assert not otsu_masks(torch.full((1, 3, 3), 0.5)).any()
    assert torch.equal(
        otsu_masks(torch.tensor([[[0.0, 1], [0.1, 0.9]]])), torch.tensor([[[False, True]] * 2])
    )


def test_published_masks_grow():
    """A cell of a half of the picture's side has pixels around it whose interpolation is not zero."""
    cells = torch.zeros(1, 4, 4, dtype=torch.bool)
    cells[0, 1, 1] = True
    published, corrected = (enlarged(cells, (64, 64), (32, 32), way) for way in (True, False))
    exact = cells.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert (
        exact.sum() == 64 and (corrected & ~exact).sum() == 0
    )  # bilinear weights cut the corners of a single cell
    assert published[0, 4:20, 4:20].all() and published.sum() == 16 * 16  # half a cell more on every side
    assert enlarged(cells[:0], (64, 64), (32, 32)).shape == (0, 32, 32)


def test_average_precision_of_masks_is_that_of_pycocotools(detector):
    pytest.importorskip("pycocotools")
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    measure = Segmentation()
    images, scores = [], []
    for seed in range(6):
        image = ExplainedImage.of(
            detector,
            draw_scene(seed, SIZE, "held_out").image,
            truth=truth_of_scene(seed, SIZE),
            confidence=0.3,
        )
        # Good maps and bad ones.
        cover, _, known = resolve_measure("true_mask").regions(image)
        noise = torch.rand(cover.shape, generator=torch.Generator().manual_seed(seed)).double()
        image._maps["planted"] = cover * known[:, None, None] + noise * torch.rand(
            len(image), 1, 1, generator=torch.Generator().manual_seed(seed)
        )
        images.append(image)
        scores.append(measure.scores(image, ["planted"])["planted"])

    def encoded(mask: Tensor) -> dict:
        return rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    found = measure.pooled(scores, np.ones((1, len(images))))[0]
    for variant, published in enumerate((False, True)):
        truths, results = [], []
        for number, image in enumerate(images):
            for mask, label in zip(image.truth.masks, image.truth.labels.tolist(), strict=True):
                about = {"segmentation": encoded(mask), "area": float(mask.sum()), "bbox": [0, 0, 1, 1]}
                truths.append(
                    {"id": len(truths) + 1, "image_id": number, "category_id": label, "iscrowd": 0, **about}
                )
            masks = enlarged(otsu_masks(image.maps("planted")), (SIZE, SIZE), (SIZE, SIZE), published)
            for detection, mask in zip(image.objects.detections, masks, strict=True):
                about = {"segmentation": encoded(mask), "score": detection.score}
                results.append({"image_id": number, "category_id": detection.label, **about})
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO()
            coco.dataset = {
                "images": [{"id": number, "height": SIZE, "width": SIZE} for number in range(len(images))],
                "annotations": truths,
                "categories": [{"id": label} for label in range(len(detector.class_names))],
            }
            coco.createIndex()
            judge = COCOeval(coco, coco.loadRes(results), iouType="segm")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        assert found[variant::2] == pytest.approx(judge.stats[:2], abs=1e-9)
        assert 0 < found[variant] < 1
    unknown = Scores(torch.full((2, 4), torch.nan))
    assert measure.pooled([*scores, unknown], np.ones((1, 7)))[0] == pytest.approx(found, abs=1e-12)
    assert np.isnan(measure.pooled([unknown], np.ones((1, 1)))).all()
    # A bootstrap weights images: one that is drawn twice is two images.
    twice = measure.pooled(scores, np.array([[2.0, 0, 0, 1, 0, 0]]))
    again = measure.pooled([scores[0], scores[0], scores[3]], np.ones((1, 3)))
    assert twice == pytest.approx(again, abs=1e-6)


def test_average_precision_says_what_it_needs(detector, monkeypatch):
    monkeypatch.setattr(sys.modules[Segmentation.__module__], "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="needs scipy: pip install"):
        faithfulness(detector, "scenes:1", "raw", "segmentation")


def test_matching_by_given_overlaps_is_that_of_boxes():
    truth, detections = synthetic(0)
    objects = TrueObjects.of(truth)

    def sides(corners):
        corners = corners.astype(np.float64)
        return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)

    boxes, others = sides(detections.boxes), sides(truth.boxes)
    expected = match(objects, detections)
    found = match(
        objects,
        detections,
        iou=lambda rows, targets: overlaps(boxes[rows], others[targets], truth.crowd[targets]),
        areas=boxes[:, 2] * boxes[:, 3],
    )
    for name in ("places", "in_range", "paired", "matched", "ignored"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


# Ranks.


def test_rank_correlation():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (4, 30), generator=generator).double()
    b = torch.randn(4, 30, generator=generator)
    stats = pytest.importorskip("scipy.stats")
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-12)
    assert rank_correlation(a, a.exp()).tolist() == pytest.approx([1] * 4)
    assert rank_correlation(a, torch.ones(30)).tolist() == [0] * 4
    assert centred_ranks(a).sum(1).abs().max() < 1e-9


# Sanity checks.


def test_every_weight_has_one_stage():
    for detector in (tiny_detector(0), *(loaded(kind, torch.float32) for kind in KINDS[::2])):
        found = stages(detector)
        names = [name for stage in found for name in stage]
        assert sorted(names) == sorted(name for name, _ in detector.named_parameters())
        heads, decoder, backbone = found[0], found[1:4], found[-1]
        assert any("class" in name for name in heads) and not any(
            ".layers.0.self_attn" in name for name in heads
        )
        for part, layer in zip(decoder, (2, 1, 0), strict=True):
            assert any(f"decoder.layers.{layer}." in name for name in part)
        assert all("backbone" in name or "input_proj" in name for name in backbone) and backbone
    assert [len(stage) for stage in stages(tiny_detector(0, decoder_layers=2))][3] == 1  # queries alone


def test_weights_become_random_from_the_top_and_are_restored_bit_for_bit():
    detector = tiny_detector(0, torch.float32)
    before = {name: value.clone() for name, value in detector.state_dict().items()}

    def changed() -> set[str]:
        return {name for name, value in detector.state_dict().items() if not torch.equal(value, before[name])}

    expected = stages(detector)
    with pytest.raises(KeyboardInterrupt):
        with cascade(detector, torch.Generator().manual_seed(0)) as steps:
            assert not changed()
            for stage in steps:
                so_far = {name for names in expected[: stage + 1] for name in names}
                assert changed() == so_far
                for name in so_far:
                    value = detector.get_parameter(name)
                    assert torch.equal(value.flatten().sort().values, before[name].flatten().sort().values)
                if stage == 7:
                    raise KeyboardInterrupt
    assert not changed()


def test_similarity_under_randomisation(detector, scene):
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    measure = Randomisation()
    fixed = torch.rand(len(scene), *scene.grid.shape, generator=torch.Generator().manual_seed(0)).double()
    planted(scene, fixed=fixed)
    found = measure.scores(scene, ["fixed", "raw"])
    assert torch.equal(found["fixed"].curves, torch.ones(len(scene), 1, len(measure.points)).double())
    raw = found["raw"].curves[:, 0]
    assert raw[:, 0].eq(1).all() and raw.abs().max() <= 1
    # Class and box heads have no part in raw attention.
    assert raw[:, 1].sub(1).abs().max() < 1e-6 and raw[:, -1].max() < 0.7
    assert torch.equal(found["raw"].values, raw[:, 1:].mean(1, keepdim=True))
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())
    assert torch.equal(measure.scores(scene, ["raw"])["raw"].values, found["raw"].values)

    def breaks(chosen, objects, encoded):
        if encoded is not None:
            raise NonFiniteError("too large")
        return fixed[None]

    scene.planted = {"breaks": breaks}
    assert measure.scores(scene, ["breaks"])["breaks"].values.isnan().all()


def test_sensitivity_to_the_target(scene):
    generator = torch.Generator().manual_seed(0)
    by_class = torch.rand(20, *scene.grid.shape, generator=generator).double()
    by_query = torch.rand(20, *scene.grid.shape, generator=generator).double()
    planted(scene)
    scene.planted = {
        "of class": lambda chosen, objects, _: by_class[objects.detections.labels][None],
        "of query": lambda chosen, objects, _: by_query[objects.detections.queries][None],
        "of neither": lambda chosen, objects, _: by_query[:1].expand(len(objects), -1, -1)[None],
    }
    others = other_classes(scene).detections
    assert not others.labels.eq(scene.objects.detections.labels).any()
    assert torch.equal(others.queries, scene.objects.detections.queries)
    found = {
        name: one.values
        for name, one in resolve_measure("targets").scores(scene, list(scene.planted)).items()
    }
    assert found["of class"][:, 0].abs().max() < 0.3
    assert found["of query"][:, 0].eq(1).all() and found["of query"][:, 1].abs().max() < 0.3
    torch.testing.assert_close(found["of neither"], torch.ones(len(scene), 2).double())


# Causal agreement.


def test_a_map_that_follows_the_value_agrees(scene):
    cover = torch.stack([scene.grid.cover(box) for box in scene.objects.detections.boxes.double()])
    measure = CausalAgreement(24)

    def following(sign):
        def maps(chosen, objects, _):
            values = scene.values(chosen, "probability")[..., None, None]
            return 2 + sign * values * cover

        return maps

    planted(scene)
    scene.planted = {
        "follows": following(1),
        "opposes": following(-1),
        "fixed": lambda chosen, *_: cover.expand(len(chosen), *cover.shape),
    }
    found = {name: one.values for name, one in measure.scores(scene, list(scene.planted)).items()}
    assert found["follows"][:, :3].eq(1).all() and found["opposes"][:, :3].eq(-1).all()
    assert found["follows"][:, 3].min() > 3 and found["follows"][:, 4].eq(1 / 1000).all()
    assert found["opposes"][:, 3].max() < -3 and found["opposes"][:, 4].eq(1).all()
    assert found["fixed"].eq(torch.tensor([0.0, 0, 0, 0, 1])).all()


def test_p_is_uniform_where_relevance_and_value_have_nothing_in_common():
    generator = torch.Generator().manual_seed(1)
    relevance, values = torch.randn(2, 600, 32, generator=generator).double()
    correlation, z, p = agreement(relevance, values, torch.Generator().manual_seed(2), 499)
    assert abs(float(correlation.mean())) < 4 * 600**-0.5 * float(correlation.std())
    assert abs(float(z.std()) - 1) < 0.15
    below = torch.arange(1, 601).double() / 600
    # Kolmogorov-Smirnov at the level of 1%.
    assert (p.sort().values - below).abs().max() < 1.63 * 600**-0.5 + 1 / 500
    nothing = agreement(torch.ones(1, 32) + 1e-7 * relevance[:1], values[:1], generator)
    assert [float(one) for one in nothing] == [0, 0, 1]


def test_configurations_of_causal_agreement_switch_off_as_many_heads():
    layout = tiny_detector(0).head_layout
    found = random_configurations(layout, 9, 0.5, "decoder_cross", torch.Generator().manual_seed(0))
    gates = torch.stack([one.gate("decoder_cross", layout)[:, 0] for one in found])
    assert gates.eq(0).sum(-1).eq(2).all() and len(torch.unique(gates, dim=0)) > 5
    one = random_configurations(layout, 1, 0.01, "encoder_self", torch.Generator().manual_seed(0))[0]
    assert one.gate("encoder_self", layout).eq(0).sum(-1).eq(1).all()
    for wrong in ({"count": 3}, {"share": 1}, {"value": "detections"}):
        with pytest.raises(SettingError):
            CausalAgreement(**wrong)


def test_all_measures_run_over_scenes(detector):
    measures = ["detected_box", "true_box", "true_mask", "segmentation", "targets", CausalAgreement(6)]
    found = faithfulness(detector, "scenes:2", ["raw", "gradient_input", "random"], measures, off="H0")
    for measure, quantity in found.columns:
        for method in found.methods:
            low, high = quantity.range
            assert low <= found.estimate(method, measure.name, quantity.name).value <= high
    assert "**causal**" in found.table()
