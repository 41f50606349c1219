"""What `headoff bench` and pytest's benchmarks time: an attention call, the decoder, the sweep, relevance.

A workload makes a `TimedCall` for any attention, and names the tensors that the call returns, so that they can be
compared with the float64 oracle's. All attentions get the same inputs. Each call has its own copy of them, which can
be filled with other contents between two runs (`Workload.varied`).
"""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headoff.attention import Attention, eager
from headoff.bench.models import BenchmarkModel, with_attention, without_backbone
from headoff.detections import class_probabilities
from headoff.detector import DetectorOutput
from headoff.detr.detector import Detr, Memory
from headoff.gates import Configuration, Gates, Site, stack
from headoff.harness.finding import Property
from headoff.harness.reference.implementations import right_implementations
from headoff.relevance import Explanation, explain
from headoff.sweeps import SweepResult, sweep
from headoff.timing import TimedCall

Direction = Literal["forward", "backward", "forward + backward"]

MOST_CHECKED = 9
"""Configurations: the oracle takes many times as long for 256 of them as the computation that is timed."""

CONFIGURATIONS = 9
"""Of the cumulative sweep. As many are decoded together, end to end in cross-attention, as batch items elsewhere."""


@dataclass(frozen=True)
class Output:
    """A tensor that a call returned.

    Attributes:
        rows: (n, m). Every row is compared relative to its own peak, so that small rows must be right as well.
        property: what is wrong with an attention that gets it wrong.
    """

    rows: Tensor
    property: Property


class Workload(ABC):
    """Something to compute with an attention."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the attention's inputs."""

    @property
    def roundings(self) -> int:
        """Attention layers that an output passes through; each rounds at least once."""
        return 1

    @property
    def relu_detector(self) -> Detr | None:
        """The detector whose ReLUs the gradients pass through, where an output depends on gradients."""
        return None

    @property
    def oracle(self) -> Any:
        """The attention that gives the truth in float64."""
        return eager

    def implementations(self) -> Iterable[Any]:
        """Correct attentions, whose errors set the tolerance."""
        return right_implementations()

    @abstractmethod
    def timed_call(self, attention: Any) -> TimedCall:
        """The computation with this attention."""

    @abstractmethod
    def outputs(self, result: Any) -> dict[str, Output]:
        """What the timed call returned, by name."""

    def outputs_of(self, attention: Attention) -> dict[str, Output]:
        """The same outputs for the oracle, which need not compute all that is timed."""
        return self.outputs(self.timed_call(attention)())

    @abstractmethod
    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The same inputs, as rounded to the present dtype, in another."""

    @abstractmethod
    def varied(self, number: int) -> Self:
        """The same computation of other inputs, of the same sizes; `number` says which.

        `TimedCall.fill` of a call of this workload takes what this returns. The sizes of all numbers in it are about
        those of this one, for the tolerance is measured for one number and not for every one.
        """


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call: query (batch, heads, queries, channels), key and value (batch, heads, keys, ...).

    `padded`: a quarter of the keys is padding.
    """

    name: str
    batch: int
    queries: int
    keys: int
    heads: int = 8
    channels: int = 32
    padded: bool = False


def site_shape(
    model: BenchmarkModel, site: Site, configurations: int = CONFIGURATIONS, *, padded: bool = False
) -> AttentionShape:
    """The attention call that a sweep of so many configurations makes at a site of the model."""
    config = model.detector.config
    batch, queries, keys = {
        "encoder_self": (1, model.tokens, model.tokens),
        "decoder_self": (configurations, config.queries, config.queries),
        "decoder_cross": (1, configurations * config.queries, model.tokens),
    }[site]
    return AttentionShape(site, batch, queries, keys, config.heads, config.width // config.heads, padded)


class CallWorkload(Workload):
    """One call of an attention with random inputs.

    For `backward` the graph is made in the setup, and only the `gradients` of the inputs are timed. `grad_context` is
    the gradient of the context; all tensors are as in the attention's contract.
    """

    title: str
    direction: Direction
    grad_context: Tensor
    gradients: tuple[Property, ...]

    @property
    @abstractmethod
    def inputs(self) -> dict[Property, Tensor]:
        """Those that gradients are wanted of, by the name of the gradient."""

    @abstractmethod
    def attend(self, attention: Any, *inputs: Tensor) -> Tensor:
        """The context of these inputs, with all else as it is here."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Context or gradient with a row for each head of each batch item."""
        return tensor.flatten(0, 1).flatten(1)

    @property
    def name(self) -> str:
        return self.title

    @property
    def dtype(self) -> torch.dtype:
        return self.grad_context.dtype

    def timed_call(self, attention: Any) -> TimedCall:
        wanted = () if self.direction == "forward" else self.gradients
        leaves = [
            tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in self.inputs.items()
        ]
        inputs = [tensor for tensor in leaves if tensor.requires_grad]
        grad_context = self.grad_context.clone()

        def fill(contents: CallWorkload) -> None:
            with torch.no_grad():
                grad_context.copy_(contents.grad_context)
                for leaf, tensor in zip(leaves, contents.inputs.values(), strict=True):
                    leaf.copy_(tensor)

        def forward() -> Tensor:
            return self.attend(attention, *leaves)

        def without_gradients() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(),)

        def backward(context: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(context, inputs, grad_context, allow_unused=True)

        def both() -> tuple[Tensor | None, ...]:
            context = forward()
            return (context.detach(), *backward(context))

        if self.direction == "forward":
            return TimedCall(without_gradients, fill=fill)
        if self.direction == "backward":
            return TimedCall(backward, lambda: (forward(),), fill)
        return TimedCall(both, fill=fill)

    def outputs(self, result: tuple[Tensor | None, ...]) -> dict[str, Output]:
        of = {name: self.inputs[name] for name in self.gradients}
        if self.direction != "backward":
            of = {"context": self.grad_context, **of}
        found = {}
        for tensor, (name, like) in zip(result, of.items(), strict=False):
            # An attention that left an input out of its graph says that its gradient is zero.
            found[str(name)] = Output(self.rows(torch.zeros_like(like) if tensor is None else tensor), name)
        return found


@dataclass(frozen=True, eq=False)
class AttentionWorkload(CallWorkload):
    """One attention call."""

    title: str
    direction: Direction
    query: Tensor
    key: Tensor
    value: Tensor
    grad_context: Tensor
    attn_mask: Tensor | None
    head_gate: Tensor | None
    gradients: tuple[Property, ...] = ("dq", "dk", "dv")

    @classmethod
    def of(
        cls,
        shape: AttentionShape,
        direction: Direction,
        head_gate: Tensor | None,
        gate_name: str,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> AttentionWorkload:
        """Random inputs in the memory layout of the model's projections: (B, T, H, D), viewed as (B, H, T, D)."""
        # crc32, because Python's own hash of a text differs between processes.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{shape.name} {seed}".encode()))

        def random(length: int) -> Tensor:
            made = torch.randn(shape.batch, length, shape.heads, shape.channels, generator=generator)
            return made.to(device, dtype).transpose(1, 2)

        mask = (torch.arange(shape.keys, device=device) < shape.keys * 3 // 4)[None, None, None]
        return cls(
            f"{shape.name}, {gate_name}, {direction}",
            direction,
            random(shape.queries),
            random(shape.keys),
            random(shape.keys),
            random(shape.queries),
            mask if shape.padded else None,
            None if head_gate is None else head_gate.to(device, dtype),
        )

    @property
    def inputs(self) -> dict[Property, Tensor]:
        return {"dq": self.query, "dk": self.key, "dv": self.value}

    def attend(self, attention: Attention, *inputs: Tensor) -> Tensor:
        query, key, value = inputs
        return attention(query, key, value, self.attn_mask, head_gate=self.head_gate)

    def in_dtype(self, dtype: torch.dtype) -> Self:
        tensors = ("query", "key", "value", "grad_context")
        gate = None if self.head_gate is None else self.head_gate.to(dtype)
        return replace(self, head_gate=gate, **{name: getattr(self, name).to(dtype) for name in tensors})

    def varied(self, number: int) -> Self:
        chosen = random.Random(number)
        tensors = ("query", "key", "value", "grad_context")[: 3 if self.direction == "forward" else 4]
        changed: dict[str, Any] = {name: mixed(getattr(self, name), 2, chosen) for name in tensors}
        return replace(self, **changed)


def mixed(tensor: Tensor, dim: int, chosen: random.Random) -> Tensor:
    """Every number mixed with another one along `dim`: independent normal numbers stay that, with the same variance."""
    angle = torch.tensor(chosen.uniform(0.1, 1.4) + chosen.randrange(4) * torch.pi / 2)
    other = tensor.roll(chosen.randrange(tensor.shape[dim]), dim)
    return torch.add(tensor * angle.cos().item(), other, alpha=angle.sin().item())


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
