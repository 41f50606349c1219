"""Tolerance self-tests: wrong answers that the tolerance must reject.

A wrong answer is what an attention with one known fault would return, computed by the oracle in float64 and rounded to
the dtype of the case, so that nothing but the fault is there to be detected. It must be rejected by the comparison that
is used on candidates, in each case where it changes some element by much more than the roundings of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headoff.attention.eager import eager
from headoff.harness.operator.call import CallTensors, Results, call, tensors_of
from headoff.harness.operator.cases import OperatorCase, reduced_cases
from headoff.harness.operator.compare import comparisons
from headoff.harness.operator.reference import truth_of

Change = Callable[[CallTensors], CallTensors | None]
"""Tensors for which a right attention gives the wrong answer; None where the fault does not apply."""


def full_gate(tensors: CallTensors) -> Tensor:
    """The gate as (B, H, Q, 1); all ones where there is none."""
    shape = (*tensors.query.shape[:-1], 1)
    if tensors.gate is None:
        return tensors.query.new_ones(shape)
    return tensors.gate.expand(shape)


def full_mask(tensors: CallTensors) -> Tensor:
    """The mask as a float (B, H, Q, S); zeros where there is none."""
    shape = (*tensors.query.shape[:-1], tensors.key.shape[-2])
    mask = tensors.mask
    if mask is None:
        return tensors.query.new_zeros(shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=tensors.query.dtype).masked_fill(~mask, -math.inf)
    return mask.expand(shape)


def without_keys(tensors: CallTensors, dropped: Tensor) -> CallTensors:
    """The same with those keys (S,) masked where `dropped` is True."""
    return replace(tensors, mask=full_mask(tensors).masked_fill(dropped.to(tensors.query.device), -math.inf))


def _gate_of_next(dim: int) -> Change:
    def change(tensors: CallTensors) -> CallTensors | None:
        gate = full_gate(tensors)
        return replace(tensors, gate=gate.roll(1, dim)) if gate.shape[dim] > 1 else None

    return change


def _flip_head(tensors: CallTensors) -> CallTensors:
    gate = full_gate(tensors).clone()
    gate[:, -1] = 1 - gate[:, -1]
    return replace(tensors, gate=gate)


def _mask_of_next_item(tensors: CallTensors) -> CallTensors | None:
    if tensors.mask is None or len(tensors.query) == 1:
        return None
    return replace(tensors, mask=full_mask(tensors).roll(1, 0))


def _drop_key(which: Callable[[int], int]) -> Change:
    def change(tensors: CallTensors) -> CallTensors | None:
        keys = tensors.key.shape[-2]
        place = which(keys)
        return without_keys(tensors, torch.arange(keys) == place) if keys > 1 and 0 <= place < keys else None

    return change


def _scale_off(relative: float) -> Change:
    return lambda tensors: replace(tensors, query=tensors.query * (1 + relative))


FORWARD: dict[str, Change] = {
    "one head's gate flipped": _flip_head,
    "gate of the next head": _gate_of_next(1),
    "gate of the next query": _gate_of_next(2),
    "gate of the next batch item": _gate_of_next(0),
    "gate ignored": lambda tensors: None if tensors.gate is None else replace(tensors, gate=None),
    "mask ignored": lambda tensors: None if tensors.mask is None else replace(tensors, mask=None),
    "mask of the next batch item": _mask_of_next_item,
    "last key dropped": _drop_key(lambda keys: keys - 1),
    "first key dropped": _drop_key(lambda keys: 0),
    "last key of a block of 16 dropped": _drop_key(lambda keys: 15),
    "last key of a block of 64 dropped": _drop_key(lambda keys: 63),
    "scale off by a hundredth": _scale_off(0.01),
    "scale off by a ten-thousandth": _scale_off(1e-4),
}
"""Faults of the forward pass, as changes of its inputs."""


def _zero_context(results: Results) -> Results:
    return {**results, "context": torch.zeros_like(results["context"])}


def _times(name: str, factor: Callable[[Tensor], float]) -> Callable[[Results], Results]:
    return lambda results: {**results, name: results[name] * factor(results["dq"])}


BACKWARD: dict[str, Callable[[Results], Results]] = {
    "a context of zeros": _zero_context,
    "dq scaled once more": _times("dq", lambda dq: dq.shape[-1] ** -0.5),
    "dq not scaled": _times("dq", lambda dq: dq.shape[-1] ** 0.5),
    "dk scaled once more": _times("dk", lambda dq: dq.shape[-1] ** -0.5),
    "dk not scaled": _times("dk", lambda dq: dq.shape[-1] ** 0.5),
    "dv of zeros": _times("dv", lambda dq: 0.0),
}
"""Faults of single results, as changes of the results."""

GRADIENT_FORMULAS = ("dv ungated", "softmax backward without its correction", "dq and dk ungated")
"""Faults of the backward pass with a formula of their own."""

FAULTS: tuple[str, ...] = (*FORWARD, *BACKWARD, *GRADIENT_FORMULAS)


def wrong_results(case: OperatorCase, fault: str) -> Results | None:
    """What an attention with this `fault` (of `FAULTS`) returns, in the case's dtype; None where it does not apply."""
    tensors = tensors_of(case).double()
    if fault in FORWARD:
        changed = FORWARD[fault](tensors)
        if changed is None:
            return None
        results = call(eager, changed, case.wanted)
        if fault.startswith("scale"):
            results["dq"] = results["dq"] * _scale_of(changed, tensors)
    elif fault in BACKWARD:
        results = BACKWARD[fault](dict(truth_of(case).values))
    else:
        results = {**truth_of(case).values, **_wrong_backward(tensors, fault)}
    return {name: tensor.to(case.dtype) for name, tensor in results.items()}


def _scale_of(changed: CallTensors, tensors: CallTensors) -> float:
    """By how much larger the query is; the gradient of a scaled query is that much larger, too."""
    return float(changed.query.norm() / tensors.query.norm())


def _wrong_backward(tensors: CallTensors, fault: str) -> Results:
    query, key, value, gate = tensors.query, tensors.key, tensors.value, full_gate(tensors)
    channels = query.shape[-1]
    identity = torch.eye(key.shape[-2], dtype=torch.float64).expand(*key.shape[:2], -1, -1)
    weights = eager(query, key, identity, tensors.mask)
    if fault == "dv ungated":
        return {"dv": weights.mT @ tensors.grad_context}
    grad_weights = tensors.grad_context @ value.mT
    if fault == "dq and dk ungated":
        delta = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - delta)
    else:
        grad_scores = weights * gate * grad_weights
    return {
        "dq": grad_scores @ key / math.sqrt(channels),
        "dk": grad_scores.mT @ query / math.sqrt(channels),
    }


LARGEST_CASE = 7e4
"""Attention weights of the largest case that wrong answers are made for."""

ENOUGH = 8
"""Cases in which a fault has to be rejected."""

CLEARLY_WRONG = 100.0
"""Roundings from which on a wrong answer must be rejected in every case."""

TOO_SMALL = {
    "scale off by a hundredth": (torch.bfloat16,),
    "scale off by a ten-thousandth": (torch.bfloat16, torch.float16),
}
"""Faults that are smaller than the roundings of a dtype."""


def undetected(fault: str, dtype: torch.dtype, device: torch.device, seed: int) -> bool:
    """Whether the tolerance accepts the answers of `fault` in all cases; only where that is expected (`TOO_SMALL`).

    Raises:
        AssertionError: it accepts an answer that is clearly wrong, or all answers of a fault that it should detect.
    """
    rejected = 0
    for case in reduced_cases(dtype, seed):
        results = wrong_results(case, fault) if case.weights <= LARGEST_CASE else None
        if results is None:
            continue
        is_rejected = any(not comparison.is_right for comparison in comparisons(results, case, device))
        if not is_rejected and _is_clearly_wrong(results, case):
            raise AssertionError(f"the tolerance accepts '{fault}' in case {case}")
        rejected += is_rejected
        if rejected == ENOUGH:
            break
    if not rejected and dtype not in TOO_SMALL.get(fault, ()):
        raise AssertionError(f"the tolerance accepts '{fault}' in all cases of {dtype}")
    return not rejected


def _is_clearly_wrong(results: Results, case: OperatorCase) -> bool:
    truth, threshold = truth_of(case), CLEARLY_WRONG * torch.finfo(case.dtype).eps
    return any(
        bool(((results[name].double() - true).abs() > threshold * truth.scales[name]).any())
        for name, true in truth.values.items()
    )
