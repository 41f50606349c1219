"""Image tokens of detectors of transformers that are taken away."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from family_examples import loaded
from PIL import Image

from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.faithfulness import ExplainedImage, Perturbation, faithfulness
from headoff.faithfulness.perturbation import TokenPerturber

KINDS = ("table-transformer", "deformable_detr", "rt_detr", "rf_detr")
"""One for each form of a backbone's output."""


def explained(kind: str, **options) -> ExplainedImage:
    """A random picture of 64 x 64 pixels, which is not resized."""
    detector = loaded(kind)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    values = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(detector.dtype) / 128 - 1
    with torch.no_grad():
        features = detector.features(values)
    encoded = EncodedImage(detector, Image.fromarray(pixels), (64, 64), features)
    return ExplainedImage.of(detector, encoded, confidence=0.02, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_of_the_backbone_are_filled(kind):
    image = explained(kind)
    cells = image.grid.shape[0] * image.grid.shape[1]
    kept = torch.rand(3, cells, generator=torch.Generator().manual_seed(0)) < 0.5
    kept[0] = True
    found = TokenPerturber(image, "zero")(kept)
    torch.testing.assert_close(found[0, :, 0], image.values(["none"])[0])
    assert not torch.allclose(found[1], found[0]) and not torch.allclose(found[1], found[2])
    image.memory_budget = 1
    torch.testing.assert_close(TokenPerturber(image, "zero")(kept), found)
    assert not torch.allclose(TokenPerturber(image, "mean")(kept)[1], found[1])


def test_coarser_cells_are_filled_in_proportion():
    image = explained("rt_detr")
    kept = torch.ones(1, *image.grid.shape, dtype=torch.bool)
    kept[0, 0, 0] = False
    filled = image.features.filled(kept, "zero").backbone
    for (was, _), (now, _) in zip(image.features.backbone, filled, strict=True):
        scale = image.grid.shape[0] / was.shape[-2]
        torch.testing.assert_close(now[..., 0, 0], was[..., 0, 0] * (1 - scale**-2))
        torch.testing.assert_close(now[..., 0, 1:], was[..., 0, 1:])


def test_tokens_are_not_removed_and_the_default_is_another_fill():
    image = explained("lw_detr")
    with pytest.raises(SettingError, match="use tokens_mean"):
        faithfulness(image.detector, image.picture, "raw", "tokens_removed")
    with pytest.raises(SettingError, match="use tokens_mean"):
        Perturbation("tokens", "removed").scores(image, ["random"])
    found = faithfulness(image.detector, image.picture, "random", confidence=0.02)
    assert [measure.name for measure in found.measures] == ["tokens_mean", "detected_box"]
