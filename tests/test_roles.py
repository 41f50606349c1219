"""What heads are for: where they look, and roles that the data supports."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import headoff
from headoff.errors import SettingError
from headoff.importance.attention import (
    STATISTICS,
    attention_at_objects,
    attention_statistics,
    token_regions,
)
from headoff.importance.games import Game
from headoff.importance.roles import ROLES, HeadRoles, MeanOverImages, head_roles

BOX = torch.tensor([[0.5, 0.5, 0.4, 0.4]], dtype=torch.float64)


def on_token(*places, grid=(10, 10)):
    """Attention of one object, layer and head, spread evenly over tokens (row, column): (1, 1, 1, N)."""
    weights = torch.zeros(grid).double()
    for row, column in places:
        weights[row, column] = 1 / len(places)
    return weights.flatten()[None, None, None]


def statistics_of(weights, box=BOX, grid=(10, 10), extent=(1.0, 1.0)):
    found = attention_statistics(weights, box, grid, extent)
    return {name: value.item() for name, value in found.by_name.items()}


def test_regions_divide_the_image():
    regions = token_regions(BOX, (10, 10), (1.0, 1.0))
    areas = {name: cover.sum().item() / 100 for name, cover in regions.items()}
    assert areas["inside"] == pytest.approx(0.4**2, abs=0.01)
    assert areas["core"] == pytest.approx(0.3**2, abs=0.01)
    assert areas["core"] + areas["rim"] == pytest.approx(0.5**2, abs=0.01)
    sides = ("left", "right", "top", "bottom")
    torch.testing.assert_close(sum(regions[side] for side in sides), regions["rim"])
    for side in sides:
        assert areas[side] == pytest.approx(areas["rim"] / 4, abs=0.01)
    # Tokens of rows 4 and 5 and columns 3 to 6 are around the centre.
    assert regions["core"].view(10, 10)[4, 4] == 1
    assert regions["left"].view(10, 10)[5].nonzero().flatten().tolist() == [2, 3]
    assert regions["top"].view(10, 10)[:, 5].nonzero().flatten().tolist() == [2, 3]


def test_statistics_of_maps_that_are_known():
    even = statistics_of(torch.full((1, 1, 1, 100), 0.01, dtype=torch.float64))
    assert even["tokens"] == pytest.approx(100)
    assert even["extremity"] == pytest.approx(1)
    assert even["inside"] == pytest.approx(0.16, abs=0.01)
    assert (even["offset_x"], even["offset_y"]) == pytest.approx((0, 0), abs=1e-12)
    centre = statistics_of(on_token((4, 4), (4, 5), (5, 4), (5, 5)))
    assert centre["tokens"] == pytest.approx(4)
    assert (centre["inside"], centre["rim"], centre["outside"]) == (1, 0, 0)
    assert centre["extremity"] == 0
    right = statistics_of(on_token((4, 6), (5, 6)))
    assert right["right"] == 1
    assert right["distance"] == pytest.approx(math.hypot(0.15, 0.05) / 0.2)
    assert right["offset_x"] == pytest.approx(0.15 / 0.2)
    assert right["offset_y"] == pytest.approx(0, abs=1e-12)
    assert statistics_of(on_token((6, 5)))["bottom"] > 0.5
    assert statistics_of(on_token((0, 0)))["outside"] == 1


def test_a_cut_last_column_is_taken_into_account():
    """10 columns of 0.12 reach beyond the image."""
    wide = statistics_of(on_token((5, 9)), extent=(1.0, 1.2))
    assert wide["offset_x"] == pytest.approx((0.95 * 1.2 - 0.5) / 0.2)


def test_agreement_is_the_cosine_of_maps():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(3, 2, 4, 25, generator=generator).double()
    weights /= weights.sum(-1, keepdim=True)
    found = attention_statistics(weights, BOX.expand(3, -1), (5, 5), (1.0, 1.0))
    cosine = torch.nn.functional.cosine_similarity
    expected = torch.stack([cosine(weights[o, 1, 2], weights[o, 1, 3], dim=0) for o in range(3)]).mean()
    assert found.agreement[1, 2, 3].item() == pytest.approx(expected.item())
    torch.testing.assert_close(found.agreement.diagonal(dim1=1, dim2=2), torch.ones(2, 4).double())
    pairs = [cosine(weights[a, 0, 1], weights[b, 0, 1], dim=0) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert found.across_objects[0, 1].item() == pytest.approx(torch.stack(pairs).mean().item())
    layers = torch.stack([cosine(weights[o, 0, 3], weights[o, 1, 3], dim=0) for o in range(3)])
    assert found.across_layers[0, 3].item() == pytest.approx(layers.mean().item())
    assert attention_statistics(weights[:1], BOX, (5, 5), (1.0, 1.0)).across_objects.isnan().all()


def test_recorded_attention_is_that_of_explain():
    detector, image = headoff.load("scenes"), headoff.sample_image(0)
    encoded = headoff.EncodedImage.of(detector, image)
    game = Game.of(detector, encoded, "decoder_cross", ())
    weights = attention_at_objects(detector, encoded, game.objects)
    explained = headoff.explain(detector, image, "none", method="raw", heads=True)
    assert explained.objects.queries.tolist() == game.objects.detections.queries.tolist()
    torch.testing.assert_close(weights.float(), explained.heads[0].flatten(-2), rtol=1e-3, atol=1e-6)


def test_intervals_cover_the_mean_and_leave_missing_values_out():
    images = np.random.default_rng(1).normal(2.0, 1.0, size=(400, 3))
    images[::2, 1] = np.nan
    found = MeanOverImages.of(images)
    assert found.mean == pytest.approx(np.nanmean(images, axis=0))
    expected = np.nanstd(images, axis=0) / np.sqrt([400, 200, 400])
    assert found.error == pytest.approx(expected, rel=0.1)
    assert (found.high - found.low) == pytest.approx(2 * 1.96 * expected, rel=0.12)


def roles_with(effect, error):
    """1 layer x 2 heads; the second has no effect."""
    estimates = {
        role.value: MeanOverImages(*(np.array([[x, 0.0]]) for x in (effect * role.sign, 0.0, 0.0, error)))
        for role in ROLES
    }
    columns = {name: MeanOverImages(*(x[0] for x in vars(one).values())) for name, one in estimates.items()}
    return HeadRoles("decoder_cross", (1, 2), 9, 9, "zero", estimates, columns, {}, None, None, None)


def test_effects_by_class_are_means_over_its_objects_and_images():
    detector, images = headoff.load("scenes"), headoff.sample_images()[:3]
    found = head_roles(detector, images)
    scored = [
        headoff.heads(detector, image, measures="removal_columns", values="iou", ablations="zero")
        for image in images
    ]
    assert found.classes
    for name, of in found.classes.items():
        label = detector.class_names.index(name)
        rows = [one.get().scores[one.objects.labels == label, 0] for one in scored]
        rows = [row for row in rows if len(row)]
        assert (of.images, of.objects) == (len(rows), sum(map(len, rows)))
        expected = torch.stack([row.mean(0) for row in rows]).mean(0)
        assert of.effects["iou"].mean == pytest.approx(expected.numpy(), abs=1e-6)
        assert found.roles_for(name, 2) == ()  # of too few images


def test_a_role_is_stated_only_where_its_interval_lies_beyond_the_smallest_effect():
    assert roles_with(1.0, 0.01).roles(0, 0) == ROLES
    assert roles_with(1.0, 0.01).roles(0) == ROLES
    assert roles_with(1.0, 0.01).roles(1, 0) == ()
    assert roles_with(1.0, 0.5).roles(0, 0) == ()  # too uncertain
    assert roles_with(-1.0, 0.01).roles(0, 0) == ()  # the other sign
    assert roles_with(0.04, 0.0001).roles(0, 0) == ()  # too small
    assert [role.name for role in roles_with(0.3, 0.01).roles(0, 0)] == [
        "box precision",
        "suppresses duplicates",
    ]
    # 12 statements together have the level of one.
    assert roles_with(1.0, 0.0).quantile == pytest.approx(2.8653, abs=1e-3)


def test_roles_of_the_bundled_model():
    """Measured on more images in docs/heads_of_scenes.md."""
    detector = headoff.load("scenes")
    found = head_roles(detector, headoff.sample_images())
    assert found.images == len(headoff.sample_images())
    assert "suppresses duplicates" in [role.name for role in found.roles(2)]
    assert "box precision" in [role.name for role in found.roles(6)]
    assert found.attention["extremity"].mean.shape == (6, 8)
    rows = list(found.rows())
    per_head = (
        3 + len(STATISTICS) + 7 + 1
    )  # effects, attention, agreement with other heads and of two objects
    assert len(rows) == 8 * 3 * (1 + len(found.classes)) + 48 * per_head + 40
    assert {row["class"] for row in rows} == {"", *found.classes}
    assert found.as_dict()["roles"][-1][2] == [role.name for role in found.roles(2)]
    one = headoff.heads(
        detector, headoff.sample_image(0), measures="removal_columns", values="iou", ablations="zero"
    )
    swept = headoff.sweep(detector, headoff.sample_image(0), ["none", "H6"])
    boxes = swept.boxes[:, swept.baseline.queries].double()
    from headoff.boxes import corners_of, iou_of

    iou = iou_of(corners_of(boxes[0]), corners_of(boxes[1]))
    torch.testing.assert_close(one.get().scores[:, 0, 6], 1 - iou, rtol=0, atol=1e-5)


def test_errors():
    detector = headoff.load("scenes")
    with pytest.raises(SettingError, match="only 1 of 1 has an object"):
        head_roles(detector, [headoff.sample_image(0)])
    with pytest.raises(SettingError, match="only 0 of 2 has an object"):
        head_roles(detector, headoff.sample_images()[:2], confidence=1.0)
