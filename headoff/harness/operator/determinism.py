"""Checks of determinism: the same bits for the same inputs, whatever the random state and the number of threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headoff.harness.finding import Finding
from headoff.harness.operator.call import CallTensors, call
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.side_effects import Trial, finding, same, side_effect
from headoff.harness.torch_settings import watched_settings

REPEATS = 24
"""Calls without gradients that must give the same bits: more than a patch is likely to count before it changes."""

THREADS = (1, 2, 3, 5)


@side_effect(
    "repeatable",
    {},
    {"mask": "none", "gate": "none"},
    {"queries": 65, "keys": 130},
    {"queries": 65, "keys": 130, "gate": "none", "mask": "none"},
    # Many keys, which a kernel may split over several programs.
    {"batch": 1, "heads": 2, "queries": 33, "keys": 1100, "gate": "fractions", "mask": "bias"},
    {"batch": 1, "heads": 2, "queries": 1100, "keys": 33},
    in_all_dtypes=True,
)
def repeatable(trial: Trial, case: OperatorCase) -> list[Finding]:
    """The same bits for the same inputs, forward and backward, whatever the random seed.

    On CUDA the bits of the backward pass may differ where torch's own attention does not repeat them either; then only
    the tolerance applies.
    """
    tensors = trial.tensors(case)
    first = trial.call(tensors)
    for number in range(1, 4):
        torch.manual_seed(trial.seed + number)
        for name, again in trial.call(tensors).items():
            if same(first[name], again) or (name != "context" and _torch_differs(tensors)):
                continue
            difference = float((first[name].detach().double() - again.detach().double()).abs().max())
            message = f"{name} differs by {difference:.3g} between two calls with the same inputs"
            return finding("randomness", message, case)
    if case.weights < 10_000:
        context = trial.forward(tensors)
        for number in range(2, REPEATS + 1):
            if not same(trial.forward(tensors), context):
                return finding(
                    "randomness", f"call {number} with the same inputs differs from the first", case
                )
    return []


def _torch_differs(tensors: CallTensors) -> bool:
    """Whether the backward pass of torch's own attention gives different bits from call to call on this device."""
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

    first, *others = (call(attention, tensors) for _ in range(4))
    return any(not same(first[name], other[name]) for other in others for name in first)


@side_effect("number-of-threads", {}, {"mask": "none", "gate": "none"})
def number_of_threads(trial: Trial, case: OperatorCase) -> list[Finding]:
    """Right for any number of torch's threads: sizes are not always a multiple of it."""
    if trial.device.type != "cpu":
        return []
    before = torch.get_num_threads()
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            if found := trial.wrong_calls(case):
                message = f"with {threads} threads of torch, {found[0].message}"
                return [replace(found[0], property="state", message=message)]
    finally:
        torch.set_num_threads(before)
    return []


@side_effect("random-state")
def random_state(trial: Trial, case: OperatorCase) -> list[Finding]:
    """A call neither uses nor seeds the random numbers of torch, Python and NumPy."""
    tensors = trial.tensors(case)
    trial.call(tensors)  # what is set up once, at a first call, may use random numbers
    if generator := _generator_changed_by(lambda: trial.call(tensors), trial.seed):
        return finding("state", f"a call changes the state of {generator}", case)
    torch.manual_seed(trial.seed)
    # Numbers are drawn first, so that a patch that seeds with the same seed is noticed as well.
    _random_numbers(trial.device)
    expected = _random_numbers(trial.device)
    torch.manual_seed(trial.seed)
    _random_numbers(trial.device)
    trial.call(tensors)
    if not torch.equal(_random_numbers(trial.device), expected):
        return finding("state", "a call changes the state of torch's random numbers", case)
    return []


def _generator_changed_by(body: Callable[[], object], seed: int) -> str | None:
    """The random number generator, of Python's and NumPy's, that `body` uses or seeds; both are restored."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        # Seeded and used, so that a patch that seeds with the same number is noticed as well.
        random.seed(seed)
        np.random.seed(seed)
        random.random(), np.random.random()
        states = random.getstate(), np.random.get_state()
        expected = random.random(), float(np.random.random())
        random.setstate(states[0])
        np.random.set_state(states[1])
        body()
        found = random.random(), float(np.random.random())
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    names = ("Python's random numbers", "NumPy's random numbers")
    return next((name for name, one, other in zip(names, expected, found, strict=True) if one != other), None)


def _random_numbers(device: torch.device) -> Tensor:
    return torch.cat([torch.rand(4), torch.rand(4, device=device).cpu()])


@side_effect("settings-untouched", {}, {"mask": "none", "gate": "none"}, {"mask": "bias"})
def settings_untouched(trial: Trial, case: OperatorCase) -> list[Finding]:
    """Torch's global settings are the same after a call and its backward pass."""
    with watched_settings() as changes:
        trial.call(trial.tensors(case))
        trial.forward(trial.tensors(case))
    return [Finding("state", f"a call changes {change}", str(case)) for change in changes]
