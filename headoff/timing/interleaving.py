"""Patch and baseline timed in turns: baseline, patch, patch, baseline, and so on.

A machine's speed changes from one second to the next, by more than most patches gain. Two calls right after each other
meet the same machine, so their ratio is reliable where their times are not. The second of two calls may have an
advantage (warm caches, raised clocks), so the order alternates.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from headoff.errors import SettingError
from headoff.timing.calls import THREADS, TimedCall, no_tracing, torch_threads
from headoff.timing.clocks import Clock, clock_of
from headoff.timing.comparison import SpeedComparison
from headoff.timing.intervals import fewest_values
from headoff.timing.memory import peak_bytes

FEWEST_ROUNDS = fewest_values() + fewest_values() % 2
"""However long a call takes: fewer rounds give no interval."""

MOST_ROUNDS = 400
"""However short a call is: more rounds hardly make the interval narrower."""

WARM_UP_PAIRS = 2
"""At least: the first call compiles or tunes, the second tells how long a call takes."""

WARM_UP_SHARE = 0.25
"""The share of a comparison's time that warm-up may take, beyond the first `WARM_UP_PAIRS`."""


class InterleavedRounds:
    """Times the baseline before or after each call of the patch, while somebody else times the patch.

    The patch's call of a round lies between `before` and `after`. They have the form of pytest-benchmark's setup and
    teardown, so that pytest-benchmark's own times of the patch can be paired with the baseline's.

    Attributes:
        baseline_rounds: seconds of the baseline, by round.
    """

    def __init__(self, patch: TimedCall, baseline: TimedCall, clock: Clock) -> None:
        self.patch = patch
        self.baseline = baseline
        self.clock = clock
        self.baseline_rounds: list[float] = []
        self._round = 0

    def before(self) -> tuple[Any, ...]:
        """To be called before the patch's call of a round; returns the arguments for it."""
        if self._round % 2 == 0:
            self._time_baseline()
        arguments = self.patch.setup()
        self.clock.prepare()
        return arguments

    def after(self) -> None:
        """To be called after the patch's call of a round."""
        if self._round % 2 == 1:
            self._time_baseline()
        self._round += 1

    def warm_up(self, seconds: float) -> int:
        """Call both until they are warm; returns the number of rounds that take about `seconds`."""
        started = time.perf_counter()
        done, last = 0, 0.0
        while done < WARM_UP_PAIRS or time.perf_counter() - started < WARM_UP_SHARE * seconds:
            began = time.perf_counter()
            for call in (self.baseline, self.patch):
                call.seconds(self.clock)
            self.clock.finish()
            last = time.perf_counter() - began
            done += 1
        return rounds_for(seconds, last)

    def _time_baseline(self) -> None:
        self.baseline_rounds.append(self.baseline.seconds(self.clock))


def rounds_for(seconds: float, seconds_per_round: float) -> int:
    """The number of rounds that take about `seconds`: even, enough for an interval, at most `MOST_ROUNDS`."""
    wanted = min(MOST_ROUNDS, int(seconds / max(seconds_per_round, 1e-9)))
    return max(FEWEST_ROUNDS, wanted - wanted % 2)


def compare(
    patch: TimedCall | Callable[[], Any],
    baseline: TimedCall | Callable[[], Any],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    memory: bool = True,
    threads: int = THREADS,
    clock: Clock | None = None,
) -> SpeedComparison:
    """Time two ways to compute the same thing, in turns.

    Args:
        patch, baseline: functions without arguments, or `TimedCall`s where something has to be set up before each call.
        device: the device that both compute on.
        seconds: about how long all rounds take together, after warm-up.
        rounds: an even number of rounds to make instead.
        memory: whether to measure the peak memory of both, in one more call.
        threads: CPU threads that torch computes with meanwhile.
        clock: to be used instead of the device's own.

    Raises:
        SettingError: the device has no clock, or `rounds` gives no interval.
    """
    device = torch.device(device)
    patch, baseline = (call if isinstance(call, TimedCall) else TimedCall(call) for call in (patch, baseline))
    if rounds is not None and (rounds < FEWEST_ROUNDS or rounds % 2):
        raise SettingError(
            f"{rounds} rounds give no interval: make an even number of at least {FEWEST_ROUNDS}"
        )
    with torch_threads(threads):
        pair = InterleavedRounds(patch, baseline, clock_of(device) if clock is None else clock)
        fitting = pair.warm_up(seconds)
        patch_rounds = []
        for _ in range(fitting if rounds is None else rounds):
            arguments = pair.before()
            with no_tracing():
                start = pair.clock.now()
                patch.run(*arguments)
                end = pair.clock.now()
            patch_rounds.append(end - start)
            del arguments
            pair.after()
        return SpeedComparison.of(
            patch_rounds,
            pair.baseline_rounds,
            patch_memory=peak_bytes(patch, device) if memory else None,
            baseline_memory=peak_bytes(baseline, device) if memory else None,
        )
