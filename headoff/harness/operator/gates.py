"""Head gates for operator cases: every shape (B or 1, H or 1, Q or 1, 1), with several kinds of values.

Values differ between heads, queries and batch items, because a gate that is the same everywhere cannot show that it was
read in the wrong place. Gates have four dimensions and the dtype of the query: callers convert them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import torch
from torch import Generator, Tensor

CONFIGURATIONS = 9
"""Configurations of a cumulative sweep of 8 heads: none off, first 1 off, ..., first 8 off."""

Build = Callable[[Generator, int, int, int], Tensor]

PATTERNS: tuple[str, ...] = tuple(
    "".join(sizes) + "1" for sizes in itertools.product(*((size, "1") for size in "BHQ"))
)
"""All shapes of gates, a letter for each dimension."""


def gate_values(kind: str, generator: Generator, batch: int, heads: int, queries: int) -> Tensor | None:
    """A float64 gate of four dimensions, or None for the kind `none`.

    Args:
        kind: one of `GATE_KINDS` or `GATES_BY_SHAPE`, or `first-K` (the first K heads off), `without-K`, `only-K`.

    Raises:
        KeyError: there is no such kind.
    """
    if kind == "none":
        return None
    if match := re.fullmatch(r"(first|without|only)-(\d+)", kind):
        number, head = int(match[2]), torch.arange(heads)
        on = {"first": head >= number, "without": head != number, "only": head == number}[match[1]]
        return on.double().view(1, heads, 1, 1)
    build = GATES_BY_SHAPE[kind] if kind in GATES_BY_SHAPE else GATE_KINDS[kind]
    return build(generator, batch, heads, queries)


def _fractions(generator: Generator, *shape: int) -> Tensor:
    """Between 0.05 and 0.95: large enough for float16, and not to be mistaken for 0 or 1."""
    return 0.05 + 0.9 * torch.rand(shape, generator=generator, dtype=torch.float64)


def _mixed(generator: Generator, *shape: int) -> Tensor:
    """Fractions, some 0 and some 1 among them."""
    fractions, which = _fractions(generator, *shape), _fractions(generator, *shape)
    return torch.where(which < 0.3, 0.0, torch.where(which > 0.8, 1.0, fractions))


def _small(generator: Generator, *shape: int) -> Tensor:
    """Log-uniform from a thousandth to 1: off is 0 and nothing else."""
    return 10.0 ** (-3 * torch.rand(shape, generator=generator, dtype=torch.float64))


def _near_one(generator: Generator, *shape: int) -> Tensor:
    """1 plus or minus a thousandth to a hundredth: on is 1 and nothing else."""
    apart = 10.0 ** (-2 - torch.rand(shape, generator=generator, dtype=torch.float64))
    return 1 + torch.where(torch.rand(shape, generator=generator) < 0.5, -apart, apart)


def _of_pattern(pattern: str) -> Build:
    def build(generator: Generator, batch: int, heads: int, queries: int) -> Tensor:
        sizes = {"B": batch, "H": heads, "Q": queries, "1": 1}
        return _fractions(generator, *(sizes[letter] for letter in pattern))

    return build


def _configurations(_generator: Generator, _batch: int, heads: int, queries: int) -> Tensor:
    """(1, H, Q, 1): queries in nine runs, as a sweep lays them out; in run c the first c heads are off."""
    off = torch.arange(queries) * CONFIGURATIONS // queries
    return (torch.arange(heads)[:, None] >= off).double().view(1, heads, queries, 1)


GATE_KINDS: dict[str, Build] = {
    "all on": lambda g, b, h, q: torch.ones(1, h, 1, 1, dtype=torch.float64),
    "all off": lambda g, b, h, q: torch.zeros(1, h, 1, 1, dtype=torch.float64),
    "scalar": lambda g, b, h, q: _fractions(g, 1, 1, 1, 1),
    "fractions": lambda g, b, h, q: _fractions(g, 1, h, 1, 1),
    "beyond": lambda g, b, h, q: 2.5 * _fractions(g, 1, h, 1, 1) - 0.5,
    "per item": lambda g, b, h, q: _mixed(g, b, h, 1, 1),
    "per item only": lambda g, b, h, q: _fractions(g, b, 1, 1, 1),
    "per query": lambda g, b, h, q: _mixed(g, b, 1, q, 1),
    "per query only": lambda g, b, h, q: _mixed(g, 1, 1, q, 1),
    "full": lambda g, b, h, q: _mixed(g, b, h, q, 1),
    "binary": lambda g, b, h, q: (_fractions(g, b, h, q, 1) < 0.5).double(),
    "binary heads": lambda g, b, h, q: (_fractions(g, 1, h, 1, 1) < 0.5).double(),
    "configurations": _configurations,
    "expanded": lambda g, b, h, q: _mixed(g, 1, h, 1, 1).expand(b, h, q, 1),
    "queries first": lambda g, b, h, q: _mixed(g, q, b, h, 1).permute(1, 2, 0, 3),
    "small": lambda g, b, h, q: _small(g, b, h, q, 1),
    "small heads": lambda g, b, h, q: _small(g, 1, h, 1, 1),
    "near one": lambda g, b, h, q: _near_one(g, 1, h, 1, 1),
    # A column of a table (heads, layers), as a model keeps its gates.
    "column of a table": lambda g, b, h, q: _fractions(g, h, 6)[None, :, 2, None, None],
    "every second query": lambda g, b, h, q: _mixed(g, 1, h, 2 * q, 1)[:, :, ::2],
}

GATES_BY_SHAPE: dict[str, Build] = {f"fractions {pattern}": _of_pattern(pattern) for pattern in PATTERNS}
"""A gate of fractions for each shape in `PATTERNS`."""
