"""Timing implementations against each other: clocks, rounds in turns, intervals, memory, and the machine.

Nothing in here knows about attention, DETR or pytest.

    >>> patch_rounds, baseline_rounds = time_in_turns([patched, baseline], clock_of(device), seconds=1.0)
    >>> SpeedComparison.of(patch_rounds, baseline_rounds).sentence("patched", "baseline")
    'patched takes 0.912 times the time of baseline (0.901 to 0.930 at 99% confidence; ...): faster'
"""

from headoff.timing.clocks import THREADS, Clock, TimedCall, clock_of, torch_threads
from headoff.timing.comparison import MAX_SLOWDOWN, SpeedComparison, Verdict
from headoff.timing.machine import describe_machine, processor
from headoff.timing.memory import peak_bytes
from headoff.timing.turns import Turns, Watch, time_in_turns

__all__ = [
    "MAX_SLOWDOWN",
    "THREADS",
    "Clock",
    "SpeedComparison",
    "TimedCall",
    "Turns",
    "Verdict",
    "Watch",
    "clock_of",
    "describe_machine",
    "peak_bytes",
    "processor",
    "time_in_turns",
    "torch_threads",
]
