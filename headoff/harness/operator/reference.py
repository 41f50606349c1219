"""What a case's context and gradients are, in float64, and how far rounding alone can move each of their elements.

The scale of an element is the size that its rounding error has in units of the dtype's eps: the root of the sum of
squares of the errors of everything it is computed from, each rounded once in the dtype and taken to be independent of
the others. A weight A = exp(s - lse) has a relative error of as many eps as s and lse are large; sums of n terms are
accumulated in float32 or better, in any order, which for n roundings of partial sums is a random walk. So every element
is judged by its own condition: a small one cannot hide behind a large one, nor one in a row of one head that is
nearly off behind the other heads. The formulas are those of Rabe and Staats (arXiv 2112.05682) and of Dao et al.
(FlashAttention, arXiv 2205.14135, appendix B) for the backward pass, with the gate g between softmax and values:

    A = softmax(Q K^T / sqrt(D) + mask)      context = (g A) V
    dV = (g A)^T dO                          dA = g dO V^T
    dS = A (dA - rowsum(A dA))               dQ = dS K / sqrt(D)     dK = dS^T Q / sqrt(D)

An element whose scale is 0 (a head that is off, a masked key, a fully masked row) has nothing to round, and must be
exactly 0.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headoff.harness.operator.call import CallTensors, tensors_of
from headoff.harness.operator.cases import WANTED, Case, OperatorCase

CHUNK = 2_000_000
"""Attention weights per chunk: matrices that still fit into a cache."""


@dataclass(frozen=True, eq=False)
class Truth:
    """`values` and `scales` by name, float64 on the CPU: `context`, `dq` (B, H, Q, D), `dk`, `dv` (B, H, S, D) of
    attention; each in the shape of its input.

    Only what the case wants; where one tensor is several inputs, its gradient is named after the first.
    """

    values: dict[str, Tensor]
    scales: dict[str, Tensor]


@functools.lru_cache(maxsize=1024)
def truth_of(case: Case) -> Truth:
    """Values and scales of a case, by the formulas and without autograd: the same for every device."""
    return truth_for(tensors_of(case), case)


@functools.singledispatch
def truth_for(tensors: Any, case: Any) -> Truth:
    """The same for other tensors of the case's sizes and dtype."""
    raise NotImplementedError(type(tensors))


@truth_for.register
def _(tensors: CallTensors, case: OperatorCase) -> Truth:
    exact = tensors.double()
    heads = case.batch * case.heads
    per_chunk = max(1, CHUNK // (case.queries * case.keys))
    mask, gate = _per_head(exact.mask, case, case.keys), _per_head(exact.gate, case, 1)

    def part(tensor: Tensor, start: int) -> Tensor:
        return tensor[start : start + per_chunk]

    parts = [
        _truth_of_heads(
            part(exact.query.flatten(0, 1), start),
            part(exact.key.flatten(0, 1), start),
            part(exact.value.flatten(0, 1), start),
            part(exact.grad_context.flatten(0, 1), start),
            None if mask is None else part(mask, start),
            None if gate is None else part(gate, start),
            case.dtype,
        )
        for start in range(0, heads, per_chunk)
    ]
    values, scales = (
        {
            name: torch.cat([part[k][name] for part in parts]).unflatten(0, (case.batch, case.heads))
            for name in NAMES
        }
        for k in (0, 1)
    )
    for own, shared in zip(NAMES[1:], case.gradient_names.values(), strict=True):
        if own != shared:
            values[shared] = values[shared] + values.pop(own)
            scales[shared] = scales[shared].hypot(scales.pop(own)).hypot(values[shared])
    wanted = {"context", *(case.gradient_names[name] for name in WANTED[case.wanted])}
    return Truth(*({name: t for name, t in of.items() if name in wanted} for of in (values, scales)))


NAMES = ("context", "dq", "dk", "dv")


def _per_head(tensor: Tensor | None, case: OperatorCase, last: int) -> Tensor | None:
    """Mask or gate as (B * H, Q or 1, S or 1)."""
    if tensor is None:
        return None
    tensor = tensor[(None,) * (4 - tensor.dim())]
    return tensor.expand(case.batch, case.heads, -1, -1).flatten(0, 1)


def _truth_of_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_context: Tensor,
    mask: Tensor | None,
    gate: Tensor | None,
    dtype: torch.dtype,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and scales of n heads: query and grad_context (n, Q, D), key and value (n, S, D), gate (n, Q or 1, 1)."""
    queries, channels = query.shape[-2:]
    keys = key.shape[-2]
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    # What underflows is lost or rounded to a multiple of eps * tiny: only float16, whose kernels keep such numbers,
    # has an exponent so short that it matters.
    # (Its square must not underflow here.)
    underflow = tiny if dtype == torch.float16 else max(tiny / eps, 1e-150)
    accumulation = (min(eps, torch.finfo(torch.float32).eps) / eps) ** 2

    def summed(squares: Tensor, value: Tensor, terms: int) -> Tensor:
        """The squared error of a sum: `squares`, those of its terms, and what accumulating and rounding it adds."""
        return (1 + terms * accumulation) * (squares + value.square()) + underflow**2 * (squares > 0).double()

    on = torch.ones(1, 1, 1, dtype=torch.float64) if gate is None else gate
    query2, key2, value2, grad_context2 = (tensor.square() for tensor in (query, key, value, grad_context))

    scores = query @ key.mT / math.sqrt(channels)
    relative2 = summed(query2 @ key2.mT / channels, scores, channels)
    attended = torch.ones((), dtype=torch.bool)
    if mask is not None:
        if mask.dtype == torch.bool:
            attended = mask
            scores = scores.masked_fill(~mask, -math.inf)
        else:
            attended = mask != -math.inf
            relative2 = relative2 + mask.masked_fill(~attended, 0.0).square()
            scores = scores + mask
            relative2 = relative2 + scores.masked_fill(~attended, 0.0).square()
    log_sum_exp = scores.logsumexp(-1, keepdim=True)
    log_sum_exp = log_sum_exp.masked_fill(log_sum_exp == -math.inf, 0.0)
    weights = (scores - log_sum_exp).exp()
    weights2 = weights.square()
    relative2 = 1 + relative2 + log_sum_exp.square()
    # To the first order, the relative error of exp(s) is the error of s; large scores in few bits are beyond that. (No
    # exponent overflows here, and no weight is off by more than 1.)
    relative2 = ((relative2.sqrt() * eps).clamp(max=100).expm1() / eps).square()
    normaliser2 = summed((weights2 * relative2).sum(-1, keepdim=True), weights.sum(-1, keepdim=True), keys)
    normaliser2 = normaliser2.clamp(max=eps**-2)
    weight_errors2 = (weights2 * (relative2 + normaliser2)).clamp(max=eps**-2)
    weight_errors2 = weight_errors2 + underflow**2 * attended.double()
    # What all weights of a row have in common does not average out over its keys.
    common2 = normaliser2 + log_sum_exp.square()

    ungated = weights @ value
    context = on * ungated
    ungated_errors2 = summed(weight_errors2 @ value2 + ungated.square() * common2, ungated, keys)
    context_errors2 = summed(on.square() * ungated_errors2, context, 0)

    dv = (on * weights).mT @ grad_context
    dv_errors2 = summed((on.square() * weight_errors2).mT @ grad_context2, dv, queries)

    grad_weights = grad_context @ value.mT
    gated = on * grad_weights
    gated_errors2 = summed(on.square() * summed(grad_context2 @ value2.mT, grad_weights, channels), gated, 0)
    delta = (weights * gated).sum(-1, keepdim=True)
    delta_errors2 = (
        summed(
            (weight_errors2 * gated.square() + weights2 * gated_errors2).sum(-1, keepdim=True), delta, keys
        )
        + (grad_context2 * context_errors2).sum(-1, keepdim=True)
        + delta.square() * common2
    )
    grad_scores = weights * (gated - delta)
    score_errors2 = summed(
        weight_errors2 * (gated - delta).square() + weights2 * (gated_errors2 + delta_errors2),
        grad_scores,
        0,
    )

    dq = grad_scores @ key / math.sqrt(channels)
    of_delta2 = delta_errors2 * (weights @ key).square() / channels
    dq_errors2 = summed(score_errors2 @ key2 / channels + of_delta2 + dq.square() * common2, dq, keys)
    dk = grad_scores.mT @ query / math.sqrt(channels)
    dk_errors2 = summed(score_errors2.mT @ query2 / channels, dk, queries)

    values = {"context": context, "dq": dq, "dk": dk, "dv": dv}
    errors2 = {"context": context_errors2, "dq": dq_errors2, "dk": dk_errors2, "dv": dv_errors2}
    return values, {name: squares.sqrt() for name, squares in errors2.items()}
