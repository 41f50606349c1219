"""What is registered in the zoo, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from headoff.attention import Attention

Family = Literal[
    "gate",
    "mask",
    "scale",
    "softmax",
    "backward",
    "precision",
    "sizes",
    "state",
    "layout",
    "dtype",
    "randomness",
    "in-place",
    "settings",
    "calls",
]
FAMILIES: tuple[str, ...] = get_args(Family)

Symptom = Literal[
    "context",  # its numbers
    "dq",  # the numbers of the query's gradient
    "dk",
    "dv",
    "no gradient",  # the context does not depend on its inputs, as far as autograd knows
    "crash",  # an exception
    "dtype",  # the context's
    "layout",  # elements of the context share memory with each other or with an input
    "in-place",  # an input is another one after the call, or the context's gradient after the backward pass
    "randomness",  # the same call again gives other bits
    "state",  # right when fresh, wrong after other calls; or an earlier result changes afterwards
    "memory",  # tensors of earlier calls are never let go
    "threads",  # other numbers where torch has another number of threads
    "gate gradient",  # a gate that requires a gradient gets a wrong one
    "grad mode",  # other numbers where no gradient is asked for
    "second backward",  # other gradients when the backward pass runs again over the same graph
    "settings",  # torch's settings or random state are others after the call
    "calls",  # an exception is swallowed, or a mask passed on, and something else computed in its place
]

DTYPE_NEEDED = {
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "half precision": torch.bfloat16,
}

ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Wrong:
    """An attention that is wrong in one way, and otherwise keeps the contract.

    - `name`: of the function that makes it
    - `family`: which part of attention code the slip is in
    - `fault`: a sentence for people
    - `needs`: features (`mutants.cases`) that a call must have, all of them, for the fault to be there at all
    - `shows`: the symptoms that it is known by; those of gradients only where the context is right
    - `make`: a fresh one, with no call behind it
    """

    name: str
    family: Family
    fault: str
    needs: frozenset[str]
    shows: frozenset[Symptom]
    make: Callable[[], Attention]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the suites are to detect it: the verdict is about the dtypes asked for."""
        return next(
            (dtype for feature, dtype in DTYPE_NEEDED.items() if feature in self.needs), torch.float32
        )


@dataclass(frozen=True)
class Right:
    """An attention that keeps the contract, in a style of its own.

    - `family`: the style, in a word or two
    - `style`: a sentence for people
    - `dtypes`: what it takes; it raises TypeError for others
    - `missing`: why it cannot run here, or None where it can
    - `slow`: it takes longer than a few seconds to get started
    - `make`: a fresh one
    """

    name: str
    family: str
    style: str
    dtypes: tuple[torch.dtype, ...]
    missing: Callable[[], str | None]
    slow: bool
    make: Callable[[], Attention]


WRONG: dict[str, Wrong] = {}
RIGHT: dict[str, Right] = {}

Maker = Callable[[], Attention]


def wrong(
    family: Family,
    fault: str,
    *,
    needs: tuple[str, ...] = (),
    shows: tuple[Symptom, ...] = ("context",),
) -> Callable[[Maker], Maker]:
    """Register what the decorated function makes, under the function's name."""

    def register(make: Maker) -> Maker:
        name = make.__name__
        assert name not in WRONG, f"two wrong attentions are called {name}"
        WRONG[name] = Wrong(name, family, fault, frozenset(needs), frozenset(shows), make)
        return make

    return register


def right(
    family: str,
    style: str,
    *,
    dtypes: tuple[torch.dtype, ...] = ALL_DTYPES,
    missing: Callable[[], str | None] = lambda: None,
    slow: bool = False,
) -> Callable[[Maker], Maker]:
    """Register what the decorated function makes, under the function's name."""

    def register(make: Maker) -> Maker:
        name = make.__name__
        assert name not in RIGHT, f"two right attentions are called {name}"
        RIGHT[name] = Right(name, family, style, dtypes, missing, slow, make)
        return make

    return register
