"""The one rule of all tolerances: a small factor of what eager attention is off by, plus a floor.

Whatever is compared (single calls, logits, boxes, relevance maps, gradients, benchmark outputs), errors are measured
against the float64 oracle. What a candidate may be off by is measured too: several correct implementations compute the
same case in the same dtype on the same device.
"""

from __future__ import annotations

import torch
from torch import Tensor

ERROR_FACTOR = 4.0
"""A candidate's rounding errors may be this many times those of the reference implementations: it may sum in another
order."""


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
    difference, size = (each.detach().to("cpu", torch.float64) for each in (difference, size))
    error = torch.where(difference == 0, 0.0, difference / size)
    return torch.where(error.isfinite(), error, torch.inf)
