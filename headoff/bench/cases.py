"""What suites of benchmarks are made of: cases, and the providers that compute them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from headoff.timing import TimedCall


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        parts: calls, and how many of each make up the whole. What takes minutes is not timed as a whole: the notebooks'
            way for 9 configurations is 9 times its way for one.
        check: what is wrong with its result, in one sentence; None where it is right. Raises what the call raises.
        note: a remark for the tables.
    """

    name: str
    parts: tuple[tuple[TimedCall, int], ...]
    check: Callable[[], str | None]
    note: str = ""

    @classmethod
    def of(cls, name: str, call: TimedCall, check: Callable[[Any], str | None], note: str = "") -> Provider:
        """A provider of one call, whose result `check` is given."""
        return cls(name, ((call, 1),), lambda: check(call()), note)


@dataclass(frozen=True)
class Case:
    """Something that several providers compute.

    Attributes:
        suite, name: for tables and progress messages.
        providers: makes them, with inputs and the oracle's outputs.
        references: ratios refer to the fastest right one of these, or to the first right one where there is none.
    """

    suite: str
    name: str
    providers: Callable[[], Sequence[Provider]]
    references: Collection[str]
