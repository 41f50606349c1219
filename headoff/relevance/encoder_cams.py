"""The encoder's cams as linear maps: their products with vectors.

Shapes: P pairs of (configuration, target), M decoder layers, N image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from headoff.relevance.attention_vjp import AttentionVjp
from headoff.relevance.sampled_vjp import SampledVjp


class EncoderCams(Protocol):
    """The cams E_l of all encoder layers."""

    def __len__(self) -> int: ...

    def right(self, layer: int, vectors: Tensor) -> Tensor:
        """E_l times vectors (P, N): (P, N)."""
        ...

    def left(self, layer: int, rows: Tensor) -> Tensor:
        """Row vectors (P, M, N) times E_l: (P, M, N)."""
        ...


class StoredCams:
    """Encoder cams as matrices (P or 1, N, N) per layer."""

    def __init__(self, cams: list[Tensor]) -> None:
        self._cams = cams

    def __len__(self) -> int:
        return len(self._cams)

    def right(self, layer: int, vectors: Tensor) -> Tensor:
        return (self._cams[layer] @ vectors[:, :, None])[:, :, 0]

    def left(self, layer: int, rows: Tensor) -> Tensor:
        return rows @ self._cams[layer]


class RecomputedCams:
    """Encoder cams that are recomputed tile by tile for each product, from the gradients of the contexts, and from
    `contributions` if there are any (see `AttentionVjp`).
    """

    def __init__(
        self,
        attention: Sequence[AttentionVjp | SampledVjp],
        grad_contexts: Sequence[Tensor] | None,
        contributions: Sequence[Tensor] | None = None,
    ) -> None:
        self._attention = attention
        self._grad_contexts = grad_contexts
        self._contributions = contributions

    def __len__(self) -> int:
        return len(self._attention)

    def right(self, layer: int, vectors: Tensor) -> Tensor:
        return self._attention[layer].right(*self._arguments(layer, vectors), vectors, **self._options(layer))

    def left(self, layer: int, rows: Tensor) -> Tensor:
        return self._attention[layer].left(*self._arguments(layer, rows), rows, **self._options(layer))

    def _arguments(self, layer: int, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """The gradient of the layer's context, and the run of each pair, which is 0 in the encoder."""
        grad_context = None if self._grad_contexts is None else self._grad_contexts[layer]
        return grad_context, torch.zeros(len(like), dtype=torch.long, device=like.device)

    def _options(self, layer: int) -> dict[str, Tensor]:
        return {} if self._contributions is None else {"contribution": self._contributions[layer]}
