"""The one rule of all tolerances: a small factor of what right implementations are off by, plus a floor.

Whatever is compared (single calls, logits, boxes, relevance maps, gradients, benchmark outputs), errors are measured
against the float64 oracle. What a candidate may be off by is measured too: several correct implementations compute the
same case in the same dtype on the same device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

ERROR_FACTOR = 4.0
"""A candidate's rounding errors may be this many times those of the reference implementations: it may sum in another
order."""

MOST_RAISED = 16.0
"""More measurements may raise what is allowed by this factor at most: to where known wrong answers still fail."""


def allowed_error(measured: float, floor: float) -> float:
    """The largest error a candidate may have.

    Args:
        measured: the largest error of the reference implementations, relative.
        floor: what is allowed even where they happen to be exact, in the same unit.
    """
    return ERROR_FACTOR * measured + floor


def relative_error(difference: Tensor, size: Tensor) -> Tensor:
    """`difference / size`, elementwise, float64 on the CPU.

    0 where the difference is 0, whatever the size; infinite where the size is 0 and the difference is not, and where
    either is NaN or infinite. So what must be zero must be exactly zero, and NaN is never within a tolerance.
    """
    difference, size = (tensor.detach().to("cpu", torch.float64) for tensor in (difference, size))
    error = torch.where(difference == 0, 0.0, difference / size)
    return torch.where(error.isfinite(), error, torch.inf)


def peak_error(found: Tensor, expected: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """The largest difference over `dims`, relative to the largest expected number there; see `relative_error`."""
    found, expected = (tensor.detach().to("cpu", torch.float64) for tensor in (found, expected))
    return relative_error((found - expected).abs().amax(dims), expected.abs().amax(dims))


@dataclass(frozen=True)
class Tolerance:
    """What a candidate may be off by.

    Args:
        measured: the largest error of the reference implementations, in the candidate's dtype on its device.
        floor: what is allowed even where they happen to be exact, in the same unit.
    """

    measured: float
    floor: float

    @property
    def allowed(self) -> float:
        return allowed_error(self.measured, self.floor)

    @property
    def limit(self) -> float:
        """What `allowed` is never raised above."""
        return MOST_RAISED * self.allowed

    def raised(self, measured: float) -> Tolerance:
        """For a case where the reference implementations were found to be off by `measured`."""
        most = (self.limit - self.floor) / ERROR_FACTOR
        return replace(self, measured=max(self.measured, min(measured, most)))

    def __str__(self) -> str:
        return (
            f"{self.allowed:.1e}: {ERROR_FACTOR:g} times the {self.measured:.1e} that right implementations are off "
            f"by, plus {self.floor:.1e}"
        )
