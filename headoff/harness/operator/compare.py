"""Whether an attention's context and gradients are right on one case, and how far they may be from the truth.

An error is the difference from the truth in units of eps(dtype) times the element's scale (`reference`). Two numbers
are compared for each tensor: the largest error, and the largest root mean square over the elements of one head of one
batch item, which shows a bias that is too small for any single element. Both may be a small factor of what the standard
formulations of attention have in the same case, in its dtype, on the device under test, plus a floor of a few
roundings, because they may be exact by luck. `mutations` shows that this is small enough.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding
from headoff.harness.forward_only import is_forward_only
from headoff.harness.operator.call import Results, Tensors, call, context_alone, tensors_of
from headoff.harness.operator.cases import Case, OperatorCase
from headoff.harness.operator.masks import unusual_mask
from headoff.harness.operator.reference import Truth, truth_of
from headoff.harness.reference.implementations import STANDARD
from headoff.harness.tolerance import allowed_error, relative_error
from headoff.harness.torch_settings import watched_settings

FLOOR_LARGEST = 2.0
FLOOR_MEAN = 0.5
"""Errors that are allowed even where the standard formulations have none."""

LARGE = 500_000
"""Attention weights from which on a case has so many elements that eager alone stands for all formulations."""

NAMES: dict[str, str] = {
    "context": "the context",
    "dq": "the gradient of the query",
    "dk": "the gradient of the key",
    "dv": "the gradient of the value",
    "dlocations": "the gradient of the sampling locations",
    "dweights": "the gradient of the attention weights",
}

WITHOUT_GRADIENTS = "without gradients (torch.no_grad), "
"""Begins the message of a finding that occurs only where no gradient is asked for."""

Note = Callable[[str, str], None]
"""Takes what an attention does not support, and why."""


@dataclass(frozen=True)
class Errors:
    """Of one tensor: the `largest` error, and the largest `mean` (root mean square) of any head of any batch item."""

    largest: float
    mean: float


@dataclass(frozen=True)
class Comparison:
    """One tensor of a case compared with its truth: errors, what is allowed, the place (b, h, t, d) of the worst."""

    name: str
    errors: Errors
    allowed: Errors
    place: tuple[int, ...]
    found: float
    true: float

    @property
    def excess(self) -> float:
        """How many times as large as allowed the errors are."""
        return max(self.errors.largest / self.allowed.largest, self.errors.mean / self.allowed.mean)

    @property
    def is_right(self) -> bool:
        return self.excess <= 1

    @property
    def decisive(self) -> tuple[float, float]:
        """Error and allowed error: the largest if that is too large, else the mean."""
        if self.errors.largest > self.allowed.largest:
            return self.errors.largest, self.allowed.largest
        return self.errors.mean, self.allowed.mean


def operator_findings(
    attention: Any, case: Case, device: torch.device | str, not_supported: Note | None = None
) -> list[Finding]:
    """What is wrong with `attention` on `case`: nothing where it is right.

    It is called with gradients and without, because these are often two kernels; one whose forward pass alone is under
    test is called in inference mode and under `torch.no_grad`. A wrong context is the only finding,
    because gradients follow from it; so is an input that was written into.

    Args:
        attention: the callable under test.
        case: what to call it with.
        device: where.
        not_supported: called with a kind of mask that the model never makes and that the attention raises on. That is
            no finding.
    """
    device = torch.device(device)
    # Settings are watched at every call, because a patch may change them at its first call alone.
    with watched_settings() as changes:
        findings = _findings_with_and_without_gradients(attention, case, device)
        if (
            findings
            and findings[0].property == "crash"
            and (reason := unsupported_input(attention, case, device))
        ):
            findings = []
            if not_supported is not None:
                not_supported(*reason)
    return [Finding("state", f"a call changes {change}", str(case)) for change in changes] + findings


def _findings_with_and_without_gradients(attention: Any, case: Case, device: torch.device) -> list[Finding]:
    tensors = tensors_of(case, device)
    before = contents_of(tensors)

    def attempt(attend: Callable[[], Results], right: Tensor | None = None) -> tuple[Results, list[Finding]]:
        """Results, and what is wrong with them; `right` is a context that is known to be right."""
        try:
            results = attend()
        except Exception as error:
            message = f"raises {describe_exception(error)}; case {case}"
            return {}, [Finding("crash", message, str(case), site=case.site)]
        if written := overwritten(tensors, before):
            return {}, [Finding("in-place", f"a call writes into the {written}; case {case}", str(case))]
        if right is not None and _equal(results["context"], right):
            return results, []
        return results, findings_of(results, case, device)

    # Gradients of one whose forward pass alone is under test would be the formula's.
    forward_only = is_forward_only(attention)
    results, findings = attempt(
        lambda: (
            {"context": _in_inference_mode(attention, tensors)}
            if forward_only
            else call(attention, tensors, case.wanted)
        )
    )
    if findings:
        return findings
    right = results["context"].detach()
    _, findings = attempt(lambda: {"context": context_alone(attention, tensors)}, right)
    return [replace(finding, message=WITHOUT_GRADIENTS + finding.message) for finding in findings]


def _in_inference_mode(attention: Any, tensors: Tensors) -> Tensor:
    """The context, as a tensor that can be used outside of inference mode."""
    with torch.inference_mode():
        context = tensors.attend(attention, tensors.inputs)
    return context.clone() if isinstance(context, Tensor) else context


def _equal(found: object, right: Tensor) -> bool:
    return (
        isinstance(found, Tensor)
        and (found.dtype, found.device) == (right.dtype, right.device)
        and torch.equal(found, right)
    )


def unsupported_input(attention: Any, case: Case, device: torch.device | str) -> tuple[str, str] | None:
    """A kind of input that no model makes and that `attention` raises on, and what it raises; else None.

    A mask only where the case without it does not raise: the exception is about the mask then.
    """
    kind = case.may_be_rejected
    if isinstance(case, OperatorCase):
        kind = unusual_mask(tensors_of(case).mask)
        if kind is not None and _raised(attention, replace(case, mask="none"), device):
            return None
    if kind is None:
        return None
    reason = _raised(attention, case, device)
    return (kind, reason) if reason else None


PLAIN = OperatorCase(name="plain", queries=64, keys=64, heads=2)


def unsupported_dtype(
    attention: Any, dtype: torch.dtype, device: torch.device | str, plain: Case = PLAIN
) -> str | None:
    """What `attention` raises for the `plain` case in `dtype`; None where it takes the dtype.

    An attention need not support dtypes that nobody asked for.
    """
    return _raised(attention, replace(plain, dtype=dtype), device)


def _raised(attention: Any, case: Case, device: torch.device | str) -> str | None:
    try:
        call(attention, tensors_of(case, device), case.wanted)
        context_alone(attention, tensors_of(case, device))
    except Exception as error:
        return describe_exception(error)
    return None


def contents_of(tensors: Tensors) -> dict[str, tuple[Tensor, int]]:
    """A copy of the memory of each tensor, and how often it was written into; for `overwritten`."""
    return {name: (_memory_of(tensor).clone(), tensor._version) for name, tensor in tensors.named().items()}


def overwritten(tensors: Tensors, before: Mapping[str, tuple[Tensor, int]]) -> str | None:
    """The name of the first tensor that was written into since `before`, even if that was undone."""
    for name, tensor in tensors.named().items():
        memory, version = before[name]
        if tensor._version != version or not torch.equal(_memory_of(tensor), memory):
            return name
    return None


def _memory_of(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage, including those between and around its elements."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def findings_of(results: Results, case: Case, device: torch.device) -> list[Finding]:
    """What is wrong with the `results` of a call, which may be the context alone: shape and dtype, then numbers."""
    if found := misshapen(results["context"], case):
        return [found]
    wrong = [comparison for comparison in comparisons(results, case, device) if not comparison.is_right]
    if wrong and wrong[0].name == "context":
        wrong = wrong[:1]
    return [_finding(comparison, case) for comparison in wrong]


def misshapen(context: object, case: Case) -> Finding | None:
    """A finding for a context that is no tensor, or of another shape or dtype than the contract's."""
    if not isinstance(context, Tensor):
        return Finding("shape", f"the context is a {type(context).__name__}, not a tensor", str(case))
    if tuple(context.shape) != case.context_shape:
        message = f"the context is of shape {tuple(context.shape)}, expected {case.context_shape}"
        return Finding("shape", message, str(case))
    if context.dtype != case.dtype:
        message = f"the context is of {context.dtype} for a {case.leading} of {case.dtype}"
        return Finding("dtype", message, str(case), site=case.site)
    return None


def comparisons(
    results: Results, case: Case, device: torch.device, truth: Truth | None = None
) -> list[Comparison]:
    """One for each of `results` that the case wants, the context first; `truth` is that of the case by default."""
    truth, allowances = truth or truth_of(case), allowances_of(case, device)
    compared = [
        compare(
            name,
            case.by_head(results[name]),
            case.by_head(true),
            case.by_head(truth.scales[name]),
            allowances.known[0][name],
            case.dtype,
        )
        for name, true in truth.values.items()
        if name in results
    ]
    for allowed in allowances:
        compared = [replace(comparison, allowed=allowed[comparison.name]) for comparison in compared]
        if all(comparison.is_right for comparison in compared):
            break
    return compared


def compare(
    name: str, found: Tensor, true: Tensor, scale: Tensor, allowed: Errors, dtype: torch.dtype
) -> Comparison:
    """`found` (B, H, T, D), on any device, compared with `true` and `scale`, float64 on the CPU."""
    error = normalised(found, true, scale, dtype)
    if not error.numel():
        return Comparison(name, Errors(0.0, 0.0), allowed, (), 0.0, 0.0)
    place = tuple(map(int, np.unravel_index(int(error.argmax()), error.shape)))  # torch's takes longer
    return Comparison(
        name, errors_of(error), allowed, place, float(found.detach()[place]), float(true[place])
    )


def normalised(found: Tensor, true: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """|found - true| in units of eps(dtype) * scale, all (B, H, T, D); float64.

    Infinite where the scale is 0 and the difference is not, and where anything is not finite.
    """
    return relative_error((found.detach().cpu().double() - true).abs(), scale * torch.finfo(dtype).eps)


def errors_of(error: Tensor) -> Errors:
    """The two numbers of normalised errors (B, H, T, D)."""
    if not error.numel():
        return Errors(0.0, 0.0)
    return Errors(float(error.max()), float(error.square().mean((-2, -1)).max().sqrt()))


def allowed_for(case: Case, device: torch.device) -> dict[str, Errors]:
    """The largest errors that are allowed, for each tensor that the case wants."""
    *_, allowed = allowances_of(case, device)
    return allowed


@functools.lru_cache(maxsize=1024)
def allowances_of(case: Case, device: torch.device) -> Allowances:
    """What is allowed, as far as formulations have been measured on the case."""
    return Allowances(case, device)


class Allowances:
    """What is allowed after none, one, ... all standard formulations have been measured.

    It only grows: what is right within an early one is right, and needs no more measurements. Most results are.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.formulations = tuple(standard_formulations(case))
        floor = Errors(allowed_error(0.0, FLOOR_LARGEST), allowed_error(0.0, FLOOR_MEAN))
        self.known = [dict.fromkeys(truth_of(case).values, floor)]

    def __iter__(self) -> Iterator[dict[str, Errors]]:
        yield from tuple(self.known)
        while len(self.known) <= len(self.formulations):
            errors = _standard_errors(self.formulations[len(self.known) - 1], self.case, self.device)
            self.known.append(
                {
                    name: Errors(
                        _more(before.largest, errors[name].largest, FLOOR_LARGEST),
                        _more(before.mean, errors[name].mean, FLOOR_MEAN),
                    )
                    for name, before in self.known[-1].items()
                }
            )
            yield self.known[-1]


def _more(allowed: float, error: float, floor: float) -> float:
    """A formulation that overflows in this dtype sets no standard."""
    return max(allowed, allowed_error(error, floor)) if math.isfinite(error) else allowed


def _standard_errors(attention: Any, case: Case, device: torch.device) -> dict[str, Errors]:
    truth, results = truth_of(case), call(attention, tensors_of(case, device), case.wanted)
    return {
        name: errors_of(case.by_head(normalised(results[name], true, truth.scales[name], case.dtype)))
        for name, true in truth.values.items()
    }


@functools.singledispatch
def standard_formulations(case: Any) -> Iterable[Any]:
    """The correct implementations that the tolerance of a case is measured on."""
    raise NotImplementedError(type(case))


@standard_formulations.register
def _(case: OperatorCase) -> Iterable[Attention]:
    return STANDARD.values() if case.weights < LARGE else (eager,)


def describe(comparison: Comparison, case: Case) -> str:
    """A sentence with error, what is allowed, and place."""
    where = case.place(comparison.name, comparison.place)
    numbers = f"{comparison.found:.7g}, expected {comparison.true:.7g}"
    unit = f"roundings of {str(case.dtype).removeprefix('torch.')}"
    name, errors, allowed = NAMES[comparison.name], comparison.errors, comparison.allowed
    if errors.largest > allowed.largest:
        size = "is off" if math.isinf(errors.largest) else f"is off by {errors.largest:.3g} {unit}"
        return f"{name} {size} (allowed {allowed.largest:.2g}) at {where}: {numbers}"
    return (
        f"{name} is off by {errors.mean:.3g} {unit} in the mean over a head (allowed {allowed.mean:.2g}), most at "
        f"{where}: {numbers}"
    )


def _finding(comparison: Comparison, case: Case) -> Finding:
    error, allowed = comparison.decisive
    return Finding(
        comparison.name,  # type: ignore[arg-type]
        f"{describe(comparison, case)}; case {case}",
        str(case),
        error=error,
        budget=allowed,
        site=case.site,
        head=comparison.place[1],
    )
