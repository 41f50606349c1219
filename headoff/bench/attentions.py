"""The attention providers: each backend of torch's SDPA, flex_attention, eager, and headoff's own."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from headoff.attention import Attention, eager, gate_context, sdpa, skipping
from headoff.attention.fused import triton_attention

SDPA_BACKENDS = {
    "torch SDPA, math": SDPBackend.MATH,
    "torch SDPA, flash": SDPBackend.FLASH_ATTENTION,
    "torch SDPA, efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch SDPA, cuDNN": SDPBackend.CUDNN_ATTENTION,
}

MOST_COMPILED = 128
"""How often flex_attention may be compiled in one run: for each shape, dtype, mask and direction."""

FLEX = "flex_attention"
EAGER = "eager"
OWN = "headoff sdpa"
TRITON = "headoff triton"


@dataclass(frozen=True)
class SdpaTimesGate:
    """One backend of torch's SDPA (None: torch's choice), with the gate applied to its context."""

    backend: SDPBackend | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        backends = [*SDPA_BACKENDS.values()] if self.backend is None else self.backend
        # A backend that does not support a call raises, and explains in warnings.
        with warnings.catch_warnings(), sdpa_kernel(backends):
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
    """flex_attention with the mask as score modification and the gate applied to its context.

    A gate acts after softmax, where flex_attention has no hook: as a score modification, log(gate) would enter the
    softmax's sum, which is a different function. Compiled on CUDA only.
    """
    modification = None
    if attn_mask is not None:
        allowed = attn_mask.expand(*query.shape[:3], key.shape[2])

        def modification(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            return torch.where(allowed[batch, head, row, column], score, -math.inf)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about not being compiled
        context = _flex(query.is_cuda)(query, key, value, score_mod=modification)
    return gate_context(context, head_gate)


@functools.cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    if compiled:
        import torch._dynamo  # it takes longer to import than all of headoff

        # Beyond the limit it would silently run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILED)
        return torch.compile(flex_attention, dynamic=False)
    uncompiled: Callable[..., Any] = flex_attention
    return uncompiled


def skipping_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """SDPA that always leaves out the rows of heads that are off, whether or not that is expected to be faster."""
    assert head_gate is not None and attn_mask is None
    attend = SdpaTimesGate()
    groups = skipping.group_streams(head_gate, query)
    return gate_context(skipping.attend_groups(groups, attend, query, key, value, None), head_gate)


OWN_ATTENTIONS: dict[str, Attention] = {OWN: sdpa, EAGER: eager, TRITON: triton_attention}
SDPA_ATTENTIONS: dict[str, Attention] = {
    name: SdpaTimesGate(backend) for name, backend in SDPA_BACKENDS.items()
}
ATTENTIONS: dict[str, Attention] = {**SDPA_ATTENTIONS, FLEX: flex_times_gate, **OWN_ATTENTIONS}
"""By name. Whether a device supports one shows when it is tried."""
