"""Known ways of being wrong, each with the answer that it gives: what a wrong answer is compared with to be named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headoff.attention.eager import eager
from headoff.harness.finding import Property
from headoff.harness.operator.call import CallTensors, tensors_of
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.mutations import full_gate, full_mask
from headoff.harness.operator.reference import truth_of

Answer = Callable[[CallTensors], Tensor]

BLOCKS = (128, 64, 32, 16, 8)

EXPLAINED = 0.02
"""A hypothesis explains a wrong tensor that is this much nearer to its answer than to the truth (root mean squares)."""


def _context(tensors: CallTensors, **changed: Any) -> Tensor:
    of = replace(tensors, **changed)
    return eager(of.query, of.key, of.value, of.mask, head_gate=of.gate)


def _gated(change: Callable[[Tensor], Tensor]) -> Answer:
    return lambda tensors: _context(tensors, gate=change(full_gate(tensors)))


def _renormalised(gate: Tensor) -> Tensor:
    total = gate.sum(1, keepdim=True)
    return torch.where(total != 0, gate * gate.shape[1] / total, gate)


def _gate_on_scores(tensors: CallTensors) -> Tensor:
    gate = full_gate(tensors)
    return _context(tensors, query=tensors.query * gate, gate=None)


def _masked(change: Callable[[Tensor], Tensor]) -> Answer:
    return lambda tensors: _context(tensors, mask=change(full_mask(tensors)))


def _inverted(mask: Tensor) -> Tensor:
    return torch.where(mask == -math.inf, 0.0, -math.inf)


def _keyless_mean(tensors: CallTensors) -> Tensor:
    """Rows without keys attend to all of them equally."""
    mask = full_mask(tensors)
    keyless = (mask == -math.inf).all(-1, keepdim=True)
    mean = full_gate(tensors) * tensors.value.mean(-2, keepdim=True)
    return torch.where(keyless, mean, _context(tensors))


GATE: dict[str, Answer] = {
    "it is ignored": lambda tensors: _context(tensors, gate=None),
    "each head has that of the head before": _gated(lambda gate: gate.roll(1, 1)),
    "each head has that of the head after": _gated(lambda gate: gate.roll(-1, 1)),
    "heads have it in reverse order": _gated(lambda gate: gate.flip(1)),
    "all heads have that of the first": _gated(lambda gate: gate[:, :1].expand_as(gate)),
    "each query has that of the query before": _gated(lambda gate: gate.roll(1, 2)),
    "each query has that of the query after": _gated(lambda gate: gate.roll(-1, 2)),
    "all queries have that of the first": _gated(lambda gate: gate[:, :, :1].expand_as(gate)),
    "all batch items have that of the first": _gated(lambda gate: gate[:1].expand_as(gate)),
    "each batch item has that of the one before": _gated(lambda gate: gate.roll(1, 0)),
    "it is inverted": _gated(lambda gate: 1 - gate),
    "it is applied twice": _gated(torch.square),
    "fractions of it count as 1": _gated(lambda gate: (gate != 0).double()),
    "fractions of it are rounded to 0 or 1": _gated(lambda gate: (gate >= 0.5).double()),
    "fractions of it count as 0": _gated(torch.floor),
    "it is clamped to 0..1": _gated(lambda gate: gate.clamp(0, 1)),
    "its sign is lost": _gated(torch.abs),
    "it is renormalised over the heads": _gated(_renormalised),
    "it multiplies the scores before softmax": _gate_on_scores,
}
MASK: dict[str, Answer] = {
    "it is ignored": lambda tensors: _context(tensors, mask=None),
    "it is inverted": _masked(_inverted),
    "it is added before the scaling": lambda tensors: _context(
        tensors, mask=full_mask(tensors) / math.sqrt(tensors.query.shape[-1])
    ),
    "all batch items have that of the first": _masked(lambda mask: mask[:1].expand_as(mask)),
    "each batch item has that of the one before": _masked(lambda mask: mask.roll(1, 0)),
    "all heads have that of the first": _masked(lambda mask: mask[:, :1].expand_as(mask)),
    "all queries have that of the first": _masked(lambda mask: mask[:, :, :1].expand_as(mask)),
    "each key has that of the key before": _masked(lambda mask: mask.roll(1, 3)),
    "each key has that of the key after": _masked(lambda mask: mask.roll(-1, 3)),
    "a bias is taken for one bit, attend or not": _masked(
        lambda mask: torch.where(mask == 0, -math.inf, 0.0)
    ),
    "its finite biases are ignored": _masked(lambda mask: torch.where(mask == -math.inf, mask, 0.0)),
    "a bool mask is added as 0 and 1": _masked(lambda mask: (mask == 0).double()),
    "rows without keys are the mean of all values": _keyless_mean,
}


def _without_tail(tensors: CallTensors, block: int) -> Tensor:
    keys = tensors.key.shape[-2]
    mask = full_mask(tensors)
    kept = keys // block * block
    return _context(tensors, mask=mask.masked_fill(torch.arange(keys) >= kept, -math.inf))


def _zero_filled(tensors: CallTensors, block: int) -> Tensor:
    rest = -tensors.key.shape[-2] % block
    pad = torch.nn.functional.pad
    return _context(
        tensors,
        key=pad(tensors.key, (0, 0, 0, rest)),
        value=pad(tensors.value, (0, 0, 0, rest)),
        mask=pad(full_mask(tensors), (0, rest)),
    )


SIZES: dict[str, Answer] = {
    "the last key is dropped": lambda tensors: _without_tail(tensors, max(1, tensors.key.shape[-2] - 1)),
    **{f"keys beyond the last multiple of {n} are dropped": partial(_without_tail, block=n) for n in BLOCKS},
    **{
        f"keys are filled up to a multiple of {n} with zeros, which count": partial(_zero_filled, block=n)
        for n in BLOCKS
    },
}


FAMILIES: tuple[tuple[Property, str, dict[str, Answer]], ...] = (
    ("gate", "the gate is wrong: ", GATE),
    ("mask", "the mask is wrong: ", MASK),
    ("sizes", "sizes are wrong: ", SIZES),
)


def explanation_of(context: Tensor, case: OperatorCase) -> tuple[Property, str] | None:
    """The hypothesis that a wrong `context` agrees with best, if it does: a property, and a clause about it."""
    found = context.detach().cpu().double()
    tensors = tensors_of(case).double()
    far = _distance(found, truth_of(case).values["context"])
    best: tuple[float, Property, str] | None = None
    for prop, what, answer in _answers(case):
        near = _distance(found, answer(tensors)) / far
        if near < EXPLAINED and (best is None or near < best[0]):
            best = near, prop, what
    if best is not None:
        return best[1:]
    factor = _scale_factor(found, case, tensors)
    if factor is not None:
        return "scale", f"the scale is wrong: the weights are those of {factor:.6g} / sqrt(D)"
    return None


def _answers(case: OperatorCase) -> Iterator[tuple[Property, str, Answer]]:
    for prop, beginning, answers in FAMILIES:
        if (prop == "gate" and case.gate == "none") or (prop == "mask" and case.mask == "none"):
            continue
        for what, answer in answers.items():
            yield prop, beginning + what, answer


def _distance(one: Tensor, other: Tensor) -> float:
    """Root mean square difference; infinite where anything is not finite."""
    distance = float((one - other).square().mean().sqrt())
    return distance if math.isfinite(distance) else math.inf


def _scale_factor(found: Tensor, case: OperatorCase, tensors: CallTensors) -> float | None:
    """The factor of the scores that gives `found` (B, H, Q, D), if there is one.

    By Gauss-Newton in its logarithm, begun at several places, because the way from 1 to 1 / 8 may be long.
    """
    for start in (1.0, case.channels**-0.5, case.channels**0.5, case.heads**-0.5, 0.7, 1.4):
        logarithm = math.log(start)
        for _ in range(8):
            at, ahead = (
                _context(tensors, query=tensors.query * math.exp(logarithm + step)) for step in (0.0, 1e-5)
            )
            slope = (ahead - at) / 1e-5
            size = float(slope.square().sum())
            if size == 0:
                break
            step = float(((found - at) * slope).sum()) / size
            if not math.isfinite(step):
                break
            logarithm += max(-0.5, min(0.5, step))
        answer = _context(tensors, query=tensors.query * math.exp(logarithm))
        if _distance(found, answer) < EXPLAINED * _distance(found, truth_of(case).values["context"]):
            return math.exp(logarithm)
    return None


def factor_of(found: Tensor, true: Tensor) -> float | None:
    """By how much `found` is `true` multiplied, if it is that and nothing else."""
    found = found.detach().cpu().double()
    size = float(true.square().sum())
    if size == 0:
        return None
    factor = float((found * true).sum()) / size
    explained = _distance(found, factor * true) < EXPLAINED * _distance(found, true)
    return factor if explained else None
