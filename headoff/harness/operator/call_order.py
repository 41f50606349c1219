"""Checks of the order of calls: a call does not depend on the calls before it, nor on the gradient mode they ran in."""

from __future__ import annotations

from dataclasses import replace

import torch

from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding
from headoff.harness.operator.call import Tensors, gradients, leaves_of
from headoff.harness.operator.cases import Case
from headoff.harness.operator.side_effects import WITH_AND_WITHOUT, Trial, finding, side_effect
from headoff.harness.tolerance import relative_error

GATE_GRADIENT = 16.0
"""Allowed error of a gate's gradient, in units of eps times the sum of the absolute values of its terms; the shares of
sampled values are moved by the rounding of positions, which is larger in larger levels (`Case.largest_side`)."""

INFERENCE_CHANNELS, DTYPES_UP_CHANNELS, DTYPES_DOWN_CHANNELS = 56, 88, 72
"""Channels that no other call has, to find what is cached by the first call of so many channels."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


# Where no gradient is asked for there is often another kernel, and one for many queries, and one for a single one.
@side_effect(
    "gradient-modes",
    {},
    {"queries": 1, "gate": "fractions"},
    {"queries": 130, "mask": "bias", "gate": "none"},
    {"queries": 19, "keys": 330, "mask": "bias and padding", "gate": "per item"},
)
def gradient_modes(trial: Trial, case: Case) -> list[Finding]:
    """The context requires a gradient where an input does and gradients are on; in all modes its numbers are right."""
    tensors = trial.tensors(case)
    leaves = leaves_of(tensors, "all")
    inputs = tuple(leaves.values())
    with torch.no_grad():
        without = {"under no_grad": trial.context(inputs, tensors)}
    with torch.inference_mode():
        without["under inference_mode"] = trial.context(inputs, tensors).clone()
    without["where no input requires one"] = trial.context(tensors.inputs, tensors)
    required = {"with gradients": trial.context(inputs, tensors)}
    for name in leaves:
        one = (leaf.detach().requires_grad_(other == name) for other, leaf in leaves.items())
        required[f"where the {name} requires one"] = trial.context(one, tensors)
    for expected, contexts in ((False, without), (True, required)):
        for when, context in contexts.items():
            if context.requires_grad != expected:
                message = f"the context requires {'no' if expected else 'a'} gradient {when}"
                # (Where a gradient is missing, that of the first input is.)
                missing = next(iter(tensors.gradient_names.values()))
                return finding(missing if expected else "state", message, case)
            if found := trial.wrong(case, {"context": context}):
                return trial.state(case, found, when)
    return []


@side_effect(
    "first-call-without-gradients",
    *(
        {"gate": gate, "mask": mask, "channels": INFERENCE_CHANNELS}
        for gate, mask in (("full", "padding"), ("none", "none"), ("fractions", "bias"))
    ),
)
def first_call_without_gradients(trial: Trial, case: Case) -> list[Finding]:
    """The first call of a size may be in inference mode; what it caches must serve training later."""
    tensors = trial.tensors(case)
    with torch.inference_mode():
        context = trial.context(tensors.inputs, tensors)
    if found := trial.wrong(case, {"context": context}):
        return trial.state(case, found, "in inference mode")
    when = "after a first call in inference mode"
    try:
        found = trial.wrong(case, trial.call(tensors))
    except Exception as error:
        return finding("state", f"{when}, a call with gradients raises {describe_exception(error)}", case)
    return trial.state(case, found, when) if found else []


@side_effect("growing-numbers", {"mask": "none"})
def growing_numbers(trial: Trial, case: Case) -> list[Finding]:
    """Keys larger than in any call before, with queries smaller in proportion, give the same scores and context."""
    tensors = trial.tensors(case)
    for power in (0, 3, 6) if trial.dtype == torch.float16 else (0, 10, 20):
        grown = replace(tensors, query=tensors.query * 2.0**-power, key=tensors.key * 2.0**power)
        if found := trial.wrong_context(case, grown, f"with keys {2**power} times as large"):
            return found
    return []


@side_effect("changing-calls")
def changing_calls(trial: Trial, case: Case) -> list[Finding]:
    """Every call of a sequence (`SEQUENCE`) is right, and of calls in one dtype after another."""
    # In both directions: what a call leaves behind may matter in one of them only.
    for fields in (*trial.sequence, *reversed(trial.sequence)):
        changed = trial.case(**{**fields, "seed": trial.seed + fields.get("seed", 0)})
        if found := trial.wrong_calls(changed):
            return trial.state(changed, found, "after calls with other inputs")
    dtypes = [dtype for dtype in DTYPES if trial.unsupported_dtype(dtype) is None]
    for order, channels in ((dtypes, DTYPES_UP_CHANNELS), (dtypes[::-1], DTYPES_DOWN_CHANNELS)):
        for dtype in order:
            changed = trial.case(dtype=dtype, channels=channels)
            found = trial.wrong_calls(changed)
            # The verdict is about the dtype that was asked for.
            if found and dtype == trial.dtype:
                return trial.state(changed, found, "after calls in other dtypes", channels=channels + 32)
    return []


@side_effect("changed-contents")
def changed_contents(trial: Trial, case: Case) -> list[Finding]:
    """New contents in the same tensors are read: in all of them, and in one input at a time."""
    cases = [replace(case, seed=case.seed + number) for number in range(3)]
    tensors = trial.tensors(case)
    for changed in cases:
        _copy_into(tensors, trial.tensors(changed))
        for results in ({"context": trial.forward(tensors)}, trial.call(tensors)):
            if found := trial.wrong(changed, results):
                return trial.state(changed, found, "with new contents in the same tensors")
    for name in (name for name in tensors.named() if name != "grad_context"):
        _copy_into(tensors, trial.tensors(case))
        trial.forward(tensors)
        tensors.named()[name].copy_(trial.tensors(cases[1]).named()[name])
        if found := trial.wrong_context(case, tensors, f"with new contents in the {name} alone"):
            return found
    return []


def _copy_into(tensors: Tensors, contents: Tensors) -> None:
    for tensor, content in zip(tensors.named().values(), contents.named().values(), strict=True):
        tensor.copy_(content)


@side_effect("crossed-backward", *WITH_AND_WITHOUT)
def crossed_backward(trial: Trial, case: Case) -> list[Finding]:
    """Two calls and then both backward passes, in either order; a backward pass twice."""
    cases = [case, replace(case, seed=case.seed + 1)]
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        calls = []
        for one in cases:
            tensors = trial.tensors(one)
            leaves = leaves_of(tensors, "all")
            calls.append((trial.context(leaves.values(), tensors), leaves, tensors))
        trial.forward(trial.tensors(replace(case, seed=case.seed + 2)))
        for place, number in enumerate(order):
            context, leaves, tensors = calls[number]
            twice = order.count(number) > 1
            again = number in order[place + 1 :]
            try:
                results = gradients(context, leaves, tensors, retain_graph=again)
            except RuntimeError:
                if twice:
                    break  # a patch may refuse a second backward pass, but not get it wrong
                raise
            if found := trial.wrong(cases[number], {"context": context, **results}):
                how = "a second time" if twice else "after another call"
                return trial.state(cases[number], found, f"where the backward pass runs {how}")
    return []


@side_effect("gate-gradient", *({"gate": gate} for gate in ("full", "fractions", "per item", "scalar")))
def gate_gradient(trial: Trial, case: Case) -> list[Finding]:
    """A gate that requires a gradient gets none, or the right one; any where it is 0.

    What is off need not be computed, and an attention need not support gradients of gates.
    """
    tensors = trial.tensors(case)
    assert tensors.gate is not None
    gate = tensors.gate.detach().requires_grad_()
    try:
        context = trial.context(tensors.inputs, replace(tensors, gate=gate))
        if not context.requires_grad:
            return []
        (found,) = torch.autograd.grad(context, [gate], tensors.grad_context, allow_unused=True)
    except Exception:
        return []
    if found is None:
        return []
    exact = replace(tensors.double(), gate=None)
    positive = replace(exact, value=exact.value.abs())
    terms = exact.attend(trial.oracle, exact.inputs) * exact.grad_context
    sizes = positive.attend(trial.oracle, positive.inputs) * exact.grad_context.abs()
    true, size = (x.sum(-1, keepdim=True).sum_to_size(found.shape) for x in (terms, sizes))
    error = relative_error((found.cpu().double() - true).abs(), size * torch.finfo(trial.dtype).eps)
    error = error.masked_fill(gate.detach().cpu() == 0, 0.0)
    if float(error.max()) <= GATE_GRADIENT * case.largest_side:
        return []
    place = int(error.argmax())
    message = f"the gradient of a gate is {float(found.flatten()[place]):.7g}"
    return finding("gate", f"{message}, expected {float(true.flatten()[place]):.7g}", case)
