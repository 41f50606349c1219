"""Whether what was timed is right: fast and wrong is wrong.

The last output of the timed patch is compared with what the eager oracle finds in float64 for the same inputs. It may
be off by a small factor of what the oracle's code is off by in the dtype under test, as in all other suites, and by one
rounding of that dtype for each attention layer, below which nobody can be.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from headoff.attention import Attention, eager
from headoff.bench.relus import ReluSides
from headoff.bench.workloads import Output, Workload
from headoff.harness.finding import Finding
from headoff.harness.reference.implementations import right_implementations
from headoff.harness.reference.maps import ERROR_FACTOR


def row_errors(truth: Tensor, found: Tensor) -> Tensor:
    """Largest difference in each row of (n, m) float64, relative to the largest number of the true row: (n,).

    A row that is truly zero must be found exactly zero: its error is infinite otherwise. So is that of a row that is
    not finite.
    """
    truth, found = truth.double().cpu(), found.double().cpu()
    difference, peak = (found - truth).abs().amax(-1), truth.abs().amax(-1)
    errors = torch.where(difference == 0, 0.0, difference / peak)
    return torch.where(errors.isfinite(), errors, torch.inf)


class Expected:
    """What a workload's outputs are to be, and how far they may be from it."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        unit = torch.finfo(workload.dtype).eps
        # In float64 the oracle has no error to measure; float32's is carried over by the ratio of the units.
        measured_in = torch.float32 if workload.dtype == torch.float64 else workload.dtype
        rounded = workload if measured_in == workload.dtype else workload.in_dtype(measured_in)
        scale = unit / torch.finfo(measured_in).eps
        self.eager_errors: dict[str, float] = {}
        for attention in right_implementations():
            result, sides = once_noting(rounded, attention)
            found = rounded.outputs(result)
            for name, truth in truth_of(rounded, sides).items():
                error = float(row_errors(truth.rows, found[name].rows).amax()) * scale
                self.eager_errors[name] = max(error, self.eager_errors.get(name, 0.0))
        self.floor = workload.roundings * unit

    def allowed(self, name: str) -> float:
        """Of an output, relative to each row's peak."""
        return ERROR_FACTOR * self.eager_errors[name] + self.floor

    def findings(self, result: Any, attention: Attention) -> list[Finding]:
        """What is wrong with what a call of the side of `attention` returned, the worst place of each output."""
        sides = None if self.workload.through_relus is None else once_noting(self.workload, attention)[1]
        truth_by_name, found = truth_of(self.workload, sides), self.workload.outputs(result)
        wrong = []
        for name, truth in truth_by_name.items():
            got, allowed = found[name].rows, self.allowed(name)
            if got.shape != truth.rows.shape:
                problem = f"is of shape {tuple(got.shape)}, expected {tuple(truth.rows.shape)}"
                error = np.inf
            else:
                errors = row_errors(truth.rows, got)
                error = float(errors.amax())
                problem = (
                    f"is off by {error:.1e} of its peak in row {int(errors.argmax())} of {len(errors)}, allowed are "
                    f"{allowed:.1e}: {ERROR_FACTOR:g} times the {self.eager_errors[name]:.1e} that eager attention is "
                    f"off by, plus {self.floor:.1e}"
                )
            if not error <= allowed:
                wrong.append(
                    Finding(
                        truth.property,
                        f"{self.workload.name}: what was timed is wrong, its {name} {problem}",
                        self.workload.name,
                        error,
                        allowed,
                    )
                )
        return wrong


def truth_of(workload: Workload, sides: ReluSides | None) -> dict[str, Output]:
    """By the oracle in float64, whose ReLUs take the `sides` of the run to be judged where rounding decides."""
    exact = workload.in_dtype(torch.float64)
    following = exact.through_relus
    if following is None or sides is None:
        return exact.outputs(exact.side(eager)())
    # A unit is a sum of `width` products, whose errors add up as a random walk does, and those of all layers before.
    resolution = workload.roundings * torch.finfo(workload.dtype).eps * following.config.width**0.5
    with sides.followed(following, resolution):
        return exact.outputs(exact.side(eager)())


def once_noting(workload: Workload, attention: Attention) -> tuple[Any, ReluSides]:
    """What one call returns, and the sides that ReLUs took in it, where they matter."""
    sides = ReluSides()
    if workload.through_relus is None:
        return workload.side(attention)(), sides
    with sides.noted(workload.through_relus):
        return workload.side(attention)(), sides
