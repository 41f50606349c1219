"""Experiments with a patch that is wrong, whatever its contract: a named cause is a reproduced cause.

A failing case that is right when called again, another shape or a changed input need no experiment. Where numbers are
wrong, cases are observed, and a fault is named only if its reference gives the patch's wrong numbers, to their
rounding. Which cases are tried, and which faults, is the contract's (`headoff.harness.operator.diagnosis` and
`headoff.harness.deformable.diagnosis`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic

import torch
from torch import Tensor

from headoff.harness.finding import Finding, Property
from headoff.harness.operator.cases import Case, CaseType
from headoff.harness.operator.compare import (
    NAMES,
    WITHOUT_GRADIENTS,
    Comparison,
    allowed_for,
    compare,
    describe,
    operator_findings,
)
from headoff.harness.operator.fault import Fault
from headoff.harness.operator.observation import Observation, observed, results_of
from headoff.harness.operator.reference import truth_of
from headoff.harness.operator.weights import rms

RESIDUAL_OF_ROUNDINGS = 0.2
"""A fault is reproduced where the patch is within the tolerance around its answer. The tolerance is that of the right
answer, and wrong ones may be more sensitive: so it is also reproduced if little of the error is left (root mean
squares): of faults that are roundings this share, of others what the contract says (`Experiments.may_be_left`)."""


@dataclass
class Diagnosis:
    """What experiments show of a patch that is wrong.

    Args:
        wrong: the property that is.
        outputs: the results that are wrong: `context`, or names of gradients.
        causes: the faults that all failing cases agree with; two where they cannot be told apart, none if unknown.
        conditions: what a case must have to fail, in words.
        failing, tried: numbers of cases.
        shown: the simplest case that fails.
        without_gradients: whether it is so only where no gradient is asked for.
        measured: which part of the context is wrong, where there is no cause.
    """

    wrong: Property
    outputs: tuple[str, ...]
    causes: tuple[Fault, ...]
    conditions: tuple[str, ...]
    failing: int
    tried: int
    shown: Observation
    without_gradients: bool = False
    measured: str = ""

    @property
    def worst(self) -> Comparison:
        """The result of the case shown that is wrong by the most."""
        compared = self.shown.comparisons
        return max(
            (compared[name] for name in self.outputs if name in compared), key=lambda item: item.excess
        )

    @property
    def message(self) -> str:
        only = f", only with {' and '.join(self.conditions)}" if self.conditions else ""
        if self.causes:
            clause = " or ".join(fault.clause for fault in self.causes)
            either = "either " if len(self.causes) > 1 else ""
            text = f"{either}{clause}{only} (reproduced in {self.failing} of {self.failing} failing cases)"
        else:
            gradients = "the context is right, " if self.outputs[0] != "context" else ""
            names = NAMES[self.outputs[0]] if len(self.outputs) == 1 else " and ".join(self.outputs)
            text = f"{gradients}{names} {'is' if len(self.outputs) == 1 else 'are'} wrong{only}"
            text += f": {self.measured}" if self.measured else ""
            text += f" ({self.failing} of {self.tried} cases tried)"
        case, when = self.shown.case, WITHOUT_GRADIENTS if self.without_gradients else ""
        return f"{when}{text}; {describe(self.worst, case)}; case {case}"

    @property
    def finding(self) -> Finding:
        case, worst = self.shown.case, self.worst
        error, budget = worst.decisive
        return Finding(
            self.wrong,
            self.message,
            str(case),
            error=error,
            budget=budget,
            site=case.site,
            head=worst.place[1],
        )


@dataclass
class Experiments(ABC, Generic[CaseType]):
    """Calls of one attention on a device, which of them are right, and what follows from it."""

    tried: ClassVar[int]
    """Failing cases, the smallest first, that are looked at."""

    summed: ClassVar[int | None]
    """The dimension of a result that its sums are alike along; None for all of them."""

    attention: Any
    device: torch.device
    diagnosis: Diagnosis | None = field(default=None, init=False)
    observed: dict[CaseType, Observation | None] = field(default_factory=dict, init=False)
    without_gradients: bool = field(default=False, init=False)

    def explain(self, failed_cases: Sequence[CaseType]) -> Finding | None:
        """Why `failed_cases` fail, as far as experiments show it; `diagnosis` has the details if numbers are wrong.

        Returns:
            A finding whose message says it before the first "; ". None for no cases.
        """
        if not failed_cases:
            return None
        found = []
        for case in sorted(failed_cases, key=lambda case: case.weights)[: self.tried]:
            if findings := operator_findings(self.attention, case, self.device):
                found.append((case, findings[0]))
        if not found:
            what = f"fails among other calls and is right when called again, e.g. case {failed_cases[0]}"
            return Finding("state", what, str(failed_cases[0]))
        for _, first in found:
            if first.property in ("dtype", "shape", "in-place", "state"):
                return first
        return self.explained(found)

    @abstractmethod
    def explained(self, found: Sequence[tuple[CaseType, Finding]]) -> Finding:
        """Why these cases fail, which have wrong numbers or raise; with the first finding of each."""

    @abstractmethod
    def may_be_left(
        self, share: float, name: str, fault: Fault, observation: Observation, expected: Tensor
    ) -> bool:
        """Whether rounding explains what a fault does not: `share` of the error of the result `name`.

        Args:
            expected: the fault's answer.
        """

    # Calls

    def observe(self, case: CaseType) -> Observation | None:
        """The first call of a case, remembered; None where it gives nothing that can be compared."""
        if case not in self.observed:
            self.observed[case] = self.observe_again(case)
        return self.observed[case]

    def observe_again(self, case: CaseType) -> Observation | None:
        """A further call of a case."""
        return observed(self.attention, case, self.device, self.without_gradients)

    def observe_all(self, cases: Iterable[CaseType]) -> list[Observation]:
        """Of each case once, as far as they can be compared."""
        return [item for case in dict.fromkeys(cases) if (item := self.observe(case)) is not None]

    def context_of(self, case: Case) -> Callable[[Any], Tensor | None]:
        """The context of tensors of the case's sizes, float64 on the CPU; None where the patch raises."""

        def context(tensors: Any) -> Tensor | None:
            return results_of(self.attention, tensors, case, self.without_gradients).get("context")

        return context

    # Comparisons

    def reproduces(self, fault: Fault, observation: Observation) -> bool:
        """Whether the patch gives the answer of the fault; see `RESIDUAL_OF_ROUNDINGS`."""
        case, truth = observation.case, truth_of(observation.case)
        answer = fault.answer(observation.tensors, case)
        for name in answer.keys() & observation.comparisons.keys():
            found, expected, true = observation.results[name], answer[name], truth.values[name]
            for is_special in (torch.isnan, torch.isinf):
                if not torch.equal(is_special(found), is_special(expected)):
                    return False
            found, expected = (item.nan_to_num(0.0, 0.0, 0.0) for item in (found, expected))
            is_right = observation.comparisons[name].is_right
            if is_right and self.agree(name, expected, true, truth.scales[name], case):
                continue  # the fault does not show in this result
            if self.agree(name, found, expected, self.scale(name, expected, case), case):
                continue
            share = rms(found - expected) / max(rms(found - true), 1e-300)
            if fault.is_rounding():
                if share > RESIDUAL_OF_ROUNDINGS:
                    return False
            elif not self.may_be_left(share, name, fault, observation, expected):
                return False
        return True

    def agree(self, name: str, found: Tensor, expected: Tensor, scale: Tensor, case: CaseType) -> bool:
        """To the tolerance of the case; what is smaller than any number of its dtype is zero."""
        found, expected = (
            torch.where(item.abs() < torch.finfo(case.dtype).tiny, 0.0, item) for item in (found, expected)
        )
        found, expected, scale = (case.by_head(item) for item in (found, expected, scale))
        allowed = allowed_for(case, self.device)[name]
        return compare(name, found, expected, scale, allowed, case.dtype).is_right

    def scale(self, name: str, answer: Tensor, case: CaseType) -> Tensor:
        """How far rounding can move a wrong answer: as far as the right one, or as a sum of the answer's size."""
        size = answer.square().mean(self.summed, keepdim=True).sqrt()
        return truth_of(case).scales[name].hypot(size)


def wrong_outputs(
    tried: Sequence[Observation],
) -> tuple[tuple[str, ...], list[Observation]]:
    """The context, if it is ever wrong, for gradients follow from it; else all gradients. And what fails in them."""
    outputs: tuple[str, ...] = ("context",)
    if tried and not any(item.fails(outputs) for item in tried):
        outputs = tuple(tried[0].tensors.gradient_names.values())
    return outputs, [item for item in tried if item.fails(outputs)]


def is_without_gradients(finding: Finding) -> bool:
    """Whether it occurs only where no gradient is asked for."""
    return finding.message.startswith(WITHOUT_GRADIENTS)
