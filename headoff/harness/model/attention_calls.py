"""Where in the model an attention is wrong: every attention call of a sweep, tested by itself.

The inputs of the calls, and the gradients of their contexts, are the float64 oracle's. So an error in one layer does
not reach the next, and the first wrong layer is the layer that is wrong. The context and the gradients dq, dk and dv of
each call are compared, head by head and configuration by configuration, with float64 results for the same inputs,
rounded to the dtype under test.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from headoff.attention import Attention, resolve_attention
from headoff.calls import Attend, AttentionAddress, AttentionCall
from headoff.gates import Configuration, Site, stack
from headoff.harness.finding import Finding, Property
from headoff.harness.model.gradients import sum_of_targets, target_of
from headoff.harness.model.patched import failures_as, loss_scale
from headoff.harness.operator.call import CallTensors, Results
from headoff.harness.operator.call import call as attend
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.compare import FLOOR_LARGEST
from headoff.harness.operator.reference import Truth, truth_for
from headoff.harness.reference.cache import Arrays, cached
from headoff.harness.reference.cases import ReferenceCase
from headoff.harness.reference.implementations import machine, right_implementations
from headoff.harness.reference.oracle import forward_batch
from headoff.harness.tolerance import allowed_error, relative_error
from headoff.wording import number_ranges

QUANTITIES = ("context", "dq", "dk", "dv")
ENCODER_ITEMS = 2
"""Configurations whose encoder calls are tested: without an encoder gate they are all alike, but for gradients."""


@dataclass(frozen=True, eq=False)
class ModelCall:
    """One attention call of the model with the gradient of its context; tensors in float64 on the CPU.

    Args:
        query, key, value, grad_context: (B, H, Q or S, D).
        gate: broadcastable to (B, H, Q, 1), or None.
        items: indices of the configurations that the batch's items are; or, if `end_to_end`, of those that are
            concatenated along the query axis of a batch of one, as in a sweep's cross-attention.
    """

    address: AttentionAddress
    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    grad_context: Tensor
    items: tuple[int, ...]
    end_to_end: bool = False


@dataclass(frozen=True)
class _Wrong:
    """The worst number of one head under one configuration (None: under all of them together)."""

    call: ModelCall
    quantity: str
    head: int
    configuration: int | None
    error: float
    allowed: float


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What an attention gives for a call of the model.

    Args:
        allowed: by result, what it may be off by in units of eps times the scale.
        loss_scale: what the gradients have to be divided by.
        found: the results, of the right shapes unless it `raised`.
        raised: a finding about an exception, or about another shape.
    """

    call: ModelCall
    allowed: dict[str, float]
    loss_scale: float
    found: Results
    raised: Finding | None


def faulty_layers(
    attention: Attention,
    case: ReferenceCase,
    configurations: Sequence[Configuration],
    device: torch.device,
    dtype: torch.dtype,
) -> list[Finding]:
    """What is wrong in single calls: one finding for each site, in the order in which the model calls them.

    Each says which of context, dq, dk and dv are wrong, from which layer and configuration on, and in which heads.
    Where the context is wrong, wrong gradients are mentioned but are not the finding's property.
    """
    chosen = tuple(configurations)
    wrong: dict[Site, list[_Wrong]] = defaultdict(list)
    findings: list[Finding] = []
    for tried in _attempts(attention, case, chosen, device, dtype):
        site, layer = tried.call.address
        if tried.raised is None:
            wrong[site] += _compare(tried, dtype)
        elif not any(finding.site == site for finding in findings):
            message = f"{site}: in layer {layer}, {tried.raised.message}"
            findings.append(replace(tried.raised, message=message, site=site, layer=layer))
    return findings + [_finding(case, chosen, site, some) for site, some in wrong.items() if some]


def largest_excess(
    attention: Attention,
    case: ReferenceCase,
    configurations: Sequence[Configuration],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest error of any of the model's calls, in multiples of what is allowed.

    Infinite where one raises, or is of another shape.
    """
    largest = 0.0
    for tried in _attempts(attention, case, tuple(configurations), device, dtype):
        if tried.raised is not None:
            return math.inf
        errors = _errors(tried.found, tried.call, dtype)
        largest = max(largest, *(float(error.max()) / tried.allowed[name] for name, error in errors.items()))
    return largest


def _attempts(
    attention: Attention,
    case: ReferenceCase,
    configurations: tuple[Configuration, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[_Attempt]:
    """Each call of the model, given to the attention."""
    attention = resolve_attention(attention)
    calls, allowances = calls_of(case, configurations), _allowed(case, configurations, device, dtype)
    for call, allowed in zip(calls, allowances, strict=True):
        name = f"{case.name}, {call.address.site} of layer {call.address.layer}"
        tensors, scale = _tensors(call, device, dtype)
        found: Results = {}
        raised: list[Finding] = []
        with failures_as(raised, "context", name):
            found = attend(attention, tensors)
        if not raised and found["context"].shape != call.query.shape:
            shapes = f"{tuple(found['context'].shape)}, expected {tuple(call.query.shape)}"
            raised = [Finding("shape", f"the context is of shape {shapes}", case=name)]
        yield _Attempt(call, allowed, scale, found, next(iter(raised), None))


@functools.lru_cache(maxsize=8)
def calls_of(case: ReferenceCase, configurations: tuple[Configuration, ...]) -> tuple[ModelCall, ...]:
    """Every attention call of the model under all `configurations`, as the oracle makes it, in the order of the model.

    Cross-attention comes twice: with one item per configuration, and with the configurations end to end as in a sweep.
    """
    # The case's own runs of the detector come first: only the calls of one batch are recorded.
    detector, features = case.detector, case.features
    targets = [target_of(case, configuration) for configuration in configurations]
    gates = stack(configurations, case.layout)
    recorded: dict[AttentionAddress, AttentionCall] = {}
    contexts: dict[AttentionAddress, Tensor] = {}

    def record(call: AttentionCall, proceed: Attend) -> Tensor:
        context = proceed(call)
        # With frozen weights the first self-attention of the decoder depends on nothing that has a gradient.
        contexts[call.address] = context if context.requires_grad else context.requires_grad_()
        recorded[call.address] = call
        return contexts[call.address]

    with detector.intercepting(record), torch.enable_grad():
        target = sum_of_targets(targets, forward_batch(detector, features, gates)[0])
        gradients = dict(zip(contexts, torch.autograd.grad(target, list(contexts.values())), strict=True))
    calls = []
    for address, call in recorded.items():
        query, key, value = (x.detach() for x in (call.query, call.key, call.value))
        grad_context = gradients[address]
        items = tuple(range(len(configurations)))
        if address.site == "encoder_self" and gates.encoder_self is None:
            # The first ones: with none off, and with the first head off.
            items = items[:ENCODER_ITEMS]
        rows = list(items)
        gate = None if call.head_gate is None else call.head_gate[rows]
        calls.append(ModelCall(address, query[rows], key[rows], value[rows], gate, grad_context[rows], items))
        if address.site == "decoder_cross" and gates.encoder_self is None:
            full = None if gate is None else gate.expand(*query.shape[:3], 1)
            calls.append(
                ModelCall(
                    address,
                    _end_to_end(query),
                    key[:1],
                    value[:1],
                    None if full is None else _end_to_end(full),
                    _end_to_end(grad_context),
                    items,
                    end_to_end=True,
                )
            )
    return tuple(calls)


def _end_to_end(x: Tensor) -> Tensor:
    """(C, H, Q, D) to (1, H, C * Q, D)."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _tensors(call: ModelCall, device: torch.device, dtype: torch.dtype) -> tuple[CallTensors, float]:
    """The arguments of the call in `dtype`, and the loss scale, which its gradients have to be divided by.

    Half precision cannot hold gradients as small as those of a model.
    """
    scale = loss_scale(call.grad_context)
    query, key, value, grad_context = (
        x.to(device, dtype) for x in (call.query, call.key, call.value, call.grad_context * scale)
    )
    gate = None if call.gate is None else call.gate.to(device, dtype)
    return CallTensors(query, key, value, None, gate, grad_context), scale


@functools.cache
def _expected(call: ModelCall, dtype: torch.dtype) -> Truth:
    """Float64 results for the rounded inputs, with the size of each number's rounding error."""
    batch, heads, queries, channels = call.query.shape
    case = OperatorCase(
        name=call.address.site,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=call.key.shape[2],
        channels=channels,
        dtype=dtype,
    )
    return truth_for(_tensors(call, torch.device("cpu"), dtype)[0], case)


@functools.cache
def _allowed(
    case: ReferenceCase, configurations: tuple[Configuration, ...], device: torch.device, dtype: torch.dtype
) -> list[dict[str, float]]:
    """What each of `calls_of` may be off by, in units of eps times the scale.

    By the largest errors of right implementations. Measured once on a machine, and cached.
    """

    def largest(call: ModelCall) -> list[float]:
        tensors, _ = _tensors(call, device, dtype)
        measured = [_errors(attend(attention, tensors), call, dtype) for attention in right_implementations()]
        return [max(float(errors[name].max()) for errors in measured) for name in QUANTITIES]

    def measure() -> Arrays:
        return {"errors": np.array([largest(call) for call in calls_of(case, configurations)])}

    inputs = {**case.inputs_of_all(), **machine(device, dtype)}
    inputs["calls under"] = "; ".join(configuration.text for configuration in configurations)
    errors = cached("call-rounding", inputs, measure)["errors"]
    return [
        {
            name: allowed_error(float(error), FLOOR_LARGEST)
            for name, error in zip(QUANTITIES, row, strict=True)
        }
        for row in errors
    ]


def _errors(found: Results, call: ModelCall, dtype: torch.dtype) -> dict[str, Tensor]:
    """In units of eps times the scale, of every number."""
    expected, unit = _expected(call, dtype), torch.finfo(dtype).eps
    return {
        name: relative_error(
            found[name].detach().cpu().double() - expected.values[name], expected.scales[name] * unit
        )
        for name in QUANTITIES
    }


def _compare(tried: _Attempt, dtype: torch.dtype) -> list[_Wrong]:
    call, allowed = tried.call, tried.allowed
    expected, unit = _expected(call, dtype), torch.finfo(dtype).eps
    wrong = []
    for name, relative in _errors(tried.found, call, dtype).items():
        errors, scale = _by_item(call, name, relative), _by_item(call, name, expected.scales[name]) * unit
        factor = 1.0 if name == "context" else tried.loss_scale
        largest, places = errors.max(-1)
        for item, head in (largest > allowed[name]).nonzero().tolist():
            of_all = call.end_to_end and name in ("dk", "dv")
            size = float(scale[item, head, places[item, head]]) / factor
            wrong.append(
                _Wrong(
                    call,
                    name,
                    head,
                    None if of_all else call.items[item],
                    float(largest[item, head]) * size if size else math.inf,
                    allowed[name] * size,
                )
            )
    return wrong


def _by_item(call: ModelCall, name: str, x: Tensor) -> Tensor:
    """Numbers (B, H, T, D) as (items, H, ...); of calls end to end dk and dv are one item, the sum of all."""
    if call.end_to_end and name in ("context", "dq"):
        x = x[0].unflatten(1, (len(call.items), -1)).transpose(0, 1)
    return x.flatten(2)


def _finding(
    case: ReferenceCase, configurations: Sequence[Configuration], site: Site, wrong: list[_Wrong]
) -> Finding:
    layers = sorted({one.call.address.layer for one in wrong})
    first = [one for one in wrong if one.call.address.layer == layers[0]]
    quantity, *others = [name for name in QUANTITIES if any(one.quantity == name for one in first)]
    first = [one for one in first if one.quantity == quantity]
    heads = sorted({one.head for one in first})
    indices = sorted({one.configuration for one in first if one.configuration is not None})
    names = [configurations[index].name for index in indices]
    worst = max(first, key=lambda one: one.error)
    finite = math.isfinite(worst.error)
    if len(layers) == case.layout.layers(site):
        where = "in every layer"
    else:
        where = f"in layer{'s' if len(layers) > 1 else ''} {number_ranges(layers)}"
    message = (
        f"{site}: {quantity} wrong {where}, {'heads' if len(heads) > 1 else 'head'} {number_ranges(heads)}, "
        f"{_under(names, len(first[0].call.items))} "
        f"({f'error {worst.error:.1e}' if finite else 'NaN or infinite'}, allowed {worst.allowed:.1e})"
    )
    if others:
        message += f"; {' and '.join(others)} wrong as well"
    if all(one.call.end_to_end for one in first):
        message += "; only where configurations lie end to end along the queries"
    return Finding(
        _property([quantity, *others]),
        message,
        case=f"{case.name}, {site} of layer {layers[0]}",
        error=worst.error if finite else None,
        budget=worst.allowed,
        site=site,
        layer=layers[0],
        head=heads[0],
        configuration=names[0] if names else None,
    )


def _under(names: list[str], tested: int) -> str:
    if not names or len(names) == tested:
        return "whatever is off"
    if len(names) == 1:
        return f"under '{names[0]}'"
    return f"from '{names[0]}' on" if len(names) > 2 else f"under '{names[0]}' and '{names[1]}'"


def _property(quantities: list[str]) -> Property:
    if quantities[:2] == ["dq", "dk"] and "dv" not in quantities:
        return "softmax backward"
    return quantities[0]  # type: ignore[return-value]
