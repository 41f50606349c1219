"""Why single calls of deformable attention are wrong: a named cause is a reproduced cause.

The failing cases and the suite's own small ones are observed. A fault is named if its reference (`known_faults`) gives
the patch's wrong numbers in every case that fails, and is right where the patch is right. Otherwise only that is said
which holds in all cases: which results are wrong, and what the failing cases have that the others lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from headoff.harness.deformable.cases import DeformableCase, deformable_cases, reduced_cases
from headoff.harness.deformable.conditions import CONDITIONS
from headoff.harness.deformable.known_faults import BACKWARD, FORWARD
from headoff.harness.deformable.reads import MOST_POINTS, MOST_TOKENS, faulty_part
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import tensors_of
from headoff.harness.operator.experiments import Diagnosis, Experiments, is_without_gradients, wrong_outputs
from headoff.harness.operator.fault import Fault
from headoff.harness.operator.observation import Observation
from headoff.harness.operator.weights import crossing

AGREEING = 3
"""Failing cases that must agree in which part of the context is wrong."""

SMALL = 600
"""Weights of the suite's own cases on which an explanation is tried."""

RESIDUAL, RESIDUAL_IN_HALF = 0.01, 0.1
"""Of an error so little may be left by the fault that is its cause: wrong answers may be more sensitive to rounding, as
where wrong places are near lines between cells."""


def diagnose(
    attention: Any, failed_cases: Sequence[DeformableCase], device: torch.device | str
) -> Finding | None:
    """See `Experiments.explain`."""
    return DeformableExperiments(attention, torch.device(device)).explain(failed_cases)


@dataclass
class DeformableExperiments(Experiments[DeformableCase]):
    """What a patch gives for the failing cases and for the suite's small ones."""

    tried = 16
    summed = None

    def explained(self, found: Sequence[tuple[DeformableCase, Finding]]) -> Finding:
        numbers = [(case, first) for case, first in found if first.property != "crash"]
        if not numbers:
            return found[0][1]
        self.without_gradients = all(is_without_gradients(first) for _, first in numbers)
        dtype, seed = found[0][0].dtype, found[0][0].seed
        own = [case for case in deformable_cases(dtype, seed + 1) if case.weights <= SMALL and case.queries]
        tried = self.observe_all([*(case for case, _ in numbers), *reduced_cases(dtype, seed), *own[::3]])
        outputs, failing = wrong_outputs(tried)
        if not failing:
            return numbers[0][1]
        # The simplest first: few kinds of anything, then few weights.
        failing.sort(key=lambda item: (str(item.case).count(", "), item.case.weights))
        right = [item for item in tried if not item.fails()]
        wrong = tuple(name for name in outputs if any(item.fails([name]) for item in failing))
        causes = self._causes(wrong, failing, right)
        # A cause says when it matters.
        conditions = () if causes else _conditions(failing, right)
        kind, measured = causes[0].property if causes else wrong[0], ""
        if wrong == ("context",) and not causes and not conditions:
            kind, measured = self._faulty_part(failing) or (kind, measured)
        self.diagnosis = Diagnosis(
            cast(Property, kind),
            wrong,
            tuple(causes),
            conditions,
            len(failing),
            len(tried),
            failing[0],
            self.without_gradients,
            measured,
        )
        return self.diagnosis.finding

    def _causes(
        self, wrong: Sequence[str], failing: Sequence[Observation], right: Sequence[Observation]
    ) -> list[Fault]:
        """The fault that reproduces all failing cases, one for each wrong gradient; two that cannot be told apart.

        None where a wrong result is not explained.
        """
        causes: list[Fault] = []
        for name in wrong:
            faults = FORWARD if name == "context" else [fault for fault in BACKWARD if fault.property == name]
            own = [item for item in failing if item.fails([name])]
            fitting = [
                fault for fault in faults if all(self.reproduces(fault, item) for item in (*own, *right))
            ]
            if len({fault.property for fault in fitting}) != 1 or len(fitting) > 2:
                return []
            causes += fitting
        return causes

    def may_be_left(
        self, share: float, name: str, fault: Fault, observation: Observation, expected: Tensor
    ) -> bool:
        """See `RESIDUAL`."""
        return not share > (RESIDUAL_IN_HALF if observation.case.dtype.itemsize == 2 else RESIDUAL)

    def _faulty_part(self, failing: Sequence[Observation]) -> tuple[Property, str] | None:
        """Whether levels, places or weights are wrong, where the simplest calls without a gate agree."""
        plain = [
            item.case
            for item in failing
            if item.case.gate == "none"
            and item.case.tokens <= MOST_TOKENS
            and len(item.case.shapes) * item.case.points <= MOST_POINTS
        ]
        said: set[tuple[Property, str] | None] = set()
        for case in plain[:AGREEING]:
            context_of, tensors = self.context_of(case), tensors_of(case, self.device)
            crossed = crossing(context_of, tensors, {"batch item": 0, "head": 2, "channel": 3})
            said.add(("context", crossed) if crossed else faulty_part(context_of, tensors))
        return said.pop() if len(said) == 1 else None


def _conditions(failing: Sequence[Observation], right: Sequence[Observation]) -> tuple[str, ...]:
    """The first condition that all failing cases have and no right one."""
    common = (
        words
        for words, holds in CONDITIONS.items()
        if all(map(holds, failing)) and not any(map(holds, right))
    )
    return tuple(common)[:1]
