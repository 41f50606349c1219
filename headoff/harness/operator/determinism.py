"""Checks of determinism: the same bits for the same inputs, whatever the random state and the number of threads."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import torch

from headoff.harness.finding import Finding
from headoff.harness.operator.cases import Case
from headoff.harness.operator.side_effects import Trial, finding, same, side_effect

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
def repeatable(trial: Trial, case: Case) -> list[Finding]:
    """The same bits for the same inputs, forward and backward, whatever the random seed.

    On CUDA the bits of the backward pass may differ where torch's own attention does not repeat them either; then only
    the tolerance applies.
    """
    tensors = trial.tensors(case)
    first = trial.call(tensors)
    for number in range(1, 4):
        torch.manual_seed(trial.seed + number)
        for name, again in trial.call(tensors).items():
            if same(first[name], again) or (name != "context" and trial.may_differ(name, tensors)):
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


@side_effect("number-of-threads", {}, {"mask": "none", "gate": "none"})
def number_of_threads(trial: Trial, case: Case) -> list[Finding]:
    """Right for any number of torch's threads: sizes are not always a multiple of it."""
    if trial.device.type != "cpu":
        return []
    if found := trial.wrong_calls(case):
        return found
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
def random_state(trial: Trial, case: Case) -> list[Finding]:
    """A call neither uses nor seeds the random numbers of torch, Python and NumPy."""
    tensors = trial.tensors(case)
    trial.call(tensors)  # what is set up once, at a first call, may use random numbers
    python, numpy = random.getstate(), np.random.get_state()
    try:
        for of, seed, draw in (
            (
                "torch's",
                torch.manual_seed,
                lambda: float(torch.rand(()) + torch.rand((), device=trial.device).cpu()),
            ),
            ("Python's", random.seed, random.random),
            ("NumPy's", np.random.seed, np.random.random),
        ):
            # A number is drawn before the call, so that a patch that seeds with the same seed is noticed as well.
            seed(trial.seed)
            _, expected = draw(), draw()
            seed(trial.seed)
            draw()
            trial.call(tensors)
            if draw() != expected:
                return finding("state", f"a call changes the state of {of} random numbers", case)
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
    return []
