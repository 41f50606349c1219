"""A call to be timed: what is timed, what is not, and how many threads it may use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from headoff.timing.clocks import Clock

THREADS = 1
"""CPU threads while timing. With several, a call takes as long as its slowest thread, and on a machine with other work
that thread waits for whole time slices, which interleaving cannot take out of the ratio."""


@contextmanager
def torch_threads(count: int = THREADS) -> Iterator[None]:
    """Within this context torch computes with `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def no_arguments() -> tuple[Any, ...]:
    """The setup of a call that needs none."""
    return ()


@dataclass(frozen=True)
class TimedCall:
    """A call `run(*setup())`, of which only `run` is timed.

    Attributes:
        run: the function to time.
        setup: makes its arguments, before each call. The backward pass of a graph, for example, needs a new graph
            each time.
    """

    run: Callable[..., Any]
    setup: Callable[[], tuple[Any, ...]] = no_arguments

    def __call__(self) -> Any:
        """Set up and run once, not timed."""
        return self.run(*self.setup())

    def seconds(self, clock: Clock) -> float:
        """Set up, run once, and return how long the run took."""
        arguments = self.setup()
        clock.prepare()
        run = self.run
        with no_tracing():
            start = clock.now()
            run(*arguments)
            end = clock.now()
        return end - start


@contextmanager
def no_tracing() -> Iterator[None]:
    """Suspend Python's tracing and profiling hooks: under coverage they would slow down what is timed."""
    trace, profile = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    try:
        yield
    finally:
        if profile is None or callable(profile):  # cProfile's hook cannot be set from Python
            sys.setprofile(profile)
        sys.settrace(trace)
