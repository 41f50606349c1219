"""What a check gets, the same for both contracts; what it says; and the list of all checks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headoff.harness.contracts import DEFORMABLE, Contract
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import Results, Tensors, call, context_alone
from headoff.harness.operator.cases import Case, Fields
from headoff.harness.operator.compare import findings_of
from headoff.harness.operator.side_effects import Trial

SIZE = 21
"""Keys of the usual case; queries of a deformable one."""


class NotApplicable(Exception):
    """A check that cannot be made of this attention or on this machine; its text says why."""


@dataclass
class Outcome:
    """What a check found wrong, and sentences that are worth knowing where nothing is."""

    findings: list[Finding] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Candidate:
    """The user's own callable (never a counted one: a compiler sees what it gets), and where it is tried.

    Attributes:
        forward_only: whether it has no backward pass under test.
        spec: what it is imported by, for a process of its own; empty where that is not known.
    """

    attention: Any
    contract: Contract
    dtype: torch.dtype
    device: torch.device
    seed: int = 0
    forward_only: bool = False
    spec: str = ""

    @functools.cached_property
    def trial(self) -> Trial:
        kind: type[Trial] = Trial
        if self.contract is DEFORMABLE:
            from headoff.harness.deformable.side_effects import DeformableTrial

            kind = DeformableTrial
        return kind(self.attention, self.dtype, self.device, self.seed, "check", SIZE)

    @property
    def sizes(self) -> tuple[Fields, ...]:
        """Sizes that differ in batch and sequence lengths, none of them 1, so that none is special to a compiler."""
        sizes: tuple[Fields, ...] = ({}, {"batch": 3}, {"queries": 40}, {"batch": 5, "queries": 33})
        return sizes if self.contract is DEFORMABLE else (*sizes, {"keys": 52}, {"queries": 26, "keys": 47})

    @property
    def arguments(self) -> tuple[Fields, ...]:
        """Calls with all optional arguments, and without any."""
        none: Fields = {"gate": "none"} if self.contract is DEFORMABLE else {"gate": "none", "mask": "none"}
        return ({}, none)

    def case(self, **fields: Any) -> Case:
        return self.trial.case(**fields)

    def tensors(self, case: Case) -> Any:
        return self.trial.tensors(case)

    def call(self, attention: Any, tensors: Tensors) -> Results:
        """Context, and gradients where a backward pass is under test."""
        return (
            {"context": context_alone(attention, tensors)} if self.forward_only else call(attention, tensors)
        )

    def wrong(self, case: Case, results: Results) -> list[Finding]:
        """What is wrong with `results` by the tolerance of single calls."""
        return findings_of(results, case, self.device)

    def wrong_alone(self, cases: Iterable[Case]) -> list[Finding]:
        """What is wrong with plain calls: then there is nothing to say about others."""
        for case in cases:
            if found := self.wrong(case, self.call(self.attention, self.tensors(case))):
                return found
        return []

    def raised_alone(self) -> list[Finding]:
        """What plain calls raise."""
        for fields in self.arguments:
            case = self.case(**fields)
            try:
                self.call(self.attention, self.tensors(case))
            except Exception as error:
                return [raised("crash", "in a plain call", error, case)]
        return []


Check = Callable[[Candidate], Outcome]

CHECKS: dict[str, Check] = {}
"""The checks by their name, as `headoff.harness.checks.names` has them."""


def check(name: str) -> Callable[[Check], Check]:
    """Register the decorated check."""

    def register(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return register


def about(kind: Property, when: str, findings: Iterable[Finding]) -> list[Finding]:
    """`findings` as those of a check: `when` they occur stands first."""
    return [replace(one, property=kind, message=f"{when}, {one.message}") for one in findings]


def raised(kind: Property, when: str, error: BaseException, case: Case | str = "") -> Finding:
    return Finding(kind, f"{when} it raises {describe_exception(error)}", str(case))


def copied(tensors: Tensors) -> dict[str, Tensor]:
    """All tensors of a call but the gradient of the context, by name."""
    return {name: tensor for name, tensor in tensors.named().items() if name != "grad_context"}


def attend(attention: Any, tensors: Any, changed: dict[str, Tensor]) -> Tensor:
    """The context of `tensors` with some of them `changed`."""
    other = replace(tensors, **changed)
    return other.attend(attention, other.inputs)
