"""Timing two implementations against each other: clocks, interleaved rounds, intervals, memory, and the machine.

Nothing in here knows about attention, DETR or pytest. `compare` is the entry point:

    >>> compare(patched, baseline, seconds=1.0).sentence("patched", "baseline")
    'patched takes 0.91 times the time of baseline (0.90 to 0.93 at 99% confidence; ...): faster'
"""

from headoff.timing.calls import THREADS, TimedCall, torch_threads
from headoff.timing.clocks import Clock, clock_of
from headoff.timing.comparison import MAX_SLOWDOWN, SpeedComparison, Verdict
from headoff.timing.interleaving import compare
from headoff.timing.machine import describe_machine, processor
from headoff.timing.memory import peak_bytes

__all__ = [
    "MAX_SLOWDOWN",
    "THREADS",
    "Clock",
    "SpeedComparison",
    "TimedCall",
    "Verdict",
    "clock_of",
    "compare",
    "describe_machine",
    "peak_bytes",
    "processor",
    "torch_threads",
]
