"""Slips with the forward pass alone, by what of the attention is wrong."""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from headoff.harness.finding import Property
from headoff.harness.operator.known_faults.steps import (
    BLOCKS,
    FORWARD,
    LIMITS,
    Step,
    Steps,
    block_starts,
    changed_context,
    exponentials,
    quotient,
    rest,
    total,
)


def hidden_keys(which: Callable[[SimpleNamespace], Tensor]) -> Steps:
    """Keys where `which` is True are never seen."""
    return {"masked": lambda s: (s.scores + s.mask).masked_fill(which(s), -math.inf)}


def scaled(of: Callable[[SimpleNamespace], float]) -> Steps:
    return {"scale": of}


def _counted_zeros(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        filled = torch.nn.functional.pad(s.filled, (0, -s.keys % size))
        return filled.softmax(-1)[..., : s.keys]

    return step


def _overlapping(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        twice = (torch.arange(s.keys) >= s.keys - size) & ~rest(s.keys, size) & (s.keys % size > 0)
        return FORWARD["filled"](s) + math.log(2) * twice

    return step


def _overflowing(s: SimpleNamespace) -> Tensor:
    """No maximum is subtracted, and exponentials and their sum are float32."""
    exponentials = s.filled.exp().float().double()
    return quotient(exponentials, exponentials.sum(-1, keepdim=True).float().double())


def _normalised_apart(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.clamp(min=-1e30).split(size, -1)
        return torch.cat([part.softmax(-1) for part in parts], -1) / len(parts)

    return step


def _own_maxima(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.split(size, -1)
        return quotient(torch.cat([(p - p.amax(-1, True).clamp(min=-1e30)).exp() for p in parts], -1))

    return step


def _total_not_rescaled(size: int) -> Step:
    def step(s: SimpleNamespace) -> Tensor:
        parts = s.filled.split(size, -1)
        running = torch.stack([p.amax(-1) for p in parts], -1).cummax(-1).values
        sums = [(p - running[..., i, None]).exp().sum(-1) for i, p in enumerate(parts)]
        return quotient(exponentials(s), torch.stack(sums, -1).sum(-1, keepdim=True))

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
        "where it is 0, the query is returned": changed_context(
            lambda s, context: torch.where(s.gate == 0, s.query, context)),
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
        "1 is added to the denominator": {"softmax": lambda s: quotient(exponentials(s), total(s) + 1)},
        "the weights are divided by the number of keys, not by their sum": {
            "softmax": lambda s: exponentials(s) / s.keys},
        "the weights are not normalised": {"softmax": exponentials},
        "exp2 is used without the factor log2 e": {"softmax": lambda s: (s.filled * math.log(2)).softmax(-1)},
        "log2 e is rounded to 1.44": {"softmax": lambda s: (s.filled * (1.44 * math.log(2))).softmax(-1)},
        "it is over the queries": {
            "softmax": lambda s: s.filled.softmax(-2 if s.queries == s.keys else -1).nan_to_num(0.0)},
        "it is over the heads": {"softmax": lambda s: s.filled.softmax(1).nan_to_num(0.0)},
        "it is over the batch items": {"softmax": lambda s: s.filled.softmax(0).nan_to_num(0.0)},
        "the weights are multiplied by their sum, not divided by it": {
            "softmax": lambda s: exponentials(s) * total(s)},
        "there is none: scores are the weights": {"softmax": lambda s: s.filled},
        "no maximum is subtracted, and exponentials overflow": {"softmax": _overflowing},
        "no maximum is subtracted, and NaN is replaced by 0": {
            "softmax": lambda s: _overflowing(s).nan_to_num(0.0, 0.0, 0.0)},
        "the denominator lacks the last key": {"softmax": lambda s: quotient(
            exponentials(s), total(s) - exponentials(s)[..., -1:] if s.keys > 1 else None)},
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
                lambda s, n=n: rest(s.keys, n) & (s.keys >= n))),
            ("zeros that fill the keys up to a multiple of {n} count", {"softmax": _counted_zeros(n)}),
            ("keys in both of the last two blocks of {n} count twice", {"filled": _overlapping(n)}),
            ("queries after the last whole block of {n} are zero", changed_context(
                lambda s, context, n=n: context.masked_fill(rest(s.queries, n)[:, None], 0.0))),
            ("queries after the last whole block of {n} repeat the one before", changed_context(
                lambda s, context, n=n: context[:, :, torch.arange(s.queries).clamp(
                    max=(s.queries // n * n or s.queries) - 1)])),
            ("channels after the last whole block of {n} are zero", changed_context(
                lambda s, context, n=n: context.masked_fill(rest(s.channels, n), 0.0))))},
        **{clause.format(n=n): steps for n in LIMITS for clause, steps in (
            ("keys after the first {n} are dropped", hidden_keys(lambda s, n=n: torch.arange(s.keys) >= n)),
            ("queries after the first {n} are zero", changed_context(
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
            "scores": lambda s: s.query @ s.key[:, block_starts(s.key.shape[1], 2)].mT * s.scale},
        "batch items and heads of the query are swapped when it is flattened": {
            "scores": lambda s: s.query.transpose(0, 1).reshape(s.query.shape) @ s.key.mT * s.scale},
        "the context is (B, Q, H, D) in memory": changed_context(
            lambda s, context: context.transpose(1, 2).reshape(context.shape)),
    },
    "context": {
        "key and value are swapped": {
            "scores": lambda s: s.query @ s.value.mT * s.scale, "context": lambda s: s.gated @ s.key},
        "it is zero": changed_context(lambda s, context: torch.zeros_like(context)),
        "it is the query": {"context": lambda s: s.query},
    },
}  # fmt: skip
