"""The check of autocast: what an attention does to inputs in float32 where lower precision was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from headoff.harness.checks.candidate import (
    Candidate,
    NotApplicable,
    Outcome,
    about,
    check,
    raised,
)
from headoff.harness.finding import Finding
from headoff.harness.operator.call import gradients, leaves_of
from headoff.harness.operator.cases import Case

LOW = torch.bfloat16


@check("autocast")
def autocast(candidate: Candidate) -> Outcome:
    """Float32 inputs under autocast to bfloat16: as right as the same numbers in bfloat16 without autocast are.

    The context may be of bfloat16 or of float32; gradients are of float32, like the inputs. An attention that computes
    in float32 all the same is more exact than was asked for, which is right. The inputs are numbers that bfloat16 has,
    so that both calls have one truth.
    """
    outcome = Outcome()
    for fields in candidate.arguments:
        case = candidate.case(**{**fields, "dtype": LOW})
        single = {
            name: tensor.float() if tensor.is_floating_point() else tensor
            for name, tensor in candidate.tensors(case).named().items()
        }
        tensors = replace(candidate.tensors(case), **single)
        when = f"under torch.autocast({candidate.device.type!r}, torch.bfloat16) with inputs in float32"
        try:
            results = _results(candidate, tensors)
        except Exception as error:
            if _is_raised(candidate, case):
                raise NotApplicable("it does not take bfloat16, with autocast or without") from error
            outcome.findings = [raised("autocast", when, error, case)]
            return outcome
        context = results["context"]
        if context.dtype not in (LOW, torch.float32):
            message = f"{when}, the context is of {context.dtype}"
            outcome.findings = [_finding(message, case)]
            return outcome
        for name, gradient in results.items():
            if name != "context" and gradient.dtype != torch.float32:
                outcome.findings = [_finding(f"{when}, the gradient {name} is of {gradient.dtype}", case)]
                return outcome
        found = candidate.wrong(case, {**results, "context": context.to(LOW)})
        outcome.findings = about("autocast", when, found)
        if outcome.findings:
            return outcome
        outcome.remarks = [f"autocast: the context is of {str(context.dtype).removeprefix('torch.')}"]
    return outcome


def _finding(message: str, case: Case) -> Finding:
    return Finding("autocast", message, str(case))


def _is_raised(candidate: Candidate, case: Case) -> bool:
    """Whether it raises on inputs in bfloat16 without autocast as well."""
    try:
        candidate.call(candidate.attention, candidate.tensors(case))
    except Exception:
        return True
    return False


def _results(candidate: Candidate, tensors: Any) -> dict[str, torch.Tensor]:
    if candidate.forward_only:
        with torch.autocast(candidate.device.type, LOW), torch.no_grad():
            return {"context": tensors.attend(candidate.attention, tensors.inputs)}
    inputs = leaves_of(tensors, "all")
    with torch.autocast(candidate.device.type, LOW):
        context = tensors.attend(candidate.attention, inputs.values())
    plain = replace(tensors, grad_context=tensors.grad_context.to(context.dtype))
    return {"context": context, **gradients(context, inputs, plain)}
