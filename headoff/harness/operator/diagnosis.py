"""Why single calls are wrong, as far as experiments show it: a named cause is a reproduced cause.

What numbers cannot explain is looked for first: results that differ from call to call, inputs that are written into.
Then a failing case is simplified, varied, and the patch is tried on the variants and on the suite's own small cases.
A fault is named if its reference (`known_faults`) gives the patch's wrong numbers, to its rounding, in every case that
fails, and is as right as the patch where the patch is right. Without a cause only that is said which holds in all cases
tried: what a case must have to fail, and which results are wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import CallTensors, tensors_of
from headoff.harness.operator.cases import Fields, OperatorCase
from headoff.harness.operator.compare import NAMES, allowed_for, compare, operator_findings
from headoff.harness.operator.conditions import CONDITIONS, Condition
from headoff.harness.operator.experiments import Diagnosis, Experiments, is_without_gradients, wrong_outputs
from headoff.harness.operator.fault import Fault
from headoff.harness.operator.known_faults import backward_faults, fitted_faults, forward_faults
from headoff.harness.operator.observation import Observation, results_of
from headoff.harness.operator.reference import truth_for, truth_of
from headoff.harness.operator.variants import beside, simplest
from headoff.harness.operator.weights import KEYS, crossing, effective_weights, faulty_part, in_words

ROUNDINGS = 16.0
RESIDUAL = 0.02
EXACT = 2e-3
"""Of an error so little may be left by the fault that is its cause: `EXACT`, or `RESIDUAL` and no more than `ROUNDINGS`
times what rounding the inputs changes."""

PAIRS = 3
"""Failing cases that must be right without something before it is said that only with it they fail; and that must agree
in which part of the context is wrong."""

REPEATS = 3
"""How often a call is repeated with the same inputs."""


def diagnose(
    attention: Attention, failed_cases: Sequence[OperatorCase], device: torch.device | str
) -> Finding | None:
    """See `Experiments.explain`."""
    return OperatorExperiments(attention, torch.device(device)).explain(failed_cases)


@dataclass
class OperatorExperiments(Experiments[OperatorCase]):
    """What a patch gives for simpler cases, for variants of them, and for the same calls once more."""

    tried = 5
    summed = -1

    def explained(self, found: Sequence[tuple[OperatorCase, Finding]]) -> Finding:
        def rank(pair: tuple[OperatorCase, Finding]) -> tuple[bool, bool]:
            """Gradients follow from a wrong context, and the way without gradients is often that with them."""
            return pair[1].property in ("dq", "dk", "dv"), is_without_gradients(pair[1])

        case, first = min(found, key=rank)
        if first.property == "crash":
            return next(iter(self._findings(self._simplest(case, "crash"))), first)
        self.without_gradients = is_without_gradients(first)
        if unsteady := self._unrepeated([case], REPEATS) or self._state(case):
            return unsteady
        failed = [case for case, finding in found if finding.property != "crash"]
        return self._numbers(self._simplest(case, first.property), failed) or first

    def _findings(self, case: OperatorCase) -> list[Finding]:
        findings = operator_findings(self.attention, case, self.device)
        return [item for item in findings if is_without_gradients(item) or not self.without_gradients]

    def _simplest(self, case: OperatorCase, kind: Property) -> OperatorCase:
        """The simplest case that fails in the same `kind` of result as `case` does."""
        return simplest(
            case, lambda simpler: any(found.property == kind for found in self._findings(simpler))
        )

    # What numbers cannot explain

    def _unrepeated(self, cases: Sequence[OperatorCase], repeats: int) -> Finding | None:
        """A result that is another one when the first call of its case is repeated, by more than roundings.

        Random if calls differ that follow one another: of this case, or of the largest, which has most to be random in.
        """
        for case in cases:
            before = self.observe(case)
            for again in (self.observe_again(case) for _ in range(repeats)):
                if not (name := self._differing(before, again)):
                    continue
                largest = max(cases, key=lambda case: case.weights)
                pairs = ((self.observe_again(item), self.observe_again(item)) for item in (case, largest))
                is_random = any(self._differing(*pair) for pair in pairs)
                when = "between two calls" if is_random else "after other calls,"
                message = f"{NAMES[name]} differs {when} with the same inputs; case {case}"
                return Finding("randomness" if is_random else "state", message, str(case))
        return None

    def _differing(self, one: Observation | None, other: Observation | None) -> str | None:
        """The name of the first result that differs between two observations of a case."""
        if one is None or other is None:
            return None
        names = (name for name in one.results if not self._is_same(name, one, other))
        return next(names, None)

    def _is_same(self, name: str, one: Observation, other: Observation) -> bool:
        """To the rounding of the case; what is not finite must be so in the same places."""
        result, again = one.results[name], other.results[name]
        if not torch.equal(result.isfinite(), again.isfinite()):
            return False
        result, again = (item.nan_to_num(0.0, 0.0, 0.0) for item in (result, again))
        return self.agree(name, again, result, self.scale(name, result, one.case), one.case)

    def _state(self, case: OperatorCase) -> Finding | None:
        """Whether the order of two calls decides which of them is right, in sizes that no call had before.

        The second is wrong after the first, and right without its last query: of another size, and otherwise the same.
        """
        case = replace(case, batch=max(2, min(3, case.batch)), heads=min(4, case.heads))
        seed = replace(case, seed=case.seed + 1)
        gate = replace(case, gate="fractions" if case.gate == "none" else "none")
        mask = replace(case, mask="padding" if case.mask == "none" else "none")
        orders = [(one, other) for item in (seed, gate, mask) for one, other in ((item, case), (case, item))]
        for number, (first, second) in enumerate([*orders, (gate, replace(gate, gate="per item"))]):
            sizes: list[Fields] = [
                {"queries": q + number, "keys": k + 64 * number} for q, k in ((8, 16), (31, 48))
            ]
            if all(
                not self._findings(replace(first, **fields))
                and self._findings(wrong := replace(second, **fields))
                and self._is_right_on(_without_last_query(tensors_of(wrong)), wrong)
                for fields in sizes
            ):
                message = "right in the first call of its sizes, wrong after another call of the same sizes"
                return Finding("state", f"{message}; case {case}", str(case))
        return None

    # Numbers

    def _numbers(self, simplest: OperatorCase, failed: Sequence[OperatorCase]) -> Finding | None:
        tried = self.observe_all([simplest, *failed, *beside(simplest)])
        outputs, failing = wrong_outputs(tried)
        if not failing:
            return None
        failing.sort(key=lambda item: item.case.weights)
        if unsteady := self._unrepeated(list(self.observed)[::-4], 1):
            return unsteady
        conditions = self._necessary(failing)
        causes, only_with = self._causes(failing, [item for item in tried if not item.fails()], conditions)
        properties = {fault.property for fault in causes}
        if len(causes) > 2 or len(properties) > 1:
            causes = []
        apart = [item for item in failing if len(set(item.case.gradient_names.values())) == 3] or failing
        wrong = tuple(name for name in outputs if any(item.fails([name]) for item in apart))
        if causes:
            conditions = only_with
        kind = properties.pop() if len(properties) == 1 else _property(wrong, conditions)
        self.diagnosis = Diagnosis(
            kind,
            wrong,
            tuple(causes),
            tuple(condition.words for condition in conditions),
            len(failing),
            len(tried),
            next((item for item in failing if item.case == simplest), failing[0]),
            self.without_gradients,
            self._measured(failing) if kind == "context" and not causes else "",
        )
        return self.diagnosis.finding

    def _measured(self, failing: Sequence[Observation]) -> str:
        """Which part of the context is wrong, where the simplest calls without a gate agree."""
        if not any(item.results["context"].isfinite().all() for item in failing):
            return "it has infinite numbers or NaN"
        measured, crossed = [], set()
        plain = [item for item in failing if item.case.gate == "none" and item.case.keys in KEYS]
        for item in plain[:PAIRS]:
            context_of, tensors = self.context_of(item.case), tensors_of(item.case, self.device)
            crossed.add(crossing(context_of, tensors, {"batch item": 0, "head": 1, "channel": 3}))
            weights = effective_weights(context_of, tensors)
            if weights is not None:
                true = truth_of(item.case).values["context"]
                measured.append(faulty_part(weights, item.tensors, item.results["context"], true))
        return in_words(measured) or (crossed.pop() if len(crossed) == 1 else "")

    def _necessary(self, failing: Sequence[Observation]) -> list[Condition]:
        """What all failing cases have, and without which the smallest of them are right."""
        necessary: list[Condition] = []
        # Where only unusual numbers are wrong, a size may matter by what it makes of them.
        is_unusual = all(item.case.inputs != "normal" for item in failing)
        for condition in CONDITIONS:
            barely = condition.barely
            if (
                not (is_unusual and condition.property == "sizes")
                and not any(condition.words in special.implies for special in necessary)
                # A call of another size has other strides.
                and not (condition.property in ("sizes", None) and any(x.property == "layout" for x in necessary))
                and all(condition.holds(item.tensors) for item in failing)
                and all(
                    self._is_right_on(without(item.tensors), item.case)
                    for item in failing[:PAIRS]
                    for without in condition.without
                )
                # What grows with a size has no size from which on it is wrong.
                and not (barely and all(self._is_right_on(barely(x.tensors), x.case) for x in failing[:PAIRS]))
            ):  # fmt: skip
                necessary.append(condition)
        return necessary

    def _is_right_on(self, tensors: CallTensors, like: OperatorCase) -> bool:
        """Whether the patch is right on `tensors`, within the tolerance of the case that they were made from."""
        batch, heads, queries, channels = tensors.query.shape
        keys = tensors.key.shape[2]
        case = replace(like, batch=batch, heads=heads, queries=queries, keys=keys, channels=channels)
        truth, allowed = truth_for(tensors, case), allowed_for(like, self.device)
        if truth.values.keys() != allowed.keys() or not any(bool(x.any()) for x in truth.values.values()):
            return False  # inputs that are no longer one tensor, and zeros, prove nothing
        results = results_of(self.attention, tensors.on(self.device), case, self.without_gradients)
        return bool(results) and all(
            compare(name, result, truth.values[name], truth.scales[name], allowed[name], case.dtype).is_right
            for name, result in results.items()
        )

    def _causes(
        self, failing: Sequence[Observation], right: Sequence[Observation], necessary: list[Condition]
    ) -> tuple[list[Fault], list[Condition]]:
        """Faults that reproduce all failing cases, and the conditions under which a patch has them.

        Those that hold in all cases come before those that hold under conditions alone.
        """
        middle = failing[len(failing) // 2]
        dtype = middle.case.dtype
        faults: list[Fault]
        if middle.fails(["context"]):
            faults = [*forward_faults(dtype)]
            found = {"context": middle.results["context"]}
        else:
            faults = [*backward_faults(dtype)]
            found = {name: result for name, result in middle.results.items() if middle.fails([name])}
        faults += fitted_faults(found, middle.tensors)
        everywhere, conditional = [], []
        for fault in faults:
            if not all(self.reproduces(fault, item) for item in failing):
                continue
            visible = [item for item in right if not self._is_right(fault, item)]
            if not visible:
                everywhere.append(fault)
            elif necessary and not any(
                all(condition.holds(item.tensors) for condition in necessary) for item in visible
            ):
                conditional.append(fault)
        return (everywhere, []) if everywhere else (conditional, necessary)

    def may_be_left(
        self, share: float, name: str, fault: Fault, observation: Observation, expected: Tensor
    ) -> bool:
        """See `RESIDUAL`."""
        if share > RESIDUAL:
            return False
        if not share > EXACT:
            return True
        rest = observation.results[name].nan_to_num(0.0) - expected
        moved = fault.answer(observation.rounded, observation.case)[name].nan_to_num(0.0) - expected
        return not float(rest.abs().max()) > ROUNDINGS * float(moved.abs().max())

    def _is_right(self, fault: Fault, observation: Observation) -> bool:
        """Whether the fault does not show in this case."""
        case, truth = observation.case, truth_of(observation.case)
        return all(
            self.agree(name, answer, truth.values[name], 2 * truth.scales[name], case)
            for name, answer in fault.answer(observation.tensors, case).items()
            if name in truth.values
        )


def _without_last_query(call: CallTensors) -> CallTensors:
    """With the same strides."""

    def cut(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or tensor.shape[-2] == 1 else tensor[..., :-1, :]

    others = {name: cut(getattr(call, name)) for name in ("mask", "gate", "grad_context")}
    return replace(call, query=call.query[:, :, :-1], **others)


def _property(outputs: Sequence[str], conditions: Sequence[Condition]) -> Property:
    if list(outputs) == ["context"]:
        return next((item.property for item in conditions if item.property), "context")
    if len(outputs) == 1:
        return outputs[0]  # type: ignore[return-value]
    return "softmax backward" if "dq" in outputs else "dk"
