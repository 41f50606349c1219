"""The contract of a deformable attention callable, and adapting callables that meet only a part of it.

The contract, in one line::

    ms_deform_attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None) -> context

==================  ====================  ======================================================================
argument            shape                 meaning
==================  ====================  ======================================================================
value               (B, N, H, D)          the tokens of all levels one after the other, each level row by row,
                                          N = the sum of h * w; any float dtype, any strides
spatial_shapes      L pairs               ((h, w), ...), one for each level: a tuple of pairs of Python's ints,
                                          on the host (see below)
sampling_locations  (B, Q, H, L, P, 2)    (x, y) as fractions of the level: (0, 0) is the upper left corner of its
                                          upper left cell, (1, 1) the lower right corner of its last; may lie
                                          outside; in the dtype and on the device of `value`
attention_weights   (B, Q, H, L, P)       as they are to be used: the caller has applied the softmax over the L * P
                                          points; in the dtype and on the device of `value`
head_gate           broadcasts to         multiplies the weights: 1 = on, 0 = off, fractions are legal; of 4
                    (B, Q, H, 1)          dimensions, in the dtype and on the device of `value`
context             (B, Q, H, D)          the gated, weighted sum of the sampled values, **before the heads are
                                          merged**, in the dtype of `value`
==================  ====================  ======================================================================

Sampling is bilinear between the centres of cells, and zero outside: `torch.nn.functional.grid_sample` with
`align_corners=False` and `padding_mode="zeros"` at 2 * location - 1. In cells, the point is at
(x * w - 0.5, y * h - 0.5); a corner that lies outside the level contributes nothing. This is Deformable DETR's
(Zhu et al., ICLR 2021, arXiv 2010.04159, equation 3).

`spatial_shapes` is on the host because sizes decide how a kernel is launched, and reading them from a GPU would wait
for it. The published CUDA operator takes them as a (L, 2) int64 tensor on the device, with each level's first token:
`level_tensors` makes both, and keeps them. `host_shapes` makes the tuple from either form.

All levels have the same number of points P. A model whose levels differ in it (D-FINE) fills up with points of weight
0: those contribute exactly nothing, wherever they are.

Inputs are never modified. A gate is one number for each batch item, query and head, so it can also be applied to the
context; `conform` does that for a callable without a `head_gate` parameter. With respect to sampling locations the
context is continuous but is not smooth where a point crosses the line between two cells' centres: its gradient there is
that of either side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from headoff.attention.contract import gate_context
from headoff.errors import AttentionError
from headoff.signatures import signature_of, takes_keyword, without_annotations

ARGUMENTS = ("value", "spatial_shapes", "sampling_locations", "attention_weights")
SIGNATURE = f"({', '.join(ARGUMENTS)}, *, head_gate=None)"

Shapes = tuple[tuple[int, int], ...]
"""(h, w) of each level."""


class DeformableAttention(Protocol):
    """The type of a deformable attention callable; see the docstring of this module."""

    def __call__(
        self,
        value: Tensor,
        spatial_shapes: Shapes,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor: ...


def host_shapes(spatial_shapes: Tensor | Sequence[Sequence[int]]) -> Shapes:
    """The levels' sizes as the contract has them, from any sequence of pairs or a (L, 2) tensor.

    Waits for the GPU where the tensor is on one.
    """
    pairs = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    return tuple((int(height), int(width)) for height, width in pairs)


@functools.lru_cache(maxsize=64)
def level_tensors(spatial_shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """What CUDA operators take: the sizes (L, 2) and the first token of each level (L,), int64 on `device`.

    They are made once, so never write into them.
    """
    with torch.inference_mode(False):  # what is kept must serve training as well
        shapes = torch.tensor(spatial_shapes, dtype=torch.int64, device=device)
        tokens = shapes.prod(1)
        return shapes, tokens.cumsum(0) - tokens


@dataclass(frozen=True)
class AdaptedDeformableAttention:
    """A `DeformableAttention` made from a callable without a gate: its context is gated here.

    Attributes:
        call: the callable.
        label: its name in messages and reports.
    """

    call: Callable[..., Tensor]
    label: str

    def __call__(
        self,
        value: Tensor,
        spatial_shapes: Shapes,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        """Compute the context.

        Raises:
            AttentionError: the callable returned no tensor, or one of another shape than the contract's.
        """
        context = self.call(value, spatial_shapes, sampling_locations, attention_weights)
        # Before the gate is applied: a context in another order may broadcast against the gate.
        check_context(context, value, sampling_locations, self.label)
        return gate_context(context, head_gate)


def check_context(context: Any, value: Tensor, sampling_locations: Tensor, label: str) -> None:
    """Raise AttentionError, one sentence, where a context is no tensor of shape (B, Q, H, D)."""
    if not isinstance(context, Tensor):
        raise AttentionError(
            f"{label} returned a {type(context).__name__}: it must return its context, one tensor of shape "
            "(batch, queries, heads, channels)."
        )
    batch, queries, heads = sampling_locations.shape[:3]
    expected = (batch, queries, heads, value.shape[-1])
    if tuple(context.shape) != expected:
        merged = tuple(context.shape) == (batch, queries, heads * value.shape[-1])
        remedy = (
            "return context.unflatten(-1, (heads, channels)), before the heads are merged"
            if merged
            else "it must keep the order (batch, queries, heads, channels)"
        )
        raise AttentionError(
            f"{label} returned a context of shape {tuple(context.shape)} where {expected} was expected: {remedy}."
        )


def conform(call: Any, label: str) -> DeformableAttention:
    """`call` as a `DeformableAttention`: unchanged where it takes a gate, otherwise gated by the caller.

    Args:
        call: what was given as a deformable attention; the four arguments are passed by position.
        label: its name, for messages.

    Raises:
        AttentionError: `call` is not callable, or the four arguments cannot be passed to it.
    """
    if isinstance(call, type):
        raise AttentionError(f"{label} is a class: pass an instance of it, or a function of {SIGNATURE}.")
    if not callable(call):
        raise AttentionError(
            f"{label} cannot be called: a deformable attention is a function that takes {SIGNATURE}."
        )
    signature = signature_of(call)
    if signature is None:
        return AdaptedDeformableAttention(call, label)
    takes_gate = takes_keyword(signature, "head_gate")
    try:
        signature.bind(*ARGUMENTS, **({"head_gate": None} if takes_gate else {}))
    except TypeError as error:
        raise AttentionError(
            f"{label} takes {without_annotations(signature)} and cannot be called as a deformable attention, "
            f"{SIGNATURE}: {error}; wrap it in a function of these."
        ) from None
    return cast(DeformableAttention, call) if takes_gate else AdaptedDeformableAttention(call, label)
