"""What is timed at which size: the detector that was asked for, or one as large as those that are used in earnest."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from headoff.attention import Attention
from headoff.detr.checkpoints import load
from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detector, Features, Memory
from headoff.errors import SettingError
from headoff.harness.reference.oracle import features_of
from headoff.harness.settings import Settings
from headoff.images import load_image
from headoff.scenes.samples import sample_image

Size = Literal["auto", "model", "r50", "dc5"]
SIZES: tuple[Size, ...] = get_args(Size)

BUNDLED = "scenes"

PICTURE = (800, 1066)
"""Height and width of the random picture: a photograph of 3 by 4, resized as the published models want it."""


@dataclass(frozen=True, eq=False)
class BenchmarkModel:
    """A detector and a picture.

    - `name`: for people
    - `detector`: in the dtype and on the device that are under test; its own attention is never timed
    - `picture`: RGB
    """

    name: str
    detector: Detector
    picture: Image.Image
    _casts: dict[torch.dtype, BenchmarkModel] = field(default_factory=dict, repr=False)

    @cached_property
    def features(self) -> Features:
        return features_of(with_attention(self.detector, "eager"), self.picture)

    @cached_property
    def memory(self) -> Memory:
        """By eager attention, so that what is decoded does not depend on who is timed."""
        with torch.no_grad():
            return with_attention(self.detector, "eager").encode_features(self.features)

    @property
    def tokens(self) -> int:
        return self.features.tokens.shape[1]

    def in_dtype(self, dtype: torch.dtype) -> BenchmarkModel:
        """The same in another dtype, weights as they were rounded to the one under test."""
        if dtype not in self._casts:
            self._casts[dtype] = replace(self, detector=in_dtype(self.detector, dtype), _casts={})
        return self._casts[dtype]


def benchmark_model(settings: Settings, size: Size = "auto") -> BenchmarkModel:
    """The subject that the settings ask for.

    - `model`: their model and image (the first, where there are several; a bundled scene where there is none)
    - `r50`, `dc5`: DETR with a ResNet-50, of random weights, on a random picture: 850 and 3,350 tokens
    - `auto`: `r50` for the bundled model on a GPU, which it is too small for; else `model`

    Raises SettingError for another size, and what loading a model or an image raises.
    """
    if size not in SIZES:
        raise SettingError(f"benchmarks cannot be of size {size!r}: use one of {', '.join(SIZES)}")
    device = torch.device(settings.device)
    if size == "auto":
        size = "r50" if settings.model == BUNDLED and device.type == "cuda" else "model"
    if size == "model":
        image = settings.images[0] if settings.images else sample_image(0)
        detector = load(settings.model, attention="eager", dtype=settings.torch_dtype, device=device)
        return BenchmarkModel(settings.model, detector.requires_grad_(False).eval(), load_image(image))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        detector = Detector(DetrConfig(backbone=BackboneConfig(dilate_last=size == "dc5")), attention="eager")
    pixels = np.random.default_rng(settings.seed).integers(0, 256, (*PICTURE, 3), dtype=np.uint8)
    return BenchmarkModel(
        f"{size}, random weights",
        detector.to(device, settings.torch_dtype).requires_grad_(False).eval(),
        Image.fromarray(pixels),
    )


def with_attention(detector: Detector, attention: Attention | str) -> Detector:
    """The same weights, not copied, with another attention."""
    # A shallow copy shares modules and parameters; the attention is neither, so that every copy has its own.
    other = copy.copy(detector)
    other.attention = attention
    return other


def in_dtype(detector: Detector, dtype: torch.dtype) -> Detector:
    """A copy whose weights are in `dtype`."""
    return copy.deepcopy(detector).to(dtype)
