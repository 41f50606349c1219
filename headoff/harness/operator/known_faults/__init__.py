"""Known faults as small faulty references: attention in float64, in steps, with one of the steps replaced.

A diagnosis names a fault only if its reference gives the wrong numbers of the patch (`diagnosis`).
A fault of the forward pass answers with the context alone. A fault of the backward pass answers with the right context
and wrong gradients; its first steps recompute the weights, so every slip with gate or mask can be one of either.
"""

from __future__ import annotations

import torch

from headoff.harness.finding import Property
from headoff.harness.operator.known_faults.backward import BACKWARD_ALONE
from headoff.harness.operator.known_faults.fitted import fitted_faults
from headoff.harness.operator.known_faults.forward import FORWARD_ALONE
from headoff.harness.operator.known_faults.gate_and_mask import GATE, MASK
from headoff.harness.operator.known_faults.precision import roundings
from headoff.harness.operator.known_faults.steps import OperatorFault, Steps, right_weights

__all__ = [
    "OperatorFault",
    "backward_faults",
    "fitted_faults",
    "forward_faults",
    "known_fault",
    "right_weights",
]


def forward_faults(dtype: torch.dtype) -> list[OperatorFault]:
    """All faults of the forward pass that a patch may have in `dtype`."""
    groups: list[tuple[Property, dict[str, Steps]]] = [("gate", GATE), ("mask", MASK), *FORWARD_ALONE.items()]
    faults = [OperatorFault(prop, clause, steps) for prop, group in groups for clause, steps in group.items()]
    return faults + [f for f in roundings() if not f.is_backward and f.rounding > torch.finfo(dtype).eps]


def backward_faults(dtype: torch.dtype) -> list[OperatorFault]:
    """All faults of the backward pass that a patch may have in `dtype`: the context is right."""
    faults = [
        OperatorFault(_of_clause(clause), clause, steps, True) for clause, steps in BACKWARD_ALONE.items()
    ]
    for what, group in (("gate", GATE), ("mask", MASK)):
        faults += [
            OperatorFault("softmax backward", f"the {what} in the backward pass: {clause}", steps, True)
            for clause, steps in group.items()
        ]
    return faults + [f for f in roundings() if f.is_backward and f.rounding > torch.finfo(dtype).eps]


def _of_clause(clause: str) -> Property:
    """The gradient that a clause is about, if it is one (of key and value, the key's)."""
    first, *more = clause.split()
    together = more[:2] == ["and", "dk"]
    return first if first in ("dq", "dk", "dv") and not together else "softmax backward"  # type: ignore[return-value]


def known_fault(prop: str, clause: str) -> OperatorFault:
    """The fault of that property and clause."""
    faults = (*forward_faults(torch.float64), *backward_faults(torch.float64))
    return next(fault for fault in faults if (fault.property, fault.clause) == (prop, clause))
