"""Which of headoff's own attentions to use where nobody chose one."""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.attention.fused import DTYPES, MAX_CHANNELS, triton_attention

AUTO = "auto"
"""The name that stands for this choice."""

AGREEMENT = 64.0
"""Units in the last place of the largest number by which the first call may differ from eager's, in its dtype."""


def chosen_attention(device: torch.device | str, dtype: torch.dtype, channels: int) -> str:
    """`triton` on a GPU that it works on, for dtypes and `channels` of a head that it takes; `sdpa` elsewhere.

    The first time on a device, a call of the Triton kernels is compared with eager attention. Where they fail or
    disagree there is a warning, and `sdpa` is used: a compiler or a GPU that they were never tried on must not spoil a
    result that nobody chose them for.
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
    """What is wrong with a first call of the Triton kernels there, forward and backward; None where it is right."""
    gate = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1).to(device)

    def results_of(attention: Attention) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(1, 3, length, channels, generator=generator).to(device, dtype).requires_grad_()
            for length in (37, 50, 50)
        )
        context = attention(query, key, value, head_gate=gate)
        return [context, *torch.autograd.grad(context.float().square().sum(), (query, key, value))]

    try:
        pairs = list(zip(results_of(triton_attention), results_of(eager), strict=True))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for found, expected in pairs:
        allowed = AGREEMENT * torch.finfo(dtype).eps * float(expected.detach().abs().max())
        if not float((found - expected).detach().abs().max()) <= allowed:
            return "its first results disagree with eager attention"
    return None
