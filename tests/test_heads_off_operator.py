"""A single attention call is right: context and gradients are those of the float64 oracle, and it behaves.

What may differ, and by how much, is in `headoff.harness.operator.compare`; that this is little enough is
proved by the last tests here, which give the same comparison answers that are known to be wrong.
"""

from __future__ import annotations

import functools

import pytest
import torch

from headoff.harness.finding import fail_on
from headoff.harness.operator import (
    SIDE_EFFECTS,
    SIDE_EFFECTS_IN_ALL_DTYPES,
    OperatorCase,
    case_named,
    operator_cases,
    operator_findings,
    reduced_cases,
    side_effect_findings,
    unsupported_reason,
)
from headoff.harness.operator.mutations import FAULTS, could_be_seen, is_refused, wrong_results

DTYPES = ("float32", "float64", "bfloat16", "float16")
CASES = [case.name for case in operator_cases()]
REDUCED = [case.name for case in reduced_cases(torch.float32)]
PROOF_CASES = 2e4
"""Weights of the largest case that wrong answers are made for."""

ENOUGH = 8
"""Cases in which a wrong answer is refused, to prove that it is."""

NEVER_SEEN_IN = {
    "scale off by a hundredth": ("bfloat16",),
    "scale off by a ten-thousandth": ("bfloat16", "float16"),
}
"""Faults smaller than the roundings of a dtype, which are found in others."""


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, except where calls are repeated: they are small, and threads mostly wait."""
    before = torch.get_num_threads()
    if request.node.name != "test_heads_off_conduct[repeatable]":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def refusal(attention, dtype, device):
    return unsupported_reason(attention, dtype, device)


def check(under_test, case: OperatorCase) -> None:
    fail_on(operator_findings(under_test.attention, case, under_test.device))


def supported(under_test, dtype: str) -> torch.dtype:
    """`dtype`, if it is another one than was asked for and the attention takes it; the test is skipped if not."""
    other = getattr(torch, dtype)
    if other == under_test.dtype:
        pytest.skip("this is the dtype that all cases are tried in")
    if reason := refusal(under_test.attention, other, under_test.device):
        under_test.not_supported(dtype, reason)
        pytest.skip(f"{under_test.label} does not support {dtype}: {reason}")
    return other


@pytest.mark.parametrize("name", CASES)
def test_heads_off_operator(under_test, name):
    """In the dtype asked for."""
    check(under_test, case_named(name, under_test.dtype, under_test.seed))


@pytest.mark.parametrize("name", REDUCED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_off_operator_in_other_dtypes(under_test, dtype, name):
    """In the others, unless the attention refuses one of them by an exception."""
    other = supported(under_test, dtype)
    check(under_test, case_named(name, other, under_test.seed))


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_heads_off_conduct(under_test, name):
    """Inputs, settings and earlier results stay as they are; the same inputs give the same bits."""
    fail_on(
        side_effect_findings(under_test.attention, name, under_test.dtype, under_test.device, under_test.seed)
    )


@pytest.mark.parametrize("name", SIDE_EFFECTS_IN_ALL_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_off_conduct_in_other_dtypes(under_test, dtype, name):
    """Half precision is often a kernel of its own, which may behave in its own way."""
    other = supported(under_test, dtype)
    fail_on(side_effect_findings(under_test.attention, name, other, under_test.device, under_test.seed))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_off_tolerance_refuses(under_test, dtype, fault):
    """An answer that is wrong in a known way is refused.

    Wherever it differs by more than a hundred roundings, and in one case of each dtype at least; `ENOUGH` are.
    """
    refused = 0
    eps = torch.finfo(getattr(torch, dtype)).eps
    for case in reduced_cases(getattr(torch, dtype), under_test.seed):
        if case.weights > PROOF_CASES:
            continue
        results = wrong_results(case, fault)
        if results is None:
            continue
        is_seen = is_refused(results, case, under_test.device)
        assert is_seen or not could_be_seen(results, case, 100 * eps), f"{fault} passes in case {case}"
        refused += is_seen
        if refused == ENOUGH:
            break
    assert refused or dtype in NEVER_SEEN_IN.get(fault, ()), f"{fault} passes in all cases of {dtype}"
