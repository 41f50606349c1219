"""What a patch costs: patch and baseline timed in turns, a ratio with its interval, a verdict, and the machine."""

from headoff.timing.comparisons import MAX_SLOWDOWN, Comparison, Verdict
from headoff.timing.machine import machine
from headoff.timing.pairs import compare
from headoff.timing.sides import Side

__all__ = ["MAX_SLOWDOWN", "Comparison", "Side", "Verdict", "compare", "machine"]
