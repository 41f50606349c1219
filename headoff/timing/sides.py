"""One way of computing something, and the time of one call of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from headoff.timing.clocks import Clock


def nothing() -> tuple[Any, ...]:
    """No preparation: the call takes no arguments."""
    return ()


@dataclass(frozen=True)
class Side:
    """A way of computing something: `call(*prepare())`, of which only the call is timed."""

    call: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = nothing


def timed(side: Side, clock: Clock) -> float:
    """Seconds of one call of a side."""
    arguments = side.prepare()
    clock.prepare()
    call = side.call
    with untraced():
        start = clock.now()
        call(*arguments)
        end = clock.now()
    return end - start


@contextmanager
def untraced() -> Iterator[None]:
    """No tracing and no profiling of Python: a measurement of coverage would slow down whoever is timed under it."""
    trace, profile = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    try:
        yield
    finally:
        if profile is None or callable(profile):  # that of cProfile cannot be put back, and counts no more
            sys.setprofile(profile)
        sys.settrace(trace)
