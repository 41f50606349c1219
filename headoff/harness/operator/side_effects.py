"""Whether an attention behaves: all that is not a number.

It leaves its inputs and torch's settings as they are, gives the same bits for the same inputs, carries nothing from
call to call, and returns a context that is its own. Each of `SIDE_EFFECTS` checks one such property. Where calls
follow one another, every result is held against its own truth, so that it does not matter in which way a patch
remembers the wrong thing.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import scaled_dot_product_attention

from headoff.attention.contract import Attention
from headoff.attention.eager import eager
from headoff.errors import SettingError
from headoff.harness.exceptions import describe_exception
from headoff.harness.finding import Finding
from headoff.harness.operator.call import (
    CallTensors,
    Results,
    call,
    context_alone,
    gradients,
    leaves_of,
    tensors_of,
)
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.compare import (
    allowed_for,
    compare,
    contents_of,
    describe,
    findings_of,
    misshapen,
    operator_findings,
    overwritten,
    unsupported_reason,
)
from headoff.harness.operator.reference import truth_for
from headoff.harness.torch_settings import watched_settings

REPEATS = 24
"""Calls that must give the same bits: more than any counter that a patch is likely to have."""

MANY = 160
KEPT = 128
"""Calls of one kind, and of how many of them a cache may hold the tensors: as many as `functools.lru_cache` does."""

WITH_AND_WITHOUT: tuple[dict[str, Any], ...] = (
    {},
    {"mask": "none", "gate": "none"},
    {"mask": "none", "gate": "fractions"},
    {"mask": "bias", "gate": "none"},
    {"mask": "bias per head", "gate": "per item"},
)
"""Mask and gate, which a patch may take different ways for: neither, each alone, and both of several kinds."""

GATE_GRADIENT = 16.0
"""Roundings that the gradient of a gate may be off by, in units of eps times what its terms add up to without signs."""

OWN_CHANNELS = {"inference mode": 56, "dtypes down": 72, "dtypes up": 88}
"""Channels that no other call has, for what is remembered by them of a first call."""


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
            "keys": 37 + 2 * list(SIDE_EFFECTS).index(self.check),
            "gate": "full",
            "mask": "padding",
            "seed": self.seed,
        }
        return OperatorCase(**{**usual, "dtype": self.dtype, **fields})

    def tensors(self, **fields: Any) -> CallTensors:
        return tensors_of(self.case(**fields), self.device)

    def forward(self, tensors: CallTensors) -> Tensor:
        """The context, without gradients."""
        return context_alone(self.attention, tensors)

    def context(self, query: Tensor, key: Tensor, value: Tensor, tensors: CallTensors) -> Tensor:
        return self.attention(query, key, value, tensors.mask, head_gate=tensors.gate)


Check = Callable[[Trial], list[Finding]]


def side_effect_findings(
    attention: Attention, check: str, dtype: torch.dtype, device: torch.device | str, seed: int = 0
) -> list[Finding]:
    """What is wrong with the conduct of `attention` by one `check` of `SIDE_EFFECTS`; none where it behaves.

    Raises SettingError for a check that there is not.
    """
    if check not in SIDE_EFFECTS:
        raise SettingError(f"there is no check {check!r}: use one of {', '.join(SIDE_EFFECTS)}")
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
        return SIDE_EFFECTS[check](trial)
    except Exception as error:
        return [Finding("crash", f"raises {describe_exception(error)}", check)]


# Inputs


def inputs_untouched(trial: Trial) -> list[Finding]:
    """Neither forward nor backward writes into any input, or into the memory around it, not even to restore it."""
    fields: list[dict[str, Any]] = [
        {},
        {"layout": "sliced", "mask": "bias and padding", "gradient": "every second"},
        {"layout": "heads last", "gate": "all off", "mask": "fully masked rows", "gradient": "heads last"},
        {"gate": "none", "mask": "additive fully masked rows", "inputs": "large"},
        {"gate": "binary", "gate_dtype": torch.bool, "mask": "none", "gradient": "ones"},
    ]
    for changed in fields:
        case = trial.case(**changed)
        for backward in (False, True):
            tensors = tensors_of(case, trial.device)
            memory = contents_of(tensors)
            versions = {name: tensor._version for name, tensor in tensors.named().items()}
            if backward:
                call(trial.attention, tensors)
            else:
                trial.forward(tensors)
            when = "a call and its backward pass" if backward else "a call without gradients"
            if name := overwritten(tensors, memory):
                same = _is_same(tensors.named()[name], tensors_of(case, trial.device).named()[name])
                where = "" if same else " itself"
                return [Finding("in-place", f"{when} changes the memory of the {name}{where}", str(case))]
            for name, tensor in tensors.named().items():
                if versions[name] != tensor._version:
                    return [Finding("in-place", f"{when} writes into the {name} and restores it", str(case))]
    return []


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
            for name, tensor in tensors.named().items():
                if context.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                    return [Finding("layout", f"the context shares its memory with the {name}", str(case))]
            if any(s == 0 and n > 1 for s, n in zip(context.stride(), context.shape, strict=True)):
                message = f"elements of the context share memory: its strides are {context.stride()}"
                return [Finding("layout", message, str(case))]
    return []


def gradient_modes(trial: Trial) -> list[Finding]:
    """The context requires a gradient where an input does and gradients are on; in all modes its numbers are right."""
    # Where no gradient is asked for there is often another kernel, and one for many queries, and one for a single one.
    for changed in (
        {},
        {"queries": 1, "gate": "fractions"},
        {"queries": 130, "mask": "bias", "gate": "none"},
        {"queries": 19, "keys": 330, "mask": "bias and padding", "gate": "per item"},
    ):
        if found := _gradient_modes(trial, trial.case(**changed)):
            return found
    return []


def _gradient_modes(trial: Trial, case: OperatorCase) -> list[Finding]:
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


def first_call_without_gradients(trial: Trial) -> list[Finding]:
    """The first call of new sizes may be one in inference mode, and what is kept of it serves training later."""
    for gate, mask in (("full", "padding"), ("none", "none"), ("fractions", "bias")):
        case = trial.case(channels=OWN_CHANNELS["inference mode"], gate=gate, mask=mask)
        tensors = tensors_of(case, trial.device)
        with torch.inference_mode():
            context = trial.context(tensors.query, tensors.key, tensors.value, tensors)
        when = "in inference mode"
        found = _wrong(trial, case, {"context": context})
        if not found:
            when = "after a first call in inference mode"
            try:
                found = _wrong(trial, case, call(trial.attention, tensors))
            except Exception as error:
                message = f"{when}, a call with gradients raises {describe_exception(error)}"
                return [Finding("state", message, str(case))]
        if found:
            return _of_state(trial, case, found, when)
    return []


# Repetition


def repeatable(trial: Trial) -> list[Finding]:
    """The same bits for the same inputs, call after call, forward and backward, whatever the random seed.

    On CUDA the bits of the backward pass may differ where torch's own attention does not repeat them either: then its
    budget is all that is asked for.
    """
    fields: list[dict[str, Any]] = [
        {"queries": 65, "keys": 130},
        {"queries": 65, "keys": 130, "gate": "none", "mask": "none"},
        # As many keys as are dealt out to several programs.
        {"batch": 1, "heads": 2, "queries": 33, "keys": 1100, "gate": "fractions", "mask": "bias"},
        {"batch": 1, "heads": 2, "queries": 1100, "keys": 33},
    ]
    for changed in fields:
        case = trial.case(**changed)
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
    for changed in WITH_AND_WITHOUT[:2]:
        case = trial.case(**changed)
        tensors = tensors_of(case, trial.device)
        contexts = [trial.forward(tensors) for _ in range(REPEATS)]
        for number, context in enumerate(contexts):
            if not _is_same(context, contexts[0]):
                message = f"call {number + 1} with the same inputs differs from the first"
                return [Finding("randomness", message, str(case))]
    return []


def number_of_threads(trial: Trial) -> list[Finding]:
    """Right however many threads torch has: sizes are not always a multiple of their number."""
    if trial.device.type != "cpu":
        return []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for changed in WITH_AND_WITHOUT[:2]:
                case = trial.case(**changed)
                tensors = tensors_of(case, trial.device)
                found = _wrong(trial, case, {"context": trial.forward(tensors)})
                if found := found or _wrong(trial, case, call(trial.attention, tensors)):
                    message = f"where torch has {threads} threads, {found[0].message}"
                    return [replace(found[0], property="state", message=message)]
    finally:
        torch.set_num_threads(before)
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
    """Random numbers go on as if nothing had been called: torch's, Python's and NumPy's."""
    tensors = trial.tensors()
    call(trial.attention, tensors)  # what is made at a first call may draw what it likes
    if generator := _others_random_after(lambda: call(trial.attention, tensors), trial.seed):
        return [Finding("state", f"a call changes the state of {generator}", str(trial.case()))]
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


def _others_random_after(body: Callable[[], object], seed: int) -> str | None:
    """The random number generator, other than torch's, that `body` uses or seeds; all are as before then."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        # Seeded and used, so that a patch that seeds by the same number is seen, too.
        random.seed(seed)
        np.random.seed(seed)
        random.random(), np.random.random()
        state, others = random.getstate(), np.random.get_state()
        expected = random.random(), float(np.random.random())
        random.setstate(state)
        np.random.set_state(others)
        body()
        found = random.random(), float(np.random.random())
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
    names = ("Python's random numbers", "NumPy's random numbers")
    return next((name for name, one, other in zip(names, expected, found, strict=True) if one != other), None)


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
        {"mask": "fully masked item"},
        {"queries": 37, "keys": 19},
        {"seed": trial.seed + 2},
        # Of a shape that no call had before, and with as many keys in each item of the last two.
        {"mask": "no padding", "keys": 54},
        {"mask": "padding", "keys": 54},
        {"mask": "padding flipped", "keys": 54},
        {"mask": "additive padding", "gate": "none"},
        {"mask": "additive left padding", "gate": "none"},
        {},
    ]
    # Up and down: what a call leaves behind may be of consequence in one direction only.
    for changed in [*fields, *reversed(fields)]:
        case = trial.case(**changed)
        tensors = tensors_of(case, trial.device)
        found = _wrong(trial, case, {"context": trial.forward(tensors)})
        if found := found or _wrong(trial, case, call(trial.attention, tensors)):
            return _of_state(trial, case, found, "after calls with other inputs")
    return _changing_dtypes(trial)


def _changing_dtypes(trial: Trial) -> list[Finding]:
    """Calls in one dtype after another, of those that the attention takes, the coarsest first and last."""
    known = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    dtypes = [each for each in known if unsupported_reason(trial.attention, each, trial.device) is None]
    for order, channels in ((dtypes, "dtypes up"), (dtypes[::-1], "dtypes down")):
        for dtype in order:
            case = trial.case(dtype=dtype, channels=OWN_CHANNELS[channels])
            tensors = tensors_of(case, trial.device)
            found = _wrong(trial, case, {"context": trial.forward(tensors)})
            if found := found or _wrong(trial, case, call(trial.attention, tensors)):
                return _of_state(
                    trial, case, found, "after calls in other dtypes", channels=case.channels + 24
                )
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
    for changed in WITH_AND_WITHOUT:
        if found := _results_stay(trial, trial.case(**changed)):
            return found
    return []


def _results_stay(trial: Trial, case: OperatorCase) -> list[Finding]:
    tensors = tensors_of(case, trial.device)
    others = tensors_of(replace(case, seed=case.seed + 1), trial.device)
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
    for changed in WITH_AND_WITHOUT:
        if found := _crossed_backward(trial, trial.case(**changed)):
            return found
    return []


def _crossed_backward(trial: Trial, case: OperatorCase) -> list[Finding]:
    cases = [case, replace(case, seed=case.seed + 1)]
    for order in ((0, 1), (1, 0), (0, 0, 1)):
        calls = []
        for each in cases:
            tensors = tensors_of(each, trial.device)
            leaves = leaves_of(tensors, "all")
            calls.append(
                (trial.context(leaves["query"], leaves["key"], leaves["value"], tensors), leaves, tensors)
            )
        trial.forward(tensors_of(replace(case, seed=case.seed + 2), trial.device))
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


def gate_gradient(trial: Trial) -> list[Finding]:
    """A gate that requires a gradient has none, or the right one; where it is 0, it may have any.

    For what is off need not be computed.
    """
    for gate in ("full", "fractions", "per item", "scalar"):
        case = trial.case(gate=gate)
        tensors = tensors_of(case, trial.device)
        assert tensors.gate is not None
        of_gate = tensors.gate.detach().requires_grad_()
        asked = replace(tensors, gate=of_gate)
        try:
            context = trial.context(tensors.query, tensors.key, tensors.value, asked)
            if not context.requires_grad:
                continue
            (found,) = torch.autograd.grad(context, [of_gate], tensors.gradient, allow_unused=True)
        except Exception:
            continue  # nothing was said of gradients of gates
        if found is None:
            continue
        exact = tensors.double()
        ungated = eager(exact.query, exact.key, exact.value, exact.mask) * exact.gradient
        size = eager(exact.query, exact.key, exact.value.abs(), exact.mask) * exact.gradient.abs()
        shape = found.shape
        true, size = (
            each.sum(-1, keepdim=True).sum_to_size(_four(shape)).view(shape) for each in (ungated, size)
        )
        error = (found.cpu().double() - true).abs() / (size * torch.finfo(trial.dtype).eps)
        error = error.nan_to_num(torch.inf).masked_fill(of_gate.detach().cpu() == 0, 0.0)
        if float(error.max()) > GATE_GRADIENT:
            place = int(error.argmax())
            message = f"the gradient of a gate ({gate}) is {float(found.flatten()[place]):.7g}"
            message += f", expected {float(true.flatten()[place]):.7g}"
            return [Finding("gate", message, str(case))]
    return []


def _four(shape: torch.Size) -> list[int]:
    """As a tensor of this shape broadcasts to one of four dimensions."""
    return [1] * (4 - len(shape)) + list(shape)


def memory_let_go(trial: Trial) -> list[Finding]:
    """Inputs and results of calls long past are no longer there, nor what autograd kept of them."""
    for changed in ({}, {"mask": "none", "gate": "none"}):
        case = trial.case(batch=1, heads=2, queries=5, channels=16, **changed)
        for backward in (False, True):
            kept: list[tuple[str, StorageWeakRef]] = []
            for _ in range(MANY):
                tensors = tensors_of(case, trial.device)
                results = call(trial.attention, tensors) if backward else {"context": trial.forward(tensors)}
                every = {**tensors.named(), **results}
                kept += [(name, StorageWeakRef(each.untyped_storage())) for name, each in every.items()]
            del tensors, results, every
            gc.collect()
            # Of one storage that is used again and again there is no more after more calls.
            alive = Counter(
                name for name, _ in {(name, each.cdata) for name, each in kept if not each.expired()}
            )
            for name, number in alive.items():
                if number > KEPT:
                    message = f"after {MANY} calls {'with' if backward else 'without'} gradients, the memory of the "
                    return [Finding("state", f"{message}{name} of {number} of them is still held", str(case))]
    return []


def optional_arguments(trial: Trial) -> list[Finding]:
    """Mask and gate may be left out."""
    case = trial.case(mask="none", gate="none")
    tensors = tensors_of(case, trial.device)
    context = trial.attention(tensors.query, tensors.key, tensors.value)
    return findings_of({"context": context}, case, trial.device)


SIDE_EFFECTS: dict[str, Check] = {
    "optional-arguments": optional_arguments,
    "inputs-untouched": inputs_untouched,
    "context-is-its-own": context_is_its_own,
    "gradient-modes": gradient_modes,
    "first-call-without-gradients": first_call_without_gradients,
    "repeatable": repeatable,
    "number-of-threads": number_of_threads,
    "random-state": random_state,
    "settings-untouched": settings_untouched,
    "growing-numbers": growing_numbers,
    "changing-calls": changing_calls,
    "changed-contents": changed_contents,
    "results-stay": results_stay,
    "crossed-backward": crossed_backward,
    "gate-gradient": gate_gradient,
    "memory-let-go": memory_let_go,
}
"""The checks by name."""

SIDE_EFFECTS_IN_ALL_DTYPES = ("inputs-untouched", "repeatable", "results-stay")
"""Those that are checked in every dtype that the attention takes: each dtype may have a kernel of its own."""


def _wrong(trial: Trial, case: OperatorCase, results: Results) -> list[Finding]:
    """What is wrong with the tensors that are there."""
    return findings_of(results, case, trial.device)


def _of_state(
    trial: Trial, case: OperatorCase, findings: list[Finding], when: str, **fields: int
) -> list[Finding]:
    """The first of `findings` about `case`, put down to what is carried from call to call.

    Unless the same is wrong where nothing can have been carried, with sizes that no call had before: other `fields`,
    and more rows and keys.
    """
    fresh = replace(case, queries=case.queries + 64, keys=case.keys + 64, **fields)  # type: ignore[arg-type]
    if plain := operator_findings(trial.attention, fresh, trial.device):
        return plain
    return [replace(findings[0], property="state", message=f"{when}, {findings[0].message}")]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit; a NaN is the same as another, and 0 as -0."""
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())
