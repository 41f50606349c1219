"""Patch and baseline timed in turns: baseline, patch, patch, baseline, and again.

A machine's speed changes from one second to the next, by more than most patches gain. Two calls that follow each other
meet the same machine, so it is their ratio that says something. Whoever comes second may have an advantage (caches,
clocks that have woken up), so the order changes from round to round.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from headoff.errors import SettingError
from headoff.timing.clocks import Clock, clock_of
from headoff.timing.comparisons import Comparison
from headoff.timing.intervals import fewest_values
from headoff.timing.memory import peak_bytes
from headoff.timing.sides import Side, timed, untraced
from headoff.timing.threads import THREADS, torch_threads

FEWEST_ROUNDS = fewest_values() + fewest_values() % 2
"""However long a call takes: with fewer there is no interval."""

MOST_ROUNDS = 400
"""Where a call is so short that more would fit into the time: the interval is as narrow as it gets long before."""

WARM_UP_PAIRS = 2
"""At least: the first call compiles or tunes, the second says how long a call takes."""

WARM_UP_SHARE = 0.25
"""Of the time for a comparison, at most, unless fewer than `WARM_UP_PAIRS` fit into it."""


class Interleaving:
    """Times the baseline around each of the patch's calls, whoever times those.

    The patch's call of a round lies between `before` and `after`. That is the shape of pytest-benchmark's setup and
    teardown, so that its own timing of the patch can be paired with the times of the baseline.

    - `baseline_rounds`: seconds of the rounds so far
    """

    def __init__(self, patch: Side, baseline: Side, clock: Clock) -> None:
        self.patch = patch
        self.baseline = baseline
        self.clock = clock
        self.baseline_rounds: list[float] = []
        self._round = 0

    def before(self) -> tuple[Any, ...]:
        """What comes before the patch's call in this round; returns the arguments for it."""
        if self._round % 2 == 0:
            self._time_baseline()
        arguments = self.patch.prepare()
        self.clock.prepare()
        return arguments

    def after(self) -> None:
        """What comes after the patch's call in this round."""
        if self._round % 2 == 1:
            self._time_baseline()
        self._round += 1

    def warm_up(self, seconds: float) -> int:
        """Call both sides as often as they need to be; returns how many rounds fit into `seconds`.

        The number is even, at least what an interval takes, and never more than `MOST_ROUNDS`.
        """
        started = time.perf_counter()
        done, last = 0, 0.0
        while done < WARM_UP_PAIRS or time.perf_counter() - started < WARM_UP_SHARE * seconds:
            began = time.perf_counter()
            for side in (self.baseline, self.patch):
                timed(side, self.clock)
            self.clock.finish()
            last = time.perf_counter() - began
            done += 1
        return rounds_for(seconds, last)

    def _time_baseline(self) -> None:
        self.baseline_rounds.append(timed(self.baseline, self.clock))


def rounds_for(seconds: float, each: float) -> int:
    """How many rounds of `each` seconds to make in about `seconds`: an even number that gives an interval."""
    wanted = min(MOST_ROUNDS, int(seconds / max(each, 1e-9)))
    return max(FEWEST_ROUNDS, wanted - wanted % 2)


def compare(
    patch: Side | Callable[[], Any],
    baseline: Side | Callable[[], Any],
    device: torch.device | str = "cpu",
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    memory: bool = True,
    threads: int = THREADS,
    clock: Clock | None = None,
) -> Comparison:
    """Time two ways of computing the same thing, in turns.

    Args:
        patch, baseline: callables without arguments; or a `Side` each, where something that is not to be timed has
            to be made before each call.
        device: that both compute on.
        seconds: for all rounds together, about; warm-up comes on top.
        rounds: how many, an even number, instead of what fits into `seconds`.
        memory: whether to measure the peak memory of both, in one more call each.
        threads: that torch computes with on the CPU meanwhile.
        clock: instead of the device's own.

    Raises SettingError for a device that has no clock and for numbers of rounds that give no interval.
    """
    device = torch.device(device)
    patch, baseline = (each if isinstance(each, Side) else Side(each) for each in (patch, baseline))
    if rounds is not None and (rounds < FEWEST_ROUNDS or rounds % 2):
        raise SettingError(
            f"{rounds} rounds give no interval: make an even number of at least {FEWEST_ROUNDS}"
        )
    with torch_threads(threads):
        pair = Interleaving(patch, baseline, clock_of(device) if clock is None else clock)
        fitting = pair.warm_up(seconds)
        patch_rounds = []
        for _ in range(fitting if rounds is None else rounds):
            arguments = pair.before()
            with untraced():
                start = pair.clock.now()
                patch.call(*arguments)
                end = pair.clock.now()
            patch_rounds.append(end - start)
            del arguments
            pair.after()
    return Comparison.of(
        patch_rounds,
        pair.baseline_rounds,
        patch_memory=peak_bytes(patch, device) if memory else None,
        baseline_memory=peak_bytes(baseline, device) if memory else None,
    )
