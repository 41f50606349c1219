"""Known faults as small faulty references: attention in float64, in steps, with one of the steps replaced.

A diagnosis names a fault only if its reference gives the wrong numbers of the patch (`diagnosis`).
A fault of the forward pass answers with the context alone. A fault of the backward pass answers with the right context
and wrong gradients; its first steps recompute the weights, so every slip with gate or mask can be one of either.
"""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from headoff.harness.finding import Property
from headoff.harness.operator.call import CallTensors, Results
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.fault import Fault

Step = Callable[[SimpleNamespace], Any]
Steps = Mapping[str, Step]
Change = Callable[[Tensor], Tensor]

BLOCKS = (8, 16, 32, 64, 128)
LIMITS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 32768)
"""Block sizes, and sizes of buffers and grids, that kernels commonly have."""


@dataclass(frozen=True, eq=False)
class OperatorFault(Fault):
    """One way to be wrong.

    Args:
        steps: the steps (of `FORWARD` and `BACKWARD`) that replace the right ones.
        is_backward: whether only gradients are wrong.
        rounding: the eps of the dtype that the fault rounds to; 0 for a fault that is no rounding.
    """

    steps: Steps
    is_backward: bool = False
    rounding: float = 0.0

    def answer(self, tensors: CallTensors, case: OperatorCase) -> Results:
        s = _start(tensors)
        if not self.is_backward:
            return {"context": _run({**FORWARD, **self.steps}, s).context}
        _run({**FORWARD, **BACKWARD, **self.steps}, s)
        answer: Results = {}
        for own, shared in zip(("dq", "dk", "dv"), case.gradient_names.values(), strict=True):
            answer[shared] = answer[shared] + s.__dict__[own] if shared in answer else s.__dict__[own]
        return answer


# The right attention


def _start(tensors: CallTensors) -> SimpleNamespace:
    """The inputs; gate (B, H, Q, 1) and mask (B, H, Q, S), additive, are 1 and 0 where the call has none."""
    exact = tensors.double()
    *rows, channels = exact.query.shape
    keys = exact.key.shape[-2]
    gate = exact.query.new_ones(1) if exact.gate is None else exact.gate
    mask = exact.query.new_zeros(1) if exact.mask is None else exact.mask
    is_bool = mask.dtype == torch.bool
    return SimpleNamespace(
        query=exact.query,
        key=exact.key,
        value=exact.value,
        grad_context=exact.grad_context,
        gate=gate.expand(*rows, 1),
        mask=(_additive(mask) if is_bool else mask).expand(*rows, keys),
        has_gate=exact.gate is not None,
        has_mask=exact.mask is not None,
        is_bool=is_bool,
        channels=channels,
        queries=rows[-1],
        keys=keys,
    )


def _run(steps: Steps, s: SimpleNamespace) -> SimpleNamespace:
    absent = {name for name, given in (("gate", s.has_gate), ("mask", s.has_mask)) if not given}
    for name, step in steps.items():
        if name not in absent:
            setattr(s, name, step(s))
    return s


FORWARD: dict[str, Step] = {
    "gate": lambda s: s.gate,
    "mask": lambda s: s.mask,
    "scale": lambda s: s.channels**-0.5,
    "scores": lambda s: s.query @ s.key.mT * s.scale,
    "masked": lambda s: s.scores + s.mask,
    "fully_masked": lambda s: (s.masked == -math.inf).all(-1, keepdim=True),
    "filled": lambda s: s.masked.masked_fill(s.fully_masked, 0.0),
    "softmax": lambda s: s.filled.softmax(-1),
    "weights": lambda s: s.softmax.masked_fill(s.fully_masked, 0.0),
    "gated": lambda s: s.weights * s.gate,
    "context": lambda s: s.gated @ s.value,
}

BACKWARD: dict[str, Step] = {
    "gated_gradient": lambda s: s.grad_context * s.gate,
    "dweights": lambda s: s.gated_gradient @ s.value.mT,
    "delta": lambda s: (s.weights * s.dweights).sum(-1, keepdim=True),
    "dscores": lambda s: s.weights * (s.dweights - s.delta),
    "dq": lambda s: s.dscores @ s.key * s.scale,
    "dk": lambda s: s.dscores.mT @ s.query * s.scale,
    "dv": lambda s: s.weights.mT @ s.gated_gradient,
}


def right_weights(tensors: CallTensors) -> Tensor:
    """The gated attention weights (B, H, Q, S) of a call, float64."""
    return _run(FORWARD, _start(tensors)).gated


# Slips with gate and mask: what is read in their place, in the forward pass or in the backward pass


def _read(name: str, change: Change) -> Steps:
    return {name: lambda s: change(getattr(s, name))}


def _gate(change: Change) -> Steps:
    return _read("gate", change)


def _bool_mask(change: Change) -> Steps:
    """`change` of a bool mask, True = attend; additive masks stay."""
    return {"mask": lambda s: _additive(change(s.mask == 0)) if s.is_bool else s.mask}


def _bias(change: Change) -> Steps:
    """`change` of an additive mask; bool masks stay."""
    return {"mask": lambda s: s.mask if s.is_bool else change(s.mask)}


def _additive(attended: Tensor) -> Tensor:
    return torch.zeros(attended.shape, dtype=torch.float64).masked_fill(~attended, -math.inf)


def _finite(change: Change) -> Steps:
    return _bias(lambda mask: torch.where(mask == -math.inf, mask, change(mask)))


def _swapped(name: str, one: int, other: int) -> Steps:
    """With two dimensions of one size swapped."""
    return _read(name, lambda x: x.transpose(one, other) if x.shape[one] == x.shape[other] else x)


def _of_others(name: str, dimensions: int) -> Iterator[tuple[str, Steps]]:
    """The gate or the mask of the first or a neighbouring batch item, head, query or key."""
    words = (("batch item", "batch items"), ("head", "heads"), ("query", "queries"), ("key", "keys"))
    for dim, (one, several) in enumerate(words[:dimensions]):
        yield (
            f"all {several} get the {name} of the first {one}",
            _read(name, lambda x, dim=dim: x.narrow(dim, 0, 1).expand_as(x)),
        )
        for which, by in (("previous", 1), ("next", -1)):
            yield (
                f"each {one} gets the {name} of the {which} {one}",
                _read(name, lambda x, dim=dim, by=by: x.roll(by, dim)),
            )
    yield (
        "batch items and heads are swapped when it is flattened",
        _read(name, lambda x: x.transpose(0, 1).reshape(x.shape)),
    )


def _block_starts(length: int, size: int) -> Tensor:
    return torch.arange(length) // size * size


def _renormalised(gate: Tensor) -> Tensor:
    mean = gate.mean(1, keepdim=True)
    return gate / torch.where(mean == 0, 1.0, mean)


def _longer(attended: Tensor) -> Tensor:
    more = attended.roll(1, -1)
    more[..., 0] = False
    return attended | more


def _low(low: float) -> Steps:
    return {
        "masked": lambda s: (s.scores + s.mask).clamp(min=low) if s.has_mask else s.scores,
        "fully_masked": lambda s: (s.mask == -math.inf).all(-1, keepdim=True),
    }


def _fully_masked(answer: Step) -> Steps:
    """`answer` is the softmax of fully masked rows."""
    return {"weights": lambda s: torch.where(s.fully_masked, answer(s), s.softmax)}


GATE: dict[str, Steps] = {
    "it is ignored": _gate(torch.ones_like),
    **dict(_of_others("gate", 3)),
    "heads get the gates in reverse order": _gate(lambda gate: gate.flip(1)),
    "all queries get the mean gate over queries": _gate(lambda gate: gate.mean(2, True).expand_as(gate)),
    "all queries get the largest gate of any query": _gate(lambda gate: gate.amax(2, True).expand_as(gate)),
    "heads and queries are swapped": _swapped("gate", 1, 2),
    "it is inverted (1 - gate)": _gate(lambda gate: 1 - gate),
    "it is applied twice": _gate(torch.square),
    "every value other than 0 counts as 1": _gate(lambda gate: (gate != 0).double()),
    "values are rounded to 0 or 1": _gate(lambda gate: (gate >= 0.5).double()),
    "values are truncated to integers": _gate(torch.trunc),
    "values are clamped to 0..1": _gate(lambda gate: gate.clamp(0, 1)),
    "values are clamped to at most 1": _gate(lambda gate: gate.clamp(max=1)),
    "it is divided by its mean over the heads": _gate(_renormalised),
    "a head counts as off wherever its first query has it off": _gate(lambda gate: gate * (gate[:, :, :1] != 0)),
    "a head counts as off wherever the first batch item has it off": _gate(lambda gate: gate * (gate[:1] != 0)),
    "it is rounded to bfloat16": _gate(lambda gate: gate.bfloat16().double()),
    **{f"each block of {n} queries gets the gate of its first query": _gate(
        lambda gate, n=n: gate[:, :, _block_starts(gate.shape[2], n)]) for n in BLOCKS[:3]},
}  # fmt: skip

MASK: dict[str, Steps] = {
    "it is ignored": _read("mask", torch.zeros_like),
    "an additive mask is ignored": _bias(torch.zeros_like),
    "a bool mask is inverted": _bool_mask(torch.logical_not),
    "a bool mask is added to the scores as 0 and 1": {
        "mask": lambda s: (s.mask == 0).double() if s.is_bool else s.mask},
    "an additive mask is read as bool (not 0 = attend)": _bias(lambda mask: _additive(mask != 0)),
    "an additive mask is read as bool (0 = attend)": _bias(lambda mask: _additive(mask == 0)),
    "finite biases are ignored": _finite(torch.zeros_like),
    "biases have the wrong sign": _finite(torch.neg),
    "biases are added before the scaling": {"mask": lambda s: s.mask if s.is_bool else s.mask * s.channels**-0.5},
    "biases are multiplied by ln 2 (base-2 exponentials)": _bias(lambda mask: mask * math.log(2)),
    **dict(_of_others("mask", 4)),
    "queries and keys are swapped": _swapped("mask", 2, 3),
    "a causal mask is used": _read("mask", lambda mask: _additive(torch.ones(mask.shape, dtype=torch.bool).tril())),
    "the first masked key is attended to": _bool_mask(_longer),
    "it ends at the first masked key": _bool_mask(lambda mask: mask.cummin(-1).values),
    "all keys up to the last unmasked one are attended to": _bool_mask(
        lambda mask: mask.flip(-1).cummax(-1).values.flip(-1)),
    "only the number of unmasked keys counts": _bool_mask(
        lambda mask: torch.arange(mask.shape[-1]) < mask.sum(-1, keepdim=True)),
    "fully masked rows attend to all keys equally": _fully_masked(lambda s: s.softmax),
    "fully masked rows are NaN": _fully_masked(lambda s: torch.full_like(s.softmax, math.nan)),
    "fully masked rows attend as if nothing were masked": _fully_masked(lambda s: s.scores.softmax(-1)),
    "fully masked rows attend to the first key": _fully_masked(lambda s: (torch.arange(s.keys) == 0).double()),
    "one fully masked row makes the whole call zero": {"weights": lambda s: s.softmax * (not s.fully_masked.any())},
    "weights are masked after the softmax and not normalised again": {
        "masked": lambda s: s.scores if s.is_bool else s.scores + s.mask,
        "weights": lambda s: s.softmax.masked_fill(s.mask == -math.inf, 0.0)},
    "masked scores are multiplied by 0, not set to -inf": {
        "masked": lambda s: s.scores * (s.mask == 0) if s.is_bool else s.scores + s.mask},
    **{f"masked scores are {low}, not -inf": _low(low) for low in (-100, -1000, -10000)},
    **{f"it is ignored in the last block of {n} keys": {
        "mask": lambda s, n=n: s.mask.masked_fill(torch.arange(s.keys) >= (s.keys - 1) // n * n, 0.0)}
       for n in BLOCKS[:-1]},
}  # fmt: skip


# Slips with the forward pass alone


def hidden_keys(which: Callable[[SimpleNamespace], Tensor]) -> Steps:
    """Keys where `which` is True are never seen."""
    return {"masked": lambda s: (s.scores + s.mask).masked_fill(which(s), -math.inf)}


def scaled(of: Callable[[SimpleNamespace], float]) -> Steps:
    return {"scale": of}


def _context(change: Callable[[SimpleNamespace, Tensor], Tensor]) -> Steps:
    return {"context": lambda s: change(s, s.gated @ s.value)}


def _rest(length: int, size: int) -> Tensor:
    """True after the last whole block. Where no large block is whole all would be: that is another fault."""
    whole = length // size * size
    return (torch.arange(length) >= whole) & (whole > 0 or size <= 16)


def _counted_zeros(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        filled = torch.nn.functional.pad(s.filled, (0, -s.keys % size))
        return filled.softmax(-1)[..., : s.keys]

    return step


def _overlapping(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        twice = (torch.arange(s.keys) >= s.keys - size) & ~_rest(s.keys, size) & (s.keys % size > 0)
        return FORWARD["filled"](s) + math.log(2) * twice

    return step


def _quotient(terms: Tensor, total: Tensor | None = None) -> Tensor:
    return terms / (terms.sum(-1, keepdim=True) if total is None else total)


def _exponentials(s: SimpleNamespace) -> Tensor:
    return (s.filled - s.filled.amax(-1, keepdim=True)).exp()


def _total(s: SimpleNamespace) -> Tensor:
    return _exponentials(s).sum(-1, keepdim=True)


def _overflowing(s: SimpleNamespace) -> Tensor:
    """No maximum is subtracted, and exponentials and their sum are float32."""
    exponentials = s.filled.exp().float().double()
    return _quotient(exponentials, exponentials.sum(-1, keepdim=True).float().double())


def _normalised_apart(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.clamp(min=-1e30).split(size, -1)
        return torch.cat([part.softmax(-1) for part in parts], -1) / len(parts)

    return step


def _own_maxima(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.split(size, -1)
        return _quotient(torch.cat([(p - p.amax(-1, True).clamp(min=-1e30)).exp() for p in parts], -1))

    return step


def _total_not_rescaled(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.split(size, -1)
        running = torch.stack([p.amax(-1) for p in parts], -1).cummax(-1).values
        sums = [(p - running[..., i, None]).exp().sum(-1) for i, p in enumerate(parts)]
        return _quotient(_exponentials(s), torch.stack(sums, -1).sum(-1, keepdim=True))

    return step


FORWARD_ALONE: dict[Property, dict[str, Steps]] = {
    "gate": {
        "it multiplies the scores before the softmax": {
            "scores": lambda s: FORWARD["scores"](s) * s.gate, "gated": lambda s: s.weights},
        "it is added to the scores as a logarithm": {
            "scores": lambda s: FORWARD["scores"](s) + s.gate.clamp(min=0).log(), "gated": lambda s: s.weights},
        "a head that is off gives the mean of its values": {
            "context": lambda s: torch.lerp(s.value.mean(2, keepdim=True), s.weights @ s.value, s.gate)},
        "where it is 0, the head attends to all keys equally": {
            "filled": lambda s: s.masked.masked_fill(s.fully_masked | (s.gate == 0), 0.0),
            "gated": lambda s: s.weights * torch.where(s.gate == 0, 1.0, s.gate)},
        "where it is 0, the query is returned": _context(lambda s, context: torch.where(s.gate == 0, s.query, context)),
        **{f"it is applied again for each block of {n} keys": {"gate": lambda s, n=n: s.gate ** -(-s.keys // n)}
           for n in BLOCKS},
    },
    "scale": {
        "it is applied twice (1 / D)": scaled(lambda s: 1 / s.channels),
        "it is 1 / sqrt(sqrt(D))": scaled(lambda s: s.channels**-0.25),
        "it is 1 / sqrt(S), of the number of keys": scaled(lambda s: s.keys**-0.5),
        "it is 1 / sqrt(H * D), of all heads' channels": scaled(lambda s: (s.query.shape[1] * s.channels) ** -0.5),
        "it is 1 / sqrt(D) of D padded to a power of 2": scaled(lambda s: 2 ** (-math.ceil(math.log2(s.channels)) / 2)),
        "it is rounded to bfloat16": scaled(lambda s: float(torch.tensor(s.channels**-0.5).bfloat16())),
    },
    "softmax": {
        "1 is added to the denominator": {"softmax": lambda s: _quotient(_exponentials(s), _total(s) + 1)},
        "the weights are divided by the number of keys, not by their sum": {
            "softmax": lambda s: _exponentials(s) / s.keys},
        "the weights are not normalised": {"softmax": _exponentials},
        "exp2 is used without the factor log2 e": {"softmax": lambda s: (s.filled * math.log(2)).softmax(-1)},
        "log2 e is rounded to 1.44": {"softmax": lambda s: (s.filled * (1.44 * math.log(2))).softmax(-1)},
        "it is over the queries": {
            "softmax": lambda s: s.filled.softmax(-2 if s.queries == s.keys else -1).nan_to_num(0.0)},
        "it is over the heads": {"softmax": lambda s: s.filled.softmax(1).nan_to_num(0.0)},
        "it is over the batch items": {"softmax": lambda s: s.filled.softmax(0).nan_to_num(0.0)},
        "the weights are multiplied by their sum, not divided by it": {
            "softmax": lambda s: _exponentials(s) * _total(s)},
        "there is none: scores are the weights": {"softmax": lambda s: s.filled},
        "no maximum is subtracted, and exponentials overflow": {"softmax": _overflowing},
        "no maximum is subtracted, and NaN is replaced by 0": {
            "softmax": lambda s: _overflowing(s).nan_to_num(0.0, 0.0, 0.0)},
        "the denominator lacks the last key": {"softmax": lambda s: _quotient(
            _exponentials(s), _total(s) - _exponentials(s)[..., -1:] if s.keys > 1 else None)},
        "scores are clamped to -20..20": {"scores": lambda s: FORWARD["scores"](s).clamp(-20, 20)},
        **{f"scores are capped by {cap} tanh(x / {cap})": {
            "scores": lambda s, cap=cap: cap * (FORWARD["scores"](s) / cap).tanh()} for cap in (20, 30, 50)},
        **{clause.format(n=n): {"softmax": step(n)} for n in BLOCKS for clause, step in (
            ("blocks of {n} keys are normalised separately and averaged", _normalised_apart),
            ("blocks of {n} keys each subtract their own maximum, and nothing is rescaled", _own_maxima),
            ("the denominator of {n} keys is not rescaled when the maximum grows", _total_not_rescaled))},
    },
    "sizes": {
        "the last key is dropped": hidden_keys(lambda s: (torch.arange(s.keys) == s.keys - 1) & (s.keys > 1)),
        "the first key is dropped": hidden_keys(lambda s: (torch.arange(s.keys) == 0) & (s.keys > 1)),
        "the last key is dropped where their number is odd": hidden_keys(
            lambda s: (torch.arange(s.keys) == s.keys - 1) & (s.keys % 2 == 1) & (s.keys > 1)),
        "keys beyond the number of queries are dropped": hidden_keys(lambda s: torch.arange(s.keys) >= s.queries),
        "with one key, its value is returned without the gate": {
            "gated": lambda s: s.weights if s.keys == 1 else s.weights * s.gate},
        **{clause.format(n=n): steps for n in BLOCKS for clause, steps in (
            ("keys after the last whole block of {n} are dropped", hidden_keys(
                lambda s, n=n: _rest(s.keys, n) & (s.keys >= n))),
            ("zeros that fill the keys up to a multiple of {n} count", {"softmax": _counted_zeros(n)}),
            ("keys in both of the last two blocks of {n} count twice", {"filled": _overlapping(n)}),
            ("queries after the last whole block of {n} are zero", _context(
                lambda s, context, n=n: context.masked_fill(_rest(s.queries, n)[:, None], 0.0))),
            ("queries after the last whole block of {n} repeat the one before", _context(
                lambda s, context, n=n: context[:, :, torch.arange(s.queries).clamp(
                    max=(s.queries // n * n or s.queries) - 1)])),
            ("channels after the last whole block of {n} are zero", _context(
                lambda s, context, n=n: context.masked_fill(_rest(s.channels, n), 0.0))))},
        **{clause.format(n=n): steps for n in LIMITS for clause, steps in (
            ("keys after the first {n} are dropped", hidden_keys(lambda s, n=n: torch.arange(s.keys) >= n)),
            ("queries after the first {n} are zero", _context(
                lambda s, context, n=n: context.masked_fill((torch.arange(s.queries) >= n)[:, None], 0.0))),
            ("scores use the first {n} channels only", {
                "scores": lambda s, n=n: s.query[..., :n] @ s.key[..., :n].mT * s.scale}))},
    },
    "layout": {
        "all batch items get keys and values of the first item": {
            "scores": lambda s: s.query @ s.key[:1].mT * s.scale, "context": lambda s: s.gated @ s.value[:1]},
        "all heads get the keys of the first head": {"scores": lambda s: s.query @ s.key[:, :1].mT * s.scale},
        "all heads get keys and values of the first head": {
            "scores": lambda s: s.query @ s.key[:, :1].mT * s.scale, "context": lambda s: s.gated @ s.value[:, :1]},
        "pairs of heads share their keys": {
            "scores": lambda s: s.query @ s.key[:, _block_starts(s.key.shape[1], 2)].mT * s.scale},
        "batch items and heads of the query are swapped when it is flattened": {
            "scores": lambda s: s.query.transpose(0, 1).reshape(s.query.shape) @ s.key.mT * s.scale},
        "the context is (B, Q, H, D) in memory": _context(
            lambda s, context: context.transpose(1, 2).reshape(context.shape)),
    },
    "context": {
        "key and value are swapped": {
            "scores": lambda s: s.query @ s.value.mT * s.scale, "context": lambda s: s.gated @ s.key},
        "it is zero": _context(lambda s, context: torch.zeros_like(context)),
        "it is the query": {"context": lambda s: s.query},
    },
}  # fmt: skip


# Roundings


def _to(dtype: torch.dtype) -> Change:
    return lambda tensor: tensor.to(dtype).double()


def _ten_bits(rounding: Change) -> Change:
    def change(tensor: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp(rounding(mantissa * 2.0**11) / 2.0**11, exponent)

    return change


def _eight_bits(tensor: Tensor) -> Tensor:
    step = tensor.abs().amax((-2, -1), keepdim=True) / 127
    return torch.round(tensor / step) * step


def _accumulated(size: int, rounded: Change) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        total = torch.zeros_like(s.query)
        for weights, value in zip(s.gated.split(size, -1), s.value.split(size, -2), strict=True):
            total = rounded(total + weights @ value)
        return total

    return step


ROUNDINGS: dict[str, tuple[float, Change]] = {
    "bfloat16": (2**-7, _to(torch.bfloat16)),
    "float16": (2**-10, _to(torch.float16)),
    "float32": (2**-23, _to(torch.float32)),
    "TF32": (2**-10, _ten_bits(torch.round)),
    "TF32 (truncated)": (2**-10, _ten_bits(torch.trunc)),
}
"""Eps and rounding of dtypes that computations may be in."""


def _roundings() -> Iterator[OperatorFault]:
    for name, (eps, r) in ROUNDINGS.items():
        of_scores: Steps = {"scores": lambda s, r=r: r(s.query) @ r(s.key).mT * s.scale}
        of_values: Steps = {"context": lambda s, r=r: s.gated @ r(s.value)}
        forward: dict[str, Steps] = {
            "query, key and value are rounded": {**of_scores, **of_values},
            "query and key are rounded": of_scores,
            "values are rounded": of_values,
            "scores are rounded": {"scores": lambda s, r=r: r(FORWARD["scores"](s))},
            "scores with the mask are rounded": {"masked": lambda s, r=r: r(s.scores + s.mask)},
            "scores less their maximum are rounded": {
                "filled": lambda s, r=r: r((f := FORWARD["filled"](s)) - f.amax(-1, keepdim=True))},
            "weights are rounded": {"gated": lambda s, r=r: r(s.weights) * s.gate},
            "gated weights are rounded": {"gated": lambda s, r=r: r(s.weights * s.gate)},
            "exponentials are rounded before the division": {
                "softmax": lambda s, r=r: _quotient(r(_exponentials(s)), _total(s))},
            "the sum of the exponentials is rounded": {
                "softmax": lambda s, r=r: _quotient(_exponentials(s), r(_total(s)))},
            "the context is rounded": _context(lambda s, context, r=r: r(context)),
            **{f"the accumulator is rounded after every {'key' if n == 1 else f'{n} keys'}": {
                "context": _accumulated(n, r)} for n in (1, *BLOCKS)},
        }  # fmt: skip
        backward: dict[str, Steps] = {
            "the gradient of the context is rounded": {"gated_gradient": lambda s, r=r: r(s.grad_context) * s.gate},
            "delta is rounded": _after(r, "delta"),
            "the log-sum-exp is rounded": {
                "softmax": lambda s, r=r: (s.filled - r(s.filled.logsumexp(-1, keepdim=True))).exp()},
            "gradients are rounded": _after(r, "dq", "dk", "dv"),
        }  # fmt: skip
        for is_backward, faults in ((False, forward), (True, backward)):
            for what, steps in faults.items():
                yield OperatorFault("precision", f"{what} to {name}", steps, is_backward, eps)
    of_key: Steps = {"scores": lambda s: s.query @ _eight_bits(s.key).mT * s.scale}
    yield OperatorFault("precision", "the key is quantised to 8 bits per head", of_key, rounding=2**-7)


# Slips with the backward pass alone


def _after(change: Change, *names: str) -> Steps:
    return {name: lambda s, name=name: change(BACKWARD[name](s)) for name in names}


def _ungated_scores(s: SimpleNamespace) -> Tensor:
    raw = s.grad_context @ s.value.mT
    return s.weights * (raw - (s.weights * raw).sum(-1, keepdim=True))


def _times(factor: Callable[[SimpleNamespace], float], *names: str) -> Steps:
    return {name: lambda s, name=name: BACKWARD[name](s) * factor(s) for name in names}


def _cut(size: int) -> Change:
    """Rows after the last whole block are zero."""
    return lambda x: x.masked_fill(_rest(x.shape[2], size)[:, None], 0.0)


def _last(length: int, size: int) -> slice:
    return slice((length - 1) // size * size, length)


def _of_gradients() -> Iterator[tuple[str, Steps]]:
    """What may befall one gradient, or several; the clause names them."""
    for names in (("dq",), ("dk",), ("dv",), ("dq", "dk"), ("dk", "dv"), ("dq", "dk", "dv")):
        subject = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
        yield f"{subject} zero", _after(torch.zeros_like, *names)
        yield f"{subject} summed over the batch", _after(lambda x: x.sum(0, True).expand_as(x), *names)
        yield f"{subject} the mean over heads", _after(lambda x: x.mean(1, True).expand_as(x), *names)
        for which, by in (("next", -1), ("previous", 1)):
            yield f"{subject} that of the {which} head", _after(lambda x, by=by: x.roll(by, 1), *names)
        if "dv" not in names:
            yield f"{subject} not scaled", _times(lambda s: s.channels**0.5, *names)
            yield f"{subject} scaled twice", _times(lambda s: s.channels**-0.5, *names)
            yield f"{subject} scaled as for 16 channels", _times(lambda s: s.channels**0.5 / 4, *names)


BACKWARD_ALONE: dict[str, Steps] = {
    "the term delta is missing": {"delta": lambda s: 0.0},
    "delta has the wrong sign": _after(torch.neg, "delta"),
    "delta lacks the gate": {"delta": lambda s: (s.grad_context * (s.weights @ s.value)).sum(-1, keepdim=True)},
    "delta has the gate twice": {"delta": lambda s: (s.gated_gradient * s.context).sum(-1, keepdim=True)},
    "delta is the mean over keys, not weighted": {"delta": lambda s: s.dweights.mean(-1, keepdim=True)},
    "each query gets delta of the next query": _after(lambda x: x.roll(-1, 2), "delta"),
    "each query gets delta of the previous query": _after(lambda x: x.roll(1, 2), "delta"),
    "the weights are gated": {"dscores": lambda s: s.gated * (s.dweights - s.delta)},
    "the gradient passes straight through": {"dscores": lambda s: s.dweights},
    "the gradient passes through the maximum": {
        "dscores": lambda s: BACKWARD["dscores"](s).scatter_add(-1, s.filled.argmax(-1, keepdim=True), -s.delta)},
    "weights are recomputed without the scale": {"scores": lambda s: s.query @ s.key.mT},
    "dq and dk lack the gate": {"dscores": _ungated_scores},
    "dq lacks the gate": {"dq": lambda s: _ungated_scores(s) @ s.key * s.scale},
    "dk lacks the gate": {"dk": lambda s: _ungated_scores(s).mT @ s.query * s.scale},
    "dv lacks the gate": {"dv": lambda s: s.weights.mT @ s.grad_context},
    "dv is gated twice": {"dv": lambda s: s.gated.mT @ s.gated_gradient},
    "dk and dv are swapped": {"dk": BACKWARD["dv"], "dv": BACKWARD["dk"]},
    **dict(_of_gradients()),
    **{clause.format(n=n): steps for n in BLOCKS for clause, steps in (
        ("dq after the last whole block of {n} queries is zero", _after(_cut(n), "dq")),
        ("dk and dv after the last whole block of {n} keys are zero", _after(_cut(n), "dk", "dv")),
        ("dq has only the last block of {n} keys", {"dq": lambda s, n=n: (
            s.dscores[..., _last(s.keys, n)] @ s.key[:, :, _last(s.keys, n)] * s.scale)}),
        ("dk and dv have only the last block of {n} queries", {
            "dk": lambda s, n=n: s.dscores[:, :, _last(s.queries, n)].mT @ s.query[:, :, _last(s.queries, n)] * s.scale,
            "dv": lambda s, n=n: s.weights[:, :, _last(s.queries, n)].mT @ s.gated_gradient[:, :, _last(s.queries, n)],
        }))},
}  # fmt: skip


def _of_backward(clause: str) -> Property:
    """The gradient that a clause is about, if it is one (of key and value, the key's)."""
    first, *more = clause.split()
    together = more[:2] == ["and", "dk"]
    return first if first in ("dq", "dk", "dv") and not together else "softmax backward"  # type: ignore[return-value]


def forward_faults(dtype: torch.dtype) -> list[OperatorFault]:
    """All faults of the forward pass that a patch may have in `dtype`."""
    groups = [("gate", GATE), ("mask", MASK), *FORWARD_ALONE.items()]
    faults = [OperatorFault(prop, clause, steps) for prop, group in groups for clause, steps in group.items()]
    return faults + [f for f in _roundings() if not f.is_backward and f.rounding > torch.finfo(dtype).eps]


def backward_faults(dtype: torch.dtype) -> list[OperatorFault]:
    """All faults of the backward pass that a patch may have in `dtype`: the context is right."""
    faults = [
        OperatorFault(_of_backward(clause), clause, steps, True) for clause, steps in BACKWARD_ALONE.items()
    ]
    for what, group in (("gate", GATE), ("mask", MASK)):
        faults += [
            OperatorFault("softmax backward", f"the {what} in the backward pass: {clause}", steps, True)
            for clause, steps in group.items()
        ]
    return faults + [f for f in _roundings() if f.is_backward and f.rounding > torch.finfo(dtype).eps]


def known_fault(prop: str, clause: str) -> OperatorFault:
    """The fault of that property and clause."""
    faults = (*forward_faults(torch.float64), *backward_faults(torch.float64))
    return next(fault for fault in faults if (fault.property, fault.clause) == (prop, clause))


# Factors that are fitted to a wrong answer


def fitted_faults(found: Results, tensors: CallTensors) -> Iterator[OperatorFault]:
    """The factor of the scale, or of a result, that brings the right answer nearest to what was `found`.

    Args:
        found: the wrong context, or gradients under a context that is right.
        tensors: the call.
    """
    right = _run({**FORWARD, **BACKWARD}, _start(tensors))
    for name, result in found.items():
        true = getattr(right, name)
        size = float(true.square().sum())
        times = float((result * true).sum()) / size if size else math.nan
        if math.isfinite(times) and abs(times) > 1e-3:
            clause = f"{'it' if name == 'context' else name} is {times:.6g} times the true one"
            step = {**FORWARD, **BACKWARD}[name]
            yield OperatorFault(
                name, clause, {name: lambda s, t=times, step=step: t * step(s)}, name != "context"
            )
    if "context" in found and (factor := _fitted_factor(found["context"], tensors)) is not None:
        yield OperatorFault(
            "scale", f"it is {factor:.6g} / sqrt(D)", scaled(lambda s: factor * s.channels**-0.5)
        )
        constant = factor * tensors.query.shape[-1] ** -0.5
        yield OperatorFault(
            "scale", f"it is {constant:.6g} for any number of channels", scaled(lambda s: constant)
        )


def _fitted_factor(found: Tensor, tensors: CallTensors) -> float | None:
    """The factor of the scale that comes nearest, by Gauss-Newton in its logarithm from several starts."""

    def context(logarithm: float) -> Tensor:
        scale = tensors.query.shape[-1] ** -0.5 * math.exp(logarithm)
        return _run({**FORWARD, "scale": lambda s: scale}, _start(tensors)).context

    best: tuple[float, float] | None = None
    for logarithm in (0.0, -1.5, 1.5, -0.5, 0.5):
        for _ in range(12):
            at = context(logarithm)
            slope = (context(logarithm + 1e-5) - at) / 1e-5
            size = float(slope.square().sum())
            step = float(((found - at) * slope).sum()) / size if size else math.nan
            if not math.isfinite(step):
                break
            logarithm += max(-0.5, min(0.5, step))
        distance = float((found - context(logarithm)).square().sum())
        if math.isfinite(distance) and (best is None or distance < best[0]):
            best = distance, math.exp(logarithm)
    return None if best is None else best[1]
