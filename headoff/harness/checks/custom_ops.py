"""The check of custom operators: `torch.library.opcheck` of each that the attention calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from headoff.harness.checks.candidate import Candidate, NotApplicable, Outcome, check
from headoff.harness.finding import Finding

OWN = ("aten", "prims", "prim", "inductor", "higher_order", "_c10d_functional", "profiler", "torchvision")
"""Namespaces of operators that are nobody's kernel."""

WORDS = {
    "test_schema": "its schema (what it says of inputs that are written into or returned)",
    "test_autograd_registration": "its autograd registration",
    "test_faketensor": "its fake implementation (shapes, strides and dtypes without data)",
    "test_aot_dispatch_dynamic": "its behaviour when it is compiled with dynamic shapes, gradients included",
    "test_aot_dispatch_static": "its behaviour when it is compiled, gradients included",
}

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _is_own(operator: Any) -> bool:
    return isinstance(operator, torch._ops.OpOverload) and operator.namespace not in OWN


class _Seen(TorchDispatchMode):
    """The first call of each custom operator, below autograd: those of a backward pass as well."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, Call] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_own(function):
            self.calls.setdefault(function, _copy((args, kwargs or {}), differentiable=False))
        return function(*args, **(kwargs or {}))


class _Differentiated(TorchFunctionMode):
    """Custom operators that are called where autograd records them, with what requires a gradient.

    One within an `autograd.Function` needs no formula of its own, and one of a backward pass mostly has none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Call] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_grad_enabled() and isinstance(
            function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
        ):
            self.calls.setdefault(_name(function), _copy((args, kwargs or {}), differentiable=True))
        return function(*args, **(kwargs or {}))


def _name(operator: Any) -> str:
    """`library::operator`, whatever the overload."""
    packet = getattr(operator, "overloadpacket", operator)
    return str(packet._qualified_op_name)


def _copy(call: Call, *, differentiable: bool) -> Call:
    """With tensors of their own, of the same strides, that require a gradient where those did if `differentiable`."""

    def copied(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with torch.no_grad():
            copy = value.detach().clone(memory_format=torch.preserve_format)
        return copy.requires_grad_(differentiable and value.requires_grad)

    return tree_map(copied, call)


@check("opcheck")
def operators(candidate: Candidate) -> Outcome:
    """Schema, fake implementation and autograd registration of each custom operator, with what it was called with."""
    calls: dict[Any, Call] = {}
    differentiated: dict[str, Call] = {}
    for fields in candidate.arguments:
        tensors = candidate.tensors(candidate.case(**fields))
        with _Differentiated() as recorded, _Seen() as seen:
            candidate.call(candidate.attention, tensors)
        calls = {**seen.calls, **calls}
        differentiated = {**recorded.calls, **differentiated}
    if not calls:
        raise NotApplicable("it calls no custom operator (torch.library.custom_op)")
    outcome = Outcome()
    for operator, call in calls.items():
        args, kwargs = differentiated.get(_name(operator), call)
        outcome.findings += _failed(operator, args, kwargs)
    names = ", ".join(sorted({_name(operator) for operator in calls}))
    if not outcome.findings:
        outcome.remarks.append(f"opcheck: right for {names}")
    return outcome


def _failed(operator: Any, args: Any, kwargs: Any) -> list[Finding]:
    results = torch.library.opcheck(operator, args, kwargs, raise_exception=False)
    findings = []
    for test, result in results.items():
        if result == "SUCCESS":
            continue
        text = " ".join(str(result).split())
        message = f"torch.library.opcheck of {_name(operator)} rejects {WORDS.get(test, test)}; {text[:400]}"
        findings.append(Finding("opcheck", message, test))
    return findings
