"""Checks of a dimension more or less: items of a batch by themselves, and `torch.func.vmap`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headoff.harness.checks.candidate import (
    Candidate,
    Outcome,
    about,
    attend,
    check,
    copied,
    raised,
)
from headoff.harness.operator.side_effects import same

BATCH = 5
"""Items, a number that no other dimension has."""

LEADING = 3
"""Size of the dimension that is mapped over."""


@check("batch-invariance")
def batch_invariance(candidate: Candidate) -> Outcome:
    """Whether an item alone has the same bits as in a batch: a note, for other block sizes round otherwise."""
    differ: dict[str, float] = {}
    for fields in candidate.arguments:
        case = candidate.case(**{**fields, "batch": BATCH, "heads": 3, "queries": 18})
        tensors = candidate.tensors(case)
        of_batch = candidate.call(candidate.attention, tensors)
        for item in range(BATCH):
            rows = {
                name: tensor[item : item + 1]
                for name, tensor in tensors.named().items()
                if tensor.dim() >= 4 and tensor.shape[0] == BATCH
            }
            alone = candidate.call(candidate.attention, replace(tensors, **rows))
            for name, one in alone.items():
                other = of_batch[name][item : item + 1]
                if not same(one.detach(), other.detach()):
                    difference = (one - other).detach().abs().max().item()
                    differ[name] = max(differ.get(name, 0.0), difference)
    if not differ:
        return Outcome(remarks=["batch-invariance: an item has the same bits alone and in a batch"])
    sizes = ", ".join(f"{name} by up to {difference:.1e}" for name, difference in differ.items())
    return Outcome(
        remarks=[f"batch-invariance: an item alone has other bits than in a batch of {BATCH} ({sizes})"]
    )


@check("vmap")
def vmap(candidate: Candidate) -> Outcome:
    """Mapped over a leading dimension of all tensors, with the gradients of each."""
    outcome = Outcome()
    for fields in candidate.arguments:
        cases = [candidate.case(**{**fields, "seed": candidate.seed + number}) for number in range(LEADING)]
        if found := candidate.wrong_alone(cases[:1]):
            outcome.findings = found
            return outcome
        calls = [candidate.tensors(case) for case in cases]
        when = f"under torch.func.vmap over {LEADING} calls"
        try:
            results = _mapped(candidate, calls)
        except Exception as error:
            outcome.findings = [raised("vmap", when, error, cases[0])]
            return outcome
        for number, case in enumerate(cases):
            one = {name: result[number] for name, result in results.items()}
            if found := candidate.wrong(case, one):
                outcome.findings = about("vmap", f"{when}, in number {number}", found)
                return outcome
    return outcome


def _mapped(candidate: Candidate, calls: list[Any]) -> dict[str, Tensor]:
    names = list(copied(calls[0]))
    stacked = {name: torch.stack([copied(call)[name] for call in calls]) for name in names}
    differentiable = [] if candidate.forward_only else list(calls[0].gradient_names)
    for name in differentiable:
        stacked[name].requires_grad_()

    def one(tensors: dict[str, Tensor]) -> Tensor:
        return attend(candidate.attention, calls[0], tensors)

    with torch.set_grad_enabled(not candidate.forward_only):
        context = torch.func.vmap(one)(stacked)
    results = {"context": context.detach()}
    if differentiable:
        grad_context = torch.stack([call.grad_context for call in calls])
        found = torch.autograd.grad(context, [stacked[name] for name in differentiable], grad_context)
        results |= {
            calls[0].gradient_names[name]: one for name, one in zip(differentiable, found, strict=True)
        }
    return results
