"""Which part of deformable attention is at fault where its context is wrong: levels, places or weights.

A context is linear in the values and in the attention weights. So values that are 1 in one token show which tokens are
read, and with how much; and weights that are 1 at one point and 0 at all others show it point by point.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headoff.harness.deformable.call import DeformableTensors
from headoff.harness.deformable.known_faults import Steps, context_by, exact_with_gate
from headoff.harness.finding import Property
from headoff.harness.operator.weights import EXPLAINED, rms

ContextOf = Callable[[DeformableTensors], Tensor | None]

MOST_TOKENS, MOST_POINTS = 150, 16
"""In calls that are looked at: of all levels together."""

PRODUCT: tuple[Property, str] = (
    "context", "the right tokens are read with the right weights, their sum is wrong"
)  # fmt: skip
SUM: tuple[Property, str] = (
    "weights", "each point alone is read rightly, and together they are not added up by their weights"
)  # fmt: skip
MIXED: tuple[Property, str] = ("weights", "points do not count by their own attention weights")
ELSEWHERE: tuple[Property, str] = ("sampling", "tokens are read that are next to no sampling point")
SHARES: tuple[Property, str] = ("sampling", "the cells around a sampling point are read with wrong shares")


def reads(context_of: ContextOf, tensors: DeformableTensors) -> Tensor | None:
    """With how much each token is read (B, Q, H, N), float64; None where a call raises.

    Args:
        context_of: the context (B, Q, H, D) of a call, float64 on the CPU.
        tensors: what the values are replaced in.
    """
    tokens, channels = tensors.value.shape[1], tensors.value.shape[3]
    columns = []
    for start in range(0, tokens, channels):
        value = torch.zeros_like(tensors.value)
        some = torch.arange(start, min(start + channels, tokens))
        value[:, some, :, some - start] = 1
        context = context_of(replace(tensors, value=value))
        if context is None or not context.isfinite().all():
            return None
        columns.append(context[..., : len(some)])
    return torch.cat(columns, -1)


def right_context(tensors: DeformableTensors) -> Tensor:
    """By the definition, in float64."""
    return context_by(Steps(), exact_with_gate(tensors))


def faulty_part(context_of: ContextOf, tensors: DeformableTensors) -> tuple[Property, str] | None:
    """Property and clause of what is wrong in a call without a gate; None where this does not show."""
    found, right = context_of(tensors), right_context(tensors)
    whole, right_whole = reads(context_of, tensors), reads(right_context, tensors)
    if found is None or whole is None or right_whole is None:
        return None

    def product(read: Tensor) -> Tensor:
        return torch.einsum("bqhn,bnhd->bqhd", read, tensors.value.cpu().double())

    left = EXPLAINED * rms(found - right)
    if not rms(product(right_whole) - product(whole)) > left:
        return PRODUCT
    if not rms(product(whole) - found) <= left:
        return None
    levels, points = tensors.attention_weights.shape[3:]
    alone, right_alone = [], []
    for place in range(levels * points):
        weights = torch.zeros_like(tensors.attention_weights)
        weights[..., place // points, place % points] = 1
        one = replace(tensors, attention_weights=weights)
        read, right_read = reads(context_of, one), reads(right_context, one)
        if read is None or right_read is None:
            return None
        alone.append(read.flatten())
        right_alone.append(right_read.flatten())
    found_alone, should = torch.stack(alone, 1), torch.stack(right_alone, 1)
    if rms(found_alone - should) <= EXPLAINED * rms(whole - right_whole):
        return SUM
    return _of_points(found_alone, should, levels)


def _of_points(found: Tensor, right: Tensor, levels: int) -> tuple[Property, str]:
    """What is wrong with what single points (columns) read, `levels` after each other."""
    by_level = list(zip(found.chunk(levels, 1), right.chunk(levels, 1), strict=True))
    wrong = [level for level, (one, true) in enumerate(by_level) if rms(one - true) > EXPLAINED * rms(true)]
    if 0 < len(wrong) < levels:
        unread = all(not by_level[level][0].any() for level in wrong)
        names = f"level {' and '.join(map(str, wrong))} of {levels}"
        if unread:
            return "levels", f"nothing is read at the points of {names}"
        return "levels", f"the points of {names} alone are read wrongly"
    # What the right reads of all points, each times a number, can explain is no matter of places.
    mixed = torch.linalg.lstsq(right, found).solution
    if rms(right @ mixed - found) <= EXPLAINED * rms(found - right):
        return MIXED
    near = right.any(1)
    return ELSEWHERE if bool((found[~near].abs() > EXPLAINED).any()) else SHARES
