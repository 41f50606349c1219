"""Which of headoff's own attentions to use where nobody chose one."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.attention.fused import (
    DTYPES,
    FEW_PROGRAMS,
    MAX_CHANNELS,
    agree,
    said_by,
    too_old,
    triton_attention,
)

AUTO = "auto"
"""The name that stands for this choice."""

AGREEMENT = 64.0
"""Units in the last place of the largest number by which the first calls may be off, in their dtype."""

HEADS, QUERIES, KEYS = 3, 37, 50
"""Of the first calls: more than a tile, and no whole number of them."""


def chosen_attention(device: torch.device | str, dtype: torch.dtype, channels: int) -> str:
    """`triton` on a GPU that it works on, for dtypes and `channels` of a head that it takes; `sdpa` elsewhere.

    The first time on a device, calls of the Triton kernels are compared with eager attention. Where they fail or
    disagree there is a warning, and `sdpa` is used: a compiler or a GPU that they were never tried on must not spoil a
    result that nobody chose them for. On a GPU that is too old they are not tried.
    """
    device = torch.device(device)
    if device.type != "cuda" or dtype not in DTYPES or channels > MAX_CHANNELS:
        return "sdpa"
    if importlib.util.find_spec("triton") is None:
        return "sdpa"
    problem = problem_on(device, dtype, channels)
    if problem is None:
        return "triton"
    warnings.warn(
        f"headoff's Triton attention is not used on {device} ({problem}); sdpa takes its place. "
        "Choose an attention to be rid of this message.",
        RuntimeWarning,
        stacklevel=3,
    )
    return "sdpa"


@functools.cache
def problem_on(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """What is wrong with first calls of the Triton kernels there, forward and backward; None where they are right.

    Two calls make all the kernels' larger variants: few rows, gated by head, and so many that tiles are of more rows,
    gated row by row and with padding. What a GPU has too little memory for, or a compiler fails at, shows in them.
    """
    try:
        if device.type == "cuda" and (reason := too_old(device)) is not None:
            return reason
        # Whoever loads a detector may do so in a mode in which nothing has a gradient.
        with torch.inference_mode(False), torch.enable_grad():
            by_head = torch.tensor([1.0, 0.0, 0.5]).view(1, HEADS, 1, 1).to(device)
            by_row = (torch.arange(QUERIES) % 3 / 2).view(1, 1, QUERIES, 1).to(device)
            padding = (torch.arange(KEYS) < KEYS - 9).view(1, 1, 1, KEYS).to(device)
            many = -(-FEW_PROGRAMS // HEADS)
            for batch, gate, mask in ((1, by_head, None), (many, by_row, padding)):
                if not _agrees(batch, gate, mask, device, dtype, channels):
                    return "its first results disagree with eager attention"
    except Exception as error:
        return said_by(error)
    return None


def _agrees(
    batch: int, gate: Tensor, mask: Tensor | None, device: torch.device, dtype: torch.dtype, channels: int
) -> bool:
    """Whether context and gradients are those of eager attention in float64, which no setting of torch's rounds."""

    def results_of(attention: Attention, computed_in: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        query, key, value, upstream = (
            torch.randn(batch, HEADS, length, channels, generator=generator).to(device, dtype).to(computed_in)
            for length in (QUERIES, KEYS, KEYS, QUERIES)
        )
        inputs = [each.requires_grad_() for each in (query, key, value)]
        context = attention(query, key, value, mask, head_gate=gate)
        return [context.detach(), *torch.autograd.grad(context, inputs, upstream)]

    return agree(results_of(triton_attention, dtype), results_of(eager, torch.float64), dtype, AGREEMENT)
