"""The same numbers in other strides: what an attention must not assume about the memory of its inputs.

Each layout takes a contiguous (B, H, T, D) tensor and returns one of equal values. Where a buffer has more room than
the tensor, the rest of it is NaN, which no result may depend on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def heads_last(tensor: Tensor) -> Tensor:
    """Out of a (B, T, H, D) buffer, as a projection split into heads comes."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def sequence_first(tensor: Tensor) -> Tensor:
    """Out of a (T, B, H * D) buffer, as `torch.nn.MultiheadAttention` has it."""
    return tensor.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)


def channels_first(tensor: Tensor) -> Tensor:
    """Out of a (B, H, D, T) buffer: the last dimension is strided."""
    return tensor.mT.contiguous().mT


def packed(tensor: Tensor) -> Tensor:
    """One of three in a (B, T, 3, H, D) buffer, as one projection for query, key and value leaves it."""
    batch, heads, length, channels = tensor.shape
    buffer = tensor.new_full((batch, length, 3, heads, channels), torch.nan)
    buffer[:, :, 1] = tensor.transpose(1, 2)
    return buffer[:, :, 1].transpose(1, 2)


def every_second(tensor: Tensor) -> Tensor:
    """Every second element of the last dimension of a wider buffer."""
    batch, heads, length, channels = tensor.shape
    buffer = tensor.new_full((batch, heads, length, 2 * channels), torch.nan)
    buffer[..., ::2] = tensor
    return buffer[..., ::2]


def sliced(tensor: Tensor) -> Tensor:
    """Out of the middle of a buffer that is larger in each dimension, with an offset into its storage."""
    buffer = tensor.new_full([size + 3 for size in tensor.shape], torch.nan)
    inside = buffer[tuple(slice(1, size + 1) for size in tensor.shape)]
    return inside.copy_(tensor)


def expanded_over(dim: int) -> Callable[[Tensor], Tensor]:
    """A layout: the first of dimension `dim` for all, with stride 0."""
    return lambda tensor: tensor.narrow(dim, 0, 1).clone().expand_as(tensor)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda tensor: tensor,
    "heads last": heads_last,
    "sequence first": sequence_first,
    "channels first": channels_first,
    "packed": packed,
    "every second": every_second,
    "sliced": sliced,
    "expanded": expanded_over(0),
    "expanded over heads": expanded_over(1),
}

GRADIENT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "expanded over queries": expanded_over(2),
    "expanded over channels": expanded_over(3),
    "ones": lambda tensor: tensor[:1, :1, :1, :1].clone().view(()).expand(tensor.shape),
}
"""Layouts of a context's gradient; `ones` is of one number for all, as that of a sum."""

MIXTURES: dict[str, tuple[str, str, str]] = {
    # A query that is different for each item keeps a batch of expanded keys from being B equal calls.
    "expanded": ("contiguous", "expanded", "expanded"),
    "all expanded": ("expanded", "expanded", "expanded"),
    "expanded over heads": ("contiguous", "expanded over heads", "expanded over heads"),
    "mixed": ("contiguous", "heads last", "channels first"),
}
"""Layouts of a whole call that are not the same for query, key and value, or say so."""

CALL_LAYOUTS: tuple[str, ...] = tuple({**LAYOUTS, **MIXTURES})
"""All layouts that a call may have."""


def layouts_of(name: str) -> tuple[str, str, str]:
    """The layouts of query, key and value in a call of layout `name` of `CALL_LAYOUTS`."""
    return MIXTURES.get(name, (name, name, name))
