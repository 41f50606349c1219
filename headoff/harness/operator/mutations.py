"""Tolerance self-tests: wrong answers that the tolerance must reject.

A wrong answer is what an attention with one known fault would return, computed in float64 and rounded to the dtype of
the case, so that nothing but the fault is there to be detected. It must be rejected by the comparison that is used on
candidates, in each case where it changes some element by much more than the roundings of the dtype.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from headoff.harness.operator.call import Results, tensors_of
from headoff.harness.operator.cases import Case, reduced_cases
from headoff.harness.operator.compare import comparisons
from headoff.harness.operator.fault import Fault
from headoff.harness.operator.known_faults import OperatorFault, known_fault
from headoff.harness.operator.known_faults.forward import hidden_keys, scaled
from headoff.harness.operator.reference import truth_of


def _key_dropped(place: int) -> OperatorFault:
    return OperatorFault(
        "sizes", f"key {place} is dropped", hidden_keys(lambda s: torch.arange(s.keys) == place)
    )


def _scale_off(relative: float) -> OperatorFault:
    return OperatorFault(
        "scale", f"it is off by {relative:g}", scaled(lambda s: (1 + relative) * s.channels**-0.5)
    )


def _known(*names: tuple[str, str]) -> dict[str, OperatorFault]:
    faults = (known_fault(prop, clause) for prop, clause in names)
    return {str(fault): fault for fault in faults}


OF_WEIGHTS: dict[str, OperatorFault] = {
    "one head's gate flipped": OperatorFault(
        "gate",
        "one head's gate flipped",
        {"gate": lambda s: torch.cat([s.gate[:, :-1], 1 - s.gate[:, -1:]], 1)},
    ),
    **_known(
        ("gate", "it is ignored"),
        ("gate", "each head gets the gate of the previous head"),
        ("gate", "each query gets the gate of the previous query"),
        ("gate", "each batch item gets the gate of the previous batch item"),
        ("mask", "it is ignored"),
        ("mask", "each batch item gets the mask of the previous batch item"),
        ("sizes", "the first key is dropped"),
        ("sizes", "the last key is dropped"),
    ),
    **{
        str(fault): fault
        for fault in (_key_dropped(15), _key_dropped(63), _scale_off(1e-2), _scale_off(1e-4))
    },
}
"""Faults of the weights, which both passes may have."""

BACKWARD = ", in the backward pass"

FAULTS: dict[str, OperatorFault] = {
    **OF_WEIGHTS,
    **{name + BACKWARD: replace(fault, is_backward=True) for name, fault in OF_WEIGHTS.items()},
    **_known(
        ("context", "it is zero"),
        ("dq", "dq is scaled twice"),
        ("dq", "dq is not scaled"),
        ("dk", "dk is scaled twice"),
        ("dk", "dk is not scaled"),
        ("dv", "dv is zero"),
        ("dv", "dv lacks the gate"),
        ("softmax backward", "the term delta is missing"),
        ("softmax backward", "dq and dk lack the gate"),
    ),
}


SELF_TESTS = tuple(FAULTS)
"""Faults that the tolerance is tried on."""


def wrong_results(case: Case, fault: Fault) -> Results:
    """What an attention with this fault returns, in the case's dtype: either the context is wrong or gradients are."""
    truth = truth_of(case).values
    results = {**truth, **fault.answer(tensors_of(case), case)}
    return {name: results[name].to(case.dtype) for name in truth}


LARGEST_CASE = 7e4
"""Attention weights of the largest case that wrong answers are made for."""

ENOUGH = 8
"""Cases in which a fault has to be rejected."""

CLEARLY_WRONG = 100.0
"""Roundings from which on a wrong result must be rejected in every case."""

TOO_SMALL = {
    "scale: it is off by 0.01": (torch.bfloat16,),
    "scale: it is off by 0.0001": (torch.bfloat16, torch.float16),
}
"""Faults that are smaller than the roundings of a dtype."""


def undetected(fault: str, dtype: torch.dtype, device: torch.device, seed: int) -> bool:
    """Whether the tolerance accepts the answers of `fault` in all cases; only where that is expected (`TOO_SMALL`).

    Raises:
        AssertionError: it accepts an answer that is clearly wrong, or all answers of a fault that it should detect.
    """
    answers = (
        (case, wrong_results(case, FAULTS[fault]))
        for case in reduced_cases(dtype, seed)
        if case.weights <= LARGEST_CASE
    )
    accepted = accepts_all(fault, answers, device)
    if accepted and dtype not in TOO_SMALL.get(fault.removesuffix(BACKWARD), ()):
        raise AssertionError(f"the tolerance accepts '{fault}' in all cases of {dtype}")
    return accepted


def accepts_all(fault: str, answers: Iterable[tuple[Case, Results]], device: torch.device) -> bool:
    """Whether the comparison accepts the wrong answers of all of these cases; it stops after `ENOUGH` rejections.

    Raises:
        AssertionError: it accepts an answer that is clearly wrong.
    """
    rejected = 0
    for case, answer in answers:
        compared = comparisons(answer, case, device)
        for comparison in compared:
            if comparison.is_right and comparison.errors.largest > CLEARLY_WRONG:
                raise AssertionError(f"the tolerance accepts '{fault}' in {comparison.name} of case {case}")
        rejected += any(not comparison.is_right for comparison in compared)
        if rejected == ENOUGH:
            break
    return not rejected
