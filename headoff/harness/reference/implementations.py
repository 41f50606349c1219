"""Right implementations of attention that round differently: what a tolerance has to admit.

One implementation's rounding errors are one draw, and may be small by luck. So every tolerance of the harness is
measured on several standard formulations, written here in plain PyTorch: none of them is code that anybody tests.

In half precision all but eager attention and the softmax by hand have scores, statistics of the softmax and sums in
float32, and weights in the dtype of the values, as kernels have. An `exp(scores - logsumexp(scores))` whose logsumexp
is rounded to bfloat16 is off by ten times as much as the others, and is no standard to measure by.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.attention.eager import eager

KEY_BLOCK = 16
"""Keys per block of the blocked formulations: some blocks even of the smallest model, and mostly a partial last one."""


@dataclass(frozen=True)
class Formulation:
    """Attention with the softmax written out, differentiated by autograd.

    Args:
        scale: where 1 / sqrt(D) is applied: to the query, to the scores, or its root to both query and key.
        normalize: "first" divides the weights by their sum, "last" divides the context, "logsumexp" computes the
            weights as exp(scores - logsumexp(scores)).
        key_block: keys per block of an online softmax, as in FlashAttention; None for all keys at once.
        powers_of_2: whether exp2 is used, with log2(e) multiplied into the scores, as in many Triton kernels.
        gate: whether the head gate multiplies the weights or the context.
        by_hand: whether every step is in the dtype of the query and differentiated, as in a few lines of PyTorch: even
            the maximum, whose gradients cancel except for roundings.
    """

    scale: Literal["query", "scores", "both"] = "query"
    normalize: Literal["first", "last", "logsumexp"] = "last"
    key_block: int | None = None
    powers_of_2: bool = False
    gate: Literal["weights", "context"] = "weights"
    by_hand: bool = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        dtype = query.dtype
        compute = dtype if self.by_hand else torch.promote_types(dtype, torch.float32)
        exp, log = (torch.exp2, torch.log2) if self.powers_of_2 else (torch.exp, torch.log)
        base = math.log2(math.e) if self.powers_of_2 else 1.0
        factor = base / math.sqrt(query.shape[-1])
        if self.scale == "query":
            query, factor = query * factor, 1.0
        elif self.scale == "both":
            query, key, factor = query * factor**0.5, key * factor**0.5, 1.0
        gate = 1.0 if head_gate is None else head_gate.to(compute)
        gate_of_weights, gate_of_context = (gate, 1.0) if self.gate == "weights" else (1.0, gate)

        # The statistics of the online softmax: a running maximum and the sum of exponentials relative to it.
        maximum: Any = -math.inf
        total: Any = 0.0
        context: Any = 0.0
        blocks = []
        for scores, values in _blocks(query.to(compute), key, value, attn_mask, self.key_block, factor, base):
            blocks.append((scores, values))
            largest = (scores if self.by_hand else scores.detach()).amax(-1, keepdim=True).clamp(min=maximum)
            # A row without any key so far has the maximum -inf: 0 in its place gives exponentials of 0, and no NaN.
            finite = largest.masked_fill(largest == -math.inf, 0.0)
            rescale, exponentials = exp(maximum - finite), exp(scores - finite)
            total = total * rescale + exponentials.sum(-1, keepdim=True)
            if self.normalize == "last":
                weights = (exponentials * gate_of_weights).to(dtype).to(compute)
                context = context * rescale + weights @ values
            maximum = largest
        total = torch.where(total > 0, total, 1.0)
        if self.normalize == "last":
            context = context / total
        for scores, values in blocks if self.normalize != "last" else ():
            if self.normalize == "logsumexp":
                weights = exp(scores - (finite + log(total)))
            else:
                weights = (exponentials if self.by_hand else exp(scores - finite)) / total
            context = context + (weights * gate_of_weights).to(dtype).to(compute) @ values
        return (context * gate_of_context).to(dtype)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """FlashAttention's backward pass: weights recomputed from the logsumexp, delta from the rounded context.

    Dao et al., "FlashAttention" (arXiv 2205.14135), algorithm 4. The forward pass is `Formulation`'s online softmax.
    """
    return _Flash.apply(query, key, value, attn_mask, head_gate)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        head_gate: Tensor | None,
    ) -> Tensor:
        context = Formulation(key_block=KEY_BLOCK)(query, key, value, attn_mask)
        ctx.save_for_backward(query, key, value, attn_mask, head_gate, context)
        return context if head_gate is None else context * head_gate.to(context)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, attn_mask, head_gate, context = ctx.saved_tensors
        dtype, compute = query.dtype, torch.promote_types(query.dtype, torch.float32)
        factor = 1 / math.sqrt(query.shape[-1])
        (grad_context,) = gradients
        if head_gate is not None:
            grad_context = grad_context * head_gate.to(grad_context)
        grad_context, wide_query = grad_context.to(compute), query.to(compute)
        delta = (grad_context * context.to(compute)).sum(-1, keepdim=True)
        blocks = list(_blocks(wide_query, key, value, attn_mask, KEY_BLOCK, factor))
        lse = torch.cat([scores.logsumexp(-1, keepdim=True) for scores, _ in blocks], -1).logsumexp(-1, True)
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        grad_query = torch.zeros_like(wide_query)
        grads_key, grads_value = [], []
        for keys, (scores, values) in zip(key.split(KEY_BLOCK, -2), blocks, strict=True):
            weights = (scores - lse).exp()
            grad_scores = weights * (grad_context @ values.mT - delta) * factor
            rounded = grad_scores.to(dtype).to(compute)
            grad_query += rounded @ keys.to(compute)
            grads_key.append(rounded.mT @ wide_query)
            grads_value.append(weights.to(dtype).to(compute).mT @ grad_context)
        grad_key, grad_value = torch.cat(grads_key, -2), torch.cat(grads_value, -2)
        return grad_query.to(dtype), grad_key.to(dtype), grad_value.to(dtype), None, None


class ExtraRounding:
    """Eager attention with one more rounding of its context, and so of the context's gradient.

    Any number of draws for where a few formulations are too few. The same `seed` rounds the same way, call by call, on
    every device.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        context = eager(query, key, value, attn_mask, head_gate=head_gate)
        noise = torch.rand(context.shape, generator=self._generator, dtype=torch.float64) - 0.5
        factor = noise.mul_(torch.finfo(context.dtype).eps).add_(1).to(context.device)
        # In float64, because in the context's own dtype a factor so near 1 is 1.
        return (context.double() * factor).to(context.dtype)


STANDARD: dict[str, Attention] = {
    "eager": eager,
    "softmax by hand": Formulation(normalize="first", gate="context", by_hand=True),
    "exp(scores - logsumexp(scores))": Formulation(scale="scores", normalize="logsumexp"),
    "online softmax in powers of 2": Formulation(key_block=KEY_BLOCK, powers_of_2=True),
    "FlashAttention": flash,
}
"""The formulations that tolerances are measured on, by name."""


def right_implementations() -> Iterator[Attention]:
    """Those of `STANDARD`, and eager attention with an extra rounding."""
    yield from STANDARD.values()
    yield ExtraRounding(1)


def more_implementations(count: int, first_seed: int) -> Iterator[Attention]:
    """`count` of eager attention with extra roundings; those with `first_seed` > 1 are not `right_implementations`."""
    for seed in range(first_seed, first_seed + count):
        yield ExtraRounding(seed)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What rounding errors depend on, apart from the numbers: each entry is a text that changes with it."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return {"device": f"{device.type} {name}", "dtype": str(dtype), "torch": torch.__version__}


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    size: int | None,
    factor: float,
    base: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Masked scores (B, H, Q, S') times `base`, and values (B, H, S', D), for `size` keys at a time.

    Both are in the dtype of `query`; `factor` is what its product with the key still lacks.
    """
    size = size or key.shape[-2]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], key.shape[-2])
    for index, (keys, values) in enumerate(zip(key.split(size, -2), value.split(size, -2), strict=True)):
        scores = query @ keys.to(query.dtype).mT * factor
        if attn_mask is not None:
            mask = attn_mask[..., index * size : (index + 1) * size]
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -math.inf)
            else:
                scores = scores + mask.to(scores) * base
        yield scores, values.to(query.dtype)
