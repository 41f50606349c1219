"""Sanity checks: whether a map depends on the weights of the model, and on what is explained.

Similarity is Spearman's rank correlation of the cells of two maps, -1..1; 0 where one of them is constant.

*Cascading randomisation* (Adebayo et al., NeurIPS 2018, arXiv 1810.03292): weights are replaced by random ones from
the top of the model down, cumulatively: class and box heads, decoder layers from the last one, encoder layers from
the last one, the backbone. After every stage the map of the same query and class is compared with the original. A map
that stays the same does not show what the model has learned. Random weights are a random permutation of the numbers
of each parameter, so that their distribution stays. The model is restored afterwards, bit for bit. Where random weights
give numbers that are not finite, similarity is not defined.

*Sensitivity to the target*: the map is compared with that of another class at the same query (the most likely other
one), and with the maps of the image's other objects (the mean over them).

**Neither ranks methods.** Random numbers that are drawn anew each time pass both, and noisy maps look better than
smooth ones, faithful or not (Binder et al., CVPR 2023, arXiv 2211.12486). A similarity near 1 is a reason to reject a
method, and a low one is no reason to trust it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headoff.detections import class_probabilities
from headoff.detector import Detector
from headoff.detr.detector import Features
from headoff.encoded import EncodedImage
from headoff.errors import NonFiniteError
from headoff.faithfulness.explained import ExplainedImage, decoded
from headoff.faithfulness.measures import Measure, Quantity, Scores, register_measure
from headoff.faithfulness.ranks import rank_correlation
from headoff.values import Objects

PARTS = 3
"""Stages of the decoder, and of the encoder."""

_DECODER_LAYER = re.compile(r"(?:^|\.)decoder\.layers\.(\d+)\.")
_ENCODER_LAYER = re.compile(r"(?:^|\.)encoder\.(?:aifi\.\d+\.)?layers\.(\d+)\.")
_HEADS = re.compile(
    r"(class_head|box_head|class_labels_classifier|bbox_predictor|class_embed|bbox_embed|pre_bbox_head|lqe_layers"
    r"|decoder\.(layer)?norm)\b"
)
_BACKBONE = re.compile(r"backbone|(^|\.)(encoder_)?input_proj")
_QUERIES = re.compile(r"(^|\.)(decoder\.|query|reference_point|enc_|pos_trans|denoising)")


def stages(detector: Detector, parts: int = PARTS) -> list[list[str]]:
    """The names of the parameters of each stage, from the top: heads, `parts` of the decoder, `parts` of the encoder,
    the backbone. Object queries belong to the last stage of the decoder, and what else encodes to the last one of the
    encoder. A stage is empty where a detector has fewer layers than parts.
    """
    layout = detector.head_layout
    found: list[list[str]] = [[] for _ in range(2 * parts + 2)]
    encoder_layers = 1 + max(
        (int(match[1]) for name, _ in detector.named_parameters() if (match := _ENCODER_LAYER.search(name))),
        default=-1,
    )

    def part_of(layer: int, layers: int) -> int:
        """Which of the parts has the layer: the first one has the last layers."""
        from_top = np.array_split(np.arange(layers)[::-1], parts)
        return next(part for part, members in enumerate(from_top) if layer in members)

    for name, _ in detector.named_parameters():
        if _BACKBONE.search(name):
            stage = 2 * parts + 1
        elif match := _DECODER_LAYER.search(name):
            stage = 1 + part_of(int(match[1]), layout.decoder_layers)
        elif match := _ENCODER_LAYER.search(name):
            stage = 1 + parts + part_of(int(match[1]), encoder_layers)
        elif _HEADS.search(name) and not re.search(r"(^|\.)(enc_|denoising)", name):
            stage = 0
        else:
            stage = parts if _QUERIES.search(name) else 2 * parts
        found[stage].append(name)
    return found


@contextmanager
def cascade(detector: Detector, generator: torch.Generator, parts: int = PARTS) -> Iterator[Iterator[int]]:
    """Within this context, each step of the iterator makes the weights of one more stage random.

    At its end the weights are what they were, bit for bit, whatever has happened.
    """
    parameters = dict(detector.named_parameters())
    saved: dict[str, Tensor] = {}

    @torch.no_grad()
    def steps() -> Iterator[int]:
        for stage, names in enumerate(stages(detector, parts)):
            for name in names:
                parameter = parameters[name]
                saved[name] = parameter.detach().clone()
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(saved[name].flatten()[order].view_as(parameter))
            yield stage

    try:
        yield steps()
    finally:
        with torch.no_grad():
            for name, values in saved.items():
                parameters[name].copy_(values)


class Randomisation(Measure):
    """Similarity to the original map while the weights are made random from the top down; see the module.

    Args:
        parts: stages of the decoder, and of the encoder.
    """

    name = "randomisation"
    summary = "similarity to the map of a model with random weights: near 1 is bad, and no less ranks nothing"
    quantities = (
        Quantity(
            "similarity",
            "rank correlation with the original map, mean over the stages",
            "neither",
            "correlation",
            (-1, 1),
        ),
    )

    def __init__(self, parts: int = PARTS) -> None:
        self.parts = parts

    @property
    def settings(self) -> dict[str, Any]:
        return {"parts": self.parts}

    @property
    def points(self) -> Tensor:
        return torch.arange(2 * self.parts + 3).double()

    @property
    def axis(self) -> str:
        parts = self.parts
        return (
            f"stages with random weights: 1 heads, {2}..{1 + parts} decoder from its last layer, {2 + parts}.."
            f"{1 + 2 * parts} encoder from its last layer, {2 + 2 * parts} backbone"
        )

    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        originals = {method: image.maps(method).flatten(1) for method in methods}
        curves = {method: [torch.ones(len(image), dtype=torch.float64)] for method in methods}
        detector = image.detector
        with cascade(detector, image.generator("randomisation"), self.parts) as steps:
            for stage in steps:
                # A DETR's features are those of the original as long as the backbone is.
                if isinstance(image.features, Features) and stage < 2 * self.parts + 1:
                    encoded = EncodedImage(detector, image.picture, image.encoded.resized, image.features)
                else:
                    encoded = EncodedImage.of(detector, image.picture)
                for method in methods:
                    try:
                        maps = image.explain(method, encoded=encoded)[0].flatten(1)
                    except NonFiniteError:  # random weights may give numbers too large
                        maps = torch.full_like(originals[method], torch.nan)
                    similarity = rank_correlation(maps, originals[method])
                    curves[method].append(similarity.masked_fill(maps.isnan().any(-1), torch.nan))
        found = {}
        for method, points in curves.items():
            curve = torch.stack(points, dim=-1)
            found[method] = Scores(curve[:, 1:].mean(-1, keepdim=True), curve[:, None])
        return found


class TargetSensitivity(Measure):
    """Similarity to the maps of another class, and of other objects; see the module."""

    name = "targets"
    summary = "similarity to the maps of other targets: near 1 is bad, and no less ranks nothing"
    quantities = (
        Quantity(
            "other_class", "rank correlation with the map of another class", "neither", "correlation", (-1, 1)
        ),
        Quantity(
            "other_object",
            "rank correlation with the maps of other objects",
            "neither",
            "correlation",
            (-1, 1),
        ),
    )

    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        objects = other_classes(image)
        count = len(image)
        found = {}
        for method in methods:
            maps = image.maps(method).flatten(1)
            classes = rank_correlation(maps, image.explain(method, objects=objects)[0].flatten(1))
            others = rank_correlation(maps[:, None], maps[None]).fill_diagonal_(0).sum(1) / max(count - 1, 1)
            if count < 2:
                others = torch.full_like(others, torch.nan)
            found[method] = Scores(torch.stack((classes, others), dim=-1))
        return found


def other_classes(image: ExplainedImage) -> Objects:
    """The image's objects, each as the most likely other class at its query."""
    output = decoded(image.encoded, (image.configuration,))
    detections = image.objects.detections
    scores = class_probabilities(output.logits[0, 0], detections.scoring)[detections.queries]
    labels = scores.scatter(1, detections.labels[:, None], -1.0).argmax(1)
    return replace(image.objects, detections=replace(detections, labels=labels))


for _measure in (Randomisation, TargetSensitivity):
    register_measure(_measure.name, _measure)
