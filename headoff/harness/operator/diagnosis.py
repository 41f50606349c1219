"""Why single calls are wrong, as far as experiments show it: a named cause is a reproduced cause.

What numbers cannot explain is looked for first: results that differ from call to call, inputs that are written into.
Then a failing case is simplified, varied, and the patch is tried on the variants and on the suite's own small cases.
A fault is named if its reference (`known_faults`) gives the patch's wrong numbers, to its rounding, in every case that
fails, and is as right as the patch where the patch is right. Without a cause only that is said which holds in all cases
tried: what a case must have to fail, and which results are wrong.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import CallTensors, Results, call, context_alone, tensors_of
from headoff.harness.operator.cases import OperatorCase, operator_cases
from headoff.harness.operator.compare import (
    NAMES,
    WITHOUT_GRADIENTS,
    Comparison,
    allowed_for,
    compare,
    describe,
    operator_findings,
)
from headoff.harness.operator.conditions import CONDITIONS, Condition
from headoff.harness.operator.known_faults import Fault, backward_faults, fitted_faults, forward_faults
from headoff.harness.operator.reference import truth_for, truth_of
from headoff.harness.torch_settings import watched_settings

SIMPLER: tuple[dict[str, Any], ...] = (
    {"dtype": torch.float32},
    {"grad_context": "random"},
    {"wanted": "all"},
    {"layout": "contiguous"},
    {"inputs": "normal"},
    {"queries": 64, "keys": 64},
    *({"queries": size} for size in (64, 100, 200, 600)),
    *({"keys": size} for size in (64, 100, 200, 600)),
    {"channels": 32},
    {"mask": "none"},
    {"mask": "padding"},
    {"mask": "bias"},
    {"gate": "none"},
    {"gate": "first-1"},
    {"gate": "fractions"},
    {"batch": 1},
    {"heads": 4},
    {"heads": 2},
)
"""What a case is without one of its difficulties, in the order in which they are taken away."""

VARIANTS: tuple[dict[str, Any], ...] = (
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
      for kind in ("padding", "holes", "rows per item", "full", "bias", "bias and padding", "fully masked rows")),
    {"layout": "heads last"},
)  # fmt: skip
"""Cases beside the simplest one that fails: faults that agree on one of them differ on another."""

TRIED = 5
"""Failing cases, the smallest first, that are looked at in search of one whose context is wrong."""

SMALL = 8_000
"""Weights of the suite's own cases on which an explanation is tried."""

ROUNDINGS = 16.0
RESIDUAL = 0.02
EXACT = 2e-3
RESIDUAL_OF_ROUNDINGS = 0.2
"""A fault is reproduced where the patch is within the tolerance around its answer. The tolerance is that of the right
answer, and wrong ones may be more sensitive: so it is also reproduced if so little of the error is left (root mean
squares, `EXACT`), or `RESIDUAL` of it and no more than `ROUNDINGS` times what rounding the inputs changes. Faults that
are roundings are judged by what is left alone."""

PAIRS = 3
"""Failing cases that must be right without something before it is said that only with it they fail."""

CALLS = 4
"""Calls with the same inputs whose results are compared."""


@dataclass
class Observation:
    """What a patch does on a case: its `results`, and the names of those that are wrong (`excess` above 1)."""

    case: OperatorCase
    tensors: CallTensors
    results: Results
    excess: dict[str, float]

    @functools.cached_property
    def rounded(self) -> CallTensors:
        """The same call with its inputs changed by about one rounding."""
        generator = torch.Generator().manual_seed(0)

        def changed(tensor: Tensor) -> Tensor:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            return tensor * (1 + torch.finfo(self.case.dtype).eps * noise)

        exact = self.tensors.double()
        return replace(
            exact,
            query=changed(exact.query),
            key=changed(exact.key),
            value=changed(exact.value),
            grad_context=changed(exact.grad_context),
        )

    @property
    def fails(self) -> bool:
        return any(excess > 1 for excess in self.excess.values())


@dataclass
class Diagnosis:
    """What experiments show of a patch that is wrong.

    Args:
        wrong: the property that is.
        outputs: the results that are wrong in the simplest case: `context`, or names of gradients.
        causes: the faults that all failing cases agree with; two where they cannot be told apart, none if unknown.
        conditions: what a case must have to fail, in words.
        failing, tried: numbers of cases.
        case: the simplest that fails.
        details: error, tolerance and place in that case.
        without_gradients: whether it is so only where no gradient is asked for.
    """

    wrong: Property
    outputs: tuple[str, ...]
    causes: tuple[Fault, ...]
    conditions: tuple[str, ...]
    failing: int
    tried: int
    case: OperatorCase
    details: str
    without_gradients: bool = False

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
            text += f" ({self.failing} of {self.tried} cases tried)"
        return (
            f"{WITHOUT_GRADIENTS if self.without_gradients else ''}{text}; {self.details}; case {self.case}"
        )


def diagnose(
    attention: Attention, failed_cases: Sequence[OperatorCase], device: torch.device | str
) -> Finding | None:
    """Why `failed_cases` fail, as far as experiments show it.

    Returns:
        A finding whose message says it before the first "; ". None for no cases.
    """
    return Experiments(attention, torch.device(device)).explain(failed_cases)


@dataclass
class Experiments:
    """Calls of one attention on a device, which of them are right, and what follows from it."""

    attention: Attention
    device: torch.device
    diagnosis: Diagnosis | None = field(default=None, init=False)
    observed: dict[OperatorCase, Observation | None] = field(default_factory=dict, init=False)
    without_gradients: bool = field(default=False, init=False)

    def explain(self, failed_cases: Sequence[OperatorCase]) -> Finding | None:
        """See `diagnose`; the details are in `diagnosis` if numbers are what is wrong."""
        if not failed_cases:
            return None
        found = []
        for case in sorted(failed_cases, key=lambda case: case.weights)[:TRIED]:
            if findings := self._findings(case):
                found.append((case, findings[0]))
        if not found:
            what = f"fails among other calls and is right when called again, e.g. case {failed_cases[0]}"
            return Finding("state", what, str(failed_cases[0]))
        for _, first in found:
            if first.property in ("dtype", "shape", "in-place", "state"):
                return first
        # Gradients follow from a wrong context, and the way without gradients is often that with them.
        case, first = min(
            found, key=lambda each: (each[1].property in ("dq", "dk", "dv"), _is_without_gradients(each[1]))
        )
        if first.property == "crash":
            return next(iter(self._findings(self._simplest(case, "crash"))), first)
        self.without_gradients = _is_without_gradients(first)
        if unsteady := self._randomness(case) or self._state(case):
            return unsteady
        simplest = self._simplest(case, first.property)
        failed = [case for case, finding in found if finding.property != "crash"]
        return self._numbers(simplest, failed) or first

    # Calls

    def _findings(self, case: OperatorCase) -> list[Finding]:
        with watched_settings():
            findings = operator_findings(self.attention, case, self.device)
        if self.without_gradients:
            findings = [each for each in findings if _is_without_gradients(each)]
        return findings

    def _call(self, tensors: CallTensors, case: OperatorCase) -> Results:
        with watched_settings():
            if self.without_gradients:
                return {"context": context_alone(self.attention, tensors)}
            return call(self.attention, tensors, case.wanted)

    def _observe(self, case: OperatorCase) -> Observation | None:
        """None where the patch raises."""
        try:
            results = self._call(tensors_of(case, self.device), case)
            results = {name: tensor.detach().cpu().double() for name, tensor in results.items()}
        except Exception:
            return None
        truth, allowed = truth_of(case), allowed_for(case, self.device)
        excess = {
            name: _excess(
                compare(name, found, truth.values[name], truth.scales[name], allowed[name], case.dtype)
            )
            for name, found in results.items()
            if name in truth.values
        }
        return Observation(case, tensors_of(case), results, excess)

    def observe(self, case: OperatorCase) -> Observation | None:
        """The first call of a case, remembered."""
        if case not in self.observed:
            self.observed[case] = self._observe(case)
        return self.observed[case]

    # What numbers cannot explain

    def _randomness(self, case: OperatorCase) -> Finding | None:
        """Calls with the same inputs that are further apart than roundings could bring them."""
        one, *others = (self._call(tensors_of(case, self.device), case) for _ in range(CALLS))
        for name, other in itertools.product(one, others):
            if not self._is_same(name, one[name], other[name], case):
                message = f"{NAMES[name]} differs between two calls with the same inputs; case {case}"
                return Finding("randomness", message, str(case))
        return None

    def _is_same(self, name: str, one: Tensor, other: Tensor, case: OperatorCase) -> bool:
        """To the rounding of the case; what is not finite must be so in the same places."""
        if torch.equal(one, other):
            return True
        if not torch.equal(one.isfinite(), other.isfinite()):
            return False
        true, found = (each.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0) for each in (one, other))
        allowed = allowed_for(case, self.device)[name]
        return compare(name, found, true, _scale(case, name, true), allowed, case.dtype).is_right

    def _state(self, case: OperatorCase) -> Finding | None:
        """Whether the order of two calls decides which of them is right, in sizes that no call had before.

        At two sizes the second call follows the first, at two others it comes alone: smaller and larger ones in turn,
        so that no size explains it.
        """
        case = replace(case, batch=max(2, min(3, case.batch)), heads=min(4, case.heads))
        own: dict[str, Any] = {"seed": case.seed + 1}
        gate: dict[str, Any] = {"gate": "fractions" if case.gate == "none" else "none"}
        mask: dict[str, Any] = {"mask": "padding" if case.mask == "none" else "none"}
        orders: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
            (own, {}),
            ({}, own),
            ({}, gate),
            (gate, {}),
            (gate, {"gate": "per item"}),
            ({}, mask),
            (mask, {}),
        )
        for number, (first, second) in enumerate(orders):

            def wrong(fields: dict[str, Any], more: int, number: int = number) -> bool:
                sizes: dict[str, Any] = {"queries": 8 + number, "keys": 64 * number + more}
                return bool(self._findings(replace(case, **fields, **sizes)))

            if all(
                not wrong(first, more) and wrong(second, more) if is_after else not wrong(second, more)
                for more, is_after in ((16, True), (48, False), (64, True), (32, False))
            ):
                message = "right in the first call of its sizes, wrong after another call of the same sizes"
                return Finding("state", f"{message}; case {case}", str(case))
        return None

    def _unsteady(self) -> Finding | None:
        """Calls that are repeated after all others, and give something else."""
        for case, before in list(self.observed.items())[::-4]:
            again = self._observe(case)
            if before is None or again is None:
                continue
            for name, tensor in before.results.items():
                if not self._is_same(name, tensor, again.results[name], case):
                    message = f"{NAMES[name]} is another one after other calls, with the same inputs"
                    return Finding("state", f"{message}; case {case}", str(case))
        return None

    # Numbers

    def _simplest(self, case: OperatorCase, kind: Property) -> OperatorCase:
        """The simplest case that fails in the same `kind` of result as `case` does."""
        for plain in SIMPLER:
            if all(getattr(case, name) == value for name, value in plain.items()):
                continue
            if any(
                value > max(64, getattr(case, name))
                for name, value in plain.items()
                if name in ("queries", "keys")
            ):
                continue
            if "mask" in plain and case.mask in ("none", "padding") and plain["mask"] != "none":
                continue
            if "gate" in plain and case.gate in ("none", "first-1"):
                continue
            if case.wanted == "query is key" and ("queries" in plain) != ("keys" in plain):
                continue
            simpler = replace(case, **plain)
            if any(finding.property == kind for finding in self._findings(simpler)):
                case = simpler
        return case

    def _numbers(self, simplest: OperatorCase, failed: Sequence[OperatorCase]) -> Finding | None:
        family = [simplest, *failed]
        family += [replace(simplest, name="variant", **variant) for variant in VARIANTS]
        small = [case for case in operator_cases(simplest.dtype, simplest.seed + 1) if case.weights <= SMALL]
        family += small[::2]
        tried = [each for case in dict.fromkeys(family) if (each := self.observe(case)) is not None]
        outputs = self._outputs(tried)
        failing = [each for each in tried if any(each.excess.get(name, 0) > 1 for name in outputs)]
        if not failing:
            return None
        if unsteady := self._unsteady():
            return unsteady
        right = [each for each in tried if not each.fails]
        necessary = self._necessary(failing)
        causes, conditions = self._causes(failing, right, necessary, outputs)
        properties = {fault.property for fault in causes}
        if len(causes) > 2 or len(properties) > 1:
            causes = []
        if not causes:
            conditions = [condition for condition in necessary]
        apart = [each for each in failing if len(set(each.case.gradient_names.values())) == 3] or failing
        wrong_here = tuple(name for name in outputs if any(each.excess.get(name, 0) > 1 for each in apart))
        prop: Property = (
            causes[0].property
            if causes
            else next(iter(properties))
            if len(properties) == 1
            else self._property(wrong_here, conditions)
        )
        shown = next((each for each in failing if each.case == simplest), failing[0])
        name = max(wrong_here, key=lambda name: shown.excess.get(name, 0))
        case, truth = shown.case, truth_of(shown.case)
        comparison = compare(
            name,
            shown.results[name],
            truth.values[name],
            truth.scales[name],
            allowed_for(case, self.device)[name],
            case.dtype,
        )
        self.diagnosis = Diagnosis(
            prop,
            wrong_here,
            tuple(causes),
            tuple(condition.words for condition in conditions),
            len(failing),
            len(tried),
            case,
            describe(comparison, case.dtype),
            self.without_gradients,
        )
        error, budget = comparison.decisive
        return Finding(
            prop,
            self.diagnosis.message,
            str(case),
            error=error,
            budget=budget,
            site=case.site,
            head=comparison.place[1],
        )

    def _outputs(self, tried: Sequence[Observation]) -> tuple[str, ...]:
        """The context, if it is ever wrong; for gradients follow from it."""
        if any(each.excess.get("context", 0) > 1 for each in tried):
            return ("context",)
        return ("dq", "dk", "dv")

    def _property(self, outputs: Sequence[str], conditions: Sequence[Condition]) -> Property:
        if outputs == ("context",):
            return next((each.property for each in conditions if each.property), "context")
        if len(outputs) == 1:
            return outputs[0]  # type: ignore[return-value]
        return "softmax backward" if "dq" in outputs else "dk"

    def _necessary(self, failing: Sequence[Observation]) -> list[Condition]:
        """What all failing cases have, and without which they are right."""
        necessary: list[Condition] = []
        chosen = sorted(failing, key=lambda each: each.case.weights)[:PAIRS]
        for condition in CONDITIONS:
            if any(condition.words in special.implies for special in necessary):
                continue
            if all(condition.holds(each.tensors) for each in failing) and all(
                self._is_right_on(condition.without(each.tensors), each.case) for each in chosen
            ):
                necessary.append(condition)
        return necessary

    def _is_right_on(self, tensors: CallTensors, like: OperatorCase) -> bool:
        batch, heads, queries, channels = tensors.query.shape
        sizes: dict[str, Any] = {
            "batch": batch,
            "heads": heads,
            "queries": queries,
            "keys": tensors.key.shape[2],
            "channels": channels,
        }
        case = replace(like, **sizes)
        try:
            results = self._call(tensors, case)
        except Exception:
            return False
        truth, allowed = truth_for(tensors, case), allowed_for(like, self.device)
        if not any(bool(true.any()) for true in truth.values.values()):
            return False  # zeros prove nothing
        return all(
            compare(name, found, truth.values[name], truth.scales[name], allowed[name], case.dtype).is_right
            for name, found in results.items()
        )

    def _causes(
        self,
        failing: Sequence[Observation],
        right: Sequence[Observation],
        necessary: list[Condition],
        outputs: Sequence[str],
    ) -> tuple[list[Fault], list[Condition]]:
        """Faults that reproduce all failing cases, and the conditions under which a patch has them.

        Those that hold in all cases come before those that hold under conditions alone.
        """
        ordered = sorted(failing, key=lambda each: each.case.weights)
        dtype = ordered[0].case.dtype
        if outputs == ("context",):
            first = ordered[len(ordered) // 2]
            faults = [*forward_faults(dtype), *fitted_faults(first.results["context"], first.tensors)]
        else:
            faults = backward_faults(dtype)
        reproduced = [fault for fault in faults if all(self._reproduces(fault, each) for each in ordered)]
        everywhere, conditional = [], []
        for fault in reproduced:
            visible = [each for each in right if not self._is_right(fault, each)]
            if not visible:
                everywhere.append(fault)
            elif necessary and not any(
                all(condition.holds(each.tensors) for condition in necessary) for each in visible
            ):
                conditional.append(fault)
        return (everywhere, []) if everywhere else (conditional, necessary)

    def _reproduces(self, fault: Fault, observation: Observation) -> bool:
        case, truth = observation.case, truth_of(observation.case)
        answer = fault.answer(observation.tensors, case)
        for name, expected in answer.items():
            if name not in observation.results:
                continue
            found = observation.results[name]
            if not torch.equal(found.isnan(), expected.isnan()):
                return False
            found, expected = found.nan_to_num(0.0), expected.nan_to_num(0.0)
            true, scale = truth.values[name], truth.scales[name]
            if observation.excess[name] <= 1 and self._agree(name, expected, true, scale, case):
                continue  # the fault does not show in this result
            if self._agree(name, found, expected, _scale(case, name, expected), case):
                continue
            residual = _rms(found - expected) / max(_rms(found - true), 1e-300)
            if residual > (RESIDUAL_OF_ROUNDINGS if fault.is_rounding else RESIDUAL):
                return False
            moved = fault.answer(observation.rounded, case)[name].nan_to_num(0.0) - expected
            if (
                not fault.is_rounding
                and residual > EXACT
                and _largest(found - expected) > ROUNDINGS * _largest(moved)
            ):
                return False
        return True

    def _agree(self, name: str, found: Tensor, expected: Tensor, scale: Tensor, case: OperatorCase) -> bool:
        """To the tolerance of the case; what is smaller than any number of its dtype is zero."""
        found, expected = (
            torch.where(each.abs() < torch.finfo(case.dtype).tiny, 0.0, each) for each in (found, expected)
        )
        return compare(
            name, found, expected, scale, allowed_for(case, self.device)[name], case.dtype
        ).is_right

    def _is_right(self, fault: Fault, observation: Observation) -> bool:
        """Whether the fault does not show in this case."""
        case, truth = observation.case, truth_of(observation.case)
        return all(
            self._agree(name, answer, truth.values[name], 2 * truth.scales[name], case)
            for name, answer in fault.answer(observation.tensors, case).items()
            if name in truth.values
        )


def _excess(comparison: Comparison) -> float:
    """How many times as large as allowed the errors are; above 1 is wrong."""
    errors, allowed = comparison.errors, comparison.allowed
    return max(errors.largest / allowed.largest, errors.mean / allowed.mean)


def _is_without_gradients(finding: Finding) -> bool:
    return finding.message.startswith(WITHOUT_GRADIENTS)


def _scale(case: OperatorCase, name: str, answer: Tensor) -> Tensor:
    """How far rounding can move a wrong answer: as far as the right one, or as a sum of the answer's size."""
    return truth_of(case).scales[name].hypot(answer.square().mean(-1, keepdim=True).sqrt())


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def _rms(difference: Tensor) -> float:
    size = float(difference.square().mean().sqrt())
    return size if math.isfinite(size) else math.inf
