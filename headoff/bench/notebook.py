"""The published notebooks' way to work, to be timed against the package's: one whole forward pass for every question.

A configuration costs a forward pass for its detections, and another that keeps its attention weights for every
object to explain. From there one backward pass, through the backbone and to all weights, gives the gradients of the
attention weights, and the rules are products of N x N matrices.
"""

from __future__ import annotations

import copy
import math

import torch
from PIL import Image
from torch import Tensor

from headoff.detector import DetectorOutput
from headoff.detr.detector import Detr
from headoff.gates import Configuration, stack
from headoff.relevance.rules import AttentionEvidence, Evidence, chefer


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

    def evidence(self, encoder_layers: int) -> Evidence:
        """Weights and gradients of all calls of one image without padding."""
        no_scale = torch.empty(0)  # of rounding errors, which equation 5 does not need
        calls = [AttentionEvidence(one.detach()[0], one.grad[0], no_scale) for one in self.weights]  # type: ignore[index]
        encoder, decoder = tuple(calls[:encoder_layers]), tuple(calls[encoder_layers:])
        tokens = self.weights[0].new_ones(self.weights[0].shape[-1], dtype=torch.bool)
        return Evidence(encoder, decoder[::2], decoder[1::2], tokens)


class Notebook:
    """A copy of the detector whose weights all require gradients, as in the notebooks, and one image."""

    def __init__(self, detector: Detr, image: Image.Image) -> None:
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
            evidence = attention.evidence(self.detector.config.encoder_layers)
            return chefer(evidence).relevance[:, query]

    def _forward(self, configuration: Configuration, attention: WeightKeepingAttention) -> DetectorOutput:
        self.detector.attention = attention
        pixels, _ = self.detector.preprocess([self.image])
        gates = stack([configuration], self.detector.head_layout)
        return self.detector.decode(self.detector.encode(pixels), gates)
