"""The published notebooks' way to work, to be timed against the package's: one whole forward pass for every question.

A configuration costs a forward pass for its detections, and another that keeps its attention weights for every
object to explain. From there one backward pass, through the backbone and to all weights, gives the gradients of the
attention weights, and the rules are products of N x N matrices (Chefer, Gur, Wolf, ICCV 2021, equations 5 to 10).
"""

from __future__ import annotations

import copy
import math

import torch
from PIL import Image
from torch import Tensor

from headoff.detr.detector import Detector, DetectorOutput
from headoff.gates import Configuration, stack
from headoff.relevance.rules import normalise


class WeightKeepingAttention:
    """Eager attention that keeps its weights in the order of its calls; a backward pass adds their gradients."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
        if head_gate is not None:
            weights = weights * head_gate
        if weights.requires_grad:
            weights.retain_grad()
        self.weights.append(weights)
        return weights @ value


class Notebook:
    """A copy of the detector whose weights all require gradients, as in the notebooks, and one image."""

    def __init__(self, detector: Detector, image: Image.Image) -> None:
        self.detector = copy.deepcopy(detector).requires_grad_(True)
        self.image = image

    @torch.no_grad()
    def detect(self, configuration: Configuration) -> DetectorOutput:
        """Logits (1, 1, Q, K + 1) and boxes (1, 1, Q, 4) of one forward pass, from the image on."""
        return self._forward(configuration, WeightKeepingAttention())

    def explain(self, configuration: Configuration, query: int, label: int) -> Tensor:
        """Maps (layers, N) of one query's logit of class `label`, after every decoder layer."""
        attention = WeightKeepingAttention()
        self.detector.zero_grad()
        self._forward(configuration, attention).logits[0, 0, query, label].backward()
        with torch.no_grad():
            return _relevance(attention.weights, self.detector.config.encoder_layers)[:, query]

    def _forward(self, configuration: Configuration, attention: WeightKeepingAttention) -> DetectorOutput:
        self.detector.attention = attention
        pixels, _ = self.detector.preprocess([self.image])
        gates = stack([configuration], self.detector.head_layout)
        return self.detector.decode(self.detector.encode(pixels), gates)


def _relevance(weights: list[Tensor], encoder_layers: int) -> Tensor:
    """(decoder layers, Q, N): the rules on whole matrices."""
    cams = [(weight.grad * weight.detach())[0].clamp(min=0).mean(0) for weight in weights]  # type: ignore[operator]
    encoder, decoder = cams[:encoder_layers], cams[encoder_layers:]
    # R - I instead of R, for the same number of products: where R - I is small, R has few of its digits.
    r_ii = torch.zeros_like(encoder[0])
    for cam in encoder:
        r_ii = r_ii + cam + cam @ r_ii
    r_ii = normalise(r_ii)
    r_qq, r_qi = torch.zeros_like(decoder[0]), torch.zeros_like(decoder[1])
    maps = []
    for self_cam, cross_cam in zip(decoder[::2], decoder[1::2], strict=True):
        r_qi = r_qi + self_cam @ r_qi
        r_qq = r_qq + self_cam + self_cam @ r_qq
        r_qi = r_qi + normalise(r_qq).T @ (cross_cam @ r_ii)
        maps.append(r_qi)
    return torch.stack(maps)
