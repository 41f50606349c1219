"""Why single calls are wrong, as far as experiments show it: a named cause is a reproduced cause.

What numbers cannot explain is looked for first: results that differ from call to call, inputs that are written into.
Then a failing case is simplified, varied, and the patch is tried on the variants and on the suite's own small cases.
A fault is named if its reference (`known_faults`) gives the patch's wrong numbers, to its rounding, in every case that
fails, and is as right as the patch where the patch is right. Without a cause only that is said which holds in all cases
tried: what a case must have to fail, and which results are wrong.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import CallTensors, Results, call, context_alone, tensors_of
from headoff.harness.operator.cases import Case, Fields, OperatorCase, operator_cases
from headoff.harness.operator.compare import (
    NAMES,
    WITHOUT_GRADIENTS,
    Comparison,
    allowed_for,
    compare,
    comparisons,
    describe,
    misshapen,
    operator_findings,
)
from headoff.harness.operator.conditions import CONDITIONS, Condition
from headoff.harness.operator.known_faults import Fault, backward_faults, fitted_faults, forward_faults
from headoff.harness.operator.reference import truth_for, truth_of
from headoff.harness.operator.weights import KEYS, crossing, effective_weights, faulty_part, in_words
from headoff.harness.torch_settings import watched_settings

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

TRIED = 5
"""Failing cases, the smallest first, that are looked at in search of one whose context is wrong."""

SMALL = 8_000
"""Weights of the suite's own cases on which an explanation is tried."""

LARGEST = 500_000
"""Weights that a case has at most, unless it is one that failed."""

ROUNDINGS = 16.0
RESIDUAL = 0.02
EXACT = 2e-3
RESIDUAL_OF_ROUNDINGS = 0.2
"""A fault is reproduced where the patch is within the tolerance around its answer. The tolerance is that of the right
answer, and wrong ones may be more sensitive: so it is also reproduced if so little of the error is left (root mean
squares, `EXACT`), or `RESIDUAL` of it and no more than `ROUNDINGS` times what rounding the inputs changes. Faults that
are roundings are judged by what is left alone."""

PAIRS = 3
"""Failing cases that must be right without something before it is said that only with it they fail; and that must agree
in which part of the context is wrong."""

REPEATS = 3
"""How often a call is repeated with the same inputs."""


@dataclass
class Observation:
    """What a patch does on a case: its `results`, and how they compare with the truth."""

    case: OperatorCase
    tensors: CallTensors
    results: Results
    comparisons: dict[str, Comparison]

    @functools.cached_property
    def rounded(self) -> CallTensors:
        """The same call with its inputs changed by about one rounding."""
        generator = torch.Generator().manual_seed(0)
        exact = self.tensors.double()
        changed = {}
        for name in ("query", "key", "value", "grad_context"):
            tensor = getattr(exact, name)
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            changed[name] = tensor * (1 + torch.finfo(self.case.dtype).eps * noise)
        return replace(exact, **changed)

    def fails(self, outputs: Iterable[str] = NAMES) -> bool:
        """Whether any of these `outputs` is wrong."""
        return any(name in self.comparisons and not self.comparisons[name].is_right for name in outputs)


@dataclass
class Diagnosis:
    """What experiments show of a patch that is wrong.

    Args:
        wrong: the property that is.
        outputs: the results that are wrong: `context`, or names of gradients.
        causes: the faults that all failing cases agree with; two where they cannot be told apart, none if unknown.
        conditions: what a case must have to fail, in words.
        failing, tried: numbers of cases.
        case: the simplest that fails.
        details: error, tolerance and place in that case.
        without_gradients: whether it is so only where no gradient is asked for.
        measured: which part of the context is wrong, where there is no cause.
    """

    wrong: Property
    outputs: tuple[str, ...]
    causes: tuple[Any, ...]
    conditions: tuple[str, ...]
    failing: int
    tried: int
    case: Case
    details: str
    without_gradients: bool = False
    measured: str = ""

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

        def rank(pair: tuple[OperatorCase, Finding]) -> tuple[bool, bool]:
            """Gradients follow from a wrong context, and the way without gradients is often that with them."""
            return pair[1].property in ("dq", "dk", "dv"), _is_without_gradients(pair[1])

        case, first = min(found, key=rank)
        if first.property == "crash":
            return next(iter(self._findings(self._simplest(case, "crash"))), first)
        self.without_gradients = _is_without_gradients(first)
        if unsteady := self._unrepeated([case], REPEATS) or self._state(case):
            return unsteady
        simplest = self._simplest(case, first.property)
        failed = [case for case, finding in found if finding.property != "crash"]
        return self._numbers(simplest, failed) or first

    # Calls

    def _findings(self, case: OperatorCase) -> list[Finding]:
        with watched_settings():
            findings = operator_findings(self.attention, case, self.device)
        return [item for item in findings if _is_without_gradients(item) or not self.without_gradients]

    def _call(self, tensors: CallTensors, case: OperatorCase) -> Results:
        """Results on the CPU in float64; none where the patch raises, or gives something of another shape."""
        try:
            with watched_settings():
                if self.without_gradients:
                    results = {"context": context_alone(self.attention, tensors)}
                else:
                    results = call(self.attention, tensors, case.wanted)
        except Exception:
            return {}
        if misshapen(results["context"], case):
            return {}
        return {name: tensor.detach().cpu().double() for name, tensor in results.items()}

    def _observe(self, case: OperatorCase) -> Observation | None:
        results = self._call(tensors_of(case, self.device), case)
        if not results:
            return None
        compared = {item.name: item for item in comparisons(results, case, self.device)}
        return Observation(case, tensors_of(case), results, compared)

    def observe(self, case: OperatorCase) -> Observation | None:
        """The first call of a case, remembered; None where it gives nothing that can be compared."""
        if case not in self.observed:
            self.observed[case] = self._observe(case)
        return self.observed[case]

    # What numbers cannot explain

    def _unrepeated(self, cases: Sequence[OperatorCase], repeats: int) -> Finding | None:
        """A result that is another one when the first call of its case is repeated, by more than roundings.

        Random if calls differ that follow one another: of this case, or of the largest, which has most to be random in.
        """
        for case in cases:
            before = self.observe(case)
            for again in (self._observe(case) for _ in range(repeats)):
                if not (name := self._differing(before, again)):
                    continue
                largest = max(cases, key=lambda case: case.weights)
                pairs = ((self._observe(item), self._observe(item)) for item in (case, largest))
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
        return self._agree(name, again, result, _scale(one.case, name, result), one.case)

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

    def _simplest(self, case: OperatorCase, kind: Property) -> OperatorCase:
        """The simplest case that fails in the same `kind` of result as `case` does."""
        for group in SIMPLER:
            for plain in group:
                simpler = replace(case, **plain)
                grows = any(
                    getattr(simpler, n) > max(SIZES[0], getattr(case, n)) for n in ("queries", "keys")
                )
                if simpler == case or grows or simpler.weights > max(LARGEST, case.weights):
                    break
                if any(finding.property == kind for finding in self._findings(simpler)):
                    case = simpler
                    break
        return case

    def _numbers(self, simplest: OperatorCase, failed: Sequence[OperatorCase]) -> Finding | None:
        family = [simplest, *failed]
        variants = (replace(simplest, name="variant", **variant) for variant in VARIANTS)
        family += [case for case in variants if case.weights <= max(LARGEST, simplest.weights)]
        small = [case for case in operator_cases(simplest.dtype, simplest.seed + 1) if case.weights <= SMALL]
        family += small[::2]
        tried = [item for case in dict.fromkeys(family) if (item := self.observe(case)) is not None]
        # The context, if it is ever wrong; for gradients follow from it.
        outputs = ["context"] if any(item.fails(["context"]) for item in tried) else ["dq", "dk", "dv"]
        failing = sorted((item for item in tried if item.fails(outputs)), key=lambda item: item.case.weights)
        if not failing:
            return None
        if unsteady := self._unrepeated(list(self.observed)[::-4], 1):
            return unsteady
        conditions = self._necessary(failing)
        causes, only_with = self._causes(failing, [item for item in tried if not item.fails()], conditions)
        properties = {fault.property for fault in causes}
        if len(causes) > 2 or len(properties) > 1:
            causes = []
        apart = [item for item in failing if len(set(item.case.gradient_names.values())) == 3] or failing
        wrong = [name for name in outputs if any(item.fails([name]) for item in apart)]
        if causes:
            conditions = only_with
        kind = properties.pop() if len(properties) == 1 else _property(wrong, conditions)
        measured = self._measured(failing) if kind == "context" and not causes else ""
        shown = next((item for item in failing if item.case == simplest), failing[0])
        worst = max((shown.comparisons[name] for name in wrong if name in shown.comparisons),
                    key=lambda item: item.excess)  # fmt: skip
        self.diagnosis = Diagnosis(
            kind,
            tuple(wrong),
            tuple(causes),
            tuple(condition.words for condition in conditions),
            len(failing),
            len(tried),
            shown.case,
            describe(worst, shown.case),
            self.without_gradients,
            measured,
        )
        error, budget = worst.decisive
        return Finding(
            kind,
            self.diagnosis.message,
            str(shown.case),
            error=error,
            budget=budget,
            site=shown.case.site,
            head=worst.place[1],
        )

    def _measured(self, failing: Sequence[Observation]) -> str:
        """Which part of the context is wrong, where the simplest calls without a gate agree."""
        if not any(item.results["context"].isfinite().all() for item in failing):
            return "it has infinite numbers or NaN"
        measured, crossed = [], set()
        plain = [item for item in failing if item.case.gate == "none" and item.case.keys in KEYS]
        for item in plain[:PAIRS]:
            case, true = item.case, truth_of(item.case).values["context"]
            tensors = tensors_of(case, self.device)

            def context_of(tensors: CallTensors, case: OperatorCase = case) -> Tensor | None:
                return self._call(tensors, case).get("context")

            crossed.add(crossing(context_of, tensors, {"batch item": 0, "head": 1, "channel": 3}))
            weights = effective_weights(context_of, tensors)
            if weights is not None:
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
        results = self._call(tensors.on(self.device), case)
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
        if middle.fails(["context"]):
            faults = forward_faults(dtype)
            found = {"context": middle.results["context"]}
        else:
            faults = backward_faults(dtype)
            found = {name: result for name, result in middle.results.items() if middle.fails([name])}
        faults += fitted_faults(found, middle.tensors)
        everywhere, conditional = [], []
        for fault in faults:
            if not all(self._reproduces(fault, item) for item in failing):
                continue
            visible = [item for item in right if not self._is_right(fault, item)]
            if not visible:
                everywhere.append(fault)
            elif necessary and not any(
                all(condition.holds(item.tensors) for condition in necessary) for item in visible
            ):
                conditional.append(fault)
        return (everywhere, []) if everywhere else (conditional, necessary)

    def _reproduces(self, fault: Fault, observation: Observation) -> bool:
        """Whether the patch gives the answer of the fault; see `RESIDUAL`."""
        case, truth = observation.case, truth_of(observation.case)
        answer = fault.answer(observation.tensors, case)
        for name in answer.keys() & observation.comparisons.keys():
            found, expected, true = observation.results[name], answer[name], truth.values[name]
            if not torch.equal(found.isnan(), expected.isnan()):
                return False
            found, expected = found.nan_to_num(0.0), expected.nan_to_num(0.0)
            is_right = observation.comparisons[name].is_right
            if is_right and self._agree(name, expected, true, truth.scales[name], case):
                continue  # the fault does not show in this result
            if self._agree(name, found, expected, _scale(case, name, expected), case):
                continue
            residual = _rms(found - expected) / max(_rms(found - true), 1e-300)
            if residual > (RESIDUAL_OF_ROUNDINGS if fault.rounding else RESIDUAL):
                return False
            if not fault.rounding and residual > EXACT:
                moved = fault.answer(observation.rounded, case)[name].nan_to_num(0.0) - expected
                if float((found - expected).abs().max()) > ROUNDINGS * float(moved.abs().max()):
                    return False
        return True

    def _agree(self, name: str, found: Tensor, expected: Tensor, scale: Tensor, case: OperatorCase) -> bool:
        """To the tolerance of the case; what is smaller than any number of its dtype is zero."""
        found, expected = (
            torch.where(item.abs() < torch.finfo(case.dtype).tiny, 0.0, item) for item in (found, expected)
        )
        allowed = allowed_for(case, self.device)[name]
        return compare(name, found, expected, scale, allowed, case.dtype).is_right

    def _is_right(self, fault: Fault, observation: Observation) -> bool:
        """Whether the fault does not show in this case."""
        case, truth = observation.case, truth_of(observation.case)
        return all(
            self._agree(name, answer, truth.values[name], 2 * truth.scales[name], case)
            for name, answer in fault.answer(observation.tensors, case).items()
            if name in truth.values
        )


def _without_last_query(call: CallTensors) -> CallTensors:
    """With the same strides."""

    def cut(tensor: Tensor | None) -> Any:
        return tensor if tensor is None or tensor.shape[-2] == 1 else tensor[..., :-1, :]

    others = {name: cut(getattr(call, name)) for name in ("mask", "gate", "grad_context")}
    return replace(call, query=call.query[:, :, :-1], **others)


def _is_without_gradients(finding: Finding) -> bool:
    return finding.message.startswith(WITHOUT_GRADIENTS)


def _property(outputs: Sequence[str], conditions: Sequence[Condition]) -> Property:
    if outputs == ["context"]:
        return next((item.property for item in conditions if item.property), "context")
    if len(outputs) == 1:
        return outputs[0]  # type: ignore[return-value]
    return "softmax backward" if "dq" in outputs else "dk"


def _scale(case: OperatorCase, name: str, answer: Tensor) -> Tensor:
    """How far rounding can move a wrong answer: as far as the right one, or as a sum of the answer's size."""
    return truth_of(case).scales[name].hypot(answer.square().mean(-1, keepdim=True).sqrt())


def _rms(difference: Tensor) -> float:
    size = float(difference.square().mean().sqrt())
    return size if math.isfinite(size) else math.inf
