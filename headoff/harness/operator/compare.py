"""Whether an attention's context and gradients are right on one case."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding, Property
from headoff.harness.operator.call import CallTensors, Results, call, context_alone, tensors_of
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.reference import truth_of
from headoff.harness.tolerance import ERROR_FACTOR
from headoff.harness.torch_settings import watched_settings

FLOOR_LARGEST = 2.0
FLOOR_MEAN = 0.5
"""Roundings, in units of eps times the scale, that are allowed even where eager makes none."""

PERTURBED = 2
"""Calls of eager with perturbed inputs, beside the plain one."""

LARGE = 2_000_000
"""Weights from which on a case has elements enough to measure eager by its one plain call."""


@dataclass(frozen=True)
class Errors:
    """Of one tensor: the `largest` error, and the largest `mean` (root mean square) of any head of any item."""

    largest: float
    mean: float


def normalised(found: Tensor, true: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """|found - true| in units of eps(dtype) * scale; infinite where the scale is 0 and the difference is not, and
    where anything is not finite. All (B, H, T, D); float64."""
    difference = (found.detach().cpu().double() - true).abs()
    error = torch.where(difference == 0, 0.0, difference / (scale * torch.finfo(dtype).eps))
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)


def errors_of(error: Tensor) -> Errors:
    """The two numbers of errors (B, H, T, D)."""
    return Errors(float(error.max()), float(error.square().mean((-2, -1)).max().sqrt()))


@functools.lru_cache(maxsize=1024)
def allowed_for(case: OperatorCase, device: torch.device) -> dict[str, Errors]:
    """What a candidate may be off by, for each tensor that the case wants."""
    measured = [
        {name: Errors(0.0, 0.0) for name in truth_of(case).values},
        *(_errors_of_results(results, case) for results in _eager_results(case, device)),
    ]
    return {
        name: Errors(
            ERROR_FACTOR * max(each[name].largest for each in measured) + FLOOR_LARGEST,
            ERROR_FACTOR * max(each[name].mean for each in measured) + FLOOR_MEAN,
        )
        for name in measured[0]
    }


def _errors_of_results(results: Results, case: OperatorCase) -> dict[str, Errors]:
    truth = truth_of(case)
    return {
        name: errors_of(normalised(results[name], true, truth.scales[name], case.dtype))
        for name, true in truth.values.items()
    }


def _eager_results(case: OperatorCase, device: torch.device) -> list[Results]:
    tensors = tensors_of(case, device)
    results = [call(eager, tensors, case.wanted)]
    if case.weights < LARGE:
        generator = torch.Generator().manual_seed(case.seed)
        results += [call(eager, _perturbed(tensors, generator), case.wanted) for _ in range(PERTURBED)]
    return results


def _perturbed(tensors: CallTensors, generator: torch.Generator) -> CallTensors:
    """Every fourth number of query and key a unit in the last place larger, and every fourth one smaller.

    As if they had been scaled and rounded, which is what implementations do that fold 1 / sqrt(D) into them.
    """

    def nudged(tensor: Tensor) -> Tensor:
        draw = torch.rand(tensor.shape, generator=generator)
        units = (draw < 0.25).double() - (draw > 0.75).double()
        return tensor * (1 + torch.finfo(tensor.dtype).eps * units).to(tensor)

    query = nudged(tensors.query)
    key = query if tensors.key is tensors.query else nudged(tensors.key)
    value = {id(tensors.query): query, id(tensors.key): key}.get(id(tensors.value), tensors.value)
    return replace(tensors, query=query, key=key, value=value)


PROPERTIES: dict[str, Property] = {"context": "context", "dq": "dq", "dk": "dk", "dv": "dv"}
NAMES = {
    "context": "the context",
    "dq": "the gradient of the query",
    "dk": "the gradient of the key",
    "dv": "the gradient of the value",
}


@dataclass(frozen=True)
class Comparison:
    """One tensor of a case beside its truth: errors, what is allowed, and the place (b, h, t, d) of the worst."""

    name: str
    errors: Errors
    allowed: Errors
    place: tuple[int, ...]
    found: float
    true: float

    @property
    def is_right(self) -> bool:
        return self.errors.largest <= self.allowed.largest and self.errors.mean <= self.allowed.mean

    @property
    def excess(self) -> float:
        """How many times as large as allowed; above 1 is wrong."""
        return max(self.errors.largest / self.allowed.largest, self.errors.mean / self.allowed.mean)


WITHOUT_GRADIENTS = "without gradients (torch.no_grad), "
"""How the message of a finding begins that is about the way taken where no gradient is asked for, and only there."""


def operator_findings(attention: Attention, case: OperatorCase, device: torch.device | str) -> list[Finding]:
    """What is wrong with `attention` on `case`: none where it is right.

    It is called with gradients and without, for these are often two kernels. A wrong context is the only finding, for
    gradients follow from it; and so is an input that was written into, for the numbers follow from that.
    """
    device = torch.device(device)
    # Settings are watched at every call, because a patch may change them at its first call alone.
    with watched_settings() as changes:
        findings = _findings_either_way(attention, case, device)
    return [Finding("state", f"a call changes {change}", str(case)) for change in changes] + findings


def _findings_either_way(attention: Attention, case: OperatorCase, device: torch.device) -> list[Finding]:
    """With gradients; where those are right, without."""
    tensors = tensors_of(case, device)
    before = contents_of(tensors)

    def tried(attend: Callable[[], Results], right: Tensor | None = None) -> tuple[Results, list[Finding]]:
        """Results, and what is wrong with them; `right` is a context that is known to be right."""
        try:
            results = attend()
        except Exception as error:
            message = f"raises {describe_exception(error)}; case {case}"
            return {}, [Finding("crash", message, str(case), site=case.site)]
        if written := overwritten(tensors, before):
            return {}, [Finding("in-place", f"a call writes into the {written}; case {case}", str(case))]
        if right is not None and _is_the_very(results["context"], right):
            return results, []
        return results, findings_of(results, case, device)

    results, findings = tried(lambda: call(attention, tensors, case.wanted))
    if findings:
        return findings
    _, findings = tried(
        lambda: {"context": context_alone(attention, tensors)}, right=results["context"].detach()
    )
    return [replace(each, message=WITHOUT_GRADIENTS + each.message) for each in findings]


def _is_the_very(found: object, right: Tensor) -> bool:
    """Whether there is nothing to compare with the truth again."""
    return (
        isinstance(found, Tensor)
        and (found.dtype, found.device) == (right.dtype, right.device)
        and torch.equal(found, right)
    )


def contents_of(tensors: CallTensors) -> dict[str, Tensor]:
    """A copy of the memory that each tensor lies in; for `overwritten`."""
    return {name: memory_of(tensor).clone() for name, tensor in tensors.named().items()}


def overwritten(tensors: CallTensors, before: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor whose memory is another one than `before`."""
    for name, tensor in tensors.named().items():
        if not torch.equal(memory_of(tensor), before[name]):
            return name
    return None


def memory_of(tensor: Tensor) -> Tensor:
    """All bytes of a tensor's storage, those between and around its elements, too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def unsupported_reason(attention: Attention, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """The exception by which `attention` refuses a plain case in `dtype`, in a line; None where it takes the dtype.

    An attention need not support dtypes that nobody asked for.
    """
    case = OperatorCase(name="plain", queries=64, keys=64, heads=2, dtype=dtype)
    try:
        call(attention, tensors_of(case, device))
    except Exception as error:
        return describe_exception(error)
    return None


def findings_of(results: Results, case: OperatorCase, device: torch.device) -> list[Finding]:
    """What is wrong with the `results` of a call: shapes and dtypes first, then numbers.

    `results` may have the context alone.
    """
    if found := misshapen(results["context"], case):
        return [found]
    wrong = [comparison for comparison in comparisons(results, case, device) if not comparison.is_right]
    if wrong and wrong[0].name == "context":
        wrong = wrong[:1]
    return [_finding(comparison, case) for comparison in wrong]


def misshapen(context: object, case: OperatorCase) -> Finding | None:
    """A context that is no tensor, or of another shape or dtype than the query."""
    if not isinstance(context, Tensor):
        return Finding("shape", f"the context is a {type(context).__name__}, not a tensor", str(case))
    expected = (case.batch, case.heads, case.queries, case.channels)
    if tuple(context.shape) != expected:
        return Finding(
            "shape", f"the context is of shape {tuple(context.shape)}, expected {expected}", str(case)
        )
    if context.dtype != case.dtype:
        return Finding(
            "dtype",
            f"the context is of {context.dtype} for a query of {case.dtype}",
            str(case),
            site=case.site,
        )
    return None


def comparisons(results: Mapping[str, Tensor], case: OperatorCase, device: torch.device) -> list[Comparison]:
    """Of all `results` that the case wants, the context first."""
    truth, allowed = truth_of(case), allowed_for(case, device)
    return [
        compare(name, results[name], true, truth.scales[name], allowed[name], case.dtype)
        for name, true in truth.values.items()
        if name in results
    ]


def compare(
    name: str, found: Tensor, true: Tensor, scale: Tensor, allowed: Errors, dtype: torch.dtype
) -> Comparison:
    """`found` (B, H, T, D) on any device beside `true` and `scale`, float64 on the CPU."""
    error = normalised(found, true, scale, dtype)
    place = tuple(int(each) for each in torch.unravel_index(error.argmax(), error.shape))
    return Comparison(
        name, errors_of(error), allowed, place, float(found.detach()[place]), float(true[place])
    )


def describe(comparison: Comparison, dtype: torch.dtype) -> str:
    """A sentence with error, budget and place."""
    batch, head, row, column = comparison.place
    what = "key" if comparison.name in ("dk", "dv") else "query"
    where = f"batch item {batch}, head {head}, {what} {row}, channel {column}"
    numbers = f"{comparison.found:.7g}, expected {comparison.true:.7g}"
    unit = f"roundings of {str(dtype).removeprefix('torch.')}"
    errors, allowed = comparison.errors, comparison.allowed
    if errors.largest > allowed.largest:
        size = "is off" if errors.largest == torch.inf else f"is off by {errors.largest:.3g} {unit}"
        return f"{NAMES[comparison.name]} {size} (allowed {allowed.largest:.2g}) at {where}: {numbers}"
    return (
        f"{NAMES[comparison.name]} is off by {errors.mean:.3g} {unit} in the mean over a head (allowed "
        f"{allowed.mean:.2g}), most at {where}: {numbers}"
    )


def _finding(comparison: Comparison, case: OperatorCase) -> Finding:
    errors, allowed = comparison.errors, comparison.allowed
    by_largest = errors.largest > allowed.largest
    return Finding(
        PROPERTIES[comparison.name],
        f"{describe(comparison, case.dtype)}; case {case}",
        str(case),
        error=errors.largest if by_largest else errors.mean,
        budget=allowed.largest if by_largest else allowed.mean,
        site=case.site,
        head=comparison.place[1],
    )
