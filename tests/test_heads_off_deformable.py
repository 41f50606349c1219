"""A single call of a deformable attention is right: context and gradients are the float64 oracle's, no side effects.

Run with `--contract deformable`, and left out otherwise. The last test is a tolerance self-test: it compares answers
that are known to be wrong, and never calls the attention under test.
"""

from __future__ import annotations

import pytest
import torch

from headoff.choices import DTYPES
from headoff.harness.deformable import (
    PLAIN,
    SIDE_EFFECTS,
    case_named,
    deformable_cases,
    reduced_cases,
    side_effect_findings,
)
from headoff.harness.deformable.mutations import SELF_TESTS, undetected
from headoff.harness.finding import fail_on
from headoff.harness.forward_only import NEEDS_BACKWARD
from headoff.harness.operator import operator_findings, unsupported_dtype

CASES = [case.name for case in deformable_cases()]


@pytest.fixture(autouse=True)
def threads(request):
    """One thread, except where calls are repeated: tensors are so small that threads mostly wait."""
    before = torch.get_num_threads()
    if request.node.name != "test_heads_off_side_effects[repeatable]":
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", CASES)
def test_heads_off_deformable(under_test, name):
    """Context and gradients of value, sampling locations and attention weights, in the dtype asked for."""
    case = case_named(name, under_test.dtype, under_test.seed)
    if case is None:
        pytest.skip("its levels are too large for locations in half precision")
    fail_on(operator_findings(under_test.attention, case, under_test.device, under_test.not_supported))


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_heads_off_side_effects(under_test, name):
    """Inputs, settings and earlier results stay as they are; the same inputs give the same bits."""
    if under_test.settings.forward_only and name in NEEDS_BACKWARD:
        pytest.skip("it is about the backward pass")
    fail_on(
        side_effect_findings(under_test.attention, name, under_test.dtype, under_test.device, under_test.seed)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_off_deformable_in_other_dtypes(under_test, dtype):
    """What is wrong in a dtype that nobody asked for is a note: half precision is often a kernel of its own."""
    other = getattr(torch, dtype)
    if dtype not in under_test.other_dtypes:
        pytest.skip("all cases are tried in this dtype")
    attention, device, seed = under_test.attention, under_test.device, under_test.seed
    if reason := unsupported_dtype(attention, other, device, PLAIN):
        under_test.not_supported(dtype, reason)
        return
    findings = [
        finding
        for case in reduced_cases(other, seed)
        for finding in operator_findings(attention, case, device)
    ]
    for name, check in SIDE_EFFECTS.items():
        if check.in_all_dtypes:
            findings += side_effect_findings(attention, name, other, device, seed)
    first_of_each_property = {finding.property: finding for finding in reversed(findings)}
    under_test.observed(first_of_each_property.values(), dtype)


@pytest.mark.parametrize("fault", SELF_TESTS)
def test_heads_off_tolerance_rejects(under_test, fault):
    """The tolerance rejects wrong answers; those that it cannot reject in this dtype are named in the verdict."""
    if undetected(fault, under_test.dtype, under_test.device, under_test.seed):
        under_test.cannot_tell(f"{fault} (single calls)")
