"""Which implementation of the attention's backward pass the engine uses."""

from __future__ import annotations

from typing import Literal

import torch

from headoff.detr.detector import Detr
from headoff.errors import SettingError
from headoff.relevance.fused_vjp import unsupported
from headoff.relevance.methods import CamMethod

Kernels = Literal["auto", "tiles", "torch", "triton"]
"""How the backward pass of an attention is computed.

- `tiles`: plain PyTorch, one pair of (configuration, target) at a time, in tiles that fit a CPU's caches
- `torch`: plain PyTorch, all pairs at once
- `triton`: fused kernels, all pairs at once
- `auto`: `tiles` on the CPU, `torch` on other devices
"""


def chosen_kernels(kernels: Kernels, detector: Detr, compute: torch.dtype, method: CamMethod) -> Kernels:
    """The implementation that `kernels` names.

    Raises:
        SettingError: `kernels` is `triton`, which cannot run here.
    """
    if kernels == "auto":
        return "tiles" if detector.device.type == "cpu" else "torch"
    if kernels == "triton":
        channels = detector.config.width // detector.config.heads
        reason = unsupported(detector.device, compute, method.rule, channels)
        if reason is not None:
            raise SettingError(f"{reason}: use kernels='auto', or leave it out")
    return kernels
