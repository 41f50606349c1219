"""Registration of wrong and right attentions, and the sample of them that is in every test run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
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

Effect = Literal[
    "context",  # wrong values
    "dq",  # wrong values of the query's gradient
    "dk",
    "dv",
    "no gradient",  # the context requires no gradient
    "crash",  # an exception
    "dtype",  # the context's
    "layout",  # elements of the context share memory with each other or with an input
    "in-place",  # an input is written into, or the gradient of the context in the backward pass
    "randomness",  # the same call gives other bits the second time
    "state",  # wrong after other calls, or an earlier result changes
    "memory",  # tensors of earlier calls are never released
    "threads",  # other numbers with another number of threads
    "gate gradient",  # a gate that requires a gradient gets a wrong one
    "grad mode",  # other numbers where no gradient is asked for
    "second backward",  # other gradients when the backward pass runs a second time
    "settings",  # the call changes torch's settings or random state
    "calls",  # an exception is caught, or a mask passed on, and something else computes the result
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
    """A mutant: an attention with one fault, which otherwise meets the contract.

    Attributes:
        name: of the decorated function.
        family: the part of attention code that has the fault.
        fault: a sentence for people.
        needs: features of a call (`mutants.cases`) without which the fault has no effect.
        shows: what is wrong then; effects on gradients only if the context is right.
        make: returns a new callable.
    """

    name: str
    family: Family
    fault: str
    needs: frozenset[str]
    shows: frozenset[Effect]
    make: Callable[[], Attention]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the suites must detect it, as a verdict is about the dtypes that were asked for."""
        return next(
            (dtype for feature, dtype in DTYPE_NEEDED.items() if feature in self.needs), torch.float32
        )


@dataclass(frozen=True)
class Right:
    """An attention that meets the contract.

    Attributes:
        name: of the decorated function.
        family: the style, in a word or two.
        style: a sentence for people.
        dtypes: those that it takes; it raises TypeError for others.
        missing: returns why it cannot run here, or None if it can.
        slow: whether it takes more than a few seconds to compile.
        make: returns a new callable.
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
    shows: tuple[Effect, ...] = ("context",),
) -> Callable[[Maker], Maker]:
    """Register the attention that the decorated function makes, under the function's name."""

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
    """Register the attention that the decorated function makes, under the function's name."""

    def register(make: Maker) -> Maker:
        name = make.__name__
        assert name not in RIGHT, f"two right attentions are called {name}"
        RIGHT[name] = Right(name, family, style, dtypes, missing, slow, make)
        return make

    return register


def in_every_run(attentions: Mapping[str, Wrong | Right], per_family: int) -> frozenset[str]:
    """Names of a fixed sample: `per_family` of each family, evenly spaced in the order of registration."""
    by_family: dict[str, list[str]] = {}
    for attention in attentions.values():
        by_family.setdefault(attention.family, []).append(attention.name)
    return frozenset(
        names[place * len(names) // per_family] for names in by_family.values() for place in range(per_family)
    )


def sampled(attentions: Iterable[Wrong | Right], sample: frozenset[str]) -> list:
    """pytest parameters; attentions outside of the sample have the marker of the long run (`tox -e mutation`)."""
    parameters = []
    for attention in attentions:
        marks = [] if attention.name in sample else [pytest.mark.mutation]
        if isinstance(attention, Right) and (reason := attention.missing()):
            marks.append(pytest.mark.skip(reason=reason))
        if isinstance(attention, Right) and attention.slow:
            marks.append(pytest.mark.mutation)
        parameters.append(pytest.param(attention, id=attention.name, marks=marks))
    return parameters
