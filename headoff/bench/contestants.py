"""What attention is timed against: each backend of torch's SDPA, flex_attention, the formula, and the package's own."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headoff.attention import Attention, eager, gate_context, sdpa
from headoff.attention.fused import triton_attention

SDPA_BACKENDS = {
    "torch SDPA, math": SDPBackend.MATH,
    "torch SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "torch SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}

MOST_COMPILED = 128
"""Shapes, dtypes, masks and directions that flex_attention is compiled for in one run, at most."""

FLEX = "flex_attention"
EAGER = "eager"
OWN = "headoff sdpa"
TRITON = "headoff triton"


@dataclass(frozen=True)
class SdpaTimesGate:
    """One backend of torch's SDPA, and the gate on its context."""

    backend: SDPBackend

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        # Why a backend refuses is said in warnings; that it does is an error, and enough.
        with warnings.catch_warnings(), sdpa_kernel(self.backend):
            warnings.simplefilter("ignore")
            return gate_context(F.scaled_dot_product_attention(query, key, value, attn_mask), head_gate)


def flex_times_gate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """flex_attention with the mask as its score modification, and the gate on its context.

    A gate acts after softmax, where flex_attention lets nobody in. (As a score modification, log(gate) would be in the
    softmax's sum, which is another function.) Compiled on CUDA; what it does elsewhere, it does without.
    """
    modification = None
    if attn_mask is not None:
        allowed = attn_mask.expand(*query.shape[:3], key.shape[2])

        def modification(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return torch.where(allowed[batch, head, row, column], score, -math.inf)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        context = _flex(query.is_cuda)(query, key, value, score_mod=modification)
    return gate_context(context, head_gate)


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if compiled:
        # Past its limit of shapes it would go on without compiling, and without a word.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
        return torch.compile(flex_attention, dynamic=False)
    uncompiled: Callable[..., Any] = flex_attention
    return uncompiled


def attention_contestants() -> dict[str, Attention]:
    """By name. What a device cannot do shows when it is tried."""
    return {
        **{name: SdpaTimesGate(backend) for name, backend in SDPA_BACKENDS.items()},
        FLEX: flex_times_gate,
        EAGER: eager,
        OWN: sdpa,
        TRITON: triton_attention,
    }
