"""How far rounding alone may lead from the truth: measured on several right implementations, of which one may be lucky.

There is one oracle, and its own rounding errors in low precision are one draw. Other right implementations add the same
numbers in another order and come out elsewhere within a rounding or two; eager attention whose contexts are
moved by one rounding each, at random, stands for them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.attention.eager import eager

IMPLEMENTATIONS = 2
"""Eager attention, and this many less one that round otherwise."""


class RoundedOtherwise:
    """Eager attention with one rounding more of its context, and so of the context's gradient.

    The same `seed` rounds the same way, call by call, on every device.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        context = eager(query, key, value, attn_mask, head_gate=head_gate)
        noise = torch.rand(context.shape, generator=self._generator, dtype=torch.float64) - 0.5
        moved = noise.mul_(torch.finfo(context.dtype).eps).add_(1).to(context.device)
        # In float64, for a factor so near 1 is 1 in the context's own dtype.
        return (context.double() * moved).to(context.dtype)


def right_implementations(count: int = IMPLEMENTATIONS, *, first_seed: int = 0) -> Iterator[Attention]:
    """Eager attention, then eager attention that rounds otherwise; with a `first_seed` only such, from that on."""
    if first_seed == 0:
        yield eager
        first_seed, count = 1, count - 1
    for seed in range(first_seed, first_seed + count):
        yield RoundedOtherwise(seed)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """All that rounding errors depend on beside the numbers: each by a text that changes with it."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {
        "device": f"{device.type} {name}",
        "dtype": str(dtype),
        "torch": torch.__version__,
        "implementations": str(IMPLEMENTATIONS),
    }
