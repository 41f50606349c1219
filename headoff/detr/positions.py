"""Sine position embedding of the image tokens (Carion et al., ECCV 2020, appendix A.4)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TEMPERATURE = 10_000.0
_EPSILON = 1e-6


def sine_positions(token_mask: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Positions of tokens, each axis scaled to 0..2 pi over the part of the grid that is image.

    Args:
        token_mask: (B, h, w) bool, True where a token is image, False where it is padding.
        width: channels of the embedding; the first half encodes y, the second half x, sines and cosines
            interleaved.
        dtype: of the result. The angles are computed in float32 at least: bfloat16 cannot count tokens.

    Returns:
        (B, h * w, width), tokens row by row.
    """
    compute = torch.promote_types(dtype, torch.float32)
    mask = token_mask.to(compute)
    half = width // 2
    exponent = torch.arange(half, dtype=compute, device=mask.device).div(2, rounding_mode="floor") * (
        2 / half
    )
    frequency = _TEMPERATURE**-exponent
    axes = []
    for axis in (1, 2):
        count = mask.cumsum(axis)
        angle = count / (count.narrow(axis, -1, 1) + _EPSILON) * (2 * math.pi)
        angle = angle.unsqueeze(-1) * frequency
        axes.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-2))
    return torch.cat(axes, dim=-1).flatten(1, 2).to(dtype)
