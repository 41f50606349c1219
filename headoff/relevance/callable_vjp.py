"""Gradients through an attention by its own backward pass: what a patch under test is judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.detr.transformer import Attend, AttentionCall
from headoff.errors import AttentionError
from headoff.relevance.capture import AttentionRecord
from headoff.relevance.vjp import of_runs


def gradients_by_callable(
    record: AttentionRecord, attend: Attend, dtype: torch.dtype, gradient: Tensor, runs: Tensor
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
    lent = _lent(gradient) if dtype == torch.float16 else 1.0
    try:
        with torch.enable_grad():
            context = attend(AttentionCall(record.address, query, key, value, mask, gate))
            if not context.requires_grad:
                raise RuntimeError("its context has no gradient")
            found = torch.autograd.grad(
                context, (query, key, value), (gradient * lent).to(dtype), allow_unused=True
            )
    except AttentionError:
        raise
    except Exception as error:  # a patch's own, whatever its kind: Triton's errors are no RuntimeErrors
        raise AttentionError(
            f"the backward pass of the attention failed at {record.address.site}, layer "
            f"{record.address.layer} ({' '.join(str(error).split())}): give it one, or explain with "
            "backward='analytic', which needs none"
        ) from error
    compute = record.query.dtype
    dq, dk, dv = (
        torch.zeros_like(leaf_, dtype=compute) if gradient_ is None else gradient_.to(compute) / lent
        for leaf_, gradient_ in zip((query, key, value), found, strict=True)
    )
    return dq, dk, dv


def _lent(gradient: Tensor) -> Tensor:
    """The power of two that brings the largest gradient near 1: half precision cannot hold the smallest of them.

    A tensor of no dimensions: a number would have to be waited for.
    """
    lent = torch.exp2(-gradient.abs().max().log2().ceil())
    return torch.where(lent.isfinite() & (lent > 0), lent, 1)
