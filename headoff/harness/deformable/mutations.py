"""Tolerance self-tests: wrong answers that the tolerance must reject, see `headoff.harness.operator.mutations`."""

from __future__ import annotations

import torch

from headoff.harness.deformable.cases import reduced_cases
from headoff.harness.deformable.known_faults import FAULTS
from headoff.harness.operator.mutations import accepts_all, wrong_results


def undetected(fault: str, dtype: torch.dtype, device: torch.device, seed: int) -> bool:
    """Whether the tolerance accepts the answers of `fault` in all cases that it makes a difference in.

    Raises:
        AssertionError: it accepts an answer that is clearly wrong.
    """
    answers = ((case, wrong_results(case, FAULTS[fault])) for case in reduced_cases(dtype, seed))
    return accepts_all(fault, answers, device)


SELF_TESTS = tuple(name for name, fault in FAULTS.items() if fault.property not in ("sizes", "precision"))
"""Faults that the tolerance is tried on: those that show in the cases of any size, and in any dtype."""
