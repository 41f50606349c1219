"""Attentions to try the harness on: `WRONG`, each wrong in one realistic way, and `RIGHT`, in many styles.

Both are dicts of name to entry (`mutants.entries`); `entry.make()` gives a fresh attention callable.
"""

from mutants import (
    right,
    wrong_backward,
    wrong_conduct,
    wrong_gates,
    wrong_masks,
    wrong_numbers,
    wrong_paths,
    wrong_patterns,
    wrong_shapes,
    wrong_weights,
)
from mutants.entries import FAMILIES, RIGHT, WRONG, Right, Wrong

__all__ = [
    "FAMILIES",
    "RIGHT",
    "WRONG",
    "Right",
    "Wrong",
    "right",
    "wrong_backward",
    "wrong_conduct",
    "wrong_gates",
    "wrong_masks",
    "wrong_numbers",
    "wrong_patterns",
    "wrong_paths",
    "wrong_shapes",
    "wrong_weights",
]
