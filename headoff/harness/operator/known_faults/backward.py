"""Slips with the backward pass alone."""

# mypy: disable-error-code="misc, arg-type"

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from headoff.harness.operator.known_faults.steps import BACKWARD, BLOCKS, Change, Steps, after, rest


def _ungated_scores(s: SimpleNamespace) -> Tensor:
    raw = s.grad_context @ s.value.mT
    return s.weights * (raw - (s.weights * raw).sum(-1, keepdim=True))


def _times(factor: Callable[[SimpleNamespace], float], *names: str) -> Steps:
    return {name: lambda s, name=name: BACKWARD[name](s) * factor(s) for name in names}


def _cut(size: int) -> Change:
    """Rows after the last whole block are zero."""
    return lambda x: x.masked_fill(rest(x.shape[2], size)[:, None], 0.0)


def _last(length: int, size: int) -> slice:
    return slice((length - 1) // size * size, length)


def _of_gradients() -> Iterator[tuple[str, Steps]]:
    """What may befall one gradient, or several; the clause names them."""
    for names in (("dq",), ("dk",), ("dv",), ("dq", "dk"), ("dk", "dv"), ("dq", "dk", "dv")):
        subject = f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"
        yield f"{subject} zero", after(torch.zeros_like, *names)
        yield f"{subject} summed over the batch", after(lambda x: x.sum(0, True).expand_as(x), *names)
        yield f"{subject} the mean over heads", after(lambda x: x.mean(1, True).expand_as(x), *names)
        for which, by in (("next", -1), ("previous", 1)):
            yield f"{subject} that of the {which} head", after(lambda x, by=by: x.roll(by, 1), *names)
        if "dv" not in names:
            yield f"{subject} not scaled", _times(lambda s: s.channels**0.5, *names)
            yield f"{subject} scaled twice", _times(lambda s: s.channels**-0.5, *names)
            yield f"{subject} scaled as for 16 channels", _times(lambda s: s.channels**0.5 / 4, *names)


BACKWARD_ALONE: dict[str, Steps] = {
    "the term delta is missing": {"delta": lambda s: 0.0},
    "delta has the wrong sign": after(torch.neg, "delta"),
    "delta lacks the gate": {"delta": lambda s: (s.grad_context * (s.weights @ s.value)).sum(-1, keepdim=True)},
    "delta has the gate twice": {"delta": lambda s: (s.gated_gradient * s.context).sum(-1, keepdim=True)},
    "delta is the mean over keys, not weighted": {"delta": lambda s: s.dweights.mean(-1, keepdim=True)},
    "each query gets delta of the next query": after(lambda x: x.roll(-1, 2), "delta"),
    "each query gets delta of the previous query": after(lambda x: x.roll(1, 2), "delta"),
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
        ("dq after the last whole block of {n} queries is zero", after(_cut(n), "dq")),
        ("dk and dv after the last whole block of {n} keys are zero", after(_cut(n), "dk", "dv")),
        ("dq has only the last block of {n} keys", {"dq": lambda s, n=n: (
            s.dscores[..., _last(s.keys, n)] @ s.key[:, :, _last(s.keys, n)] * s.scale)}),
        ("dk and dv have only the last block of {n} queries", {
            "dk": lambda s, n=n: s.dscores[:, :, _last(s.queries, n)].mT @ s.query[:, :, _last(s.queries, n)] * s.scale,
            "dv": lambda s, n=n: s.weights[:, :, _last(s.queries, n)].mT @ s.gated_gradient[:, :, _last(s.queries, n)],
        }))},
}  # fmt: skip
