"""Wrong answers that the budget must refuse: the proof that it is small enough.

Each is what an attention would find that is wrong in one known way, computed by the oracle in float64 and then rounded
to the case's dtype, so that nothing but the fault is there to be seen. An answer must be refused by the very comparison
that is used on candidates, on each case where it is as wrong as low precision can show at all: where the fault
moves something by more than the dtype's roundings could, in some element (`could_be_seen`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from headoff.attention.eager import eager
from headoff.harness.operator.call import CallTensors, Results, call, tensors_of
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.compare import comparisons
from headoff.harness.operator.reference import truth_of

Change = Callable[[CallTensors], CallTensors | None]
"""Tensors under which a right attention gives the wrong answer; None where the fault cannot be."""


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
    """Masked, in addition: those of the keys (S,) where `dropped` is True."""
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
"""Faults of single results, as changes of those."""

OF_BACKWARD = ("dv ungated", "softmax backward without its correction", "dq and dk ungated")
"""Faults of the backward pass that have their own formula."""

FAULTS: tuple[str, ...] = (*FORWARD, *BACKWARD, *OF_BACKWARD)


def wrong_results(case: OperatorCase, fault: str) -> Results | None:
    """What an attention with this `fault` (of `FAULTS`) finds, in the case's dtype; None where it cannot have it."""
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
    """By how much larger the query is: the gradient of one that was scaled is that much larger, too."""
    return float(changed.query.norm() / tensors.query.norm())


def _wrong_backward(tensors: CallTensors, fault: str) -> Results:
    query, key, value, gate = tensors.query, tensors.key, tensors.value, full_gate(tensors)
    channels = query.shape[-1]
    each_key = torch.eye(key.shape[-2], dtype=torch.float64).expand(*key.shape[:2], -1, -1)
    weights = eager(query, key, each_key, tensors.mask)
    if fault == "dv ungated":
        return {"dv": weights.mT @ tensors.gradient}
    weight_gradient = tensors.gradient @ value.mT
    if fault == "dq and dk ungated":
        delta = (weights * weight_gradient).sum(-1, keepdim=True)
        score_gradient = weights * (weight_gradient - delta)
    else:
        score_gradient = weights * gate * weight_gradient
    return {
        "dq": score_gradient @ key / math.sqrt(channels),
        "dk": score_gradient.mT @ query / math.sqrt(channels),
    }


def could_be_seen(results: Results, case: OperatorCase, relative: float) -> bool:
    """Whether any element differs from the truth by more than `relative` of its scale."""
    truth = truth_of(case)
    return any(
        bool(((results[name].double() - true).abs() > relative * truth.scales[name]).any())
        for name, true in truth.values.items()
    )


def is_refused(results: Results, case: OperatorCase, device: torch.device) -> bool:
    """Under the budget that candidates on `device` have."""
    return any(not comparison.is_right for comparison in comparisons(results, case, device))
