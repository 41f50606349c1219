"""A whole detector as a workload: the decoder, a sweep from the image to the outcomes, relevance maps."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headoff.attention import Attention
from headoff.bench.models import BenchmarkModel, with_attention, without_backbone
from headoff.bench.workloads import Output, Workload
from headoff.detections import class_probabilities
from headoff.detector import DetectorOutput
from headoff.detr.detector import Detr, Memory
from headoff.gates import Configuration, Gates, stack
from headoff.relevance import Explanation, explain
from headoff.sweeps import SweepResult, sweep
from headoff.timing import TimedCall

MOST_CHECKED = 9
"""Configurations: the oracle takes many times as long for 256 of them as the computation that is timed."""


def rolled(image: Image.Image, chosen: random.Random) -> Image.Image:
    """The image moved across its borders, and darkened a little: as hard to detect in as before."""
    pixels = np.asarray(image)
    pixels = np.roll(pixels, [chosen.randrange(size) for size in pixels.shape[:2]], (0, 1))
    return Image.fromarray((pixels * chosen.uniform(0.9, 1.0)).astype(pixels.dtype))


@dataclass(frozen=True, eq=False)
class ModelWorkload(Workload):
    """What the workloads of a whole detector share.

    Attributes:
        model: detector and image.
        configurations: computed together, so that they share what they have in common, as in use.
        title: of the configurations; made from their names by default.
    """

    model: BenchmarkModel
    configurations: tuple[Configuration, ...]
    title: str = ""

    @property
    def dtype(self) -> torch.dtype:
        return self.model.detector.dtype

    @property
    def roundings(self) -> int:
        config = self.model.detector.config
        return config.encoder_layers + 2 * config.decoder_layers

    @property
    def subtitle(self) -> str:
        names = [configuration.name for configuration in self.configurations]
        return self.title or (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")

    @cached_property
    def gates(self) -> Gates:
        return stack(self.configurations, self.model.detector.head_layout)

    @property
    def checked(self) -> list[int]:
        """The configurations whose detections are compared with the oracle's: all, or some that are evenly spaced."""
        count = len(self.configurations)
        return torch.linspace(0, count - 1, min(count, MOST_CHECKED)).round().int().tolist()

    def in_dtype(self, dtype: torch.dtype) -> Self:
        return replace(self, model=self.model.in_dtype(dtype))

    def varied(self, number: int) -> Self:
        return replace(self, model=self.model.with_image(rolled(self.model.image, random.Random(number))))

    def image_cell(self) -> tuple[list[Image.Image], Callable[[ModelWorkload], None]]:
        """A place for the image of a call, and how it is filled."""
        cell = [self.model.image]

        def fill(contents: ModelWorkload) -> None:
            cell[0] = contents.model.image

        return cell, fill


@dataclass(frozen=True, eq=False, kw_only=True)
class DecoderWorkload(ModelWorkload):
    """One decode of all configurations; backward, from logits and boxes to the gradient of the memory."""

    direction: Literal["forward", "backward"]
    memory: Memory
    output_gradients: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        model: BenchmarkModel,
        configurations: tuple[Configuration, ...],
        direction: Literal["forward", "backward"],
        seed: int = 0,
        title: str = "",
    ) -> DecoderWorkload:
        """With random gradients of logits and boxes."""
        config, like = model.detector.config, model.memory.tokens
        generator = torch.Generator().manual_seed(seed)
        gradients = tuple(
            torch.randn(len(configurations), 1, config.queries, size, generator=generator).to(like)
            for size in (config.classes + 1, 4)
        )
        return cls(
            model, configurations, title, direction=direction, memory=model.memory, output_gradients=gradients
        )

    @property
    def name(self) -> str:
        return f"decoder {self.direction}, {self.subtitle}"

    @property
    def relu_detector(self) -> Detr | None:
        return self.model.detector if self.direction == "backward" else None

    def timed_call(self, attention: Attention) -> TimedCall:
        detector, gates = with_attention(self.model.detector, attention), self.gates
        tokens = self.memory.tokens.detach().clone().requires_grad_(self.direction == "backward")
        memory = replace(self.memory, tokens=tokens)

        def fill(contents: DecoderWorkload) -> None:
            with torch.no_grad():
                tokens.copy_(contents.memory.tokens)

        def decode() -> DetectorOutput:
            with torch.inference_mode():
                return detector.decode(memory, gates)

        def gradient(output: DetectorOutput) -> Tensor:
            return torch.autograd.grad((output.logits, output.boxes), tokens, self.output_gradients)[0]

        if self.direction == "forward":
            return TimedCall(decode, fill=fill)
        return TimedCall(gradient, lambda: (detector.decode(memory, gates),), fill)

    def outputs(self, result: Any) -> dict[str, Output]:
        if self.direction == "forward":
            return detection_outputs(result.logits[self.checked], result.boxes[self.checked])
        return {"gradient of the memory": Output(result.flatten()[None], "gradients")}

    def outputs_of(self, attention: Attention) -> dict[str, Output]:
        if self.direction == "backward":
            return super().outputs_of(attention)
        some = replace(self, configurations=tuple(self.configurations[index] for index in self.checked))
        return some.outputs(some.timed_call(attention)())

    def in_dtype(self, dtype: torch.dtype) -> Self:
        tokens, positions = self.memory.tokens.to(dtype), self.memory.positions.to(dtype)
        memory = replace(self.memory, tokens=tokens, positions=positions)
        gradients = tuple(gradient.to(dtype) for gradient in self.output_gradients)
        return replace(super().in_dtype(dtype), memory=memory, output_gradients=gradients)

    def varied(self, number: int) -> Self:
        """With the memory's tokens at other places, and a little larger or smaller."""
        chosen = random.Random(number)
        tokens = self.memory.tokens.roll(chosen.randrange(self.memory.tokens.shape[1]), 1)
        return replace(self, memory=replace(self.memory, tokens=tokens * chosen.uniform(0.9, 1.1)))


@dataclass(frozen=True, eq=False)
class SweepWorkload(ModelWorkload):
    """`headoff.sweep`, from the image to the outcomes."""

    @property
    def name(self) -> str:
        return f"sweep, {self.subtitle}"

    def timed_call(self, attention: Attention) -> TimedCall:
        detector = with_attention(self.model.detector, attention)
        cell, fill = self.image_cell()
        return TimedCall(lambda: sweep(detector, cell[0], self.configurations), fill=fill)

    def outputs(self, result: SweepResult | DetectorOutput) -> dict[str, Output]:
        return detection_outputs(result.logits[self.checked], result.boxes[self.checked])

    def outputs_of(self, attention: Attention) -> dict[str, Output]:
        some = [self.configurations[index] for index in self.checked]
        result = sweep(without_backbone(self.model, attention), self.model.image, some)
        return detection_outputs(result.logits, result.boxes)


@dataclass(frozen=True, eq=False, kw_only=True)
class RelevanceWorkload(ModelWorkload):
    """`headoff.explain`, from the image to the maps of some queries.

    Gradients pass each attention by its own backward pass: for headoff's own attentions `explain` would otherwise use
    a formula, and the patch would not be called.
    """

    queries: tuple[int, ...]

    @classmethod
    def of(
        cls, model: BenchmarkModel, configurations: tuple[Configuration, ...], objects: int, title: str = ""
    ) -> RelevanceWorkload:
        """Explains the queries whose class scores are highest with none off."""
        exact = model.in_dtype(torch.float64)
        with torch.no_grad():
            logits = with_attention(exact.detector, "eager").decode(exact.memory).logits[0, 0]
        highest = class_probabilities(logits).amax(-1).argsort(descending=True)
        return cls(model, configurations, title, queries=tuple(highest[:objects].tolist()))

    @property
    def name(self) -> str:
        return f"relevance, {self.subtitle}"

    @property
    def relu_detector(self) -> Detr:
        return self.model.detector

    def timed_call(self, attention: Attention) -> TimedCall:
        return self.explain_call(attention, backward="callable")

    def explain_call(self, attention: Attention, **options: Any) -> TimedCall:
        """With options of `headoff.explain`."""
        return self._explain(with_attention(self.model.detector, attention), **options)

    def outputs_of(self, attention: Attention) -> dict[str, Output]:
        return self.outputs(self._explain(without_backbone(self.model, attention), backward="callable")())

    def _explain(self, detector: Detr, **options: Any) -> TimedCall:
        configurations, queries = self.configurations, self.queries
        cell, fill = self.image_cell()
        return TimedCall(lambda: explain(detector, cell[0], configurations, queries, **options), fill=fill)

    def outputs(self, result: Explanation) -> dict[str, Output]:
        return relevance_outputs(result.logits, result.boxes, result.maps.flatten(0, 2).flatten(1))


def detection_outputs(logits: Tensor, boxes: Tensor) -> dict[str, Output]:
    """Logits and boxes (configurations, ...), one row per configuration."""
    return {
        "logits": Output(logits.flatten(1), "detections"),
        "boxes": Output(boxes.flatten(1), "detections"),
    }


def relevance_outputs(logits: Tensor, boxes: Tensor, maps: Tensor) -> dict[str, Output]:
    """As `detection_outputs`, with maps (n, N), one row for each configuration, object and layer."""
    return {**detection_outputs(logits, boxes), "maps": Output(maps, "relevance")}
