"""Conditions under which calls fail, and how to take one away from a call and leave all else as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from headoff.harness.finding import Property
from headoff.harness.operator.call import CallTensors, moved


@dataclass(frozen=True)
class Condition:
    """Something that a call may have.

    Args:
        words: "only with ...".
        property: what is wrong if nothing but this makes calls fail; None where that says nothing.
        holds: whether a call has it.
        without: the same call without it and with all else as it was, strides included.
        implies: what a call with it has as well, and what is not said of it again.
    """

    words: str
    property: Property | None
    holds: Callable[[CallTensors], bool]
    without: Callable[[CallTensors], CallTensors]
    implies: tuple[str, ...] = ()


def _of(name: str, holds: Callable[[Tensor], Any]) -> Callable[[CallTensors], bool]:
    return lambda call: getattr(call, name) is not None and bool(holds(_four(getattr(call, name))))


def with_values(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[CallTensors], CallTensors]:
    """Other numbers in the memory of a mask or a gate."""

    def changed(call: CallTensors) -> CallTensors:
        tensor = getattr(call, name)
        values = change(_four(tensor)).view(tensor.shape)
        memory = moved(tensor, tensor.dtype, tensor.device)
        inside, values = memory, values
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0:
                inside, values = inside.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
        inside.copy_(values)
        return replace(call, **{name: memory})

    return changed


def _four(tensor: Tensor) -> Tensor:
    return tensor[(None,) * (4 - tensor.dim())]


def _attended(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask != -math.inf


def opened_rows(mask: Tensor) -> Tensor:
    """Fully masked rows attend to all keys."""
    closed = ~_attended(mask).any(-1, keepdim=True)
    return mask | closed if mask.dtype == torch.bool else mask.masked_fill(closed, 0.0)


def _additive(call: CallTensors) -> CallTensors:
    assert call.mask is not None
    return replace(
        call, mask=torch.zeros_like(call.mask, dtype=call.query.dtype).masked_fill(~call.mask, -math.inf)
    )


def _sized(call: CallTensors, **sizes: int) -> CallTensors:
    """With other numbers of items, heads, queries, keys or channels: the first ones, or some of them again."""

    def taken(tensor: Tensor | None, *names: str, broadcasts: bool = False) -> Any:
        for place, name in enumerate(reversed(names)):
            if tensor is None or name not in sizes or place >= tensor.dim():
                continue
            dim = tensor.dim() - 1 - place
            if tensor.shape[dim] > 1 or not broadcasts:
                tensor = tensor.index_select(dim, torch.arange(sizes[name]) % tensor.shape[dim])
        return tensor

    made: dict[int, Any] = {}  # one tensor that is several inputs stays one
    for name, rows in (("query", "queries"), ("key", "keys"), ("value", "keys")):
        tensor = getattr(call, name)
        made.setdefault(id(tensor), taken(tensor, "batch", "heads", rows, "channels"))
    return replace(
        call,
        **{name: made[id(getattr(call, name))] for name in ("query", "key", "value")},
        mask=taken(call.mask, "batch", "heads", "queries", "keys", broadcasts=True),
        gate=taken(call.gate, "batch", "heads", "queries", "one", broadcasts=True),
        grad_context=taken(call.grad_context, "batch", "heads", "queries", "channels"),
    )


BLOCKS = (2, 4, 8, 16, 32, 64)

ONE = {"batch items": "batch item", "heads": "head", "queries": "query", "keys": "key", "channels": "channel"}

DIMENSIONS = {"batch items": ("batch", 0), "heads": ("heads", 1), "queries": ("queries", 2), "keys": ("keys", 2),
              "channels": ("channels", 3)}  # fmt: skip


def _size(call: CallTensors, name: str) -> int:
    return (call.key if name == "keys" else call.query).shape[DIMENSIONS[name][1]]


def _differs(name: Literal["gate", "mask"], what: str) -> Condition:
    dim = DIMENSIONS[what][1]
    return Condition(
        f"{name}s that differ between {what}",
        name,
        _of(name, lambda tensor: (tensor != tensor.narrow(dim, 0, 1)).any()),
        with_values(name, lambda tensor: tensor.narrow(dim, 0, 1).expand_as(tensor)),
        (f"a {name}", f"more than one {ONE[what]}"),
    )


def _more_than(what: str, numbers: Sequence[int]) -> Iterator[Condition]:
    for place, n in enumerate(numbers):
        yield Condition(
            f"more than one {ONE[what]}" if n == 1 else f"more than {n} {what}",
            None if what == "batch items" or n == 1 else "sizes",
            lambda call, n=n: _size(call, what) > n,  # type: ignore[misc]
            lambda call, n=n: _sized(call, **{DIMENSIONS[what][0]: n}),  # type: ignore[misc]
            tuple(f"more than {smaller} {what}" for smaller in numbers[place + 1 :])
            + (f"more than one {ONE[what]}",),
        )


def _no_multiple(what: str, numbers: Sequence[int]) -> Iterator[Condition]:
    for place, n in enumerate(numbers):
        yield Condition(
            f"{what} that are no multiple of {n}",
            "sizes",
            lambda call, n=n: _size(call, what) % n > 0,  # type: ignore[misc]
            lambda call, n=n: _sized(call, **{DIMENSIONS[what][0]: -(-_size(call, what) // n) * n}),  # type: ignore[misc]
            tuple(f"{what} that are no multiple of {larger}" for larger in numbers[place + 1 :]),
        )


def _contiguous(*names: str) -> Callable[[CallTensors], CallTensors]:
    return lambda call: replace(
        call, **{name: getattr(call, name).clone(memory_format=torch.contiguous_format) for name in names}
    )


CONDITIONS: tuple[Condition, ...] = (
    Condition("a gate that is not contiguous", "layout",
              _of("gate", lambda gate: not gate.is_contiguous()), _contiguous("gate")),
    Condition("a mask that is not contiguous", "layout",
              _of("mask", lambda mask: not mask.is_contiguous()), _contiguous("mask")),
    Condition(
        "query, key or value that are not contiguous",
        "layout",
        lambda call: not all(each.is_contiguous() for each in (call.query, call.key, call.value)),
        _contiguous("query", "key", "value"),
    ),
    Condition(
        "a gradient of the context that is not contiguous",
        "layout",
        lambda call: not call.grad_context.is_contiguous(),
        _contiguous("grad_context"),
    ),
    Condition("a gate of zeros", "gate", _of("gate", lambda gate: not gate.any()), with_values("gate", torch.ones_like),
              ("a gate", "gates of 0")),
    Condition("gates of 0", "gate", _of("gate", lambda gate: (gate == 0).any()),
              with_values("gate", lambda gate: torch.where(gate == 0, 1, gate)), ("a gate",)),
    Condition("gates other than 0 and 1", "gate", _of("gate", lambda gate: ((gate != 0) & (gate != 1)).any()),
              with_values("gate", lambda gate: (gate >= 0.5).to(gate)), ("a gate",)),
    Condition("gates above 1", "gate", _of("gate", lambda gate: (gate > 1).any()),
              with_values("gate", lambda gate: gate.clamp(max=1)), ("a gate",)),
    *(_differs("gate", what) for what in ("queries", "batch items", "heads")),
    Condition("a gate", "gate", _of("gate", lambda gate: True), lambda call: replace(call, gate=None)),
    Condition("fully masked rows", "mask", _of("mask", lambda mask: (~_attended(mask)).all(-1).any()),
              with_values("mask", opened_rows), ("a mask",)),
    Condition("biases in the mask", "mask",
              _of("mask", lambda mask: mask.dtype != torch.bool and ((mask != 0) & mask.isfinite()).any()),
              with_values("mask", lambda mask: torch.where(mask.isfinite(), 0.0, mask)), ("a mask",)),
    Condition("a bool mask", "mask", _of("mask", lambda mask: mask.dtype == torch.bool), _additive, ("a mask",)),
    *(_differs("mask", what) for what in ("queries", "batch items", "heads")),
    Condition("a mask", "mask", _of("mask", lambda mask: True), lambda call: replace(call, mask=None)),
    Condition("as many queries as heads", None, lambda call: _size(call, "queries") == _size(call, "heads"),
              lambda call: _sized(call, queries=_size(call, "queries") + 3),
              tuple(f"queries that are no multiple of {n}" for n in BLOCKS)),
    Condition("as many queries as keys", None, lambda call: _size(call, "queries") == _size(call, "keys"),
              lambda call: _sized(call, queries=_size(call, "queries") + 3),
              tuple(f"{what} that are no multiple of {n}" for n in BLOCKS for what in ("queries", "keys"))),
    Condition("one query", "sizes", lambda call: _size(call, "queries") == 1, lambda call: _sized(call, queries=3),
              tuple(f"queries that are no multiple of {n}" for n in BLOCKS)),
    Condition("one key", "sizes", lambda call: _size(call, "keys") == 1, lambda call: _sized(call, keys=3),
              tuple(f"keys that are no multiple of {n}" for n in BLOCKS)),
    *_more_than("keys", (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)),
    *_more_than("queries", (32768, 1024, 512, 256, 128, 64, 32, 16)),
    *_more_than("channels", (128, 64, 32, 16)),
    *_more_than("heads", (32, 16, 8, 1)),
    *_more_than("batch items", (32, 1)),
    *_no_multiple("keys", BLOCKS),
    *_no_multiple("queries", BLOCKS),
    *_no_multiple("channels", BLOCKS),
)  # fmt: skip
"""What is taken away from failing calls, the more special first."""
