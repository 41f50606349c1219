"""An image whose objects are explained: what measures are computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from headoff.ablation.references import hash_of_image
from headoff.detections import detections_from
from headoff.detector import Detector, DetectorOutput
from headoff.encoded import EncodedImage
from headoff.faithfulness.controls import CONTROLS
from headoff.faithfulness.truth import Truth
from headoff.gates import Configuration, Gates, none_off, read_configurations, stack
from headoff.images import ImageSource
from headoff.relevance import explain
from headoff.relevance.targets import TargetSpec
from headoff.relevance.token_grid import TokenGrid
from headoff.sweeps import decode_all, for_queries_of
from headoff.values import Objects, resolve_value

MEMORY_BUDGET = 256 * 2**20
"""Default limit of the activations of a batch of changed images, in bytes."""


@dataclass(eq=False)
class ExplainedImage:
    """An image, the detector under a configuration, and the objects that it detects: they are what is explained.

    Attributes:
        detector: the detector.
        encoded: the image through the detector.
        configuration: the heads that are off, everywhere; objects that it names are replaced by their queries.
        objects: the O detections under the configuration.
        truth: the true objects, where they are known.
        matched: (O,) int64, the true object of each detection, -1 where there is none or it is not known.
        seed: of all random numbers.
        identity: SHA-256 of the image.
        memory_budget: limit of the activations of a batch of changed images, in bytes.
    """

    detector: Detector
    encoded: EncodedImage
    configuration: Configuration
    objects: Objects
    truth: Truth | None
    matched: Tensor
    seed: int
    identity: str
    memory_budget: int = MEMORY_BUDGET
    _maps: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        detector: Detector,
        image: ImageSource | EncodedImage,
        configuration: Configuration | str = "none",
        *,
        truth: Truth | None = None,
        confidence: float = 0.5,
        seed: int = 0,
        memory_budget: int = MEMORY_BUDGET,
    ) -> ExplainedImage:
        """Detect the objects of an image under a configuration.

        Raises:
            ImageError: the image cannot be read.
            GateError: the configuration cannot be read, or does not fit the detector.
            SettingError: `confidence` is not a probability, or the configuration names an object that does not exist.
            NonFiniteError: a logit or box is not finite.
        """
        encoded = image if isinstance(image, EncodedImage) else EncodedImage.of(detector, image)
        (chosen,) = read_configurations(configuration)
        chosen.check(detector.head_layout)

        def detected(one: Configuration) -> Objects:
            output = decoded(encoded, (one,))
            logits, boxes = output.logits[0, 0], output.boxes[0, 0]
            size = encoded.picture.height, encoded.picture.width
            found = detections_from(logits, boxes, size, detector.class_names, confidence, detector.scoring)
            return Objects.of(found, boxes, confidence)

        if chosen.names_objects:
            (chosen,) = for_queries_of(detected(none_off()).detections, (chosen,))
        objects = detected(chosen)
        nothing = torch.full((len(objects),), -1)
        return cls(
            detector,
            encoded,
            chosen,
            objects,
            truth,
            nothing if truth is None else truth.match(objects.detections),
            seed,
            hash_of_image(encoded.picture),
            memory_budget,
        )

    def __len__(self) -> int:
        """O."""
        return len(self.objects)

    @property
    def picture(self) -> Image.Image:
        """The image as RGB."""
        return self.encoded.picture

    @property
    def features(self) -> Any:
        return self.encoded.features

    @cached_property
    def grid(self) -> TokenGrid:
        """Where the cells of maps are in the image."""
        return TokenGrid(
            tuple(self.features.grid),
            self.detector.stride(self.features),
            self.encoded.resized,
            (self.picture.height, self.picture.width),
        )

    @cached_property
    def gates(self) -> Gates:
        """The gates of the configuration, a batch of one."""
        return stack((self.configuration,), self.detector.head_layout)

    def maps(self, method: str) -> Tensor:
        """Relevance maps of the objects under the configuration after the last decoder layer: (O, h, w) float64.

        They are computed once. Some methods have maps with negative numbers, which are evidence against the object.

        Args:
            method: a relevance method or a control.
        """
        if method not in self._maps:
            self._maps[method] = self.explain(method)[0]
        return self._maps[method]

    def explain(
        self,
        method: str,
        configurations: Sequence[Configuration | str] | None = None,
        *,
        encoded: EncodedImage | None = None,
        objects: Objects | None = None,
        target: TargetSpec | Sequence[TargetSpec] = "class",
    ) -> Tensor:
        """Relevance maps after the last decoder layer: (C, O, h, w) float64.

        Args:
            method: a relevance method or a control.
            configurations: by default that of the image only.
            encoded: the image as another detector of the same layout encodes it, such as one with other weights.
            objects: explain these instead of the image's, such as the same queries with another class.
            target: see `headoff.explain`. Controls ignore it.
        """
        objects = self.objects if objects is None else objects
        chosen = read_configurations(self.configuration if configurations is None else configurations)
        if method in CONTROLS:
            return torch.stack([CONTROLS[method](self, one.text, objects) for one in chosen])
        encoded = self.encoded if encoded is None else encoded
        found = explain(
            encoded.detector,
            encoded,
            chosen,
            objects.detections,
            method,
            "last",
            target=target,
            confidence=objects.confidence,
        )
        return found.maps[:, :, 0].double()

    def values(self, configurations: Sequence[Configuration | str], value: str = "probability") -> Tensor:
        """A value (`headoff.values`) of the image's objects under other configurations: (C, O) float64."""
        output = decoded(self.encoded, read_configurations(configurations))
        return self.value(output.logits[:, 0], output.boxes[:, 0], value)

    def value(self, logits: Tensor, boxes: Tensor, value: str = "probability") -> Tensor:
        """A value of the image's objects, (P, O) float64 on the CPU, from logits (P, Q, K + 1) and boxes (P, Q, 4)."""
        return resolve_value(value)(self.objects, logits, boxes).double().cpu()

    def generator(self, *words: object) -> torch.Generator:
        """Random numbers that depend on the seed, the image and `words`, and on nothing that was computed before."""
        text = repr((self.seed, self.identity, *map(str, words)))
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        return torch.Generator().manual_seed(number)


def decoded(encoded: EncodedImage, configurations: Sequence[Configuration]) -> DetectorOutput:
    """Logits (C, 1, Q, columns) and boxes (C, 1, Q, 4) of an image under configurations."""
    with torch.inference_mode():
        gates = stack(configurations, encoded.detector.head_layout)
        return decode_all(encoded.detector, encoded.features, gates, memory=encoded.memory)
