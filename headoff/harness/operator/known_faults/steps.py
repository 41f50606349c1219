"""Attention in float64 as steps that a fault may replace, and helpers that several kinds of fault are made with."""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headoff.harness.operator.call import CallTensors, Results
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.fault import Fault

Step = Callable[[SimpleNamespace], Any]
Steps = Mapping[str, Step]
Change = Callable[[Tensor], Tensor]

BLOCKS = (8, 16, 32, 64, 128)
LIMITS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 32768)
"""Block sizes, and sizes of buffers and grids, that kernels commonly have."""


@dataclass(frozen=True, eq=False)
class OperatorFault(Fault):
    """One way to be wrong.

    Args:
        steps: the steps (of `FORWARD` and `BACKWARD`) that replace the right ones.
        is_backward: whether only gradients are wrong.
        rounding: the eps of the dtype that the fault rounds to; 0 for a fault that is no rounding.
    """

    steps: Steps
    is_backward: bool = False
    rounding: float = 0.0

    def answer(self, tensors: CallTensors, case: OperatorCase) -> Results:
        s = start(tensors)
        if not self.is_backward:
            return {"context": run({**FORWARD, **self.steps}, s).context}
        run({**FORWARD, **BACKWARD, **self.steps}, s)
        answer: Results = {}
        for own, shared in zip(("dq", "dk", "dv"), case.gradient_names.values(), strict=True):
            answer[shared] = answer[shared] + s.__dict__[own] if shared in answer else s.__dict__[own]
        return answer


def start(tensors: CallTensors) -> SimpleNamespace:
    """The inputs; gate (B, H, Q, 1) and mask (B, H, Q, S), additive, are 1 and 0 where the call has none."""
    exact = tensors.double()
    *rows, channels = exact.query.shape
    keys = exact.key.shape[-2]
    gate = exact.query.new_ones(1) if exact.gate is None else exact.gate
    mask = exact.query.new_zeros(1) if exact.mask is None else exact.mask
    is_bool = mask.dtype == torch.bool
    return SimpleNamespace(
        query=exact.query,
        key=exact.key,
        value=exact.value,
        grad_context=exact.grad_context,
        gate=gate.expand(*rows, 1),
        mask=(additive(mask) if is_bool else mask).expand(*rows, keys),
        has_gate=exact.gate is not None,
        has_mask=exact.mask is not None,
        is_bool=is_bool,
        channels=channels,
        queries=rows[-1],
        keys=keys,
    )


def run(steps: Steps, s: SimpleNamespace) -> SimpleNamespace:
    """`s` with the result of each step; steps of a gate or a mask that the call has not are left out."""
    absent = {name for name, given in (("gate", s.has_gate), ("mask", s.has_mask)) if not given}
    for name, step in steps.items():
        if name not in absent:
            setattr(s, name, step(s))
    return s


FORWARD: dict[str, Step] = {
    "gate": lambda s: s.gate,
    "mask": lambda s: s.mask,
    "scale": lambda s: s.channels**-0.5,
    "scores": lambda s: s.query @ s.key.mT * s.scale,
    "masked": lambda s: s.scores + s.mask,
    "fully_masked": lambda s: (s.masked == -math.inf).all(-1, keepdim=True),
    "filled": lambda s: s.masked.masked_fill(s.fully_masked, 0.0),
    "softmax": lambda s: s.filled.softmax(-1),
    "weights": lambda s: s.softmax.masked_fill(s.fully_masked, 0.0),
    "gated": lambda s: s.weights * s.gate,
    "context": lambda s: s.gated @ s.value,
}


BACKWARD: dict[str, Step] = {
    "gated_gradient": lambda s: s.grad_context * s.gate,
    "dweights": lambda s: s.gated_gradient @ s.value.mT,
    "delta": lambda s: (s.weights * s.dweights).sum(-1, keepdim=True),
    "dscores": lambda s: s.weights * (s.dweights - s.delta),
    "dq": lambda s: s.dscores @ s.key * s.scale,
    "dk": lambda s: s.dscores.mT @ s.query * s.scale,
    "dv": lambda s: s.weights.mT @ s.gated_gradient,
}


def right_weights(tensors: CallTensors) -> Tensor:
    """The gated attention weights (B, H, Q, S) of a call, float64."""
    return run(FORWARD, start(tensors)).gated


# What faults are made with


def changed_context(change: Callable[[SimpleNamespace, Tensor], Tensor]) -> Steps:
    """`change` of the right context."""
    return {"context": lambda s: change(s, s.gated @ s.value)}


def after(change: Change, *names: str) -> Steps:
    """`change` of the results of these steps of the backward pass."""
    return {name: lambda s, name=name: change(BACKWARD[name](s)) for name in names}


def additive(attended: Tensor) -> Tensor:
    """The additive mask of a bool one, True = attend."""
    return torch.zeros(attended.shape, dtype=torch.float64).masked_fill(~attended, -math.inf)


def exponentials(s: SimpleNamespace) -> Tensor:
    """Of the scores less their maximum."""
    return (s.filled - s.filled.amax(-1, keepdim=True)).exp()


def total(s: SimpleNamespace) -> Tensor:
    """Of the exponentials of each row."""
    return exponentials(s).sum(-1, keepdim=True)


def quotient(terms: Tensor, total: Tensor | None = None) -> Tensor:
    """Of the terms and their sum, or another `total`."""
    return terms / (terms.sum(-1, keepdim=True) if total is None else total)


def block_starts(length: int, size: int) -> Tensor:
    """For each index the first one of its block."""
    return torch.arange(length) // size * size


def rest(length: int, size: int) -> Tensor:
    """True after the last whole block. Where no large block is whole all would be: that is another fault."""
    whole = length // size * size
    return (torch.arange(length) >= whole) & (whole > 0 or size <= 16)
