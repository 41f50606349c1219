"""Known faults as small faulty references: attention in float64, in steps, with one of the steps replaced.

A diagnosis names a fault only if its reference gives the wrong numbers of the patch (`diagnosis`).
A fault of the forward pass answers with the context alone. A fault of the backward pass answers with the right context
and wrong gradients; its first steps recompute the weights, so every slip with gate, mask or scale can be one of either.
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

Step = Callable[[SimpleNamespace], Any]

BLOCKS = (8, 16, 32, 64, 128)
SIZES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 32768)
"""Block sizes, and sizes of buffers and grids, that kernels commonly have."""


@dataclass(frozen=True, eq=False)
class Fault:
    """One way to be wrong.

    Args:
        property: what of the attention is wrong.
        clause: what is wrong with it, after "property: ".
        steps: the steps (of `FORWARD` and `BACKWARD`) that replace the right ones.
        is_backward: whether only gradients are wrong.
        is_rounding: whether the fault is a rounding, which another order of operations moves a little.
    """

    property: Property
    clause: str
    steps: Mapping[str, Step]
    is_backward: bool = False
    is_rounding: bool = False

    def answer(self, tensors: CallTensors, case: OperatorCase) -> Results:
        """Context, or gradients by name, float64 on the CPU, that a patch with this fault gives for `case`."""
        s = _start(tensors)
        if not self.is_backward:
            return {"context": _run({**FORWARD, **self.steps}, s).context}
        _run({**FORWARD, **BACKWARD, **self.steps}, s)
        answer: Results = {}
        for own, shared in zip(("dq", "dk", "dv"), case.gradient_names.values(), strict=True):
            answer[shared] = answer[shared] + s.__dict__[own] if shared in answer else s.__dict__[own]
        return answer


# The right attention


def _full_gate(tensors: CallTensors) -> Tensor:
    """The gate as (B, H, Q, 1); all ones where there is none."""
    shape = (*tensors.query.shape[:-1], 1)
    if tensors.gate is None:
        return tensors.query.new_ones(shape)
    return tensors.gate.expand(shape)


def _full_mask(tensors: CallTensors) -> Tensor:
    """The mask as a float (B, H, Q, S); zeros where there is none."""
    shape = (*tensors.query.shape[:-1], tensors.key.shape[-2])
    mask = tensors.mask
    if mask is None:
        return tensors.query.new_zeros(shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=tensors.query.dtype).masked_fill(~mask, -math.inf)
    return mask.expand(shape)


def _start(tensors: CallTensors) -> SimpleNamespace:
    exact = tensors.double()
    return SimpleNamespace(
        query=exact.query,
        key=exact.key,
        value=exact.value,
        grad_context=exact.grad_context,
        gate=_full_gate(exact),
        mask=_full_mask(exact),
        has_gate=exact.gate is not None,
        has_mask=exact.mask is not None,
        is_bool=exact.mask is not None and exact.mask.dtype == torch.bool,
        channels=exact.query.shape[-1],
        queries=exact.query.shape[-2],
        keys=exact.key.shape[-2],
    )


def _run(steps: Mapping[str, Step], s: SimpleNamespace) -> SimpleNamespace:
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
    "keyless": lambda s: (s.masked == -math.inf).all(-1, keepdim=True),
    "filled": lambda s: s.masked.masked_fill(s.keyless, 0.0),
    "softmax": lambda s: s.filled.softmax(-1),
    "weights": lambda s: s.softmax.masked_fill(s.keyless, 0.0),
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


# Slips with gate and mask: what is read in their place, in the forward pass or in the backward pass


def _first(name: str, dim: int) -> Step:
    return lambda s: getattr(s, name).narrow(dim, 0, 1).expand_as(getattr(s, name))


def _roll(name: str, dim: int, by: int) -> Step:
    return lambda s: getattr(s, name).roll(by, dim)


def _gate(change: Callable[[Tensor], Tensor]) -> dict[str, Step]:
    return {"gate": lambda s: change(s.gate)}


def _bool_mask(change: Callable[[Tensor], Tensor]) -> dict[str, Step]:
    """`change` of a bool mask, True = attend; additive masks stay."""

    def step(s: SimpleNamespace) -> Tensor:
        return _additive(change(s.mask == 0)) if s.is_bool else s.mask

    return {"mask": step}


def _bias(change: Callable[[Tensor], Tensor]) -> dict[str, Step]:
    """`change` of an additive mask; bool masks stay."""
    return {"mask": lambda s: s.mask if s.is_bool else change(s.mask)}


def _additive(attended: Tensor) -> Tensor:
    return torch.zeros(attended.shape, dtype=torch.float64).masked_fill(~attended, -math.inf)


def _finite(mask: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.where(mask == -math.inf, mask, change(mask))


def _renormalised(gate: Tensor) -> Tensor:
    mean = gate.mean(1, keepdim=True)
    return gate / torch.where(mean == 0, 1.0, mean)


def _block_starts(length: int, size: int) -> Tensor:
    return torch.arange(length) // size * size


def _longer(attended: Tensor) -> Tensor:
    more = attended.roll(1, -1)
    more[..., 0] = False
    return attended | more


def _unmasked_last_block(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        last = torch.arange(s.keys) >= (s.keys - 1) // size * size
        return s.mask.masked_fill(last, 0.0)

    return step


GATE: dict[str, dict[str, Step]] = {
    "it is ignored": _gate(torch.ones_like),
    "each head gets the gate of the previous head": {"gate": _roll("gate", 1, 1)},
    "each head gets the gate of the next head": {"gate": _roll("gate", 1, -1)},
    "heads get the gates in reverse order": _gate(lambda gate: gate.flip(1)),
    "all heads get the gate of the first head": {"gate": _first("gate", 1)},
    "each query gets the gate of the previous query": {"gate": _roll("gate", 2, 1)},
    "each query gets the gate of the next query": {"gate": _roll("gate", 2, -1)},
    "queries get the gates in reverse order": _gate(lambda gate: gate.flip(2)),
    "all queries get the gate of the first query": {"gate": _first("gate", 2)},
    "all queries get the mean gate over queries": _gate(lambda gate: gate.mean(2, True).expand_as(gate)),
    "all queries get the largest gate of any query": _gate(lambda gate: gate.amax(2, True).expand_as(gate)),
    "all batch items get the gate of the first item": {"gate": _first("gate", 0)},
    "each batch item gets the gate of the previous item": {"gate": _roll("gate", 0, 1)},
    "each batch item gets the gate of the next item": {"gate": _roll("gate", 0, -1)},
    "batch items and heads are swapped when it is flattened": _gate(
        lambda gate: gate.transpose(0, 1).reshape(gate.shape)
    ),
    "heads and queries are swapped": {
        "gate": lambda s: s.gate.transpose(1, 2) if s.gate.shape[1] == s.gate.shape[2] else s.gate
    },
    "it is inverted (1 - gate)": _gate(lambda gate: 1 - gate),
    "it is applied twice": _gate(torch.square),
    "every value other than 0 counts as 1": _gate(lambda gate: (gate != 0).double()),
    "values are rounded to 0 or 1": _gate(lambda gate: (gate >= 0.5).double()),
    "values are truncated to integers": _gate(torch.trunc),
    "values are clamped to 0..1": _gate(lambda gate: gate.clamp(0, 1)),
    "values are clamped to at most 1": _gate(lambda gate: gate.clamp(max=1)),
    "its sign is lost": _gate(torch.abs),
    "its square root is applied": _gate(lambda gate: gate.clamp(min=0).sqrt()),
    "it is divided by its mean over the heads": _gate(_renormalised),
    "a head counts as off wherever its first query has it off": _gate(
        lambda gate: gate * (gate[:, :, :1] != 0)
    ),
    "a head counts as off wherever the first batch item has it off": _gate(
        lambda gate: gate * (gate[:1] != 0)
    ),
    **{
        f"each block of {n} queries gets the gate of its first query": _gate(
            lambda gate, n=n: gate[:, :, _block_starts(gate.shape[2], n)]
        )
        for n in (8, 16, 32)
    },
    **{f"it is rounded to {name}": _gate(lambda gate, dtype=dtype: gate.to(dtype).double())
       for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16))},
}  # fmt: skip

MASK: dict[str, dict[str, Step]] = {
    "it is ignored": {"mask": lambda s: torch.zeros_like(s.mask)},
    "a bool mask is ignored": _bool_mask(torch.ones_like),
    "an additive mask is ignored": _bias(torch.zeros_like),
    "a bool mask is inverted": _bool_mask(torch.logical_not),
    "a bool mask is added to the scores as 0 and 1": {
        "mask": lambda s: (s.mask == 0).double() if s.is_bool else s.mask
    },
    "an additive mask is read as bool (not 0 = attend)": _bias(lambda mask: _additive(mask != 0)),
    "an additive mask is read as bool (0 = attend)": _bias(lambda mask: _additive(mask == 0)),
    "finite biases are ignored": _bias(lambda mask: _finite(mask, torch.zeros_like)),
    "biases have the wrong sign": _bias(lambda mask: _finite(mask, torch.neg)),
    "biases are added before the scaling": {
        "mask": lambda s: s.mask if s.is_bool else s.mask * s.channels**-0.5
    },
    "biases are multiplied by ln 2 (base-2 exponentials)": _bias(lambda mask: mask * math.log(2)),
    "biases are multiplied by log2 e (base-2 exponentials)": _bias(lambda mask: mask / math.log(2)),
    "all batch items get the mask of the first item": {"mask": _first("mask", 0)},
    "each batch item gets the mask of the previous item": {"mask": _roll("mask", 0, 1)},
    "each batch item gets the mask of the next item": {"mask": _roll("mask", 0, -1)},
    "all heads get the mask of the first head": {"mask": _first("mask", 1)},
    "each head gets the mask of the previous head": {"mask": _roll("mask", 1, 1)},
    "each head gets the mask of the next head": {"mask": _roll("mask", 1, -1)},
    "all queries get the mask of the first query": {"mask": _first("mask", 2)},
    "each query gets the mask of the previous query": {"mask": _roll("mask", 2, 1)},
    "each query gets the mask of the next query": {"mask": _roll("mask", 2, -1)},
    "each key gets the mask of the previous key": {"mask": _roll("mask", 3, 1)},
    "each key gets the mask of the next key": {"mask": _roll("mask", 3, -1)},
    "batch items and heads are swapped when it is flattened": {
        "mask": lambda s: s.mask.transpose(0, 1).reshape(s.mask.shape)
    },
    "queries and keys are swapped": {"mask": lambda s: s.mask.mT if s.queries == s.keys else s.mask},
    "a causal mask is used": {"mask": lambda s: _additive(torch.ones(s.mask.shape, dtype=torch.bool).tril())},
    "the first masked key is attended to": _bool_mask(_longer),
    "it ends at the first masked key": _bool_mask(lambda mask: mask.cummin(-1).values),
    "all keys up to the last unmasked one are attended to": _bool_mask(
        lambda mask: mask.flip(-1).cummax(-1).values.flip(-1)
    ),
    "only the number of unmasked keys counts": _bool_mask(
        lambda mask: (torch.arange(mask.shape[-1]) < mask.sum(-1, keepdim=True))
    ),
    "fully masked rows attend to all keys equally": {"weights": lambda s: s.softmax},
    "fully masked rows are NaN": {"weights": lambda s: s.softmax.masked_fill(s.keyless, math.nan)},
    "fully masked rows attend as if nothing were masked": {
        "weights": lambda s: torch.where(s.keyless, s.scores.softmax(-1), s.softmax)
    },
    "fully masked rows attend to the first key": {
        "weights": lambda s: torch.where(s.keyless, (torch.arange(s.keys) == 0).double(), s.softmax)
    },
    "one fully masked row makes the whole call zero": {
        "weights": lambda s: s.softmax * (not bool(s.keyless.any()))
    },
    "weights are masked after the softmax and not normalised again": {
        "masked": lambda s: s.scores if s.is_bool else s.scores + s.mask,
        "weights": lambda s: s.softmax.masked_fill(s.mask == -math.inf, 0.0),
    },
    "masked scores are multiplied by 0, not set to -inf": {
        "masked": lambda s: s.scores * (s.mask == 0) if s.is_bool else s.scores + s.mask
    },
    **{
        f"masked scores are {low}, not -inf": {
            "masked": lambda s, low=low: (s.scores + s.mask).clamp(min=low) if s.has_mask else s.scores,
            "keyless": lambda s: (s.mask == -math.inf).all(-1, keepdim=True),
        }
        for low in (-100, -1000, -10000)
    },
    **{f"it is ignored in the last block of {n} keys": {"mask": _unmasked_last_block(n)} for n in BLOCKS[:-1]},
}  # fmt: skip


# Slips with the forward pass alone


def hidden_keys(which: Callable[[SimpleNamespace], Tensor]) -> dict[str, Step]:
    """Keys where `which` is True are never seen."""
    return {"masked": lambda s: (s.scores + s.mask).masked_fill(which(s), -math.inf)}


def _tail(length: int, size: int) -> Tensor:
    """True in what is left after the last whole block, where there is a whole block."""
    whole = length // size * size
    return (torch.arange(length) >= whole) & (whole > 0)


def _rest(length: int, size: int) -> Tensor:
    """True after the last whole block. Of blocks that no length fills, everything would be: that is said otherwise."""
    whole = length // size * size
    return (torch.arange(length) >= whole) & (whole > 0 or size <= 16)


def _counted_zeros(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        filled = torch.nn.functional.pad(s.filled, (0, -s.keys % size))
        return filled.softmax(-1)[..., : s.keys]

    return step


def _overlapping(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        place = torch.arange(s.keys)
        twice = (place >= s.keys - size) & (place < s.keys // size * size) & (s.keys > size)
        return s.masked.masked_fill(s.keyless, 0.0) + math.log(2) * (twice & (s.keys % size > 0))

    return step


def _quotient(terms: Tensor, total: Tensor | None = None) -> Tensor:
    return terms / (terms.sum(-1, keepdim=True) if total is None else total)


def _shifted(s: SimpleNamespace) -> Tensor:
    return s.filled - s.filled.amax(-1, keepdim=True)


def _raw_exponentials(s: SimpleNamespace) -> Tensor:
    """Without a maximum; what overflows in float32 is infinite."""
    exponentials = s.filled.exp()
    return exponentials.masked_fill(exponentials > torch.finfo(torch.float32).max, math.inf)


def _own_maxima(size: int) -> Step:
    """Each block of keys has its own maximum subtracted."""

    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.split(size, -1)
        return _quotient(torch.cat([(p - p.amax(-1, True).clamp(min=-1e30)).exp() for p in parts], -1))

    return step


def _total_not_rescaled(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.split(size, -1)
        running = torch.stack([p.amax(-1) for p in parts], -1).cummax(-1).values
        sums = [(p - running[..., i, None]).exp().sum(-1) for i, p in enumerate(parts)]
        return _quotient(_shifted(s).exp(), torch.stack(sums, -1).sum(-1, keepdim=True))

    return step


SOFTMAX: dict[str, dict[str, Step]] = {
    "1 is added to the denominator": {
        "softmax": lambda s: _quotient(_shifted(s).exp(), _shifted(s).exp().sum(-1, keepdim=True) + 1)
    },
    "the weights are divided by the number of keys, not by their sum": {
        "softmax": lambda s: _shifted(s).exp() / s.keys
    },
    "the weights are not normalised": {"softmax": lambda s: _shifted(s).exp()},
    "exp2 is used without the factor log2 e": {"softmax": lambda s: (s.filled * math.log(2)).softmax(-1)},
    "log2 e is rounded to 1.44": {"softmax": lambda s: (s.filled * (1.44 * math.log(2))).softmax(-1)},
    "it is over the queries": {
        "softmax": lambda s: (
            s.filled.softmax(-2).nan_to_num(0.0) if s.queries == s.keys else s.filled.softmax(-1)
        )
    },
    "it is over the heads": {"softmax": lambda s: s.filled.softmax(1).nan_to_num(0.0)},
    "it is over the batch": {"softmax": lambda s: s.filled.softmax(0).nan_to_num(0.0)},
    "no maximum is subtracted, and exponentials overflow": {"softmax": lambda s: _quotient(_raw_exponentials(s))},
    "no maximum is subtracted, and NaN is replaced by 0": {
        "softmax": lambda s: _quotient(_raw_exponentials(s)).nan_to_num(0.0, 0.0, 0.0)
    },
    "the denominator lacks the last key": {
        "softmax": lambda s: _quotient(
            _shifted(s).exp(),
            (_shifted(s).exp().sum(-1, True) - _shifted(s).exp()[..., -1:]) if s.keys > 1 else None,
        )
    },
    "scores are clamped to -20..20": {"scores": lambda s: (s.query @ s.key.mT * s.scale).clamp(-20, 20)},
    **{
        f"scores are capped by {cap} tanh(x / {cap})": {
            "scores": lambda s, cap=cap: cap * (s.query @ s.key.mT * s.scale / cap).tanh()
        }
        for cap in (20, 30, 50)
    },
    **{
        f"{what} of {n} keys {how}": {"softmax": step}
        for n in BLOCKS
        for what, how, step in (
            ("blocks", "are normalised separately and averaged", lambda s, n=n: torch.cat(
                [p.softmax(-1) for p in s.filled.clamp(min=-1e30).split(n, -1)], -1) / -(-s.keys // n)),
            ("blocks", "each subtract their own maximum, and nothing is rescaled", _own_maxima(n)),
            ("the denominator", "is not rescaled when the maximum grows", _total_not_rescaled(n)),
        )
    },
}  # fmt: skip


def scaled(of: Callable[[SimpleNamespace], float]) -> dict[str, Step]:
    return {"scale": of}


SCALE: dict[str, dict[str, Step]] = {
    "it is missing": scaled(lambda s: 1.0),
    "it is applied twice (1 / D)": scaled(lambda s: 1 / s.channels),
    "it is 1 / sqrt(sqrt(D))": scaled(lambda s: s.channels**-0.25),
    "it is 1 / sqrt(S), of the number of keys": scaled(lambda s: s.keys**-0.5),
    "it is 1 / sqrt(H * D), of all heads' channels": scaled(lambda s: (s.query.shape[1] * s.channels) ** -0.5),
    "it is 1 / sqrt(D) of D padded to a power of 2": scaled(
        lambda s: 2 ** (-math.ceil(math.log2(s.channels)) / 2)
    ),
    "it is rounded to bfloat16": scaled(lambda s: float(torch.tensor(s.channels**-0.5).bfloat16())),
    **{f"it is 1 / sqrt({n}) for any number of channels": scaled(lambda s, n=n: n**-0.5)
       for n in (16, 32, 64, 80, 96, 128)},
}  # fmt: skip

SIZE: dict[str, dict[str, Step]] = {
    "the last key is dropped": hidden_keys(lambda s: (torch.arange(s.keys) == s.keys - 1) & (s.keys > 1)),
    "the first key is dropped": hidden_keys(lambda s: (torch.arange(s.keys) == 0) & (s.keys > 1)),
    "the last key is dropped where their number is odd": hidden_keys(
        lambda s: (torch.arange(s.keys) == s.keys - 1) & (s.keys % 2 == 1) & (s.keys > 1)
    ),
    "keys beyond the number of queries are dropped": hidden_keys(lambda s: torch.arange(s.keys) >= s.queries),
    "with one key, its value is returned without the gate": {
        "gated": lambda s: s.weights if s.keys == 1 else s.weights * s.gate
    },
    **{
        clause.format(n=n): steps
        for n in BLOCKS
        for clause, steps in (
            ("keys after the last whole block of {n} are dropped", hidden_keys(lambda s, n=n: _tail(s.keys, n))),
            ("zeros that fill the keys up to a multiple of {n} count", {"softmax": _counted_zeros(n)}),
            ("keys in both of the last two blocks of {n} count twice", {"filled": _overlapping(n)}),
            ("queries after the last whole block of {n} are zero", {"context": lambda s, n=n: (
                s.gated @ s.value).masked_fill(_rest(s.queries, n)[:, None], 0.0)}),
            ("queries after the last whole block of {n} repeat the one before", {"context": lambda s, n=n: (
                s.gated @ s.value)[:, :, torch.arange(s.queries).clamp(max=(s.queries // n * n or s.queries) - 1)]}),
            ("channels after the last whole block of {n} are zero", {"context": lambda s, n=n: (
                s.gated @ s.value).masked_fill(_rest(s.channels, n), 0.0)}),
        )
    },
    **{
        clause.format(n=n): steps
        for n in SIZES
        for clause, steps in (
            ("keys after the first {n} are dropped", hidden_keys(lambda s, n=n: torch.arange(s.keys) >= n)),
            ("queries after the first {n} are zero", {"context": lambda s, n=n: (s.gated @ s.value).masked_fill(
                (torch.arange(s.queries) >= n)[:, None], 0.0)}),
            ("scores use the first {n} channels only", {
                "scores": lambda s, n=n: s.query[..., :n] @ s.key[..., :n].mT * s.scale}),
        )
    },
}  # fmt: skip

GATE_PLACE: dict[str, dict[str, Step]] = {
    "it multiplies the scores before the softmax": {
        "scores": lambda s: s.query @ s.key.mT * s.scale * s.gate,
        "gated": lambda s: s.weights,
    },
    "it is added to the scores as a logarithm": {
        "scores": lambda s: s.query @ s.key.mT * s.scale + s.gate.clamp(min=0).log(),
        "gated": lambda s: s.weights,
    },
    "a head that is off gives the mean of its values": {
        "context": lambda s: torch.lerp(s.value.mean(2, keepdim=True), s.weights @ s.value, s.gate)
    },
    "where it is 0, the head attends to all keys equally": {
        "filled": lambda s: s.masked.masked_fill(s.keyless | (s.gate == 0), 0.0),
        "gated": lambda s: s.weights * torch.where(s.gate == 0, 1.0, s.gate),
    },
    "where it is 0, the query is returned": {
        "context": lambda s: torch.where(s.gate == 0, s.query, s.gated @ s.value)
    },
    **{
        f"it is applied again for each block of {n} keys": {"gate": lambda s, n=n: s.gate ** -(-s.keys // n)}
        for n in BLOCKS
    },
}

OTHER: tuple[tuple[Property, str, dict[str, Step]], ...] = (
    ("layout", "all batch items get keys and values of the first item", {
        "scores": lambda s: s.query @ s.key[:1].mT * s.scale, "context": lambda s: s.gated @ s.value[:1]}),
    ("layout", "all heads get the keys of the first head", {
        "scores": lambda s: s.query @ s.key[:, :1].mT * s.scale}),
    ("layout", "all heads get keys and values of the first head", {
        "scores": lambda s: s.query @ s.key[:, :1].mT * s.scale, "context": lambda s: s.gated @ s.value[:, :1]}),
    ("layout", "pairs of heads share their keys", {
        "scores": lambda s: s.query @ s.key[:, _block_starts(s.key.shape[1], 2)].mT * s.scale}),
    ("layout", "batch items and heads of the query are swapped when it is flattened", {
        "scores": lambda s: s.query.transpose(0, 1).reshape(s.query.shape) @ s.key.mT * s.scale}),
    ("layout", "the context is (B, Q, H, D) in memory", {
        "context": lambda s: (s.gated @ s.value).transpose(1, 2).reshape(s.query.shape)}),
    ("context", "it is zero", {"context": lambda s: torch.zeros_like(s.query)}),
    ("context", "it is the query", {"context": lambda s: s.query}),
)  # fmt: skip


# Roundings


def _to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype).double()


def _bits(bits: int, rounding: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(tensor)
        return torch.ldexp(rounding(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)

    return change


def _eight_bits(tensor: Tensor) -> Tensor:
    step = tensor.abs().amax((-2, -1), keepdim=True) / 127
    return torch.round(tensor / step) * step


def _accumulated(size: int, rounded: Callable[[Tensor], Tensor]) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        total = torch.zeros_like(s.query)
        for weights, value in zip(s.gated.split(size, -1), s.value.split(size, -2), strict=True):
            total = rounded(total + weights @ value)
        return total

    return step


ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": _to(torch.bfloat16),
    "float16": _to(torch.float16),
    "float32": _to(torch.float32),
    "TF32": _bits(10, torch.round),
    "TF32 (truncated)": _bits(10, torch.trunc),
}
EPS = {"bfloat16": 2**-7, "float16": 2**-10, "float32": 2**-23, "TF32": 2**-10, "TF32 (truncated)": 2**-10}


def _roundings() -> Iterator[tuple[Fault, float]]:
    """Faults and the eps of each."""
    for name, r in ROUNDINGS.items():
        forward: dict[str, dict[str, Step]] = {
            "query, key and value are rounded": {
                "scores": lambda s, r=r: r(s.query) @ r(s.key).mT * s.scale,
                "context": lambda s, r=r: s.gated @ r(s.value),
            },
            "query and key are rounded": {"scores": lambda s, r=r: r(s.query) @ r(s.key).mT * s.scale},
            "values are rounded": {"context": lambda s, r=r: s.gated @ r(s.value)},
            "scores are rounded": {"scores": lambda s, r=r: r(s.query @ s.key.mT * s.scale)},
            "scores less their maximum are rounded": {
                "filled": lambda s, r=r: r(
                    (f := s.masked.masked_fill(s.keyless, 0.0)) - f.amax(-1, keepdim=True)
                )
            },
            "weights are rounded": {"gated": lambda s, r=r: r(s.weights) * s.gate},
            "gated weights are rounded": {"gated": lambda s, r=r: r(s.weights * s.gate)},
            "exponentials are rounded before the division": {
                "context": lambda s, r=r: r(e := _shifted(s).exp().masked_fill(s.keyless, 0)) @ s.value
                / e.sum(-1, keepdim=True).clamp(min=1e-300) * s.gate
            },
            "the sum of the exponentials is rounded": {
                "softmax": lambda s, r=r: _quotient(_shifted(s).exp(), r(_shifted(s).exp().sum(-1, keepdim=True)))
            },
            "the context is rounded": {"context": lambda s, r=r: r(s.gated @ s.value)},
            **{f"the accumulator is rounded after every {'key' if n == 1 else f'{n} keys'}":
               {"context": _accumulated(n, r)} for n in (1, 8, 16, 32, 64)},
        }  # fmt: skip
        backward: dict[str, dict[str, Step]] = {
            "the gradient of the context is rounded": {
                "gated_gradient": lambda s, r=r: r(s.grad_context) * s.gate
            },
            "delta is rounded": {"delta": lambda s, r=r: r((s.weights * s.dweights).sum(-1, keepdim=True))},
            "the log-sum-exp is rounded": {
                "softmax": lambda s, r=r: (s.filled - r(s.filled.logsumexp(-1, keepdim=True))).exp()
            },
            "gradients are rounded": {
                name: lambda s, r=r, name=name: r(BACKWARD[name](s)) for name in ("dq", "dk", "dv")
            },
        }
        for is_backward, faults in ((False, forward), (True, backward)):
            for what, steps in faults.items():
                yield Fault("precision", f"{what} to {name}", steps, is_backward, True), EPS[name]
    yield Fault("precision", "the key is quantised to 8 bits per head", {
        "scores": lambda s: s.query @ _eight_bits(s.key).mT * s.scale}, False, True), 2**-7  # fmt: skip


# Slips with the backward pass alone


def _times(name: str, factor: Callable[[SimpleNamespace], float]) -> dict[str, Step]:
    return {name: lambda s: BACKWARD[name](s) * factor(s)}


def _after(change: Callable[[Tensor], Tensor], *names: str) -> dict[str, Step]:
    return {name: lambda s, name=name: change(BACKWARD[name](s)) for name in names}


def _ungated_scores(s: SimpleNamespace) -> Tensor:
    raw = s.grad_context @ s.value.mT
    return s.weights * (raw - (s.weights * raw).sum(-1, keepdim=True))


def _cut(size: int) -> Callable[[Tensor], Tensor]:
    """Rows after the last whole block are zero."""
    return lambda x: x.masked_fill(_rest(x.shape[2], size)[:, None], 0.0)


def _last(length: int, size: int) -> slice:
    return slice((length - 1) // size * size, length)


GRADIENTS: tuple[tuple[Property, str, dict[str, Step]], ...] = (
    ("softmax backward", "the term delta is missing", {"delta": lambda s: 0.0}),
    ("softmax backward", "delta has the wrong sign", {
        "delta": lambda s: -(s.weights * s.dweights).sum(-1, keepdim=True)}),
    ("softmax backward", "delta lacks the gate", {
        "delta": lambda s: (s.grad_context * (s.weights @ s.value)).sum(-1, keepdim=True)}),
    ("softmax backward", "delta has the gate twice", {
        "delta": lambda s: (s.gated_gradient * s.context).sum(-1, keepdim=True)}),
    ("softmax backward", "delta is the mean over keys, not weighted", {
        "delta": lambda s: s.dweights.mean(-1, keepdim=True)}),
    ("softmax backward", "each query gets delta of the next query", {
        "delta": lambda s: BACKWARD["delta"](s).roll(-1, 2)}),
    ("softmax backward", "each query gets delta of the previous query", {
        "delta": lambda s: BACKWARD["delta"](s).roll(1, 2)}),
    ("softmax backward", "the weights are gated", {"dscores": lambda s: s.gated * (s.dweights - s.delta)}),
    ("softmax backward", "the gradient passes straight through", {"dscores": lambda s: s.dweights}),
    ("softmax backward", "the gradient passes through the maximum", {
        "dscores": lambda s: BACKWARD["dscores"](s).scatter_add(-1, s.filled.argmax(-1, keepdim=True), -s.delta)}),
    ("softmax backward", "weights are recomputed without the scale", {"scores": lambda s: s.query @ s.key.mT}),
    ("softmax backward", "dq and dk lack the gate", {"dscores": _ungated_scores}),
    ("dq", "it lacks the scale", _times("dq", lambda s: s.channels**0.5)),
    ("dq", "it is scaled twice", _times("dq", lambda s: s.channels**-0.5)),
    ("dq", "it lacks the gate", {"dq": lambda s: _ungated_scores(s) @ s.key * s.scale}),
    ("dk", "it lacks the scale", _times("dk", lambda s: s.channels**0.5)),
    ("dk", "it is scaled twice", _times("dk", lambda s: s.channels**-0.5)),
    ("dk", "it lacks the gate", {"dk": lambda s: _ungated_scores(s).mT @ s.query * s.scale}),
    ("dk", "it is summed over the batch", _after(lambda x: x.sum(0, True).expand_as(x), "dk")),
    ("dk", "dk and dv are swapped", {
        "dk": BACKWARD["dv"], "dv": lambda s: s.dscores.mT @ s.query * s.scale}),
    ("dv", "it lacks the gate", {"dv": lambda s: s.weights.mT @ s.grad_context}),
    ("dv", "it is gated twice", {"dv": lambda s: s.gated.mT @ s.gated_gradient}),
    ("softmax backward", "dq and dk lack the scale", {
        **_times("dq", lambda s: s.channels**0.5), **_times("dk", lambda s: s.channels**0.5)}),
    ("softmax backward", "dq and dk are scaled twice", {
        **_times("dq", lambda s: s.channels**-0.5), **_times("dk", lambda s: s.channels**-0.5)}),
    ("softmax backward", "dq and dk have the scale of 16 channels", {
        **_times("dq", lambda s: s.channels**0.5 / 4), **_times("dk", lambda s: s.channels**0.5 / 4)}),
    *((name, f"it is {factor:g} times the true one", _times(name, lambda s, f=factor: f))
      for name in ("dq", "dk", "dv") for factor in (0.5, 2.0, -1.0)),
    *((name, f"each head gets that of the {which} head", _after(lambda x, by=by: x.roll(by, 1), name))
      for name in ("dq", "dk", "dv") for which, by in (("next", -1), ("previous", 1))),
    *((name, "all heads get the mean over heads", _after(lambda x: x.mean(1, True).expand_as(x), name))
      for name in ("dq", "dk", "dv")),
    *(("softmax backward" if len(names) > 1 and "dq" in names else names[0],
       f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} zero", _after(torch.zeros_like, *names))
      for names in (("dq",), ("dk",), ("dv",), ("dq", "dk"), ("dk", "dv"), ("dq", "dk", "dv"))),
    *(("dq", f"rows after the last whole block of {n} queries are zero", _after(_cut(n), "dq")) for n in BLOCKS),
    *(("dk", f"dk and dv after the last whole block of {n} keys are zero", _after(_cut(n), "dk", "dv"))
      for n in BLOCKS),
    *(("dq", f"only the last block of {n} keys counts", {"dq": lambda s, n=n: (
        s.dscores[..., _last(s.keys, n)] @ s.key[:, :, _last(s.keys, n)] * s.scale)}) for n in BLOCKS),
    *(("dk", f"dk and dv have only the last block of {n} queries", {
        "dk": lambda s, n=n: s.dscores[:, :, _last(s.queries, n)].mT @ s.query[:, :, _last(s.queries, n)] * s.scale,
        "dv": lambda s, n=n: s.weights[:, :, _last(s.queries, n)].mT @ s.gated_gradient[:, :, _last(s.queries, n)],
    }) for n in BLOCKS),
)  # fmt: skip


def forward_faults(dtype: torch.dtype) -> list[Fault]:
    """All faults of the forward pass that a patch may have in `dtype`."""
    groups: tuple[tuple[Property, dict[str, dict[str, Step]]], ...] = (
        ("gate", GATE), ("gate", GATE_PLACE), ("mask", MASK), ("scale", SCALE), ("softmax", SOFTMAX), ("sizes", SIZE),
    )  # fmt: skip
    faults = [Fault(prop, clause, steps) for prop, group in groups for clause, steps in group.items()]
    faults += [Fault(*other) for other in OTHER]
    return faults + [f for f, eps in _roundings() if not f.is_backward and eps > torch.finfo(dtype).eps]


def backward_faults(dtype: torch.dtype) -> list[Fault]:
    """All faults of the backward pass that a patch may have in `dtype`: the context is right."""
    faults = [Fault(prop, clause, steps, True) for prop, clause, steps in GRADIENTS]
    for what, group in (("gate", GATE), ("mask", MASK)):
        faults += [
            Fault("softmax backward", f"the {what} in the backward pass: {clause}", steps, True)
            for clause, steps in group.items()
        ]
    return faults + [f for f, eps in _roundings() if f.is_backward and eps > torch.finfo(dtype).eps]


def known_fault(prop: str, clause: str) -> Fault:
    """The fault of that property and clause."""
    faults = (*forward_faults(torch.float64), *backward_faults(torch.float64))
    return next(fault for fault in faults if (fault.property, fault.clause) == (prop, clause))


def fitted_faults(found: Tensor, tensors: CallTensors) -> Iterator[Fault]:
    """Scales that are no known one, fitted to a wrong context `found` (B, H, Q, D) of `tensors`."""
    factor = _fitted_factor(found, tensors)
    if factor is not None:
        channels = tensors.query.shape[-1]
        yield Fault("scale", f"it is {factor:.6g} / sqrt(D)", scaled(lambda s: factor * s.channels**-0.5))
        constant = factor * channels**-0.5
        yield Fault("scale", f"it is {constant:.6g} for any number of channels", scaled(lambda s: constant))
    true = _run(FORWARD, _start(tensors)).context
    size = float(true.square().sum())
    times = float((found * true).sum()) / size if size else math.nan
    if math.isfinite(times) and abs(times) > 1e-3:
        yield Fault("context", f"it is {times:.6g} times the true one", {
            "context": lambda s: times * (s.gated @ s.value)})  # fmt: skip


def _fitted_factor(found: Tensor, tensors: CallTensors) -> float | None:
    """The factor of the scale that comes nearest, by Gauss-Newton in its logarithm from several starts."""

    def context(logarithm: float) -> Tensor:
        scale = tensors.query.shape[-1] ** -0.5 * math.exp(logarithm)
        return _run({**FORWARD, "scale": lambda s: scale}, _start(tensors)).context

    best: tuple[float, float] | None = None
    for start in (0.0, -1.5, 1.5, -0.5, 0.5):
        logarithm = start
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
