"""What deformable attention with one known fault would return, in float64.

A patch that gives the numbers of one of these in every case that fails has that fault (`diagnosis`); and answers that
are known to be wrong must be rejected by the comparison that is used on candidates (`mutations`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headoff.deformable import level_tensors
from headoff.harness.deformable.call import DeformableTensors
from headoff.harness.deformable.cases import DeformableCase
from headoff.harness.finding import Property
from headoff.harness.operator.call import Results
from headoff.harness.operator.fault import Fault
from headoff.harness.operator.known_faults.precision import ROUNDINGS
from headoff.harness.operator.reference import truth_for


@dataclass(frozen=True, eq=False)
class DeformableFault(Fault):
    """One way to be wrong.

    Args:
        of_exact: the answer. Takes the exact tensors, which have a gate, and the case.
    """

    of_exact: Callable[[DeformableTensors, DeformableCase], Results]

    def answer(self, tensors: DeformableTensors, case: DeformableCase) -> Results:
        return self.of_exact(exact_with_gate(tensors), case)


def exact_with_gate(tensors: DeformableTensors) -> DeformableTensors:
    """The tensors of a call in float64, with a gate (B, Q, H, 1) in any case."""
    exact = tensors.double()
    batch, queries, heads = exact.sampling_locations.shape[:3]
    on = torch.ones(1, 1, 1, 1, dtype=torch.float64) if exact.gate is None else exact.gate
    return replace(exact, gate=on.expand(batch, queries, heads, 1))


CORNERS = {"upper left": (0, 0), "upper right": (1, 0), "lower left": (0, 1), "lower right": (1, 1)}
"""Which of the cells around a point is the right one, and which the lower one."""

# The right attention, in steps that a fault may replace

Step = Callable[..., Tensor]


@dataclass(frozen=True)
class Levels:
    """Sizes (L, 1, 2) as w, h, and first tokens (L, 1) of the levels."""

    size: Tensor
    first: Tensor


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps from the inputs to the context."""

    locations: Step = lambda locations: locations
    position: Step = lambda locations, size: locations * size - 0.5
    cell: Step = torch.floor
    value: Step = lambda value: value
    weights: Step = lambda weights: weights
    gate: Step = lambda gate: gate
    gated: Step = lambda weights, gate: weights * gate[..., None]
    levels: Callable[[Levels], Levels] = lambda levels: levels
    shares: Callable[[Tensor, Tensor, int, int], Tensor] = lambda x, y, right, up: x * y
    """Of a cell, from its linear weights along x and y, and whether it is the right and the lower one."""
    inside: Step = lambda x, y, size: (x >= 0) & (x < size[..., 0]) & (y >= 0) & (y < size[..., 1])
    token: Step = lambda x, y, size: y * size[..., 0] + x
    context: Step = lambda context: context
    clamped: bool = field(default=False)
    """Whether what lies outside is read from the border."""


def context_by(steps: Steps, tensors: DeformableTensors) -> Tensor:
    """The context by these steps, one corner at a time."""
    shapes, first = level_tensors(tensors.spatial_shapes, torch.device("cpu"))
    levels = steps.levels(Levels(shapes.flip(1)[:, None], first[:, None]))
    size, value = levels.size, steps.value(tensors.value).transpose(1, 2)
    position = steps.position(steps.locations(tensors.sampling_locations), size)
    cell = steps.cell(position)
    fraction = position - cell
    weights = steps.gated(steps.weights(tensors.attention_weights), steps.gate(tensors.gate))
    context: Any = 0.0
    for right, up in CORNERS.values():
        x, y = cell[..., 0] + right, cell[..., 1] + up
        along_x = fraction[..., 0] if right else 1 - fraction[..., 0]
        along_y = fraction[..., 1] if up else 1 - fraction[..., 1]
        share = steps.shares(along_x, along_y, right, up)
        if steps.clamped:
            x, y = x.clamp(torch.zeros(()), size[..., 0] - 1), y.clamp(torch.zeros(()), size[..., 1] - 1)
        share = torch.where(steps.inside(x, y, size), share, 0.0)
        token = (levels.first + steps.token(x, y, size)).clamp(0, value.shape[2] - 1).long()
        index = token.transpose(1, 2).flatten(2)[..., None].expand(-1, -1, -1, value.shape[-1])
        read = value.gather(2, index).view(*token.transpose(1, 2).shape, -1).transpose(1, 2)
        context = context + ((weights * share)[..., None] * read).sum((3, 4))
    return steps.context(context)


def _forward(name: Property, clause: str, **steps: Any) -> DeformableFault:
    return DeformableFault(
        name, clause, lambda tensors, case: {"context": context_by(Steps(**steps), tensors)}
    )


def _as_heads_before_queries(gate: Tensor) -> Tensor:
    batch, queries, heads, _ = gate.shape
    return gate.reshape(batch, heads, queries, 1).transpose(1, 2)


def _over_all(weights: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return change(weights.flatten(-2)).view(weights.shape)


def _renormalised(weights: Tensor, gate: Tensor) -> Tensor:
    gated = weights * gate[..., None]
    total = gated.sum((-2, -1), keepdim=True)
    return torch.where(total == 0, 0.0, gated / total)


def _last_zero(tensor: Tensor, dim: int) -> Tensor:
    tensor = tensor.clone()
    tensor.narrow(dim, tensor.shape[dim] - 1, 1).zero_()
    return tensor


def _rest(context: Tensor, size: int) -> Tensor:
    """Zero in the channels beyond the last full block of `size`."""
    return context * (torch.arange(context.shape[-1]) < context.shape[-1] // size * size)


FORWARD: tuple[DeformableFault, ...] = (
    _forward(
        "sampling", "x and y of the sampling locations are swapped", locations=lambda places: places.flip(-1)
    ),
    _forward(
        "sampling", "width and height of the levels are swapped",
        position=lambda places, size: places * size.flip(-1) - 0.5,
    ),
    _forward(
        "sampling", "positions are those of align_corners=True", position=lambda places, size: places * (size - 1)
    ),
    _forward("sampling", "positions are half a cell too far", position=lambda places, size: places * size),
    _forward("sampling", "positions are half a cell too low", position=lambda places, size: places * size - 1),
    _forward(
        "sampling", "locations are taken to be from -1 to 1",
        position=lambda places, size: ((places + 1) * size - 1) / 2,
    ),
    _forward("sampling", "positions are half a level too far",
             position=lambda places, size: places * size + size / 2 - 0.5),
    _forward("sampling", "positions are half as far from the first row and column",
             position=lambda places, size: places * size / 2 - 0.5),
    *(
        _forward("sampling", f"the {corner} cell alone of the four around a point is read",
                 shares=lambda x, y, right, up, place=place: x * y * ((right, up) == place))
        for corner, place in CORNERS.items()
    ),
    _forward("sampling", "the four cells around a point get each other's shares",
             shares=lambda x, y, right, up: (1 - x) * (1 - y)),
    _forward("sampling", "the four cells around a point get each other's shares along x",
             shares=lambda x, y, right, up: (1 - x) * y),
    _forward("sampling", "the four cells around a point get each other's shares along y",
             shares=lambda x, y, right, up: x * (1 - y)),
    _forward("sampling", "the four cells around a point count alike, with 1 each",
             shares=lambda x, y, right, up: torch.ones_like(x)),
    _forward("sampling", "shares along x are left out", shares=lambda x, y, right, up: y),
    _forward("sampling", "shares along y are left out", shares=lambda x, y, right, up: x),
    _forward("sampling", "the nearest cell is read, without interpolation",
             position=lambda places, size: (places * size - 0.5).round()),
    _forward("sampling", "positions are truncated to cells, not rounded down", cell=torch.trunc),
    _forward("sampling", "outside of a level its border is read, not zeros", clamped=True),
    _forward("sampling", "what lies left or right of a level is read from the rows next to it",
             inside=lambda x, y, size: (y >= 0) & (y < size[..., 1])),
    _forward("sampling", "cells next to the border count as outside",
             inside=lambda x, y, size: (x > 0) & (x < size[..., 0] - 1) & (y > 0) & (y < size[..., 1] - 1)),
    _forward("sampling", "the last row and column of a level count as outside",
             inside=lambda x, y, size: (x >= 0) & (x < size[..., 0] - 1) & (y >= 0) & (y < size[..., 1] - 1)),
    _forward("levels", "each level starts one token too late",
             levels=lambda levels: replace(levels, first=levels.first + 1)),
    _forward("levels", "each level but the first starts one token too late",
             levels=lambda levels: replace(levels, first=levels.first + (levels.first > 0))),
    _forward("levels", "each level but the first starts one token too early",
             levels=lambda levels: replace(levels, first=levels.first - (levels.first > 0).long())),
    _forward("levels", "all levels are read from the first token on",
             levels=lambda levels: replace(levels, first=torch.zeros_like(levels.first))),
    _forward("levels", "each level is read from the place of the previous one",
             levels=lambda levels: replace(levels, first=levels.first.roll(1, 0))),
    _forward("levels", "all levels have the size of the first",
             levels=lambda levels: replace(levels, size=levels.size[:1].expand_as(levels.size))),
    _forward("levels", "the tokens of a level are read column by column",
             token=lambda x, y, size: x * size[..., 1] + y),
    _forward("levels", "rows of a level are as long as it is high",
             token=lambda x, y, size: y * size[..., 1] + x),
    _forward("levels", "the first level alone is used",
             weights=lambda weights: weights * (torch.arange(weights.shape[-2])[:, None] == 0)),
    _forward("levels", "the last level alone is used", weights=lambda weights:
             weights * (torch.arange(weights.shape[-2])[:, None] == weights.shape[-2] - 1)),
    _forward("levels", "the last level is left out", weights=lambda weights: _last_zero(weights, -2)),
    _forward("weights", "the attention weights are ignored", weights=torch.ones_like),
    _forward("weights", "points are averaged, whatever their weights",
             weights=lambda weights: torch.full_like(weights, 1 / (weights.shape[-1] * weights.shape[-2]))),
    _forward("weights", "the softmax is applied again",
             weights=lambda weights: _over_all(weights, lambda flat: flat.softmax(-1))),
    _forward("weights", "a softmax is applied again over the points of each level",
             weights=lambda weights: weights.softmax(-1)),
    _forward("weights", "the attention weights are divided by their sum",
             weights=lambda weights: _over_all(weights, lambda flat: flat / flat.sum(-1, keepdim=True))),
    _forward("weights", "levels and points of the attention weights are confused",
             weights=lambda weights: weights.mT.reshape(weights.shape)),
    _forward("weights", "the last point is left out", weights=lambda weights: _last_zero(weights, -1)),
    _forward("weights", "each point gets the weight of the previous one",
             weights=lambda weights: _over_all(weights, lambda flat: flat.roll(1, -1))),
    _forward("gate", "it is ignored", gate=torch.ones_like),
    _forward("gate", "each head gets the gate of the previous head", gate=lambda gate: gate.roll(1, 2)),
    _forward("gate", "each query gets the gate of the previous query", gate=lambda gate: gate.roll(1, 1)),
    _forward("gate", "each batch item gets the gate of the previous batch item",
             gate=lambda gate: gate.roll(1, 0)),
    _forward("gate", "each batch item gets the gate of the first",
             gate=lambda gate: gate[:1].expand_as(gate)),
    _forward("gate", "each query gets the gate of the first",
             gate=lambda gate: gate[:, :1].expand_as(gate)),
    _forward("gate", "each head gets the gate of the first",
             gate=lambda gate: gate[:, :, :1].expand_as(gate)),
    _forward("gate", "it is read as if heads came before queries", gate=_as_heads_before_queries),
    _forward("gate", "the weights are renormalised after it", gated=_renormalised),
    _forward("gate", "the heads that are on are scaled up for those that are off",
             gate=lambda gate: gate / gate.mean(2, keepdim=True).clamp(min=1e-300)),
    _forward("gate", "all that is not 0 counts as 1", gate=lambda gate: (gate != 0).double()),
    _forward("gate", "all from 0.5 counts as 1, the rest as 0", gate=lambda gate: (gate >= 0.5).double()),
    _forward("gate", "it is applied twice", gate=torch.square),
    _forward("gate", "on and off are confused", gate=lambda gate: 1 - gate),
    *(
        _forward("precision", f"{what} rounded to {name}", **{step: ROUNDINGS[name][1]})
        for name in ("bfloat16", "float16")
        for step, what in (("value", "the value is"), ("weights", "attention weights are"),
                           ("locations", "sampling locations are"), ("context", "the context is"))
    ),
    _forward("context", "it is zero", context=torch.zeros_like),
    _forward("context", "heads and channels of the value are confused",
             value=lambda value: value.flatten(2).unflatten(2, value.shape[:1:-1]).mT),
    _forward("context", "heads and queries of the context are confused",
             context=lambda context: context.transpose(1, 2).reshape(context.shape)),
    _forward("sizes", "the last query is left out", context=lambda context: _last_zero(context, 1)),
    _forward("sizes", "the last head is left out", context=lambda context: _last_zero(context, 2)),
    *(
        _forward("sizes", f"channels beyond the last full {size} are left out",
                 context=lambda context, size=size: _rest(context, size))
        for size in (2, 4, 8, 16, 32, 64)
    ),
    *(
        _forward("sizes", f"channels from {limit} on are left out",
                 context=lambda context, limit=limit: context * (torch.arange(context.shape[-1]) < limit))
        for limit in (32, 64, 128, 256)
    ),
)  # fmt: skip


Change = Callable[[Tensor, DeformableTensors], Tensor]


def _gradient(name: Property, clause: str, change: Change) -> DeformableFault:
    """A gradient that is `change` of the right one and the tensors of the call."""
    return DeformableFault(
        name, clause, lambda tensors, case: {name: change(_right(name, tensors, case), tensors)}
    )


def _lacking(name: Property, clause: str, **changed: Callable[[Tensor], Tensor]) -> DeformableFault:
    """A gradient that is right for other inputs."""

    def answer(tensors: DeformableTensors, case: DeformableCase) -> Results:
        others: dict[str, Any] = {of: change(getattr(tensors, of)) for of, change in changed.items()}
        return {name: _right(name, replace(tensors, **others), case)}

    return DeformableFault(name, clause, answer)


def _right(name: str, tensors: DeformableTensors, case: DeformableCase) -> Tensor:
    """The right gradient, also where the case does not want it."""
    return truth_for(tensors, replace(case, wanted="all")).values[name]


def _size(tensors: DeformableTensors) -> Tensor:
    return level_tensors(tensors.spatial_shapes, torch.device("cpu"))[0].flip(1)[:, None].double()


BACKWARD: tuple[DeformableFault, ...] = (
    _gradient("dlocations", "dlocations is zero", lambda right, t: torch.zeros_like(right)),
    _gradient("dlocations", "x and y of dlocations are swapped", lambda right, t: right.flip(-1)),
    _gradient("dlocations", "dlocations is not multiplied by the levels' sizes",
              lambda right, t: right / _size(t)),
    _gradient("dlocations", "dlocations is multiplied by the levels' sizes with width and height swapped",
              lambda right, t: right / _size(t) * _size(t).flip(-1)),
    _gradient("dlocations", "dlocations is multiplied by the levels' sizes twice",
              lambda right, t: right * _size(t)),
    _gradient("dlocations", "dlocations is half as large", lambda right, t: right / 2),
    _gradient("dlocations", "dlocations is twice as large", lambda right, t: right * 2),
    _gradient("dlocations", "dlocations has the opposite sign", lambda right, t: -right),
    _lacking("dlocations", "dlocations lacks the attention weights", attention_weights=torch.ones_like),
    _lacking("dlocations", "dlocations lacks the gate", gate=torch.ones_like),
    _lacking("dlocations", "dlocations has the gate twice", gate=torch.square),
    _gradient("dweights", "dweights is zero", lambda right, t: torch.zeros_like(right)),
    _gradient("dweights", "each level gets the dweights of the next", lambda right, t: right.roll(-1, 3)),
    _gradient("dweights", "each level gets the dweights of the previous", lambda right, t: right.roll(1, 3)),
    _gradient("dweights", "all levels get the dweights of the first",
              lambda right, t: right[:, :, :, :1].expand_as(right)),
    _gradient("dweights", "levels and points of dweights are confused",
              lambda right, t: right.mT.reshape(right.shape)),
    _gradient("dweights", "each point gets the dweights of the previous", lambda right, t: right.roll(1, 4)),
    _lacking("dweights", "dweights lacks the gate", gate=torch.ones_like),
    _lacking("dweights", "dweights has the gate twice", gate=torch.square),
    _gradient("dweights", "dweights is multiplied by the attention weights",
              lambda right, t: right * t.attention_weights),
    _gradient("dweights", "dweights is that of a softmax", lambda right, t: t.attention_weights * (
        right - (right * t.attention_weights).sum((3, 4), keepdim=True))),
    _gradient("dv", "dv is zero", lambda right, t: torch.zeros_like(right)),
    _lacking("dv", "dv lacks the attention weights", attention_weights=torch.ones_like),
    _lacking("dv", "dv lacks the gate", gate=torch.ones_like),
    _lacking("dv", "dv has the gate twice", gate=torch.square),
    _lacking("dv", "dv is that of the first level alone", attention_weights=lambda weights:
             weights * (torch.arange(weights.shape[-2])[:, None] == 0)),
    _gradient("dv", "heads and tokens of dv are confused",
              lambda right, t: right.transpose(1, 2).reshape(right.shape)),
)  # fmt: skip


FAULTS: dict[str, DeformableFault] = {str(fault): fault for fault in (*FORWARD, *BACKWARD)}
"""All by name."""
