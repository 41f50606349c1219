"""The detectors that benchmarks run on, and their image."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from headoff.attention import Attention
from headoff.detr.checkpoints import ModelChoice
from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detr, Features, Memory
from headoff.errors import SettingError
from headoff.images import ImageSource, load_image
from headoff.scenes.samples import sample_image

Size = Literal["scenes", "r50", "dc5", "model"]
SIZES: tuple[Size, ...] = get_args(Size)[:-1]
"""The bundled detector, and DETR with a ResNet-50, without and with a dilated last stage (4 times the tokens).
A detector that is loaded has the size `model`."""

IMAGE_SIZE = (800, 1066)
"""Height and width of the random image for `r50` and `dc5`: a photo of 3:4, resized as the published models do."""


@dataclass(frozen=True, eq=False)
class BenchmarkModel:
    """A detector and an image.

    Attributes:
        name: for titles.
        detector: in the dtype and on the device that are benchmarked. Its own attention is never used.
        image: RGB.
    """

    name: str
    detector: Detr
    image: Image.Image
    _casts: dict[torch.dtype, BenchmarkModel] = field(default_factory=dict, repr=False)

    @cached_property
    def features(self) -> Features:
        """The image through the backbone."""
        with torch.no_grad():
            pixels, _ = self.detector.preprocess([self.image])
            return self.detector.features(pixels)

    @cached_property
    def memory(self) -> Memory:
        """The features through the encoder with eager attention, so that all decodes start from the same memory."""
        with torch.no_grad():
            return with_attention(self.detector, "eager").encode_features(self.features)

    @property
    def tokens(self) -> int:
        return self.features.tokens.shape[1]

    def in_dtype(self, dtype: torch.dtype) -> BenchmarkModel:
        """The same weights in another dtype."""
        if dtype not in self._casts:
            detector = copy.deepcopy(self.detector).to(dtype)
            self._casts[dtype] = replace(self, detector=detector, _casts={})
        return self._casts[dtype]

    def with_image(self, image: Image.Image) -> BenchmarkModel:
        """The same detector with another image."""
        casts = {dtype: cast.with_image(image) for dtype, cast in self._casts.items()}
        return replace(self, image=image, _casts=casts)


def benchmark_model(size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> BenchmarkModel:
    """The detector of a size; `r50` and `dc5` have random weights and a random image.

    Raises:
        SettingError: the size is not known.
    """
    if size == "scenes":
        return loaded_model(ModelChoice(size), sample_image(0), device, dtype)
    if size not in SIZES:
        raise SettingError(f"there is no benchmark of size {size!r}: use one of {', '.join(SIZES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        detector = Detr(DetrConfig(backbone=BackboneConfig(dilate_last=size == "dc5")), attention="eager")
    pixels = np.random.default_rng(seed).integers(0, 256, (*IMAGE_SIZE, 3), dtype=np.uint8)
    detector = detector.to(device, dtype).requires_grad_(False).eval()
    return BenchmarkModel(f"{size}, random weights", detector, Image.fromarray(pixels))


def loaded_model(
    model: ModelChoice, image: ImageSource, device: torch.device, dtype: torch.dtype
) -> BenchmarkModel:
    """Any detector that `headoff.load` loads. Raises what loading the model or the image raises."""
    detector = model.load_detr(attention="eager", dtype=dtype, device=device)
    return BenchmarkModel(model.source, detector.requires_grad_(False).eval(), load_image(image))


def without_backbone(model: BenchmarkModel, attention: Attention | str) -> Detr:
    """The model's detector with another attention, and with the features of its image, whatever image it is given."""
    detector = with_attention(model.detector, attention)
    detector.features = lambda *_: model.features  # type: ignore[method-assign]
    return detector


def with_attention(detector: Detr, attention: Attention | str) -> Detr:
    """The same weights, not copied, with another attention."""
    # A shallow copy shares modules and parameters; the attention is neither, so that every copy has its own.
    other = copy.copy(detector)
    other.attention = attention
    return other
