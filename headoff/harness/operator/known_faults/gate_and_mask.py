"""Slips with gate and mask: what is read in their place, in the forward pass or in the backward pass."""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from headoff.harness.operator.known_faults.steps import BLOCKS, Change, Step, Steps, additive, block_starts


def _read(name: str, change: Change) -> Steps:
    return {name: lambda s: change(getattr(s, name))}


def _gate(change: Change) -> Steps:
    return _read("gate", change)


def _bool_mask(change: Change) -> Steps:
    """`change` of a bool mask, True = attend; additive masks stay."""
    return {"mask": lambda s: additive(change(s.mask == 0)) if s.is_bool else s.mask}


def _bias(change: Change) -> Steps:
    """`change` of an additive mask; bool masks stay."""
    return {"mask": lambda s: s.mask if s.is_bool else change(s.mask)}


def _finite(change: Change) -> Steps:
    return _bias(lambda mask: torch.where(mask == -math.inf, mask, change(mask)))


def _swapped(name: str, one: int, other: int) -> Steps:
    """With two dimensions of one size swapped."""
    return _read(name, lambda x: x.transpose(one, other) if x.shape[one] == x.shape[other] else x)


def _of_others(name: str, dimensions: int) -> Iterator[tuple[str, Steps]]:
    """The gate or the mask of the first or a neighbouring batch item, head, query or key."""
    words = (("batch item", "batch items"), ("head", "heads"), ("query", "queries"), ("key", "keys"))
    for dim, (one, several) in enumerate(words[:dimensions]):
        yield (
            f"all {several} get the {name} of the first {one}",
            _read(name, lambda x, dim=dim: x.narrow(dim, 0, 1).expand_as(x)),
        )
        for which, by in (("previous", 1), ("next", -1)):
            yield (
                f"each {one} gets the {name} of the {which} {one}",
                _read(name, lambda x, dim=dim, by=by: x.roll(by, dim)),
            )
    yield (
        "batch items and heads are swapped when it is flattened",
        _read(name, lambda x: x.transpose(0, 1).reshape(x.shape)),
    )


def _renormalised(gate: Tensor) -> Tensor:
    mean = gate.mean(1, keepdim=True)
    return gate / torch.where(mean == 0, 1.0, mean)


def _longer(attended: Tensor) -> Tensor:
    more = attended.roll(1, -1)
    more[..., 0] = False
    return attended | more


def _low(low: float) -> Steps:
    return {
        "masked": lambda s: (s.scores + s.mask).clamp(min=low) if s.has_mask else s.scores,
        "fully_masked": lambda s: (s.mask == -math.inf).all(-1, keepdim=True),
    }


def _fully_masked(answer: Step) -> Steps:
    """`answer` is the softmax of fully masked rows."""
    return {"weights": lambda s: torch.where(s.fully_masked, answer(s), s.softmax)}


GATE: dict[str, Steps] = {
    "it is ignored": _gate(torch.ones_like),
    **dict(_of_others("gate", 3)),
    "heads get the gates in reverse order": _gate(lambda gate: gate.flip(1)),
    "all queries get the mean gate over queries": _gate(lambda gate: gate.mean(2, True).expand_as(gate)),
    "all queries get the largest gate of any query": _gate(lambda gate: gate.amax(2, True).expand_as(gate)),
    "heads and queries are swapped": _swapped("gate", 1, 2),
    "it is inverted (1 - gate)": _gate(lambda gate: 1 - gate),
    "it is applied twice": _gate(torch.square),
    "every value other than 0 counts as 1": _gate(lambda gate: (gate != 0).double()),
    "values are rounded to 0 or 1": _gate(lambda gate: (gate >= 0.5).double()),
    "values are truncated to integers": _gate(torch.trunc),
    "values are clamped to 0..1": _gate(lambda gate: gate.clamp(0, 1)),
    "values are clamped to at most 1": _gate(lambda gate: gate.clamp(max=1)),
    "it is divided by its mean over the heads": _gate(_renormalised),
    "a head counts as off wherever its first query has it off": _gate(lambda gate: gate * (gate[:, :, :1] != 0)),
    "a head counts as off wherever the first batch item has it off": _gate(lambda gate: gate * (gate[:1] != 0)),
    "it is rounded to bfloat16": _gate(lambda gate: gate.bfloat16().double()),
    **{f"each block of {n} queries gets the gate of its first query": _gate(
        lambda gate, n=n: gate[:, :, block_starts(gate.shape[2], n)]) for n in BLOCKS[:3]},
}  # fmt: skip

MASK: dict[str, Steps] = {
    "it is ignored": _read("mask", torch.zeros_like),
    "an additive mask is ignored": _bias(torch.zeros_like),
    "a bool mask is inverted": _bool_mask(torch.logical_not),
    "a bool mask is added to the scores as 0 and 1": {
        "mask": lambda s: (s.mask == 0).double() if s.is_bool else s.mask},
    "an additive mask is read as bool (not 0 = attend)": _bias(lambda mask: additive(mask != 0)),
    "an additive mask is read as bool (0 = attend)": _bias(lambda mask: additive(mask == 0)),
    "finite biases are ignored": _finite(torch.zeros_like),
    "biases have the wrong sign": _finite(torch.neg),
    "biases are added before the scaling": {"mask": lambda s: s.mask if s.is_bool else s.mask * s.channels**-0.5},
    "biases are multiplied by ln 2 (base-2 exponentials)": _bias(lambda mask: mask * math.log(2)),
    **dict(_of_others("mask", 4)),
    "queries and keys are swapped": _swapped("mask", 2, 3),
    "a causal mask is used": _read("mask", lambda mask: additive(torch.ones(mask.shape, dtype=torch.bool).tril())),
    "the first masked key is attended to": _bool_mask(_longer),
    "it ends at the first masked key": _bool_mask(lambda mask: mask.cummin(-1).values),
    "all keys up to the last unmasked one are attended to": _bool_mask(
        lambda mask: mask.flip(-1).cummax(-1).values.flip(-1)),
    "only the number of unmasked keys counts": _bool_mask(
        lambda mask: torch.arange(mask.shape[-1]) < mask.sum(-1, keepdim=True)),
    "fully masked rows attend to all keys equally": _fully_masked(lambda s: s.softmax),
    "fully masked rows are NaN": _fully_masked(lambda s: torch.full_like(s.softmax, math.nan)),
    "fully masked rows attend as if nothing were masked": _fully_masked(lambda s: s.scores.softmax(-1)),
    "fully masked rows attend to the first key": _fully_masked(lambda s: (torch.arange(s.keys) == 0).double()),
    "one fully masked row makes the whole call zero": {"weights": lambda s: s.softmax * (not s.fully_masked.any())},
    "weights are masked after the softmax and not normalised again": {
        "masked": lambda s: s.scores if s.is_bool else s.scores + s.mask,
        "weights": lambda s: s.softmax.masked_fill(s.mask == -math.inf, 0.0)},
    "masked scores are multiplied by 0, not set to -inf": {
        "masked": lambda s: s.scores * (s.mask == 0) if s.is_bool else s.scores + s.mask},
    **{f"masked scores are {low}, not -inf": _low(low) for low in (-100, -1000, -10000)},
    **{f"it is ignored in the last block of {n} keys": {
        "mask": lambda s, n=n: s.mask.masked_fill(torch.arange(s.keys) >= (s.keys - 1) // n * n, 0.0)}
       for n in BLOCKS[:-1]},
}  # fmt: skip
