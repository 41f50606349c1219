"""Whether an attention behaves: all that is not a number.

It leaves its inputs and torch's settings as they are, gives the same bits for the same inputs, carries nothing from
call to call, and returns a context that is its own. Each check of `CONDUCT` asks for one such property. Where calls
follow one another, every result is held against its own truth, so that it does not matter in which way a patch
remembers the wrong thing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention.contract import Attention
from headoff.errors import SettingError
from headoff.harness.exceptions import describe_exception
from headoff.harness.findings import Finding
from headoff.harness.operator.accuracy import compare, describe, findings_of, misshapen, operator_findings
from headoff.harness.operator.budget import allowed_for
from headoff.harness.operator.calls import Results, call, gradients, leaves_of
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.tensors import CallTensors, tensors_of
from headoff.harness.operator.torch_settings import watched_settings
from headoff.harness.operator.truth import truth_for

REPEATS = 24
"""Calls that must give the same bits: more than any counter that a patch is likely to have."""


@dataclass(frozen=True)
class Trial:
    """An attention, and where it is tried."""

    attention: Attention
    dtype: torch.dtype
    device: torch.device
    seed: int
    check: str

    def case(self, **fields: Any) -> OperatorCase:
        """A case of moderate, ragged sizes with everything in it, changed by `fields`.

        Each check has its own number of keys, so that its first call is the first of that size.
        """
        usual: dict[str, Any] = {
            "name": self.check,
            "batch": 2,
            "heads": 4,
            "queries": 19,
            "keys": 37 + 2 * list(CONDUCT).index(self.check),
            "gate": "full",
            "mask": "padding",
            "seed": self.seed,
        }
        return OperatorCase(**{**usual, "dtype": self.dtype, **fields})

    def tensors(self, **fields: Any) -> CallTensors:
        return tensors_of(self.case(**fields), self.device)

    def forward(self, tensors: CallTensors) -> Tensor:
        """The context, without gradients."""
        with torch.no_grad():
            return self.context(tensors.query, tensors.key, tensors.value, tensors)

    def context(self, query: Tensor, key: Tensor, value: Tensor, tensors: CallTensors) -> Tensor:
        return self.attention(query, key, value, tensors.mask, head_gate=tensors.gate)


Check = Callable[[Trial], list[Finding]]


def conduct_findings(
    attention: Attention, check: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[Finding]:
    """What is wrong with the conduct of `attention` by one `check` of `CONDUCT`; none where it behaves.

    Raises SettingError for a check that there is not.
    """
    if check not in CONDUCT:
        raise SettingError(f"there is no check {check!r}: use one of {', '.join(CONDUCT)}")
    with watched_settings() as changes:
        findings = _checked(attention, check, dtype, torch.device(device), seed)
    return findings or [Finding("state", f"a call changes {change}", check) for change in changes]


def _checked(
    attention: Attention, check: str, dtype: torch.dtype, device: torch.device, seed: int
) -> list[Finding]:
    try:
        trial = Trial(attention, dtype, device, seed, check)
        # What is wrong from the first call is not put down to what this check is about.
        if findings := operator_findings(attention, trial.case(), device):
            return findings
        return CONDUCT[check](trial)
    except Exception as error:
        return [Finding("crash", f"raises {describe_exception(error)}", check)]


# Inputs


def inputs_untouched(trial: Trial) -> list[Finding]:
    """Neither forward nor backward writes into any input, or into the memory around it, not even to restore it."""
    fields: list[dict[str, Any]] = [
        {},
        {"layout": "sliced", "mask": "bias and padding", "gradient": "every second"},
        {"layout": "heads last", "gate": "all off", "mask": "keyless rows", "gradient": "heads last"},
        {"gate": "none", "mask": "additive keyless rows", "inputs": "large"},
        {"gate": "binary", "gate_dtype": torch.bool, "mask": "none", "gradient": "ones"},
    ]
    for changed in fields:
        case = trial.case(**changed)
        for backward in (False, True):
            tensors = tensors_of(case, trial.device)
            before = {name: (_memory(tensor), tensor._version) for name, tensor in tensors.named().items()}
            if backward:
                call(trial.attention, tensors)
            else:
                trial.forward(tensors)
            for name, tensor in tensors.named().items():
                memory, version = before[name]
                when = "a call and its backward pass" if backward else "a call without gradients"
                if not torch.equal(memory, _memory(tensor)):
                    where = (
                        "" if _is_same(tensor, tensors_of(case, trial.device).named()[name]) else " itself"
                    )
                    return [Finding("in-place", f"{when} changes the memory of the {name}{where}", str(case))]
                if version != tensor._version:
                    return [Finding("in-place", f"{when} writes into the {name} and restores it", str(case))]
    return []


def _memory(tensor: Tensor) -> Tensor:
    """A copy of all bytes of a tensor's storage, those between and around its elements, too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage()).clone()


# The context


def context_is_its_own(trial: Trial) -> list[Finding]:
    """Shape, dtype and device are the query's; no two elements share memory, and none is an input's."""
    fields: list[dict[str, Any]] = [
        {},
        {"layout": "heads last", "gate": "none", "mask": "none"},
        {"keys": 1, "gate": "none", "mask": "none"},
        {"keys": 1, "gate": "all on", "mask": "none"},
        {"gate": "all off"},
        {"mask": "all masked"},
        {"queries": 1, "batch": 1},
        {"layout": "expanded", "gate": "scalar"},
        {"layout": "all expanded", "gate": "none", "mask": "none"},
        {"gate": "full", "gate_dtype": torch.float64},
    ]
    for changed in fields:
        case = trial.case(**changed)
        tensors = tensors_of(case, trial.device)
        for context in (trial.forward(tensors), call(trial.attention, tensors)["context"]):
            if found := misshapen(context, case):
                return [found]
            if context.device.type != trial.device.type:
                return [
                    Finding(
                        "layout", f"the context is on {context.device}, expected {trial.device}", str(case)
                    )
                ]
            if any(s == 0 and n > 1 for s, n in zip(context.stride(), context.shape, strict=True)):
                message = f"elements of the context share memory: its strides are {context.stride()}"
                return [Finding("layout", message, str(case))]
            for name, tensor in tensors.named().items():
                if context.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    return [Finding("layout", f"the context shares its memory with the {name}", str(case))]
    return []


def gradient_modes(trial: Trial) -> list[Finding]:
    """The context requires a gradient where an input does and gradients are on; in all modes its numbers are right."""
    case = trial.case()
    tensors = tensors_of(case, trial.device)
    leaves = leaves_of(tensors, "all")
    inputs = leaves["query"], leaves["key"], leaves["value"]
    contexts: dict[str, Tensor] = {}
    with torch.no_grad():
        contexts["under no_grad"] = trial.context(*inputs, tensors)
    with torch.inference_mode():
        contexts["under inference_mode"] = trial.context(*inputs, tensors).clone()
    contexts["where no input requires one"] = trial.context(
        tensors.query, tensors.key, tensors.value, tensors
    )
    contexts["with gradients"] = trial.context(*inputs, tensors)
    for name in leaves:
        alone = {each: tensor.detach() for each, tensor in leaves.items()}
        alone[name].requires_grad_()
        contexts[f"where the {name} requires one"] = trial.context(
            alone["query"], alone["key"], alone["value"], tensors
        )
    for when, context in contexts.items():
        expected = when == "with gradients" or when.endswith("requires one") and "no input" not in when
        if context.requires_grad != expected:
            message = f"the context {'requires no' if expected else 'requires a'} gradient {when}"
            return [Finding("dq" if expected else "state", message, str(case))]
        if found := _wrong(trial, case, {"context": context}):
            return _of_state(trial, case, found, when)
    return []


# Repetition


def repeatable(trial: Trial) -> list[Finding]:
    """The same bits for the same inputs, call after call, forward and backward, whatever the random seed.

    On CUDA the bits of the backward pass may differ where torch's own attention does not repeat them either: then its
    budget is all that is asked for.
    """
    case = trial.case(queries=65, keys=130)
    tensors = tensors_of(case, trial.device)
    first = call(trial.attention, tensors)
    for number in range(1, 4):
        torch.manual_seed(trial.seed + number)
        again = call(trial.attention, tensors)
        for name, tensor in first.items():
            if not _is_same(tensor, again[name]) and not (name != "context" and _torch_differs(tensors)):
                difference = float((tensor.detach().double() - again[name].detach().double()).abs().max())
                message = f"{name} differs by {difference:.3g} between two calls with the same inputs"
                return [Finding("randomness", message, str(case))]
    case = trial.case()
    tensors = tensors_of(case, trial.device)
    contexts = [trial.forward(tensors) for _ in range(REPEATS)]
    for number, context in enumerate(contexts):
        if not _is_same(context, contexts[0]):
            return [
                Finding(
                    "randomness", f"call {number + 1} with the same inputs differs from the first", str(case)
                )
            ]
    return []


def _torch_differs(tensors: CallTensors) -> bool:
    """Whether the backward pass of torch's own attention gives other bits the second time, here."""
    if tensors.query.device.type == "cpu":
        return False

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        return scaled_dot_product_attention(query, key, value, attn_mask)

    results = [call(attention, tensors) for _ in range(4)]
    return any(not _is_same(results[0][name], each[name]) for each in results for name in each)


def random_state(trial: Trial) -> list[Finding]:
    """Torch's random numbers go on as if nothing had been called."""
    tensors = trial.tensors()
    call(trial.attention, tensors)  # what is made at a first call may draw what it likes
    torch.manual_seed(trial.seed)
    # Numbers are drawn first, so that a patch that seeds by the same seed is seen, too.
    _random_numbers(trial.device)
    expected = _random_numbers(trial.device)
    torch.manual_seed(trial.seed)
    _random_numbers(trial.device)
    call(trial.attention, tensors)
    if not torch.equal(_random_numbers(trial.device), expected):
        return [Finding("state", "a call changes the state of torch's random numbers", str(trial.case()))]
    return []


def _random_numbers(device: torch.device) -> Tensor:
    return torch.cat([torch.rand(4), torch.rand(4, device=device).cpu()])


# State


def settings_untouched(trial: Trial) -> list[Finding]:
    """Torch's global settings are the same after a call and its backward pass."""
    with watched_settings() as changes:
        for fields in ({}, {"mask": "none", "gate": "none"}, {"mask": "bias"}):
            call(trial.attention, trial.tensors(**fields))
            trial.forward(trial.tensors(**fields))
    return [Finding("state", f"a call changes {change}", str(trial.case())) for change in changes]


def growing_numbers(trial: Trial) -> list[Finding]:
    """Keys larger than any before, with queries smaller in proportion: the same scores, and so the same context."""
    case = trial.case(mask="none")
    tensors = tensors_of(case, trial.device)
    for power in (0, 3, 6) if trial.dtype == torch.float16 else (0, 10, 20):
        grown = replace(tensors, query=tensors.query * 2.0**-power, key=tensors.key * 2.0**power)
        truth, allowed = truth_for(grown, case), allowed_for(case, trial.device)["context"]
        comparison = compare(
            "context",
            trial.forward(grown),
            truth.values["context"],
            truth.scales["context"],
            allowed,
            trial.dtype,
        )
        if not comparison.is_right:
            message = f"with keys {2**power} times as large, {describe(comparison, trial.dtype)}"
            return [Finding("state" if power else "context", message, str(case))]
    return []


def changing_calls(trial: Trial) -> list[Finding]:
    """Calls of which each differs from the one before in contents, gate, mask, sizes or strides are each right."""
    fields: list[dict[str, Any]] = [
        {},
        {"seed": trial.seed + 1},
        {"gate": "none"},
        {"gate": "binary"},
        {"mask": "none"},
        {"mask": "rows per item"},
        {"mask": "bias"},
        {"mask": "none", "gate": "none"},
        {"queries": 40, "keys": 70},
        {"queries": 5, "keys": 9},
        {"queries": 19, "keys": 36},
        {"layout": "heads last"},
        {"layout": "channels first"},
        {"batch": 4, "heads": 2},
        {"batch": 1, "heads": 8},
        {"channels": 64},
        {"channels": 16},
        {"gate": "all off"},
        {"mask": "keyless item"},
        {"queries": 37, "keys": 19},
        {"seed": trial.seed + 2},
        {},
    ]
    # Up and down: what a call leaves behind may be of consequence in one direction only.
    for changed in [*fields, *reversed(fields)]:
        case = trial.case(**changed)
        tensors = tensors_of(case, trial.device)
        found = _wrong(trial, case, {"context": trial.forward(tensors)})
        if found := found or _wrong(trial, case, call(trial.attention, tensors)):
            return _of_state(trial, case, found, "after calls with other inputs")
    return []


def changed_contents(trial: Trial) -> list[Finding]:
    """Tensors that keep their memory and get other contents are read anew."""
    cases = [trial.case(seed=trial.seed + number) for number in range(3)]
    tensors = tensors_of(cases[0], trial.device)
    for case in cases:
        for name, tensor in tensors_of(case, trial.device).named().items():
            tensors.named()[name].copy_(tensor)
        for results in ({"context": trial.forward(tensors)}, call(trial.attention, tensors)):
            if found := _wrong(trial, case, results):
                return _of_state(trial, case, found, "with new contents in the same tensors")
    # One input at a time: what is remembered of one may be looked up by another.
    for name in ("key", "value", "gate", "mask", "query"):
        current = tensors_of(cases[0], trial.device)
        for tensor, original in zip(tensors.named().values(), current.named().values(), strict=True):
            tensor.copy_(original)
        trial.forward(tensors)
        tensors.named()[name].copy_(tensors_of(cases[1], trial.device).named()[name])
        truth = truth_for(tensors, cases[0])
        allowed = allowed_for(cases[0], trial.device)["context"]
        found_context = trial.forward(tensors)
        comparison = compare(
            "context", found_context, truth.values["context"], truth.scales["context"], allowed, trial.dtype
        )
        if not comparison.is_right:
            message = f"with new contents in the {name} alone, {describe(comparison, trial.dtype)}"
            return [Finding("state", message, str(cases[0]))]
    return []


def results_stay(trial: Trial) -> list[Finding]:
    """Results keep their contents whatever is called later, and later calls do not depend on what is done to them."""
    case, other = trial.case(), trial.case(seed=trial.seed + 1)
    tensors, others = tensors_of(case, trial.device), tensors_of(other, trial.device)
    context = trial.forward(tensors)
    results = call(trial.attention, tensors)
    kept = {"context without gradients": context, **results}
    copies = {name: tensor.detach().clone() for name, tensor in kept.items()}
    trial.forward(others)
    call(trial.attention, others)
    for name, tensor in kept.items():
        if not _is_same(tensor, copies[name]):
            return [Finding("state", f"{name} of an earlier call is overwritten by a later one", str(case))]
    context.zero_()
    if found := _wrong(trial, case, {"context": trial.forward(tensors)}):
        return _of_state(trial, case, found, "after the result of an earlier call was overwritten")
    return []


def crossed_backward(trial: Trial) -> list[Finding]:
    """Two calls and then both backward passes, in either order; a backward pass twice."""
    cases = [trial.case(), trial.case(seed=trial.seed + 1)]
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        calls = []
        for case in cases:
            tensors = tensors_of(case, trial.device)
            leaves = leaves_of(tensors, "all")
            calls.append(
                (trial.context(leaves["query"], leaves["key"], leaves["value"], tensors), leaves, tensors)
            )
        trial.forward(trial.tensors(seed=trial.seed + 2))
        for place, number in enumerate(order):
            context, leaves, tensors = calls[number]
            again = number in order[place + 1 :]
            try:
                results = gradients(context, leaves, tensors.gradient, retain_graph=again)
            except RuntimeError:
                if order.count(number) > 1:
                    break  # to refuse a second backward pass is right, to get it wrong is not
                raise
            if found := _wrong(trial, cases[number], {"context": context, **results}):
                how = "a second time" if order.count(number) > 1 else "after another call"
                return _of_state(trial, cases[number], found, f"where the backward pass runs {how}")
    return []


def optional_arguments(trial: Trial) -> list[Finding]:
    """Mask and gate may be left out."""
    case = trial.case(mask="none", gate="none")
    tensors = tensors_of(case, trial.device)
    context = trial.attention(tensors.query, tensors.key, tensors.value)
    return findings_of({"context": context}, case, trial.device)


CONDUCT: dict[str, Check] = {
    "optional-arguments": optional_arguments,
    "inputs-untouched": inputs_untouched,
    "context-is-its-own": context_is_its_own,
    "gradient-modes": gradient_modes,
    "repeatable": repeatable,
    "random-state": random_state,
    "settings-untouched": settings_untouched,
    "growing-numbers": growing_numbers,
    "changing-calls": changing_calls,
    "changed-contents": changed_contents,
    "results-stay": results_stay,
    "crossed-backward": crossed_backward,
}
"""The checks by name."""


def _wrong(trial: Trial, case: OperatorCase, results: Results) -> list[Finding]:
    """What is wrong with the tensors that are there."""
    return findings_of(results, case, trial.device)


def _of_state(trial: Trial, case: OperatorCase, findings: list[Finding], when: str) -> list[Finding]:
    """The first of `findings` about `case`, put down to what is carried from call to call.

    Unless the same is wrong where nothing can have been carried, with sizes that no call had before.
    """
    fresh = replace(case, queries=case.queries + 64, keys=case.keys + 64)
    if plain := operator_findings(trial.attention, fresh, trial.device):
        return plain
    return [replace(findings[0], property="state", message=f"{when}, {findings[0].message}")]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; a NaN is the same as another, and 0 as -0."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
