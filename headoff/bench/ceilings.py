"""What a device reaches at best, measured in the same run: bytes of a large copy, operations of a matrix product."""

from __future__ import annotations

import statistics

import torch

from headoff.bench.cases import Scale
from headoff.bench.roofline import Ceilings
from headoff.timing.calls import TimedCall
from headoff.timing.clocks import Clock

ROUNDS = 8

COPIED = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of the copy: several times any cache."""

SIDE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the product: large enough for the last per cent not to matter."""


def ceilings_of(device: torch.device, dtype: torch.dtype, clock: Clock, scale: Scale) -> Ceilings:
    """In `dtype`, with torch's own settings (float32 without TF32, unless they were changed)."""
    shrink = 2 if scale == "quick" else 1
    source = torch.ones(COPIED[device.type] // shrink, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _median(TimedCall(lambda: target.copy_(source)), clock)
    copied = 2 * source.numel() / seconds
    side = SIDE[device.type] // shrink
    matrix = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(matrix)
    seconds = _median(TimedCall(lambda: torch.mm(matrix, matrix, out=product)), clock)
    return Ceilings(flops=2 * side**3 / seconds, bytes=copied)


def _median(side: TimedCall, clock: Clock) -> float:
    side.seconds(clock)
    return statistics.median(side.seconds(clock) for _ in range(ROUNDS))
