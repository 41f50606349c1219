"""Which property a wrong attention lacks: controlled experiments, from a case that fails to the simplest that does.

A failing case has several difficulties at once. They are taken away one at a time, and whatever still fails without one
goes on without it: what remains is what it takes to fail. Then the wrong answer of that simplest case is held against
those of known faults (`hypotheses`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import Results, call, tensors_of
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.compare import (
    NAMES,
    WITHOUT_GRADIENTS,
    Comparison,
    allowed_for,
    compare,
    comparisons,
    describe,
    operator_findings,
)
from headoff.harness.operator.known_faults import explanation_of, factor_of
from headoff.harness.operator.reference import truth_of

SIMPLER: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dtype", {"dtype": torch.float32}),
    ("gradient of the context", {"grad_context": "random"}),
    ("wanted", {"wanted": "all"}),
    ("layout", {"layout": "contiguous"}),
    ("inputs", {"inputs": "normal"}),
    ("sizes", {"queries": 64, "keys": 64}),
    ("queries", {"queries": 64}),
    ("keys", {"keys": 64}),
    ("channels", {"channels": 32}),
    ("mask", {"mask": "none"}),
    ("mask", {"mask": "padding"}),
    ("mask", {"mask": "bias"}),
    ("gate", {"gate": "none"}),
    ("gate", {"gate": "first-1"}),
    ("gate", {"gate": "fractions"}),
    ("batch", {"batch": 1}),
    ("heads", {"heads": 4}),
)
"""Difficulties and what a case is without them, in the order in which they are taken away."""

TRIED = 5
"""Failing cases, the smallest first, that are looked at in search of one whose context is wrong."""

NEW = 192
"""Rows and keys more than a case has: a number that divides as most blocks do, for the tail is to stay the same."""

KINDS: dict[str, Property] = {"context": "context", "dq": "dq", "dk": "dk", "dv": "dv"}

CALLS = 4
"""Calls with the same inputs whose results are compared."""

LOWER = (torch.float32, torch.float16, torch.bfloat16)


def diagnose(
    attention: Attention, failed_cases: Sequence[OperatorCase], device: torch.device | str
) -> Finding | None:
    """The root of the failures of `failed_cases`: a property, and a sentence on where, by how much and how.

    None for no cases.
    """
    device = torch.device(device)
    if not failed_cases:
        return None
    found = []
    for case in sorted(failed_cases, key=lambda case: case.weights)[:TRIED]:
        findings = operator_findings(attention, case, device)
        if findings:
            found.append((case, findings))
    if not found:
        return Finding(
            "state",
            f"fails among other calls and is right when called again, e.g. case {failed_cases[0]}",
            str(failed_cases[0]),
        )
    # A context that is wrong is the root of gradients that are; and one that is wrong either way, of one that is
    # wrong without gradients.
    case, findings = min(
        found, key=lambda each: (each[1][0].property in ("dq", "dk", "dv"), _is_without_gradients(each[1][0]))
    )
    first = findings[0]
    if first.property in ("dtype", "shape", "in-place"):
        return first
    without = _is_without_gradients(first)
    if without:
        attention = _without_gradients(attention)
    if first.property != "crash" and (random := random_results(attention, case, device)):
        return random
    if first.property != "crash" and depends_on_calls_before(attention, case, device):
        message = (
            f"wrong after another call of the same sizes, right in the first of its sizes; {first.message}"
        )
        return replace(first, property="state", message=message)
    simplest = simplify(attention, case, first.property, device)
    if first.property == "crash":
        return next(iter(operator_findings(attention, simplest, device)), first)
    root = _explain(attention, simplest, device)
    return replace(root, message=WITHOUT_GRADIENTS + root.message) if without else root


def _is_without_gradients(finding: Finding) -> bool:
    return finding.message.startswith(WITHOUT_GRADIENTS)


def _without_gradients(attention: Attention) -> Attention:
    """What `attention` does where no gradient is asked for, whether one is or not."""

    def alone(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        with torch.no_grad():
            query, key, value = query.detach(), key.detach(), value.detach()
            return attention(query, key, value, attn_mask, head_gate=head_gate)

    return alone


def random_results(attention: Attention, case: OperatorCase, device: torch.device) -> Finding | None:
    """Calls with the same inputs that are further apart than roundings could bring them."""
    one, *others = (call(attention, tensors_of(case, device), case.wanted) for _ in range(CALLS))
    truth, allowed = truth_of(case), allowed_for(case, device)
    for name, other in itertools.product(one, others):
        first = one[name]
        # What is not finite has no distance.
        if torch.equal(first.isfinite(), other[name].isfinite()):
            true, found = (each.detach().cpu().double().nan_to_num() for each in (first, other[name]))
            apart = compare(name, found, true, truth.scales[name], allowed[name], case.dtype)
            if apart.is_right:
                continue
        return Finding(
            "randomness",
            f"{NAMES[name]} differs between two calls with the same inputs; case {case}",
            str(case),
        )
    return None


def depends_on_calls_before(attention: Attention, case: OperatorCase, device: torch.device) -> bool:
    """Whether a call with other inputs is right in sizes that are new, and wrong after one of the same sizes.

    Of sizes that no case has: what a patch may have kept of the calls before does not fit them.
    """
    other_gate = "fractions" if case.gate == "none" else "none"
    for gate in (case.gate, other_gate):
        first = replace(case, keys=case.keys + NEW, queries=case.queries + NEW)
        second = replace(first, seed=case.seed + 1, gate=gate)
        elsewhere = replace(second, keys=second.keys + NEW, queries=second.queries + NEW)
        if (
            not operator_findings(attention, first, device)
            and operator_findings(attention, second, device)
            and not operator_findings(attention, elsewhere, device)
        ):
            return True
    return False


def simplify(attention: Attention, case: OperatorCase, kind: Property, device: torch.device) -> OperatorCase:
    """The simplest case that fails in the same `kind` of result as `case` does."""
    for _, plain in SIMPLER:
        if all(getattr(case, field) == value for field, value in plain.items()):
            continue
        if "mask" in plain and case.mask in ("none", "padding") and plain["mask"] != "none":
            continue
        if "gate" in plain and case.gate in ("none", "first-1"):
            continue
        if case.wanted == "query is key" and ("queries" in plain) != ("keys" in plain):
            continue
        simpler = replace(case, **plain)
        if any(finding.property == kind for finding in operator_findings(attention, simpler, device)):
            case = simpler
    return case


def _explain(attention: Attention, case: OperatorCase, device: torch.device) -> Finding:
    results = call(attention, tensors_of(case, device), case.wanted)
    wrong = [comparison for comparison in comparisons(results, case, device) if not comparison.is_right]
    if not wrong:
        return Finding(
            "state", f"fails in one call and not in the next, with the same inputs; case {case}", str(case)
        )
    first = wrong[0]
    prop, clause = (
        _of_context(results, case, device) if first.name == "context" else _of_gradients(results, wrong, case)
    )
    message = f"{clause}; {describe(first, case.dtype)}; case {case}"
    by_largest = first.errors.largest > first.allowed.largest
    return Finding(
        prop,
        message,
        str(case),
        error=first.errors.largest if by_largest else first.errors.mean,
        budget=first.allowed.largest if by_largest else first.allowed.mean,
        site=case.site,
        head=first.place[1],
    )


def _of_context(results: Results, case: OperatorCase, device: torch.device) -> tuple[Property, str]:
    context, true = results["context"], truth_of(case).values["context"]
    if explanation := explanation_of(context, case):
        return explanation
    if case.gate == "none" and (factor := factor_of(context, true)):
        return "softmax", f"weights do not add up to 1: the context is {factor:.6g} times the true one"
    if case.mask != "none":
        where = " in rows without keys" if "fully masked" in case.mask or case.mask == "all masked" else ""
        return "mask", f"the context is wrong only with a mask ({case.mask}){where}"
    if case.gate != "none":
        return "gate", f"the context is wrong only with a gate ({case.gate})"
    if dtype := _like_lower_precision(results, case, device):
        return "precision", f"the context has the errors of {dtype} inside"
    return _remaining(case, "the context is") or ("context", "the context is wrong, in all cases")


def _remaining(case: OperatorCase, what: str) -> tuple[Property, str] | None:
    """Put down to what is not plain about a case. `what`: with its verb."""
    if case.layout != "contiguous":
        return "layout", f"{what} wrong only where query, key and value are not contiguous ({case.layout})"
    if case.grad_context != "random":
        return (
            "layout",
            f"{what} wrong only where the context's gradient comes in other strides ({case.grad_context})",
        )
    if case.wanted != "all":
        return "softmax backward", f"{what} wrong only where the gradient of {case.wanted} alone is wanted"
    if case.inputs != "normal":
        return "softmax", f"{what} wrong only with {case.inputs} inputs"
    if case.batch > 1:
        return "layout", f"{what} wrong only with more than one batch item"
    sizes = [
        f"{number} {name}"
        for name, number, usual in (
            ("queries", case.queries, 64),
            ("keys", case.keys, 64),
            ("channels", case.channels, 32),
            ("heads", case.heads, 4),
        )
        if number != usual
    ]
    if sizes:
        return "sizes", f"{what} wrong with {', '.join(sizes)}, and right where these are 64, 64, 32 and 4"
    if case.dtype != torch.float32:
        return "precision", f"{what} wrong only in {str(case.dtype).removeprefix('torch.')}"
    return None


def _of_gradients(results: Results, wrong: list[Comparison], case: OperatorCase) -> tuple[Property, str]:
    names = [comparison.name for comparison in wrong]
    what = NAMES[names[0]] if len(names) == 1 else " and ".join(names)
    prop: Property = "softmax backward" if set(names) == {"dq", "dk"} else KINDS[names[0]]
    clauses = []
    for name in names:
        if (factor := factor_of(results[name], truth_of(case).values[name])) is not None:
            clauses.append(f"{name} is {f'{factor:.6g} times the true one' if factor else 'zero'}")
    if len(names) == 3:
        prop = "softmax backward"
    if clauses:
        return prop, f"the context is right, {' and '.join(clauses)}"
    if case.gate != "none":
        return prop, f"the context is right, {what} wrong, only with a gate ({case.gate})"
    if case.mask != "none":
        return prop, f"the context is right, {what} wrong, only with a mask ({case.mask})"
    remaining = _remaining(case, f"{what} {'is' if len(names) == 1 else 'are'}")
    if remaining and remaining[0] in ("layout", "sizes"):
        return remaining[0], f"the context is right, {remaining[1]}"
    return prop, f"the context is right, {what} wrong" + (f" ({remaining[1]})" if remaining else "")


def _like_lower_precision(results: Results, case: OperatorCase, device: torch.device) -> str | None:
    """The dtype whose errors the context has, the nearest within a factor of 8 either way; None where there is none."""
    truth = truth_of(case).values["context"]
    error = _mean(results["context"], truth)
    nearest: tuple[float, str] | None = None
    for dtype in LOWER:
        if torch.finfo(dtype).eps <= torch.finfo(case.dtype).eps:
            continue
        # Of inputs that are rounded to the lower dtype, which is what an attention does that casts them.
        lower = _mean(call(eager, tensors_of(replace(case, dtype=dtype), device))["context"], truth)
        apart = abs(math.log(error / lower)) if 0 < error < math.inf and lower > 0 else math.inf
        if apart < math.log(8) and (nearest is None or apart < nearest[0]):
            nearest = apart, str(dtype).removeprefix("torch.")
    return None if nearest is None else nearest[1]


def _mean(found: Tensor, true: Tensor) -> float:
    return float((found.detach().cpu().double() - true).square().mean().sqrt())
