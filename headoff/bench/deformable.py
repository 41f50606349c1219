"""What the benchmarks of deformable attention time: single calls at the sizes of known detectors."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from headoff.bench.calls import CallWorkload, mixed
from headoff.bench.workloads import Direction
from headoff.deformable import DeformableAttention, Shapes, gather_attention, grid_sample_attention
from headoff.harness.finding import Property


@dataclass(frozen=True)
class DeformableShape:
    """Sizes of one call: value (batch, tokens of all levels, heads, channels), P points on each level."""

    name: str
    levels: Shapes
    queries: int
    points: int = 4
    batch: int = 1
    heads: int = 8
    channels: int = 32


def _encoder(name: str, levels: Shapes) -> DeformableShape:
    """Every token of every level is a query."""
    return DeformableShape(name, levels, sum(height * width for height, width in levels))


STRIDES_8_TO_64 = ((100, 134), (50, 67), (25, 34), (13, 17))
"""Levels of Deformable DETR at 800 x 1066 pixels."""

MARGIN = 0.02
"""Cells that points keep away from the lines between cells."""

RT_DETR = DeformableShape("rt-detr decoder", ((80, 80), (40, 40), (20, 20)), 300)
DECODER = DeformableShape("deformable detr decoder", STRIDES_8_TO_64, 300)
ENCODER = _encoder("deformable detr encoder", STRIDES_8_TO_64)
SMALL_ENCODER = _encoder("deformable detr encoder, 128x160", ((16, 20), (8, 10), (4, 5), (2, 3)))


def shapes_for(*, small: bool) -> tuple[DeformableShape, ...]:
    """What is timed; `small` is for runs of seconds on a CPU, where a call of the whole encoder takes one."""
    return RT_DETR, DECODER, SMALL_ENCODER if small else ENCODER


@dataclass(frozen=True, eq=False)
class DeformableWorkload(CallWorkload):
    """One call of a deformable attention."""

    title: str
    direction: Direction
    value: Tensor
    spatial_shapes: Shapes
    sampling_locations: Tensor
    attention_weights: Tensor
    grad_context: Tensor
    head_gate: Tensor | None
    gradients: tuple[Property, ...] = ("dv", "dlocations", "dweights")

    @classmethod
    def of(
        cls,
        shape: DeformableShape,
        direction: Direction,
        heads_off: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> DeformableWorkload:
        """Random inputs: points scattered around a reference point of their query by a tenth of the image."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{shape.name} {seed}".encode()))
        tokens = sum(height * width for height, width in shape.levels)
        batch, queries, heads, levels = shape.batch, shape.queries, shape.heads, len(shape.levels)
        around = torch.rand(batch, queries, 1, 1, 1, 2, generator=generator)
        offsets = 0.1 * torch.randn(batch, queries, heads, levels, shape.points, 2, generator=generator)
        logits = torch.randn(batch, queries, heads, levels * shape.points, generator=generator)
        # Away from the lines between cells, where right gradients of locations differ by rounding.
        size = torch.tensor([(width, height) for height, width in shape.levels])[:, None]
        position = (around + offsets) * size - 0.5
        fraction = (position - position.floor()).clamp(MARGIN, 1 - MARGIN)
        locations = (position.floor() + fraction + 0.5) / size
        gate = None
        if heads_off:  # with none off a detector passes no gate at all
            gate = (torch.arange(heads) >= heads_off).view(1, 1, heads, 1).to(device, dtype)
        return cls(
            f"{shape.name}, {heads_off} heads off, {direction}",
            direction,
            torch.randn(batch, tokens, heads, shape.channels, generator=generator).to(device, dtype),
            shape.levels,
            locations.to(device, dtype),
            logits.softmax(-1).unflatten(-1, (levels, shape.points)).to(device, dtype),
            torch.randn(batch, queries, heads, shape.channels, generator=generator).to(device, dtype),
            gate,
        )

    @property
    def inputs(self) -> dict[Property, Tensor]:
        return {
            "dv": self.value,
            "dlocations": self.sampling_locations,
            "dweights": self.attention_weights,
        }

    def attend(self, attention: DeformableAttention, *inputs: Tensor) -> Tensor:
        value, sampling_locations, attention_weights = inputs
        return attention(
            value, self.spatial_shapes, sampling_locations, attention_weights, head_gate=self.head_gate
        )

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).flatten(0, 1).flatten(1)

    @property
    def oracle(self) -> Any:
        return grid_sample_attention

    def implementations(self) -> Iterable[Any]:
        return grid_sample_attention, gather_attention

    def in_dtype(self, dtype: torch.dtype) -> Self:
        tensors = ("value", "sampling_locations", "attention_weights", "grad_context")
        gate = None if self.head_gate is None else self.head_gate.to(dtype)
        changed: dict[str, Any] = {name: getattr(self, name).to(dtype) for name in tensors}
        return replace(self, head_gate=gate, **changed)

    def varied(self, number: int) -> Self:
        """Other values; locations and weights of other queries, so that points keep away from the lines."""
        chosen = random.Random(number)

        def of_other_queries(tensor: Tensor) -> Tensor:
            return tensor.roll(chosen.randrange(tensor.shape[1]), 1)

        return replace(
            self,
            value=mixed(self.value, 1, chosen),
            sampling_locations=of_other_queries(self.sampling_locations),
            attention_weights=of_other_queries(self.attention_weights),
            grad_context=mixed(self.grad_context, 1, chosen),
        )
