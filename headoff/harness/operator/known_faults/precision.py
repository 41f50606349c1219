"""Roundings of what either pass computes to a dtype that is smaller than that of the call."""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from headoff.harness.operator.known_faults.steps import (
    BLOCKS,
    FORWARD,
    Change,
    OperatorFault,
    Step,
    Steps,
    after,
    changed_context,
    exponentials,
    quotient,
    total,
)


def _to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype).double()


def _ten_bits(rounding: Change) -> Change:
    def change(tensor: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp(rounding(mantissa * 2.0**11) / 2.0**11, exponent)

    return change


def _eight_bits(tensor: Tensor) -> Tensor:
    step = tensor.abs().amax((-2, -1), keepdim=True) / 127
    return torch.round(tensor / step) * step


def _accumulated(size: int, rounded: Change) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        total = torch.zeros_like(s.query)
        for weights, value in zip(s.gated.split(size, -1), s.value.split(size, -2), strict=True):
            total = rounded(total + weights @ value)
        return total

    return step


ROUNDINGS: dict[str, tuple[float, Change]] = {
    "bfloat16": (2**-7, _to(torch.bfloat16)),
    "float16": (2**-10, _to(torch.float16)),
    "float32": (2**-23, _to(torch.float32)),
    "TF32": (2**-10, _ten_bits(torch.round)),
    "TF32 (truncated)": (2**-10, _ten_bits(torch.trunc)),
}
"""Eps and rounding of dtypes that computations may be in."""


def roundings() -> Iterator[OperatorFault]:
    for name, (eps, r) in ROUNDINGS.items():
        of_scores: Steps = {"scores": lambda s, r=r: r(s.query) @ r(s.key).mT * s.scale}
        of_values: Steps = {"context": lambda s, r=r: s.gated @ r(s.value)}
        forward: dict[str, Steps] = {
            "query, key and value are rounded": {**of_scores, **of_values},
            "query and key are rounded": of_scores,
            "values are rounded": of_values,
            "scores are rounded": {"scores": lambda s, r=r: r(FORWARD["scores"](s))},
            "scores with the mask are rounded": {"masked": lambda s, r=r: r(s.scores + s.mask)},
            "scores less their maximum are rounded": {
                "filled": lambda s, r=r: r((f := FORWARD["filled"](s)) - f.amax(-1, keepdim=True))},
            "weights are rounded": {"gated": lambda s, r=r: r(s.weights) * s.gate},
            "gated weights are rounded": {"gated": lambda s, r=r: r(s.weights * s.gate)},
            "exponentials are rounded before the division": {
                "softmax": lambda s, r=r: quotient(r(exponentials(s)), total(s))},
            "the sum of the exponentials is rounded": {
                "softmax": lambda s, r=r: quotient(exponentials(s), r(total(s)))},
            "the context is rounded": changed_context(lambda s, context, r=r: r(context)),
            **{f"the accumulator is rounded after every {'key' if n == 1 else f'{n} keys'}": {
                "context": _accumulated(n, r)} for n in (1, *BLOCKS)},
        }  # fmt: skip
        backward: dict[str, Steps] = {
            "the gradient of the context is rounded": {"gated_gradient": lambda s, r=r: r(s.grad_context) * s.gate},
            "delta is rounded": after(r, "delta"),
            "the log-sum-exp is rounded": {
                "softmax": lambda s, r=r: (s.filled - r(s.filled.logsumexp(-1, keepdim=True))).exp()},
            "gradients are rounded": after(r, "dq", "dk", "dv"),
        }  # fmt: skip
        for is_backward, faults in ((False, forward), (True, backward)):
            for what, steps in faults.items():
                yield OperatorFault("precision", f"{what} to {name}", steps, is_backward, eps)
    of_key: Steps = {"scores": lambda s: s.query @ _eight_bits(s.key).mT * s.scale}
    yield OperatorFault("precision", "the key is quantised to 8 bits per head", of_key, rounding=2**-7)
