"""Attention masks that an attention is tried with: all shapes that broadcast to (B, H, Q, S), bool and additive.

A float mask is one of finite biases, of 0 and -inf, or of both; it is float64, to be rounded to the query's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

Build = Callable[[Generator, int, int, int, int], Tensor]


def mask_values(
    kind: str, generator: Generator, batch: int, heads: int, queries: int, keys: int
) -> Tensor | None:
    """A mask of a kind of `MASK_KINDS`, bool (True = attend) or float64; None for `none`.

    Raises KeyError for another kind.
    """
    return None if kind == "none" else MASK_KINDS[kind](generator, batch, heads, queries, keys)


def _random(generator: Generator, *shape: int) -> Tensor:
    """About two of three, and one at least in each row of the last dimension."""
    draw = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (draw > 0.35) | (draw == draw.amax(-1, keepdim=True))


def _padding(generator: Generator, batch: int, keys: int) -> Tensor:
    """(B, 1, 1, S): the first so many keys of each item, the last item's all but one, another number for each."""
    lengths = torch.randint(1, keys + 1, (batch,), generator=generator)
    lengths[-1] = max(1, keys - 1)
    return (torch.arange(keys) < lengths[:, None]).view(batch, 1, 1, keys)


def _left_padding(generator: Generator, batch: int, keys: int) -> Tensor:
    """(B, 1, 1, S): the last so many keys, a quarter at most, so that the first blocks of keys are wholly masked."""
    lengths = torch.randint(1, keys // 4 + 2, (batch,), generator=generator).clamp(max=keys)
    return (torch.arange(keys) >= keys - lengths[:, None]).view(batch, 1, 1, keys)


def _keyless_rows(generator: Generator, batch: int, queries: int, keys: int) -> Tensor:
    """(B, 1, Q, S): holes, and rows with no key at all, the first and the last item's last among them."""
    mask = _random(generator, batch, 1, queries, keys)
    keyless = torch.rand((batch, 1, queries, 1), generator=generator) < 0.25
    keyless[0, 0, 0] = keyless[-1, 0, -1] = True
    return mask & ~keyless


def _keyless_item(generator: Generator, batch: int, keys: int) -> Tensor:
    """(B, 1, 1, S): padding, and all of the first item is padding."""
    mask = _padding(generator, batch, keys)
    mask[0] = False
    return mask


def _single_key(generator: Generator, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """(B, H, Q, S): each row has one key and no other."""
    chosen = torch.randint(0, keys, (batch, heads, queries, 1), generator=generator)
    return torch.arange(keys) == chosen


def _additive(mask: Tensor) -> Tensor:
    """0 where `mask` is True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def _bias(generator: Generator, *shape: int) -> Tensor:
    """Of the size of the scores and positive, too, so that a bias that comes before the scaling is another one."""
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


MASK_KINDS: dict[str, Build] = {
    "keys": lambda g, b, h, q, s: _padding(g, 1, s),
    "padding": lambda g, b, h, q, s: _padding(g, b, s),
    "left padding": lambda g, b, h, q, s: _left_padding(g, b, s),
    "holes": lambda g, b, h, q, s: _random(g, b, 1, 1, s),
    "rows": lambda g, b, h, q, s: _random(g, q, s),
    "rows per head": lambda g, b, h, q, s: _random(g, h, q, s),
    "rows per item": lambda g, b, h, q, s: _random(g, b, 1, q, s),
    "full": lambda g, b, h, q, s: _random(g, b, h, q, s),
    "causal": lambda g, b, h, q, s: torch.ones(q, s, dtype=torch.bool).tril(max(0, s - q)),
    "single key": _single_key,
    "keyless rows": lambda g, b, h, q, s: _keyless_rows(g, b, q, s),
    "keyless item": lambda g, b, h, q, s: _keyless_item(g, b, s),
    "all on": lambda g, b, h, q, s: torch.ones(q, s, dtype=torch.bool),
    "all masked": lambda g, b, h, q, s: torch.zeros(b, 1, 1, s, dtype=torch.bool),
    "expanded": lambda g, b, h, q, s: _padding(g, b, s).expand(b, h, q, s),
    "transposed": lambda g, b, h, q, s: _random(g, s, q).logical_or(torch.eye(s, q, dtype=torch.bool)).mT,
    "additive padding": lambda g, b, h, q, s: _additive(_padding(g, b, s)),
    "additive left padding": lambda g, b, h, q, s: _additive(_left_padding(g, b, s)),
    "additive keyless rows": lambda g, b, h, q, s: _additive(_keyless_rows(g, b, q, s)),
    "bias": lambda g, b, h, q, s: _bias(g, b, 1, q, s),
    "bias of rows": lambda g, b, h, q, s: _bias(g, q, s),
    "bias per head": lambda g, b, h, q, s: _bias(g, 1, h, q, s),
    "bias of keys": lambda g, b, h, q, s: _bias(g, b, 1, 1, s),
    "bias and padding": lambda g, b, h, q, s: _bias(g, b, h, q, s) + _additive(_padding(g, b, s)),
    "bias expanded": lambda g, b, h, q, s: _bias(g, 1, h, q, s).expand(b, h, q, s),
    "bias transposed": lambda g, b, h, q, s: _bias(g, b, 1, s, q).mT,
}
