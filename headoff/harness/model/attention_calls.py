"""Where in the model an attention is wrong: every attention call of a sweep, each given to it alone.

The calls' inputs, and the gradients of their contexts, are the float64 oracle's. So what one layer gets wrong does not
reach the next, and the first wrong layer is the layer that is wrong. Of each call the context and the gradients dq, dk
and dv are compared, head by head and configuration by configuration, with the float64 truth of the very inputs that the
attention was given: rounded to its dtype.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from headoff.attention import Attention, resolve_attention
from headoff.detr.transformer import Attend, AttentionAddress, AttentionCall
from headoff.gates import Configuration, Site, stack
from headoff.harness.finding import Finding, Property
from headoff.harness.model.gradients import forward, target_of
from headoff.harness.model.patched import failures_as
from headoff.harness.operator.call import CallTensors, Results
from headoff.harness.operator.call import call as attend
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.compare import FLOOR_LARGEST, normalised
from headoff.harness.operator.reference import Truth, truth_for
from headoff.harness.reference.cases import Subject
from headoff.harness.reference.implementations import right_implementations
from headoff.harness.reference.maps import ERROR_FACTOR

QUANTITIES = ("context", "dq", "dk", "dv")
ENCODER_ITEMS = 2
"""Configurations whose gradients are sent through the encoder's attention, which no decoder gate changes otherwise."""


@dataclass(frozen=True, eq=False)
class Call:
    """One attention call of the model with the gradient of its context; tensors in float64 on the CPU.

    - `query`, `key`, `value`, `gradient` (B, H, Q or S, D); `gate` broadcastable to (B, H, Q, 1), or None
    - `items`: the configurations, by index, that the batch's items are; or, where `end_to_end`, that lie one after the
      other along the query axis of a batch of one, as in a sweep's cross-attention
    """

    address: AttentionAddress
    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    gradient: Tensor
    items: tuple[int, ...]
    end_to_end: bool = False


@dataclass(frozen=True)
class _Wrong:
    """The worst number of one head under one configuration (None: under all of them together)."""

    call: Call
    quantity: str
    head: int
    configuration: int | None
    error: float
    allowed: float


def faulty_layers(
    attention: Attention,
    subject: Subject,
    configurations: Sequence[Configuration],
    device: torch.device,
    dtype: torch.dtype,
    calls: Sequence[Call] | None = None,
) -> list[Finding]:
    """What is wrong in single calls: one finding for each site, first the one that the model calls first.

    Each says which of context, dq, dk and dv are wrong, from which layer and configuration on, and in which heads. A
    gradient is not blamed where the context is wrong already, but mentioned. `calls`: other ones than `calls_of` has.
    """
    attention = resolve_attention(attention)
    chosen = tuple(configurations)
    wrong: dict[Site, list[_Wrong]] = defaultdict(list)
    findings: list[Finding] = []
    for call in calls_of(subject, chosen) if calls is None else calls:
        site, layer = call.address
        case = f"{subject.name}, {site} of layer {layer}"
        tensors, lent = _tensors(call, device, dtype)
        found: Results = {}
        raised: list[Finding] = []
        with failures_as(raised, "context", case):
            found = attend(attention, tensors)
        if not raised:
            raised = _misshapen(found, call, case)
        if not raised:
            wrong[site] += _compare(found, call, device, dtype, lent)
        elif not any(each.site == site for each in findings):
            message = f"{site}: in layer {layer}, {raised[0].message}"
            findings.append(Finding(raised[0].property, message, case=case, site=site, layer=layer))
    for blamed, some in wrong.items():
        if some:
            findings.append(_finding(subject, chosen, blamed, some))
    return findings


def calls_of(subject: Subject, configurations: Sequence[Configuration]) -> tuple[Call, ...]:
    """Every attention call of the model under all `configurations`, as the oracle makes it, in the order of the model.

    Cross-attention comes twice: with one item per configuration, and with the configurations end to end as in a sweep.
    """
    return _calls_of(subject, tuple(configurations))


@functools.lru_cache(maxsize=8)
def _calls_of(subject: Subject, configurations: tuple[Configuration, ...]) -> tuple[Call, ...]:
    detector = subject.detector
    gates = stack(configurations, subject.layout)
    targets = [target_of(subject, each) for each in configurations]
    recorded: dict[AttentionAddress, AttentionCall] = {}
    contexts: dict[AttentionAddress, Tensor] = {}

    def record(call: AttentionCall, proceed: Attend) -> Tensor:
        context = proceed(call)
        # With frozen weights the first self-attention of the decoder depends on nothing that has a gradient.
        contexts[call.address] = context if context.requires_grad else context.requires_grad_()
        recorded[call.address] = call
        return contexts[call.address]

    with detector.intercepting(record), torch.enable_grad():
        target, _, _ = forward(detector, subject.features, gates, targets)
        gradients = dict(zip(contexts, torch.autograd.grad(target, list(contexts.values())), strict=True))
    calls = []
    for address, call in recorded.items():
        query, key, value = (each.detach() for each in (call.query, call.key, call.value))
        gradient = gradients[address]
        items = tuple(range(len(configurations)))
        if address.site == "encoder_self" and gates.encoder_self is None:
            # The first ones: with nothing off, and with the first head off.
            items = items[:ENCODER_ITEMS]
        rows = list(items)
        one_gate = None if call.head_gate is None else call.head_gate[rows]
        calls.append(Call(address, query[rows], key[rows], value[rows], one_gate, gradient[rows], items))
        if address.site == "decoder_cross" and gates.encoder_self is None:
            full = None if one_gate is None else one_gate.expand(*query.shape[:3], 1)
            calls.append(
                Call(
                    address,
                    _end_to_end(query),
                    key[:1],
                    value[:1],
                    None if full is None else _end_to_end(full),
                    _end_to_end(gradient),
                    items,
                    end_to_end=True,
                )
            )
    return tuple(calls)


def _end_to_end(x: Tensor) -> Tensor:
    """(C, H, Q, D) to (1, H, C * Q, D)."""
    return x.transpose(0, 1).flatten(1, 2)[None]


def _tensors(call: Call, device: torch.device, dtype: torch.dtype) -> tuple[CallTensors, float]:
    """What the call is made with in `dtype`, and what its gradients are to be divided by.

    Half precision cannot hold gradients as small as those of a model: they are lent a power of two.
    """
    largest = float(call.gradient.abs().max())
    lent = 2.0 ** -round(math.log2(largest)) if largest > 0 else 1.0
    query, key, value, gradient = (
        each.to(device, dtype) for each in (call.query, call.key, call.value, call.gradient * lent)
    )
    gate = None if call.gate is None else call.gate.to(device, dtype)
    return CallTensors(query, key, value, None, gate, gradient), lent


@functools.cache
def _truth(call: Call, dtype: torch.dtype) -> Truth:
    """Of the rounded inputs, in float64, with the size of each number's rounding error."""
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
def _budget(call: Call, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What others may be off by, in units of eps times the scale: measured on several right implementations."""
    truth = _truth(call, dtype)
    tensors, _ = _tensors(call, device, dtype)
    found = [attend(each, tensors) for each in right_implementations()]
    return {
        name: FLOOR_LARGEST
        + ERROR_FACTOR
        * max(float(normalised(each[name], true, truth.scales[name], dtype).max()) for each in found)
        for name, true in truth.values.items()
    }


def _misshapen(found: Results, call: Call, case: str) -> list[Finding]:
    context = found["context"]
    if context.shape == call.query.shape:
        return []
    shapes = f"{tuple(context.shape)}, expected {tuple(call.query.shape)}"
    return [Finding("shape", f"the context is of shape {shapes}", case=case)]


def _compare(
    found: Results, call: Call, device: torch.device, dtype: torch.dtype, lent: float
) -> list[_Wrong]:
    truth, budget = _truth(call, dtype), _budget(call, device, dtype)
    unit = torch.finfo(dtype).eps
    wrong = []
    for name in QUANTITIES:
        true, scale = truth.values[name], truth.scales[name]
        errors = _by_item(call, name, normalised(found[name], true, scale, dtype))
        off = _by_item(call, name, (found[name].detach().double().cpu() - true).abs())
        scale = _by_item(call, name, scale)
        factor = 1.0 if name == "context" else lent
        largest, places = errors.max(-1)
        for item, head in (largest > budget[name]).nonzero().tolist():
            of_all = call.end_to_end and name in ("dk", "dv")
            place = item, head, places[item, head]
            wrong.append(
                _Wrong(
                    call,
                    name,
                    head,
                    None if of_all else call.items[item],
                    float(off[place]) / factor,
                    float(scale[place]) * unit * budget[name] / factor,
                )
            )
    return wrong


def _by_item(call: Call, name: str, x: Tensor) -> Tensor:
    """Numbers (B, H, T, D) as (items, H, ...); of calls end to end dk and dv are one item, the sum of all."""
    if call.end_to_end and name in ("context", "dq"):
        x = x[0].unflatten(1, (len(call.items), -1)).transpose(0, 1)
    return x.flatten(2)


def _finding(
    subject: Subject, configurations: Sequence[Configuration], site: Site, wrong: list[_Wrong]
) -> Finding:
    layers = sorted({each.call.address.layer for each in wrong})
    first = [each for each in wrong if each.call.address.layer == layers[0]]
    names = [name for name in QUANTITIES if any(each.quantity == name for each in first)]
    root = names[0]
    of_root = [each for each in first if each.quantity == root]
    heads = sorted({each.head for each in of_root})
    under = sorted({each.configuration for each in of_root if each.configuration is not None})
    worst = max(of_root, key=lambda each: each.error if each.error == each.error else math.inf)
    finite = math.isfinite(worst.error)
    every = len(layers) == subject.layout.layers(site)
    where = (
        "in every layer"
        if every
        else f"in layer {_ranges(layers)}"
        if len(layers) > 1
        else f"in layer {layers[0]}"
    )
    under_what = _under([configurations[index].name for index in under], len(of_root[0].call.items))
    size = f"error {worst.error:.1e}" if finite else "NaN or infinite"
    also = names[1:]
    message = (
        f"{site}: {root} wrong {where}, {'heads' if len(heads) > 1 else 'head'} {_ranges(heads)}, {under_what} "
        f"({size}, allowed {worst.allowed:.1e})"
    )
    if also:
        message += f"; {' and '.join(also)} wrong as well"
    if all(each.call.end_to_end for each in of_root):
        message += "; only where configurations lie end to end along the queries"
    return Finding(
        _property(names),
        message,
        case=f"{subject.name}, {site} of layer {layers[0]}",
        error=worst.error if finite else None,
        budget=worst.allowed,
        site=site,
        layer=layers[0],
        head=heads[0],
        configuration=configurations[under[0]].name if under else None,
    )


def _under(names: list[str], tried: int) -> str:
    if not names or len(names) == tried:
        return "whatever is off"
    if len(names) == 1:
        return f"under '{names[0]}'"
    return f"from '{names[0]}' on" if len(names) > 2 else f"under '{names[0]}' and '{names[1]}'"


def _property(names: list[str]) -> Property:
    if names[:2] == ["dq", "dk"] and "dv" not in names:
        return "softmax backward"
    return names[0]  # type: ignore[return-value]


def _ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5`."""
    parts = []
    for _, group in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in group]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(parts)
