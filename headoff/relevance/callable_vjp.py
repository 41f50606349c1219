"""Gradients through an attention by its own backward pass, which is what tests of a patch have to use."""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.detr.transformer import Attend, AttentionCall
from headoff.errors import AttentionError
from headoff.relevance.records import AttentionRecord, of_runs


def gradients_by_callable(
    record: AttentionRecord, attend: Attend, dtype: torch.dtype, grad_context: Tensor, runs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (P, H, T or S, D) from that of the context, all P pairs in one call.

    `attend` is called in `dtype`, head gate included, on the record's runs `runs` (P,). The forward pass is repeated
    rather than its graph kept, because a kernel's backward pass may free what it needs.

    Raises:
        AttentionError: the attention has no backward pass, or it fails.
    """

    def leaf(x: Tensor) -> Tensor:
        x = x.expand(len(runs), *x.shape[1:]) if len(x) == 1 else of_runs(x, runs)
        return x.to(dtype).detach().requires_grad_()

    query, key, value = leaf(record.query), leaf(record.key), leaf(record.value)
    mask = None if record.keys is None else record.keys[None, None, None]
    gate = None if record.gate is None else of_runs(record.gate, runs).to(dtype)
    loss_scale = _loss_scale(grad_context) if dtype == torch.float16 else 1.0
    try:
        with torch.enable_grad():
            context = attend(AttentionCall(record.address, query, key, value, mask, gate))
            if not context.requires_grad:
                raise RuntimeError("its context has no gradient")
            gradients = torch.autograd.grad(
                context, (query, key, value), (grad_context * loss_scale).to(dtype), allow_unused=True
            )
    except AttentionError:
        raise
    except Exception as error:  # of any kind: not all errors of Triton are RuntimeErrors
        raise AttentionError(
            f"the backward pass of the attention failed at {record.address.site}, layer "
            f"{record.address.layer} ({' '.join(str(error).split())}): give it one, or explain with "
            "backward='analytic', which needs none"
        ) from error
    compute = record.query.dtype
    dq, dk, dv = (
        torch.zeros_like(x, dtype=compute) if gradient is None else gradient.to(compute) / loss_scale
        for x, gradient in zip((query, key, value), gradients, strict=True)
    )
    return dq, dk, dv


def _loss_scale(gradient: Tensor) -> Tensor:
    """The power of two that scales the largest gradient to about 1, because half precision cannot hold tiny ones.

    A tensor without dimensions, rather than a number: the host does not wait for it.
    """
    scale = torch.exp2(-gradient.abs().max().log2().ceil())
    return torch.where(scale.isfinite() & (scale > 0), scale, 1)
