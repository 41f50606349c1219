"""What failing calls of deformable attention may have in common."""

from __future__ import annotations

from collections.abc import Callable

from headoff.harness.operator.observation import Observation


def _strided(item: Observation) -> bool:
    return not all(tensor.is_contiguous() for tensor in item.tensors.inputs)


def _differs(item: Observation, dim: int) -> bool:
    gate = item.tensors.gate
    return gate is not None and bool((gate != gate.narrow(dim, 0, 1)).any())


CONDITIONS: dict[str, Callable[[Observation], bool]] = {
    "a gate": lambda item: item.tensors.gate is not None,
    "a gate that differs between queries": lambda item: _differs(item, 1),
    "a gate that differs between batch items": lambda item: _differs(item, 0),
    "several levels": lambda item: len(item.case.shapes) > 1,
    "several batch items": lambda item: item.case.batch > 1,
    "points outside": lambda item: item.case.inputs in ("normal", "borders", "outside", "far", "corners"),
    "inputs that are not contiguous": _strided,
    "a gradient of the context that is not contiguous": lambda item: (
        not item.tensors.grad_context.is_contiguous()
    ),
    "attention weights that do not add up to 1": lambda item: item.case.weight_kind in ("any", "filled up"),
    "levels of one row or column": lambda item: any(1 in shape for shape in item.case.shapes),
    "levels that are not square": lambda item: any(h != w for h, w in item.case.shapes),
    "more than 4 points": lambda item: item.case.points > 4,
    "a number of points that is no power of 2": lambda item: item.case.points & (item.case.points - 1) != 0,
    "a number of channels that is no power of 2": lambda item: (
        item.case.channels & (item.case.channels - 1) != 0
    ),
    "more than 32 channels": lambda item: item.case.channels > 32,
    "a number of heads that is no power of 2": lambda item: item.case.heads & (item.case.heads - 1) != 0,
}
"""By words: whether a case has it."""
