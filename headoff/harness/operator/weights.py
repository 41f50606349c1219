"""Which part of attention is at fault where its context is wrong: the weights, or their product with the values.

A context is a product of weights with values. So contexts for values that are 1 in one key and one channel, and 0
elsewhere, are the weights that a patch has in effect, whatever it computes. What they show is measured, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headoff.harness.operator.call import CallTensors
from headoff.harness.operator.known_faults import right_weights

EXPLAINED = 0.05
"""What may be left of an error (root mean squares) that is said to be explained."""

CLOSE = 4e-6
"""How far a sum of weights is from 1 that is said to be another one, or 8 roundings where those are more."""

KEYS = range(8, 301)
"""In calls whose weights are measured: with one key any weight may be right."""


def effective_weights(
    context_of: Callable[[CallTensors], Tensor | None], tensors: CallTensors
) -> Tensor | None:
    """Weights (B, H, Q, S), float64: the contexts for values of one key at a time, as many keys a call as channels.

    Args:
        context_of: the context (B, H, Q, D) of a call, float64 on the CPU; None where it raises.
        tensors: what the values are replaced in.
    """
    keys, channels = tensors.value.shape[-2:]
    columns = []
    for start in range(0, keys, channels):
        one_hot = torch.zeros_like(tensors.value)
        some = torch.arange(start, min(start + channels, keys))
        one_hot[..., some, some - start] = 1
        context = context_of(replace(tensors, value=one_hot))
        if context is None:
            return None
        columns.append(context[..., : len(some)])
    return torch.cat(columns, -1)


def crossing(context_of: Callable[[Any], Tensor | None], tensors: Any, dims: Mapping[str, int]) -> str:
    """Whether values of one batch item, head or channel reach the context of another, in words; else nothing.

    Values that are all 0 give a context of 0: where they do not, it is made of something else, and that is said.

    Args:
        dims: which dimension of value and context each of them is.
    """
    nothing = context_of(replace(tensors, value=torch.zeros_like(tensors.value)))
    if nothing is None or not nothing.isfinite().all():
        return ""
    if nothing.any():
        return "it is not 0 where all values are"
    for what, dim in dims.items():
        value = torch.zeros_like(tensors.value)
        value.narrow(dim, 0, 1).copy_(tensors.value.narrow(dim, 0, 1))
        context = context_of(replace(tensors, value=value))
        if context is None or not context.isfinite().all():
            return ""
        if context.narrow(dim, 1, context.shape[dim] - 1).any():
            return f"values of one {what} reach the context of another"
    return ""


@dataclass(frozen=True)
class Measured:
    """What is wrong with the weights in effect in a call: a key of `PARTS`; and the least and largest sum of a row."""

    part: str
    least: float
    most: float


PARTS = {
    "product": "for one key's value at a time it is right: the product with the values is wrong",
    "rows without keys": "rows without keys have attention weights in effect",
    "sums": "in effect, the attention weights of a row add up to {least:.6g} to {most:.6g}, not to 1",
    "weights": "in effect, the attention weights are wrong, though those of a row add up to 1",
    "sums or weights": "in effect, the attention weights are wrong",
}
"""In words. What is wrong in effect may be the weights or which values they are multiplied with."""


def faulty_part(weights: Tensor, tensors: CallTensors, found: Tensor, true: Tensor) -> Measured | None:
    """What is wrong with `weights` (B, H, Q, S) in effect in a call without a gate; None where they explain nothing.

    Args:
        tensors: the call, whose context is `found` and should be `true`.
    """
    right, value = right_weights(tensors), tensors.double().value
    left = EXPLAINED * rms(found - true)
    if not weights.isfinite().all() or not left > 0:
        return None
    sums, attended = weights.sum(-1), right.sum(-1) > 0.5
    least, most = (float(of(sums[attended])) if attended.any() else 1.0 for of in (torch.min, torch.max))
    close = max(CLOSE, 8 * torch.finfo(tensors.value.dtype).eps)
    if rms((weights - right) @ value) <= left:
        part = "product"
    elif rms(weights @ value - found) > left:
        return None
    elif bool((sums[~attended].abs() > close).any()):
        part = "rows without keys"
    else:
        part = "sums" if max(1 - least, most - 1) > close else "weights"
    return Measured(part, least, most)


def in_words(measured: Sequence[Measured | None]) -> str:
    """What was measured in several calls, where it is the same in all of them; else nothing."""
    known = [item for item in measured if item is not None]
    parts = {item.part for item in known}
    part = "sums or weights" if parts == {"sums", "weights"} else next(iter(parts), "")
    if len(known) < len(measured) or (len(parts) != 1 and part != "sums or weights"):
        return ""
    return PARTS[part].format(least=min(x.least for x in known), most=max(x.most for x in known))


def rms(difference: Tensor) -> float:
    """The root mean square."""
    return float(difference.square().mean().sqrt())
