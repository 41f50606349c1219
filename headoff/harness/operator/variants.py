"""Cases that are simpler than one that fails, and cases beside it: what experiments with a patch are made on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from headoff.harness.operator.cases import Fields, OperatorCase, operator_cases

SIZES = (64, 100, 200, 600)

SIMPLER: tuple[tuple[Fields, ...], ...] = (
    ({"dtype": torch.float32},),
    ({"grad_context": "random"},),
    ({"wanted": "all"},),
    ({"layout": "contiguous"},),
    ({"inputs": "normal"},),
    ({"queries": 64, "keys": 64},),
    tuple({"queries": size} for size in SIZES),
    tuple({"keys": size} for size in SIZES),
    ({"channels": 32},),
    ({"mask": "none"}, {"mask": "padding"}, {"mask": "bias"}),
    ({"gate": "none"}, {"gate": "first-1"}, {"gate": "fractions"}),
    ({"batch": 1},),
    ({"heads": 2}, {"heads": 4}),
)
"""What a case is without its difficulties, in the order in which they are taken away: of each, the simplest first."""

VARIANTS: tuple[Fields, ...] = (
    {"seed": 1},
    {"seed": 2, "inputs": "positive"},
    {"batch": 3, "heads": 5},
    {"queries": 37, "keys": 53},
    {"queries": 50, "keys": 90},
    {"queries": 33, "keys": 33},
    {"queries": 8, "keys": 150},
    {"channels": 48},
    {"channels": 16},
    {"heads": 8, "queries": 8},
    {"gate": "none"},
    *({"gate": kind, "batch": 3, "heads": 5}
      for kind in ("first-1", "binary heads", "full", "per item", "per query", "beyond", "small", "all off")),
    {"mask": "none"},
    *({"mask": kind, "batch": 3, "heads": 5}
      for kind in ("padding", "holes", "rows per item", "full", "bias", "bias of hundreds", "bias and padding",
                   "fully masked rows")),
    {"layout": "heads last"},
)  # fmt: skip
"""Cases beside the simplest one that fails: faults that agree on one of them differ on another."""

SMALL = 8_000
"""Weights of the suite's own cases on which an explanation is tried."""

LARGEST = 500_000
"""Weights that a case has at most, unless it is one that failed."""


def simplest(case: OperatorCase, fails: Callable[[OperatorCase], bool]) -> OperatorCase:
    """`case` without those difficulties that it `fails` without."""
    for group in SIMPLER:
        for plain in group:
            simpler = replace(case, **plain)
            grows = any(getattr(simpler, n) > max(SIZES[0], getattr(case, n)) for n in ("queries", "keys"))
            if simpler == case or grows or simpler.weights > max(LARGEST, case.weights):
                break
            if fails(simpler):
                case = simpler
                break
    return case


def beside(case: OperatorCase) -> Iterator[OperatorCase]:
    """Variants of a case, and small cases of the suite with other numbers."""
    variants = (replace(case, name="variant", **variant) for variant in VARIANTS)
    yield from (variant for variant in variants if variant.weights <= max(LARGEST, case.weights))
    small = [own for own in operator_cases(case.dtype, case.seed + 1) if own.weights <= SMALL]
    yield from small[::2]
