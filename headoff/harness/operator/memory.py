"""Checks of memory: inputs are not written into, the context has memory of its own, and nothing is held too long."""

from __future__ import annotations

import gc
from collections import Counter
from dataclasses import replace

from torch.multiprocessing.reductions import StorageWeakRef

from headoff.harness.finding import Finding
from headoff.harness.operator.cases import Case
from headoff.harness.operator.compare import misshapen, operator_findings
from headoff.harness.operator.side_effects import WITH_AND_WITHOUT, Trial, finding, same, side_effect

CALLS = 160
CACHED = 128
"""Calls of one kind, and for how many of them a cache may hold tensors: as many as `functools.lru_cache` does."""


@side_effect("optional-arguments", {"mask": "none", "gate": "none"})
def optional_arguments(trial: Trial, case: Case) -> list[Finding]:
    """Mask and gate may be left out."""
    tensors = trial.tensors(case)
    return trial.wrong(case, {"context": trial.attention(*tensors.inputs)})


@side_effect(
    "inputs-untouched",
    {},
    {"layout": "sliced", "mask": "bias and padding", "grad_context": "every second"},
    {"layout": "heads last", "gate": "all off", "mask": "fully masked rows", "grad_context": "heads last"},
    {"gate": "none", "mask": "additive fully masked rows", "inputs": "large"},
    {"gate": "binary", "mask": "none", "grad_context": "ones"},
    in_all_dtypes=True,
)
def inputs_untouched(trial: Trial, case: Case) -> list[Finding]:
    """Neither forward nor backward writes into an input or the memory around it, not even to restore it."""
    found = operator_findings(trial.attention, case, trial.device)
    return [one for one in found if one.property == "in-place"]


@side_effect(
    "context-owns-memory",
    {},
    {"layout": "heads last", "gate": "none", "mask": "none"},
    {"keys": 1, "gate": "none", "mask": "none"},
    {"keys": 1, "gate": "all on", "mask": "none"},
    {"gate": "all off"},
    {"mask": "all masked"},
    {"queries": 1, "batch": 1},
    {"layout": "expanded", "gate": "scalar"},
    {"layout": "all expanded", "gate": "none", "mask": "none"},
)
def context_owns_memory(trial: Trial, case: Case) -> list[Finding]:
    """Shape, dtype and device are the query's; elements share memory neither with each other nor with an input."""
    tensors = trial.tensors(case)
    for context in (trial.forward(tensors), trial.call(tensors)["context"]):
        if found := misshapen(context, case):
            return [found]
        if context.device.type != trial.device.type:
            return finding("layout", f"the context is on {context.device}, expected {trial.device}", case)
        for name, tensor in tensors.named().items():
            if context.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                return finding("layout", f"the context shares its memory with the {name}", case)
        if any(s == 0 and n > 1 for s, n in zip(context.stride(), context.shape, strict=True)):
            message = f"elements of the context share memory: its strides are {context.stride()}"
            return finding("layout", message, case)
    return []


@side_effect("results-stay", *WITH_AND_WITHOUT, in_all_dtypes=True)
def results_stay(trial: Trial, case: Case) -> list[Finding]:
    """Later calls do not change earlier results, and do not depend on what happens to those."""
    tensors, others = trial.tensors(case), trial.tensors(replace(case, seed=case.seed + 1))
    context = trial.forward(tensors)
    results = {"context without gradients": context, **trial.call(tensors)}
    copies = {name: tensor.detach().clone() for name, tensor in results.items()}
    trial.forward(others)
    trial.call(others)
    for name, tensor in results.items():
        if not same(tensor, copies[name]):
            return finding("state", f"{name} of an earlier call is overwritten by a later one", case)
    context.zero_()
    if found := trial.wrong(case, {"context": trial.forward(tensors)}):
        return trial.state(case, found, "after the result of an earlier call was overwritten")
    return []


@side_effect("memory-released", {}, {"mask": "none", "gate": "none"})
def memory_released(trial: Trial, case: Case) -> list[Finding]:
    """Inputs and results of past calls are released, and what autograd saved of them."""
    case = replace(case, batch=1, heads=2, queries=5, channels=16)
    for backward in (False, True):
        made: list[tuple[str, StorageWeakRef]] = []
        for _ in range(CALLS):
            tensors = trial.tensors(case)
            results = trial.call(tensors) if backward else {"context": trial.forward(tensors)}
            every = {**tensors.named(), **results}
            made += [(name, StorageWeakRef(tensor.untyped_storage())) for name, tensor in every.items()]
        del tensors, results, every
        gc.collect()
        # A storage that is used again and again counts once.
        held = {(name, storage.cdata) for name, storage in made if not storage.expired()}
        for name, number in Counter(name for name, _ in held).items():
            if number > CACHED:
                how = "with" if backward else "without"
                message = f"after {CALLS} calls {how} gradients, the memory of the {name} of {number} of them is held"
                return finding("state", message, case)
    return []
