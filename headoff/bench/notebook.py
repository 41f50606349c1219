"""The way of the published notebooks, to be timed beside the package's: one whole forward pass for every question.

A configuration costs one forward pass of its own for its detections, and another, which leaves its attention weights
behind, for each object that is explained; from there one backward pass, through the backbone and to all weights, gives
the gradients of the attention weights, and the rules are products of N x N matrices (Chefer, Gur, Wolf, ICCV 2021,
equations 5 to 10).
"""

from __future__ import annotations

import copy
import math

import torch
from PIL import Image
from torch import Tensor

from headoff.detr.detector import Detector, DetectorOutput
from headoff.gates import Configuration, Gates, stack
from headoff.relevance.rules import normalise


class KeptWeights:
    """Eager attention that keeps its weights, in the order of its calls, and their gradients once there are any."""

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
            weights = weights * head_gate.to(weights)
        if weights.requires_grad:
            weights.retain_grad()
        self.weights.append(weights)
        return weights @ value


class Notebook:
    """A detector of its own, whose weights all want gradients, and one picture."""

    def __init__(self, detector: Detector, picture: Image.Image) -> None:
        self.detector = copy.deepcopy(detector).requires_grad_(True)
        self.picture = picture

    def forward(self, gates: Gates) -> DetectorOutput:
        """The whole detector under one configuration, from the picture on."""
        pixels, _ = self.detector.preprocess([self.picture])
        return self.detector.decode(self.detector.encode(pixels), gates)

    @torch.no_grad()
    def detect(self, configurations: tuple[Configuration, ...]) -> DetectorOutput:
        """Logits (C, 1, Q, K + 1) and boxes (C, 1, Q, 4), one configuration after the other."""
        self.detector.attention = KeptWeights()
        found = [self.forward(stack([each], self.detector.head_layout)) for each in configurations]
        return DetectorOutput(
            torch.cat([each.logits for each in found]), torch.cat([each.boxes for each in found])
        )

    def explain(self, configuration: Configuration, query: int, label: int) -> Tensor:
        """Maps (layers, N) of one query's logit of class `label`, after every decoder layer."""
        attention = KeptWeights()
        self.detector.attention = attention
        self.detector.zero_grad()
        output = self.forward(stack([configuration], self.detector.head_layout))
        output.logits[0, 0, query, label].backward()
        with torch.no_grad():
            return _maps(attention.weights, self.detector.config.encoder_layers)[:, query]


def _maps(weights: list[Tensor], encoder_layers: int) -> Tensor:
    """(decoder layers, Q, N): the rules, on whole matrices."""
    cams = [(each.grad * each.detach())[0].clamp(min=0).mean(0) for each in weights]  # type: ignore[operator]
    encoder, decoder = cams[:encoder_layers], cams[encoder_layers:]
    # R - I rather than R, for the same products: where R - I is small, R has few of its digits.
    of_image = torch.zeros_like(encoder[0])
    for cam in encoder:
        of_image = of_image + cam + cam @ of_image
    of_image = normalise(of_image)
    of_queries, r_qi = torch.zeros_like(decoder[0]), torch.zeros_like(decoder[1])
    maps = []
    for own, cross in zip(decoder[::2], decoder[1::2], strict=True):
        r_qi = r_qi + own @ r_qi
        of_queries = of_queries + own + own @ of_queries
        r_qi = r_qi + normalise(of_queries).T @ (cross @ of_image)
        maps.append(r_qi)
    return torch.stack(maps)
