"""Gradients of an attention call by the backward pass of the attention callable, as tests of a patch need them."""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.calls import Attend, AttentionCall
from headoff.errors import AttentionError
from headoff.relevance.records import AttentionRecord, select_runs


def gradients_by_callable(
    record: AttentionRecord, attend: Attend, dtype: torch.dtype, grad_context: Tensor, runs: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value (P, H, T or S, D) from that of the context, all P pairs in one call.

    `attend` is called in `dtype`, head gate included, on the record's runs `runs` (P,). The forward pass is repeated,
    because a kernel's backward pass may free the tensors that it needs, so a graph could be used only once.

    Raises:
        AttentionError: the attention has no backward pass, or it fails.
    """

    def leaf(x: Tensor) -> Tensor:
        x = x.expand(len(runs), *x.shape[1:]) if len(x) == 1 else select_runs(x, runs)
        return x.to(dtype).detach().requires_grad_()

    query, key, value = leaf(record.query), leaf(record.key), leaf(record.value)
    mask = None if record.keys is None else record.keys[None, None, None]
    gate = None if record.gate is None else select_runs(record.gate, runs).to(dtype)
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
    except Exception as error:  # errors of Triton have no common base
        raise AttentionError(
            f"the backward pass of the attention failed at {record.address.site}, layer "
            f"{record.address.layer} ({' '.join(str(error).split())}): give it one, or use "
            "backward='analytic', which needs none"
        ) from error
    compute = record.query.dtype
    dq, dk, dv = (
        torch.zeros_like(x, dtype=compute) if gradient is None else gradient.to(compute) / loss_scale
        for x, gradient in zip((query, key, value), gradients, strict=True)
    )
    return dq, dk, dv


def _loss_scale(gradient: Tensor) -> Tensor:
    """The power of two that scales the largest gradient to about 1, because float16 cannot represent tiny ones.

    Returned as a tensor without dimensions, so that the host does not wait for its value.
    """
    scale = torch.exp2(-gradient.abs().max().log2().ceil())
    return torch.where(scale.isfinite() & (scale > 0), scale, 1)
