"""Factors that are fitted to a wrong answer."""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from headoff.harness.operator.call import CallTensors, Results
from headoff.harness.operator.known_faults.forward import scaled
from headoff.harness.operator.known_faults.steps import BACKWARD, FORWARD, OperatorFault, run, start


def fitted_faults(found: Results, tensors: CallTensors) -> Iterator[OperatorFault]:
    """The factor of the scale, or of a result, that brings the right answer nearest to what was `found`.

    Args:
        found: the wrong context, or gradients under a context that is right.
        tensors: the call.
    """
    right = run({**FORWARD, **BACKWARD}, start(tensors))
    for name, result in found.items():
        true = getattr(right, name)
        size = float(true.square().sum())
        times = float((result * true).sum()) / size if size else math.nan
        if math.isfinite(times) and abs(times) > 1e-3:
            clause = f"{'it' if name == 'context' else name} is {times:.6g} times the true one"
            step = {**FORWARD, **BACKWARD}[name]
            yield OperatorFault(
                name, clause, {name: lambda s, t=times, step=step: t * step(s)}, name != "context"
            )
    if "context" in found and (factor := _fitted_factor(found["context"], tensors)) is not None:
        yield OperatorFault(
            "scale", f"it is {factor:.6g} / sqrt(D)", scaled(lambda s: factor * s.channels**-0.5)
        )
        constant = factor * tensors.query.shape[-1] ** -0.5
        yield OperatorFault(
            "scale", f"it is {constant:.6g} for any number of channels", scaled(lambda s: constant)
        )


def _fitted_factor(found: Tensor, tensors: CallTensors) -> float | None:
    """The factor of the scale that comes nearest, by Gauss-Newton in its logarithm from several starts."""

    def context(logarithm: float) -> Tensor:
        scale = tensors.query.shape[-1] ** -0.5 * math.exp(logarithm)
        return run({**FORWARD, "scale": lambda s: scale}, start(tensors)).context

    best: tuple[float, float] | None = None
    for logarithm in (0.0, -1.5, 1.5, -0.5, 0.5):
        for _ in range(12):
            at = context(logarithm)
            slope = (context(logarithm + 1e-5) - at) / 1e-5
            size = float(slope.square().sum())
            step = float(((found - at) * slope).sum()) / size if size else math.nan
            if not math.isfinite(step):
                break
            logarithm += max(-0.5, min(0.5, step))
        distance = float((found - context(logarithm)).square().sum())
        if math.isfinite(distance) and (best is None or distance < best[0]):
            best = distance, math.exp(logarithm)
    return None if best is None else best[1]
