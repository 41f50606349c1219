"""The arguments of one attention call of a detector, its place in the model, and who may compute its context.

Shapes: B images, Q queries, H heads, S keys, D channels of a head; deformable calls have L levels of P points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from headoff.deformable import Shapes, corners
from headoff.gates import Site


class AttentionAddress(NamedTuple):
    """The place of an attention call in the model."""

    site: Site
    layer: int


class AttentionCall(NamedTuple):
    """The arguments of one attention call of the model, and its place.

    Attributes:
        address: site and layer.
        query: (B, H, Q, D).
        key, value: (B, H, S, D); the widths of keys and values may differ.
        attn_mask: broadcastable to (B, H, Q, S), or None.
        head_gate: 4 dimensions, broadcastable to (B, H, Q, 1), in the query's dtype; None where every head is on.
    """

    address: AttentionAddress
    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    head_gate: Tensor | None

    @property
    def rows(self) -> int:
        """Q."""
        return self.query.shape[-2]

    @property
    def requires_grad(self) -> bool:
        """Whether autograd follows any input."""
        return any(x.requires_grad for x in (self.query, self.key, self.value))

    def weights_at(self, queries: Tensor) -> Tensor:
        """Attention weights before the gate at some queries (q,): float64 (B, H, q, S)."""
        query = self.query.index_select(2, queries).double()
        scores = query @ self.key.double().transpose(-1, -2) / query.shape[-1] ** 0.5
        if self.attn_mask is not None:
            mask = self.attn_mask
            mask = mask if mask.shape[2] == 1 else mask.index_select(2, queries)
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(-1)


class DeformableCall(NamedTuple):
    """The arguments of one call of multi-scale deformable attention, and its place.

    It is attention with few weights that are not 0: those of the four tokens around each sampling point.

    Attributes:
        address: site and layer.
        value: (B, H, S, D), the tokens of all levels; tokens of padding are 0.
        spatial_shapes: (h, w) of each level.
        locations: (B, Q, H, L, P, 2), see `headoff.deformable.contract`.
        weights: (B, Q, H, L, P).
        head_gate: 4 dimensions, broadcastable to (B, H, Q, 1), in the value's dtype; None where every head is on.
    """

    address: AttentionAddress
    value: Tensor
    spatial_shapes: Shapes
    locations: Tensor
    weights: Tensor
    head_gate: Tensor | None

    @property
    def attn_mask(self) -> None:
        """None: padding is in the value."""
        return None

    @property
    def rows(self) -> int:
        """Q."""
        return self.locations.shape[1]

    @property
    def requires_grad(self) -> bool:
        """Whether autograd follows any input."""
        return any(x.requires_grad for x in (self.value, self.locations, self.weights))

    def corner_weights(self) -> tuple[Tensor, Tensor]:
        """Tokens (B, H, Q, L * P * 4), int64, and their weights before the gate, in the dtype of `weights`."""
        tokens, bilinear = corners(self.spatial_shapes, self.locations)
        weights = self.weights[..., None] * bilinear
        return tokens.transpose(1, 2).flatten(3), weights.transpose(1, 2).flatten(3)

    def weights_at(self, queries: Tensor) -> Tensor:
        """Attention weights before the gate at some queries (q,): float64 (B, H, q, S)."""
        some = self._replace(
            locations=self.locations.index_select(1, queries).double(),
            weights=self.weights.index_select(1, queries).double(),
        )
        tokens, weights = some.corner_weights()
        dense = weights.new_zeros(*weights.shape[:3], self.value.shape[2])
        return dense.scatter_add_(-1, tokens, weights)


Call = AttentionCall | DeformableCall

Attend = Callable[..., Tensor]
"""Computes the context (B, H, Q, D) of a `Call`. See `Detector.context_of` for a second argument, of headoff's DETR."""

Split = Callable[[Tensor], Tensor]
"""Copies rows of contexts (B, H, Q, D) of runs of the decoder to the runs that continue them."""

Replacement = Callable[[Any], Tensor]
"""Computes what a head that is off contributes in place of its context, broadcastable to (B, H, Q, D)."""


class Interceptor(Protocol):
    """Computes the context of a call, with the help of `proceed(call)`, which computes it without the interceptor."""

    def __call__(self, call: Any, proceed: Attend) -> Tensor: ...
