"""Several calls timed in turns: first to last, last to first, and so on.

A machine's speed changes from one second to the next, by more than most patches gain. Calls right after each other
meet the same machine, so their ratio is reliable where their times are not. A later call may have an advantage (warm
caches, raised clocks), so the order alternates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from headoff.timing.clocks import Clock, TimedCall
from headoff.timing.comparison import FEWEST_VALUES

FEWEST_ROUNDS = FEWEST_VALUES + FEWEST_VALUES % 2
"""However long a call takes: fewer rounds give no interval."""

FEWEST_OF_SLOW = 2
"""Rounds of calls for which there is no time for more; one in each order."""

MOST_ROUNDS = 400
"""However short a call is: more rounds hardly make the interval narrower."""

WARM_UP_ROUNDS = 2
"""At least: the first call compiles or tunes, the second tells how long a call takes."""

WARM_UP_SHARE = 0.25
"""The share of the whole time that warm-up may take, beyond the first `WARM_UP_ROUNDS`."""


class Watch:
    """Sees every timed call, by its number, before and after; none of it is part of the time. Does nothing itself."""

    def before(self, index: int) -> None:
        """Before its arguments are made."""

    def ready(self, index: int) -> None:
        """Right before it is called."""

    def after(self, index: int, result: Any) -> None:
        """Right after it returned `result`."""


class Turns:
    """Rounds in which every call is timed once.

    The last call of a round may be timed by others: `run` lies between `before` and `after`, which have the form of
    pytest-benchmark's setup and teardown. So pytest-benchmark's own times of the patch pair with the baseline's.

    Attributes:
        rounds: for each call, its seconds by round.
    """

    def __init__(self, calls: Sequence[TimedCall], clock: Clock, watch: Watch | None = None) -> None:
        self.calls = calls
        self.clock = clock
        self.rounds: list[list[float]] = [[] for _ in calls]
        self._watch = watch or Watch()
        self._round = 0
        self._result: Any = None

    def before(self) -> tuple[Any, ...]:
        """To be called before the last call of a round; returns the arguments for it."""
        if self._round % 2 == 0:
            self._time_others()
        return self._prepared(len(self.calls) - 1)

    def run(self, *arguments: Any) -> Any:
        """The last call of a round, to be timed."""
        self._result = self.calls[-1].run(*arguments)
        return self._result

    def after(self) -> None:
        """To be called after the last call of a round."""
        result, self._result = self._result, None
        self._watch.after(len(self.calls) - 1, result)
        del result
        if self._round % 2 == 1:
            self._time_others()
        self._round += 1

    def warm_up(self, seconds: float, patience: float = math.inf) -> int:
        """Call all until they are warm; returns the number of rounds to make, see `rounds_for`."""
        started = time.perf_counter()
        done, last = 0, 0.0
        while done < WARM_UP_ROUNDS or time.perf_counter() - started < WARM_UP_SHARE * seconds:
            began = time.perf_counter()
            for index in range(len(self.calls)):
                self.calls[index].timed(self._prepared(index), self.clock)
            self.clock.finish()
            last = time.perf_counter() - began
            done += 1
        return rounds_for(seconds, last, patience)

    def _prepared(self, index: int) -> tuple[Any, ...]:
        """The arguments of a call that is to be made at once."""
        self._watch.before(index)
        arguments = self.calls[index].setup()
        self.clock.prepare()
        self._watch.ready(index)
        return arguments

    def _time_others(self) -> None:
        others = range(len(self.calls) - 1)
        for index in others if self._round % 2 == 0 else reversed(others):
            seconds, result = self.calls[index].timed(self._prepared(index), self.clock)
            self.rounds[index].append(seconds)
            self._watch.after(index, result)


def time_in_turns(
    calls: Sequence[TimedCall],
    clock: Clock,
    seconds: float,
    *,
    rounds: int | None = None,
    patience: float = math.inf,
) -> list[list[float]]:
    """The seconds of each call by round, after warm-up.

    Args:
        calls: all on the device of `clock`.
        clock: see `clock_of`.
        seconds: about how long all rounds take together.
        rounds: an even number of rounds to make instead.
        patience: seconds that the rounds of an interval may take at most, where `seconds` are too few for them.
    """
    turns = Turns(calls, clock)
    fitting = turns.warm_up(seconds, patience)
    for _ in range(fitting if rounds is None else rounds):
        arguments = turns.before()
        seconds_taken, result = calls[-1].timed(arguments, clock)
        turns.rounds[-1].append(seconds_taken)
        del arguments, result
        turns.after()
    return turns.rounds


def rounds_for(seconds: float, seconds_per_round: float, patience: float = math.inf) -> int:
    """The number of rounds that take about `seconds`: even, at most `MOST_ROUNDS`.

    At least `FEWEST_ROUNDS`; but `FEWEST_OF_SLOW` where those would take longer than `patience`.
    """
    fewest = FEWEST_ROUNDS if FEWEST_ROUNDS * seconds_per_round <= patience else FEWEST_OF_SLOW
    wanted = min(MOST_ROUNDS, int(seconds / max(seconds_per_round, 1e-9)))
    return max(fewest, wanted - wanted % 2)
