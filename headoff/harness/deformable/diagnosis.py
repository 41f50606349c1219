"""Why single calls of deformable attention are wrong: a named cause is a reproduced cause.

The failing cases and the suite's own small ones are observed. A fault is named if its reference (`known_faults`) gives
the patch's wrong numbers in every case that fails, and is right where the patch is right. Otherwise only that is said
which holds in all cases: which results are wrong, and what the failing cases have that the others lack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from headoff.harness.deformable.call import DeformableTensors
from headoff.harness.deformable.cases import GRADIENTS, DeformableCase, deformable_cases, reduced_cases
from headoff.harness.deformable.known_faults import BACKWARD, FORWARD, Fault, exact_with_gate
from headoff.harness.deformable.reads import MOST_POINTS, MOST_TOKENS, faulty_part
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import Results, call, context_alone, tensors_of
from headoff.harness.operator.compare import (
    WITHOUT_GRADIENTS,
    Comparison,
    allowed_for,
    compare,
    comparisons,
    describe,
    operator_findings,
)
from headoff.harness.operator.diagnosis import RESIDUAL_OF_ROUNDINGS, Diagnosis
from headoff.harness.operator.reference import truth_of
from headoff.harness.operator.weights import crossing

TRIED = 16
"""Failing cases, the smallest first, that a cause must explain."""

AGREEING = 3
"""Failing cases that must agree in which part of the context is wrong."""

SMALL = 600
"""Weights of the suite's own cases on which an explanation is tried."""


RESIDUAL, RESIDUAL_IN_HALF = 0.01, 0.1
"""A fault is reproduced where the patch is within the tolerance around its answer, or where so little of its error is
left (root mean squares); of roundings more may be left."""


@dataclass(frozen=True)
class Observation:
    """What a patch does on a case: its `results`, and how they compare with the truth."""

    case: DeformableCase
    tensors: DeformableTensors
    results: Results
    comparisons: dict[str, Comparison]

    def fails(self, outputs: Sequence[str]) -> bool:
        return any(name in self.comparisons and not self.comparisons[name].is_right for name in outputs)

    def agrees(self, fault: Fault, device: torch.device) -> bool:
        """Whether the patch's results are those of the fault, to the tolerance of the case."""
        allowed, truth = allowed_for(self.case, device), truth_of(self.case)
        answer = fault.answer(exact_with_gate(self.tensors), self.case)
        for name, expected in answer.items():
            if name not in self.results:
                continue
            # Rounding moves a wrong answer as far as the right one, or as a sum of the answer's size.
            scale = truth.scales[name].hypot(expected.square().mean().sqrt())
            found, expected, scale = (
                self.case.by_head(tensor) for tensor in (self.results[name], expected, scale)
            )
            if compare(name, found, expected, scale, allowed[name], self.case.dtype).is_right:
                continue
            # Wrong answers may be more sensitive to rounding, as where wrong places are near lines between cells.
            true = self.case.by_head(truth.values[name])
            found = found.detach().cpu().double()
            most = RESIDUAL_IN_HALF if self.case.dtype.itemsize == 2 else RESIDUAL
            if fault.property == "precision":
                most = RESIDUAL_OF_ROUNDINGS
            if not _rms(found - expected) <= most * _rms(found - true):
                return False
        return True


def _observed(attention: Any, case: DeformableCase, device: torch.device, grads: bool) -> Observation | None:
    """None where the patch raises, or gives something of another shape."""
    tensors = tensors_of(case, device)
    try:
        results = (
            call(attention, tensors, case.wanted) if grads else {"context": context_alone(attention, tensors)}
        )
        if tuple(results["context"].shape) != case.context_shape:
            return None
    except Exception:
        return None
    compared = {one.name: one for one in comparisons(results, case, device)}
    return Observation(case, tensors_of(case, device), results, compared)


def diagnose(
    attention: Any, failed_cases: Sequence[DeformableCase], device: torch.device | str
) -> Finding | None:
    """Why `failed_cases` fail, as far as experiments show it; None for no cases.

    Returns:
        A finding whose message says it before the first "; ".
    """
    device = torch.device(device)
    failed = sorted(failed_cases, key=lambda case: case.weights)[:TRIED]
    found = [
        (case, findings[0]) for case in failed if (findings := operator_findings(attention, case, device))
    ]
    if not found:
        if not failed:
            return None
        what = f"fails among other calls and is right when called again, e.g. case {failed[0]}"
        return Finding("state", what, str(failed[0]))
    for _, first in found:
        if first.property not in ("context", *GRADIENTS.values(), "crash"):
            return first
    numbers = [(case, first) for case, first in found if first.property != "crash"]
    if not numbers:
        return found[0][1]
    grads = not all(first.message.startswith(WITHOUT_GRADIENTS) for _, first in numbers)
    dtype, seed = failed[0].dtype, failed[0].seed
    own = [case for case in deformable_cases(dtype, seed + 1) if case.weights <= SMALL and case.queries]
    family = dict.fromkeys([*(case for case, _ in numbers), *reduced_cases(dtype, seed), *own[::3]])
    tried = [item for case in family if (item := _observed(attention, case, device, grads)) is not None]
    outputs: tuple[str, ...] = ("context",)
    if not any(item.fails(outputs) for item in tried):
        outputs = tuple(GRADIENTS.values())
    failing = [item for item in tried if item.fails(outputs)]
    if not failing:
        return numbers[0][1]
    # The simplest first: few kinds of anything, then few weights.
    failing.sort(key=lambda item: (str(item.case).count(", "), item.case.weights))
    right = [item for item in tried if not item.fails(("context", *GRADIENTS.values()))]
    wrong = tuple(name for name in outputs if any(item.fails([name]) for item in failing))
    conditions = [
        words
        for words, holds in CONDITIONS.items()
        if all(holds(item) for item in failing) and not any(holds(item) for item in right)
    ][:1]
    causes = _causes(wrong, failing, right, device)
    if causes:
        conditions = []  # the cause says when it matters
    kind, measured = causes[0].property if causes else wrong[0], ""
    if wrong == ("context",) and not causes and not conditions:
        kind, measured = _faulty_part(attention, failing, device, grads) or (kind, measured)
    simplest = failing[0]
    worst = max(
        (simplest.comparisons[name] for name in wrong if name in simplest.comparisons),
        key=lambda one: one.excess,
    )
    diagnosis = Diagnosis(
        cast(Property, kind),
        wrong,
        tuple(causes),
        tuple(conditions),
        len(failing),
        len(tried),
        simplest.case,
        describe(worst, simplest.case),
        not grads,
        measured,
    )
    error, budget = worst.decisive
    return Finding(
        cast(Property, kind),
        diagnosis.message,
        str(simplest.case),
        error=error,
        budget=budget,
        head=worst.place[1],
    )


def _faulty_part(
    attention: Any, failing: Sequence[Observation], device: torch.device, grads: bool
) -> tuple[Property, str] | None:
    """Whether levels, places or weights are wrong, where the simplest calls without a gate agree."""
    said: list[tuple[Property, str] | None] = []
    for item in failing:
        case = item.case
        if (
            case.gate == "none"
            and case.tokens <= MOST_TOKENS
            and len(case.shapes) * case.points <= MOST_POINTS
            and len(said) < AGREEING
        ):

            def context_of(tensors: DeformableTensors, case: DeformableCase = case) -> torch.Tensor | None:
                return _context(attention, tensors, case, grads)

            tensors = tensors_of(case, device)
            crossed = crossing(context_of, tensors, {"batch item": 0, "head": 2, "channel": 3})
            said.append(("context", crossed) if crossed else faulty_part(context_of, tensors))
    if len(set(said)) != 1:
        return None
    return said[0]


def _context(attention: Any, tensors: Any, case: DeformableCase, grads: bool) -> torch.Tensor | None:
    """On the CPU in float64; None where the patch raises, or gives something of another shape."""
    try:
        results = call(attention, tensors, case.wanted) if grads else None
        context = results["context"] if results else context_alone(attention, tensors)
    except Exception:
        return None
    return None if tuple(context.shape) != case.context_shape else context.detach().cpu().double()


def _causes(
    wrong: Sequence[str], failing: Sequence[Observation], right: Sequence[Observation], device: torch.device
) -> list[Fault]:
    """The fault that reproduces all failing cases, one for each wrong gradient; two where they cannot be told apart.

    None where a wrong result is not explained.
    """
    causes: list[Fault] = []
    for name in wrong:
        faults = FORWARD if name == "context" else [fault for fault in BACKWARD if fault.property == name]
        own = [item for item in failing if item.fails([name])]
        fitting = [
            fault
            for fault in faults
            if all(item.agrees(fault, device) for item in own)
            and all(item.agrees(fault, device) for item in right)
        ]
        if len({fault.property for fault in fitting}) != 1 or len(fitting) > 2:
            return []
        causes += fitting
    return causes


def _rms(difference: torch.Tensor) -> float:
    return float(difference.square().mean().sqrt())


def _strided(item: Observation) -> bool:
    return not all(tensor.is_contiguous() for tensor in item.tensors.inputs)


CONDITIONS: dict[str, Callable[[Observation], bool]] = {
    "a gate": lambda item: item.tensors.gate is not None,
    "a gate that differs between queries": lambda item: _differs(item, 1),
    "a gate that differs between batch items": lambda item: _differs(item, 0),
    "several levels": lambda item: len(item.case.shapes) > 1,
    "several batch items": lambda item: item.case.batch > 1,
    "points outside": lambda item: item.case.inputs in ("normal", "borders", "outside", "far", "corners"),
    "inputs that are not contiguous": _strided,
    "a gradient of the context that is not contiguous": lambda item: (
        not item.tensors.grad_context.is_contiguous()
    ),
    "attention weights that do not add up to 1": lambda item: item.case.weight_kind in ("any", "filled up"),
    "levels of one row or column": lambda item: any(1 in shape for shape in item.case.shapes),
    "levels that are not square": lambda item: any(h != w for h, w in item.case.shapes),
    "more than 4 points": lambda item: item.case.points > 4,
    "a number of points that is no power of 2": lambda item: item.case.points & (item.case.points - 1) != 0,
    "a number of channels that is no power of 2": lambda item: (
        item.case.channels & (item.case.channels - 1) != 0
    ),
    "more than 32 channels": lambda item: item.case.channels > 32,
    "a number of heads that is no power of 2": lambda item: item.case.heads & (item.case.heads - 1) != 0,
}
"""What failing cases may have in common."""


def _differs(item: Observation, dim: int) -> bool:
    gate = item.tensors.gate
    return gate is not None and bool((gate != gate.narrow(dim, 0, 1)).any())
