"""Attention masks for operator cases: every shape that broadcasts to (B, H, Q, S), bool and additive.

A float mask is one of finite biases, of 0 and -inf, or of both; it is float64, to be rounded to the query's dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Generator, Tensor

Build = Callable[[Generator, int, int, int, int], Tensor]

PATTERNS: tuple[str, ...] = tuple(
    "".join(sizes)
    for dimensions in (4, 3, 2)
    for sizes in itertools.product(*((size, "1") for size in "BHQS"[-dimensions:]))
)
"""All shapes of masks that broadcast to (B, H, Q, S) and have at least two dimensions, a letter for each."""

SLOPE = 0.5
"""Of a bias by distance (ALiBi): what each place of distance takes off a score."""

NEARLY_MASKED = -1e30
"""A bias as good as -inf, but finite (-inf in float16)."""

WINDOW = 4
"""Keys in a sliding window, and in a block of a block-diagonal mask."""


def mask_values(kind: str, generator: Generator, sizes: tuple[int, int, int, int]) -> Tensor | None:
    """A bool mask (True = attend) or a float64 one for sizes (B, H, Q, S); None for the kind `none`.

    Raises:
        KeyError: there is no such kind in `MASK_KINDS` or `MASKS_BY_SHAPE`.
    """
    return None if kind == "none" else {**MASK_KINDS, **MASKS_BY_SHAPE}[kind](generator, *sizes)


def unusual_mask(mask: Tensor | None) -> str | None:
    """What makes a mask one that the model never calls attention with, for people; None for one that it may.

    The model's masks are bool, of shape (B or 1, 1, 1, S). An attention that raises on others does not support them.
    """
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        return "additive masks"
    if mask.dim() < 4:
        return f"masks of {mask.dim()} dimensions"
    _, heads, queries, keys = mask.shape
    if heads > 1:
        return "masks per head"
    if queries > 1:
        return "masks per query"
    return "masks that all keys share" if keys == 1 else None


def _random(generator: Generator, *shape: int) -> Tensor:
    """About two of three keys, and at least one in each row."""
    draw = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (draw > 0.35) | (draw == draw.amax(-1, keepdim=True))


def _padding(generator: Generator, batch: int, keys: int) -> Tensor:
    """(B, 1, 1, S): right padding, of another length for each item; one key of padding in the last item."""
    lengths = torch.randint(1, keys + 1, (batch,), generator=generator)
    lengths[-1] = max(1, keys - 1)
    return (torch.arange(keys) < lengths[:, None]).view(batch, 1, 1, keys)


def _left_padding(generator: Generator, batch: int, keys: int) -> Tensor:
    """(B, 1, 1, S): left padding; only the last quarter of the keys at most, so that the first blocks are masked."""
    lengths = torch.randint(1, keys // 4 + 2, (batch,), generator=generator).clamp(max=keys)
    return (torch.arange(keys) >= keys - lengths[:, None]).view(batch, 1, 1, keys)


def _fully_masked_rows(generator: Generator, batch: int, queries: int, keys: int) -> Tensor:
    """(B, 1, Q, S): holes, and fully masked rows, among them the first and the last one."""
    mask = _random(generator, batch, 1, queries, keys)
    masked = torch.rand((batch, 1, queries, 1), generator=generator) < 0.25
    masked[0, 0, 0] = masked[-1, 0, -1] = True
    return mask & ~masked


def _fully_masked_item(generator: Generator, batch: int, keys: int) -> Tensor:
    """(B, 1, 1, S): padding; the first item is nothing else."""
    mask = _padding(generator, batch, keys)
    mask[0] = False
    return mask


def _single_key(generator: Generator, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """(B, H, Q, S): each row attends to a single key."""
    chosen = torch.randint(0, keys, (batch, heads, queries, 1), generator=generator)
    return torch.arange(keys) == chosen


def _mixed_padding(generator: Generator, batch: int, keys: int, first: int) -> Tensor:
    """(B, 1, 1, S): right padding, left padding, holes and no padding, item by item, beginning with the `first`."""
    right = _padding(generator, batch, keys)
    kinds = (right, right.flip(-1), _random(generator, batch, 1, 1, keys), torch.ones_like(right))
    return torch.stack([kinds[(first + item) % len(kinds)][item] for item in range(batch)])


def _of_pattern(pattern: str, sizes: tuple[int, int, int, int]) -> tuple[int, ...]:
    """The shape that a pattern of `PATTERNS` is for sizes (B, H, Q, S)."""
    return tuple({**dict(zip("BHQS", sizes, strict=True)), "1": 1}[letter] for letter in pattern)


def _bool_of(pattern: str) -> Build:
    """One that all keys share has fully masked rows: the first row, and not the last."""

    def build(generator: Generator, *sizes: int) -> Tensor:
        shape = _of_pattern(pattern, sizes)  # type: ignore[arg-type]
        if shape[-1] > 1:
            return _random(generator, *shape)
        mask = torch.rand(shape, generator=generator) > 0.35
        mask.view(-1)[0] = False
        mask.view(-1)[-1] = True
        return mask

    return build


def _bias_of(pattern: str) -> Build:
    def build(generator: Generator, *sizes: int) -> Tensor:
        return _bias(generator, *_of_pattern(pattern, sizes))  # type: ignore[arg-type]

    return build


def _places(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """Places of queries (Q, 1) and of keys (S), such that each query has a key at its own place."""
    return torch.arange(queries).clamp(max=keys - 1)[:, None], torch.arange(keys)


def _distance(queries: int, keys: int) -> Tensor:
    """(Q, S): how many places a key comes after a query."""
    of_query, of_key = _places(queries, keys)
    return of_key - of_query


def _blocks(queries: int, keys: int) -> Tensor:
    """(Q, S): True within blocks of `WINDOW` places."""
    of_query, of_key = _places(queries, keys)
    return of_query // WINDOW == of_key // WINDOW


def _bias_by_distance(generator: Generator, heads: int, queries: int, keys: int) -> Tensor:
    """(H, Q, S): 0 at the query's own place, less with the distance and never positive (ALiBi, arXiv 2108.12409)."""
    slopes = SLOPE * (1 + torch.rand(heads, 1, 1, generator=generator, dtype=torch.float64))
    return -slopes * _distance(queries, keys).abs()


def _bias_of_hundreds(generator: Generator, *shape: int) -> Tensor:
    """100 or -100 plus noise."""
    sign = torch.where(torch.rand(shape, generator=generator) < 0.5, -100.0, 100.0)
    return sign + torch.randn(shape, generator=generator, dtype=torch.float64)


def _bias_of_low_rows(generator: Generator, depth: float, *shape: int) -> Tensor:
    """Every second row is shifted by `-depth`, which softmax cancels."""
    low = torch.arange(shape[-2]) % 2 == 0
    return torch.randn(shape, generator=generator, dtype=torch.float64) - depth * low[:, None].double()


def _bias_nearly_masked(generator: Generator, *shape: int) -> Tensor:
    """-1e30 for some keys of each row: as good as -inf, but finite (-inf in float16)."""
    return _bias(generator, *shape).masked_fill(~_random(generator, *shape), NEARLY_MASKED)


def _sliced(mask: Tensor) -> Tensor:
    """The same mask, cut out of longer rows."""
    return torch.cat([mask, _others(mask)[..., :3]], -1)[..., : mask.shape[-1]]


def _every_second(mask: Tensor) -> Tensor:
    """The same mask at every second place of a wider buffer."""
    return torch.stack([mask, _others(mask)], -1)[..., 0]


def _others(mask: Tensor) -> Tensor:
    return ~mask if mask.dtype == torch.bool else -mask


def _turned(mask: Tensor) -> Tensor:
    """The same mask, with its rows strided: in memory key by key."""
    return mask.mT.contiguous().mT


def _additive(mask: Tensor) -> Tensor:
    """0 where `mask` is True, -inf elsewhere."""
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)


def _bias(generator: Generator, *shape: int) -> Tensor:
    """As large as the scores, of both signs: one added before the scaling is a different one."""
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


_KINDS: dict[str, Build] = {
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
    "fully masked rows": lambda g, b, h, q, s: _fully_masked_rows(g, b, q, s),
    "fully masked item": lambda g, b, h, q, s: _fully_masked_item(g, b, s),
    "all on": lambda g, b, h, q, s: torch.ones(q, s, dtype=torch.bool),
    "all masked": lambda g, b, h, q, s: torch.zeros(b, 1, 1, s, dtype=torch.bool),
    "expanded": lambda g, b, h, q, s: _padding(g, b, s).expand(b, h, q, s),
    "transposed": lambda g, b, h, q, s: _random(g, s, q).logical_or(torch.eye(s, q, dtype=torch.bool)).mT,
    "additive padding": lambda g, b, h, q, s: _additive(_padding(g, b, s)),
    "additive left padding": lambda g, b, h, q, s: _additive(_left_padding(g, b, s)),
    "additive fully masked rows": lambda g, b, h, q, s: _additive(_fully_masked_rows(g, b, q, s)),
    "bias": lambda g, b, h, q, s: _bias(g, b, 1, q, s),
    "bias of rows": lambda g, b, h, q, s: _bias(g, q, s),
    "bias per head": lambda g, b, h, q, s: _bias(g, 1, h, q, s),
    "bias of keys": lambda g, b, h, q, s: _bias(g, b, 1, 1, s),
    "bias and padding": lambda g, b, h, q, s: _bias(g, b, h, q, s) + _additive(_padding(g, b, s)),
    "bias expanded": lambda g, b, h, q, s: _bias(g, 1, h, q, s).expand(b, h, q, s),
    "bias transposed": lambda g, b, h, q, s: _bias(g, b, 1, s, q).mT,
}

SQUARE_KINDS: dict[str, Build] = {
    "padding flipped": lambda g, b, h, q, s: _padding(g, b, s).flip(-1),
    "no padding": lambda g, b, h, q, s: torch.ones(b, 1, 1, s, dtype=torch.bool),
    "mixed padding": lambda g, b, h, q, s: _mixed_padding(g, b, s, 0),
    "mixed padding after all on": lambda g, b, h, q, s: _mixed_padding(g, b, s, 3),
    "window": lambda g, b, h, q, s: _distance(q, s).abs() < WINDOW,
    "causal window": lambda g, b, h, q, s: (_distance(q, s) <= 0) & (_distance(q, s) > -WINDOW),
    "blocks": lambda g, b, h, q, s: _blocks(q, s),
    "causal blocks": lambda g, b, h, q, s: _blocks(q, s) & (_distance(q, s) <= 0),
    "rows turned": lambda g, b, h, q, s: _turned(_random(g, b, h, q, s)),
    "rows sliced": lambda g, b, h, q, s: _sliced(_random(g, b, 1, q, s)),
    "rows every second": lambda g, b, h, q, s: _every_second(_random(g, b, 1, q, s)),
    "bias turned": lambda g, b, h, q, s: _turned(_bias(g, q, s)),
    "bias sliced": lambda g, b, h, q, s: _sliced(_bias(g, b, h, q, s)),
    "bias every second": lambda g, b, h, q, s: _every_second(_bias(g, h, q, s)),
    "bias by distance": lambda g, b, h, q, s: _bias_by_distance(g, h, q, s),
    "bias of hundreds": lambda g, b, h, q, s: _bias_of_hundreds(g, b, 1, q, s),
    "bias of rows of -2000": lambda g, b, h, q, s: _bias_of_low_rows(g, 2000.0, q, s),
    "bias of rows of -12000": lambda g, b, h, q, s: _bias_of_low_rows(g, 12000.0, b, 1, q, s),
    "bias of -1e30": lambda g, b, h, q, s: _bias_nearly_masked(g, b, 1, q, s),
}
"""Kinds that are tried with as many queries as keys, where they may be mistaken for others."""

MASK_KINDS: dict[str, Build] = {**_KINDS, **SQUARE_KINDS}

MASKS_BY_SHAPE: dict[str, Build] = {
    **{f"bool {pattern}": _bool_of(pattern) for pattern in PATTERNS},
    **{f"bias {pattern}": _bias_of(pattern) for pattern in PATTERNS},
}
"""A bool mask and a bias for each shape in `PATTERNS`; a bool mask that all keys share has fully masked rows."""
