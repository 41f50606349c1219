"""Conditions under which calls fail, and how to take one away from a call and leave all else as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headoff.harness.finding import Property
from headoff.harness.operator.call import CallTensors, moved

Change = Callable[[CallTensors], CallTensors]


@dataclass(frozen=True)
class Condition:
    """Something that a call may have.

    Args:
        words: "only with ...".
        property: what is wrong if nothing but this makes calls fail; None where that says nothing.
        holds: whether a call has it.
        without: ways to make the same call without it and with all else as it was, strides included.
        implies: what a call with it has as well, and what is not said of it again.
        barely: the same call with no more of it than makes the difference, where there may be more or less of it.
    """

    words: str
    property: Property | None
    holds: Callable[[CallTensors], bool]
    without: tuple[Change, ...]
    implies: tuple[str, ...] = ()
    barely: Change | None = None


BLOCKS = (2, 4, 8, 16, 32, 64)

DIMENSIONS = {
    "batch items": (0, "batch item"),
    "heads": (1, "head"),
    "queries": (2, "query"),
    "keys": (2, "key"),
    "channels": (3, "channel"),
}
"""Where the size of a call is that a plural stands for, and its singular."""


def _of(name: str, holds: Callable[[Tensor], Any]) -> Callable[[CallTensors], bool]:
    return lambda call: getattr(call, name) is not None and bool(holds(_four(getattr(call, name))))


def with_values(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Other numbers in the memory of a mask or a gate."""

    def changed(call: CallTensors) -> CallTensors:
        tensor = getattr(call, name)
        values = change(_four(tensor)).view(tensor.shape)
        inside = memory = moved(tensor, tensor.dtype, tensor.device)
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


def _opened_rows(mask: Tensor) -> Tensor:
    """Fully masked rows attend to all keys."""
    closed = ~_attended(mask).any(-1, keepdim=True)
    return mask | closed if mask.dtype == torch.bool else mask.masked_fill(closed, 0.0)


def _additive(call: CallTensors) -> CallTensors:
    assert call.mask is not None
    zeros = torch.zeros_like(call.mask, dtype=call.query.dtype)
    return replace(call, mask=zeros.masked_fill(~call.mask, -math.inf))


def _size(call: CallTensors, what: str) -> int:
    return (call.key if what == "keys" else call.query).shape[DIMENSIONS[what][0]]


def sized(call: CallTensors, what: str, size: int) -> CallTensors:
    """With `size` items, heads, queries, keys or channels: the first ones, or some of them again."""

    def taken(tensor: Tensor | None, *dimensions: str, broadcasts: bool = False) -> Any:
        dim = dimensions.index(what) - len(dimensions) if what in dimensions else 0
        if tensor is None or dim == 0 or -dim > tensor.dim() or (broadcasts and tensor.shape[dim] == 1):
            return tensor
        return tensor.index_select(dim, torch.arange(size, device=tensor.device) % tensor.shape[dim])

    # One tensor that is several inputs stays one, unless there are no longer as many queries as keys.
    is_shared = call.query is call.key or call.query is call.value
    apart = is_shared and what in ("queries", "keys")
    made: dict[Any, Any] = {}
    for name, rows in (("query", "queries"), ("key", "keys"), ("value", "keys")):
        tensor = getattr(call, name)
        made.setdefault(
            name if apart else id(tensor), taken(tensor, "batch items", "heads", rows, "channels")
        )
    return replace(
        call,
        **{name: made[name if apart else id(getattr(call, name))] for name in ("query", "key", "value")},
        mask=taken(call.mask, "batch items", "heads", "queries", "keys", broadcasts=True),
        gate=taken(call.gate, "batch items", "heads", "queries", "", broadcasts=True),
        grad_context=taken(call.grad_context, "batch items", "heads", "queries", "channels"),
    )


def _differs(name: Property, what: str) -> Condition:
    dim, one = DIMENSIONS[what]
    return Condition(
        f"{name}s that differ between {what}",
        name,
        _of(name, lambda tensor: (tensor != tensor.narrow(dim, 0, 1)).any()),
        (with_values(name, lambda tensor: tensor.narrow(dim, 0, 1).expand_as(tensor)),),
        (f"a {name}", f"more than one {one}"),
    )


def _sizes(what: str, numbers: Sequence[int], *, multiple: bool = False) -> Iterator[Condition]:
    """More than a number of batch items, heads, queries, keys or channels; or no `multiple` of it."""
    one = f"more than one {DIMENSIONS[what][1]}"
    words = [f"{what} that are no multiple of {n}" if multiple else f"more than {n} {what}" for n in numbers]
    for place, n in enumerate(numbers):

        def holds(call: CallTensors, n: int = n) -> bool:
            return _size(call, what) % n > 0 if multiple else _size(call, what) > n

        def without(call: CallTensors, n: int = n) -> CallTensors:
            # Of the multiples an odd one: nearly all sizes that are even more than multiples of n are among the others.
            size = max(3, -(-_size(call, what) // n) | 1) * n if multiple else n
            return sized(call, what, size)

        def barely(call: CallTensors, without: Change = without) -> CallTensors:
            return sized(call, what, _size(without(call), what) + 1)

        yield Condition(
            one if n == 1 else words[place],
            None if n == 1 or what == "batch items" else "sizes",
            holds,
            (without,),
            (*words[place + 1 :], f"{what} that are no power of 2" if multiple else one),
            barely,
        )


def _no_power_of_2(what: str) -> Condition:
    return Condition(
        f"{what} that are no power of 2",
        "sizes",
        lambda call: _size(call, what).bit_count() > 1,
        (lambda call: sized(call, what, 1 << _size(call, what).bit_length()),),
    )


def _ragged(*several: str) -> tuple[str, ...]:
    return tuple(f"{what} that are no multiple of {n}" for n in BLOCKS for what in several)


def _as_many_queries_as(what: str, *several: str) -> Condition:
    return Condition(
        f"as many queries as {what}",
        None,
        lambda call: _size(call, "queries") == _size(call, what),
        tuple(lambda call, one=one: sized(call, one, _size(call, one) + 3) for one in ("queries", what)),  # type: ignore[misc]
        _ragged(*several),
    )


def _one(what: str) -> Condition:
    return Condition(
        f"one {DIMENSIONS[what][1]}",
        "sizes",
        lambda call: _size(call, what) == 1,
        (lambda call: sized(call, what, 3),),
        _ragged(what),
    )


def _not_contiguous(words: str, *names: str) -> Condition:
    return Condition(
        f"{words} not contiguous",
        "layout",
        lambda call: not all(x.is_contiguous() for name in names if (x := getattr(call, name)) is not None),
        (
            lambda call: replace(
                call,
                **{name: getattr(call, name).clone(memory_format=torch.contiguous_format) for name in names},
            ),
        ),
        tuple(f"a {name}" for name in names),
    )


def _gate(
    words: str, holds: Callable[[Tensor], Any], change: Callable[[Tensor], Tensor], *more: str
) -> Condition:
    return Condition(words, "gate", _of("gate", holds), (with_values("gate", change),), ("a gate", *more))


def _mask(words: str, holds: Callable[[Tensor], Any], change: Callable[[Tensor], Tensor]) -> Condition:
    return Condition(words, "mask", _of("mask", holds), (with_values("mask", change),), ("a mask",))


def _any(name: Property) -> Condition:
    none: dict[str, Any] = {name: None}
    return Condition(f"a {name}", name, _of(name, lambda _: True), (lambda call: replace(call, **none),))


CONDITIONS: tuple[Condition, ...] = (
    _not_contiguous("a gate that is", "gate"),
    _not_contiguous("a mask that is", "mask"),
    _not_contiguous("query, key or value that are", "query", "key", "value"),
    _not_contiguous("a gradient of the context that is", "grad_context"),
    _gate("a gate of zeros", lambda gate: not gate.any(), torch.ones_like, "gates of 0"),
    _gate("gates of 0", lambda gate: (gate == 0).any(), lambda gate: torch.where(gate == 0, 1, gate)),
    _gate("gates other than 0 and 1", lambda gate: ((gate != 0) & (gate != 1)).any(),
          lambda gate: (gate >= 0.5).to(gate)),
    _gate("gates above 1", lambda gate: (gate > 1).any(), lambda gate: gate.clamp(max=1)),
    *(_differs("gate", what) for what in ("queries", "batch items", "heads")),
    _any("gate"),
    _mask("fully masked rows", lambda mask: (~_attended(mask)).all(-1).any(), _opened_rows),
    _mask("biases in the mask", lambda mask: mask.dtype != torch.bool and ((mask != 0) & mask.isfinite()).any(),
          lambda mask: torch.where(mask.isfinite(), 0.0, mask)),
    Condition("a bool mask", "mask", _of("mask", lambda mask: mask.dtype == torch.bool), (_additive,), ("a mask",)),
    *(_differs("mask", what) for what in ("queries", "batch items", "heads")),
    _any("mask"),
    _as_many_queries_as("batch items", "queries"),
    _as_many_queries_as("heads", "queries"),
    _as_many_queries_as("keys", "queries", "keys"),
    _one("queries"),
    _one("keys"),
    *_sizes("keys", (4096, 2048, 1024, 512, 256, 128, 64, 32, 16)),
    *_sizes("queries", (32768, 1024, 512, 256, 128, 64, 32, 16)),
    *_sizes("channels", (128, 64, 32, 16)),
    *_sizes("heads", (32, 16, 8, 1)),
    *_sizes("batch items", (32, 1)),
    *(condition for what in ("keys", "queries", "channels") for condition in _sizes(what, BLOCKS, multiple=True)),
    _no_power_of_2("channels"),
)  # fmt: skip
"""What is taken away from failing calls, the more special first."""
