"""The tensors of a case of deformable attention, the same on every machine."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headoff.deformable import DeformableAttention, Shapes
from headoff.harness.deformable.cases import GRADIENTS, WANTED, DeformableCase
from headoff.harness.deformable.inputs import LAYOUTS, STRIDES, WEIGHT_KINDS, locations
from headoff.harness.operator.call import Tensors, moved, tensors_of
from headoff.harness.operator.gates import gate_values


@dataclass(frozen=True, eq=False)
class DeformableTensors(Tensors):
    """The tensors of a call of deformable attention, named and shaped as in the contract."""

    gradient_names = GRADIENTS
    wanted_inputs = WANTED

    value: Tensor
    sampling_locations: Tensor
    attention_weights: Tensor
    gate: Tensor | None
    grad_context: Tensor
    spatial_shapes: Shapes

    def attend(self, attention: DeformableAttention, inputs: Iterable[Tensor]) -> Tensor:
        value, sampling_locations, attention_weights = inputs
        return attention(
            value, self.spatial_shapes, sampling_locations, attention_weights, head_gate=self.gate
        )

    def double(self) -> DeformableTensors:
        changed: dict[str, Any] = {
            name: tensor.cpu().double().contiguous() for name, tensor in self.named().items()
        }
        return replace(self, **changed)


@tensors_of.register
def _(case: DeformableCase, device: torch.device | str = "cpu") -> DeformableTensors:
    value, points, weights, gate, grad_context = _values_of(case)

    def made(values: Tensor, layout: str) -> Tensor:
        # Never the tensor itself: it is cached, and a patch may write into what it gets.
        return STRIDES[layout](values.to(case.dtype, copy=True).to(device))

    value, points, weights = (
        made(values, layout)
        for values, layout in zip((value, points, weights), LAYOUTS[case.layout], strict=True)
    )
    layout = case.grad_context if case.grad_context in STRIDES else "contiguous"
    return DeformableTensors(
        value,
        points,
        weights,
        None if gate is None else moved(gate, case.dtype, device),
        made(grad_context, layout),
        case.shapes,
    )


@functools.lru_cache(maxsize=2)
def _values_of(case: DeformableCase) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Value, sampling locations, attention weights, gate, gradient of the context; float64, cached."""
    half = case.dtype.itemsize == 2
    plain = replace(
        case, dtype=torch.float16 if half else torch.float64
    )  # both half dtypes have equal numbers
    generator = torch.Generator().manual_seed(zlib.crc32(repr(plain).encode()))
    sizes = (case.batch, case.queries, case.heads, len(case.shapes), case.points)
    value = torch.randn(
        case.batch, case.tokens, case.heads, case.channels, generator=generator, dtype=torch.float64
    )
    points = locations(case.inputs, generator, sizes, case.shapes, half)
    weights = WEIGHT_KINDS[case.weight_kind](generator, sizes)
    # The kinds of gates are written for (B, H, Q, 1), and are as good the other way round.
    gate = gate_values(case.gate, generator, case.batch, case.heads, case.queries)
    gate = None if gate is None else gate.transpose(1, 2)
    grad_context = torch.randn(case.context_shape, generator=generator, dtype=torch.float64)
    if case.grad_context == "small":
        # In float16 products of numbers as small as 1e-6 are 0.
        grad_context = grad_context * (1e-2 if case.dtype == torch.float16 else 1e-6)
    elif case.grad_context == "one row":
        grad_context = grad_context * (torch.arange(case.queries) == case.queries // 2)[:, None, None]
    return value, points, weights, gate, grad_context
