"""Values of query, key and value, and the layouts (strides) that they come in.

Values are float64 and contiguous, to be rounded to the dtype of the case. A layout takes a contiguous (B, H, T, D)
tensor and returns one of equal values; where its buffer has more room than the tensor, the rest of it is NaN, which no
result may depend on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Sizes = tuple[int, int, int, int, int]
Triple = tuple[Tensor, Tensor, Tensor]
Change = Callable[[Tensor, Tensor, Tensor], Triple]

SPOTLIGHT_SCORE = 16.0
"""Score of the attended keys of `spotlight` inputs: far above the others, and still exact in few bits."""


LARGEST_OF_HALF = 400.0
"""Bound on values in float16: products of values and gradients stay finite."""


def input_values(kind: str, generator: Generator, sizes: Sizes) -> Triple:
    """Query (B, H, Q, D), key and value (B, H, S, D) for `sizes` (B, H, Q, S, D). KeyError for an unknown kind."""
    batch, heads, queries, keys, channels = sizes
    query, key, value = (
        torch.randn(batch, heads, length, channels, generator=generator, dtype=torch.float64)
        for length in (queries, keys, keys)
    )
    return INPUT_KINDS[kind](query, key, value)


def _scores_plus(offset: float) -> Change:
    """All scores are about `offset`, which softmax cancels and a plain exponential does not."""

    def change(query: Tensor, key: Tensor, value: Tensor) -> Triple:
        push = math.sqrt(abs(offset) / math.sqrt(query.shape[-1]))
        return query + push, key + math.copysign(push, offset), value

    return change


def _zero_rows(*tensors: Tensor) -> Triple:
    """Every third row of each tensor is zero, the last one among them."""
    query, key, value = (x * (torch.arange(x.shape[2], 0, -1) % 3 != 1)[:, None] for x in tensors)
    return query, key, value


def _spotlight(query: Tensor, key: Tensor, value: Tensor) -> Triple:
    """Each query attends to two keys, half to each, and to next to nothing else; every key has its turn.

    A wrong index, gate or mask then changes values and gradients by about 1, in any dtype.
    """
    keys, channels = key.shape[-2:]
    key = key / key.norm(dim=-1, keepdim=True) * math.sqrt(channels)
    # Counted from the end, where blocks are partial: the last keys are attended to even with few queries.
    first = (keys - 1 - 2 * torch.arange(query.shape[2])) % keys
    pair = key[:, :, first], key[:, :, (first - 1) % keys]
    # With both keys of squared norm D and cosine c to one another, this gives both of them that score.
    cosine = (pair[0] * pair[1]).sum(-1, keepdim=True) / channels
    strength = SPOTLIGHT_SCORE / math.sqrt(channels) / (1 + cosine).clamp(min=0.1)
    query = torch.where(first[:, None] == (first[:, None] - 1) % keys, pair[0], pair[0] + pair[1]) * strength
    return query, key, value


INPUT_KINDS: dict[str, Change] = {
    "normal": lambda query, key, value: (query, key, value),
    # Keys and values with a mean, so that sums over them do not cancel.
    "positive": lambda query, key, value: (query, key + 1, value + 2),
    "large": lambda query, key, value: (query * 60, key, value),
    "huge": lambda query, key, value: (query * 600, key, value),
    "raised": _scores_plus(300.0),
    "sunken": _scores_plus(-300.0),
    "tiny": lambda query, key, value: (query / 100, key / 100, value / 100),
    # All keys of a head are equal: its weights are uniform.
    "constant": lambda query, key, value: (query, key[:, :, :1].expand_as(key).contiguous(), value),
    "spotlight": _spotlight,
    "zero-rows": _zero_rows,
    "zero-keys": lambda query, key, value: (query, torch.zeros_like(key), value),
    # Values beyond the range of float16.
    "great-values": lambda query, key, value: (query, key, value * 1e6),
    # Nearly equal weights and values of one sign: sums over many keys before normalization exceed float16.
    "heavy-values": lambda query, key, value: (query / 10, key, value + 300),
}
"""What is made of normal query, key and value."""


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
    """A layout of stride 0 along `dim`, with the first slice for all."""
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

GRAD_CONTEXT_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **LAYOUTS,
    "expanded over queries": expanded_over(2),
    "expanded over channels": expanded_over(3),
    "ones": lambda tensor: tensor[:1, :1, :1, :1].clone().view(()).expand(tensor.shape),
}
"""Layouts of the gradient of the context; `ones` is one number expanded to all elements, as for a sum."""

MIXTURES: dict[str, tuple[str, str, str]] = {
    # A query that differs between items keeps a batch of expanded keys from being B equal calls.
    "expanded": ("contiguous", "expanded", "expanded"),
    "all expanded": ("expanded", "expanded", "expanded"),
    "expanded over heads": ("contiguous", "expanded over heads", "expanded over heads"),
    "mixed": ("contiguous", "heads last", "channels first"),
}
"""Layouts of query, key and value where they differ, or where all three are meant."""

CALL_LAYOUTS: tuple[str, ...] = tuple({**LAYOUTS, **MIXTURES})
"""All layouts that a call may have."""


def layouts_of(name: str) -> tuple[str, str, str]:
    """The layouts of query, key and value in a call of layout `name` of `CALL_LAYOUTS`."""
    return MIXTURES.get(name, (name, name, name))
