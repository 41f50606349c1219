"""Attentions to test the harness with: `WRONG`, mutants with one realistic fault each, and `RIGHT`, in many styles.

Both are dicts by name (`mutants.registry`); `make()` returns a new attention callable. `mutants.cases` and
`mutants.effects` compute a mutant's effects independently of the harness, so they repeat some of its code.
"""

from mutants import (
    right,
    right_kernels,
    wrong_backward,
    wrong_gates,
    wrong_masks,
    wrong_numbers,
    wrong_paths,
    wrong_patterns,
    wrong_shapes,
    wrong_state,
    wrong_weights,
)
from mutants.registry import FAMILIES, RIGHT, WRONG, Right, Wrong

__all__ = [
    "FAMILIES",
    "RIGHT",
    "WRONG",
    "Right",
    "Wrong",
    "right",
    "right_kernels",
    "wrong_backward",
    "wrong_state",
    "wrong_gates",
    "wrong_masks",
    "wrong_numbers",
    "wrong_patterns",
    "wrong_paths",
    "wrong_shapes",
    "wrong_weights",
]
