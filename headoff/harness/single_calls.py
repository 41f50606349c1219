"""What the suites of single calls have in common, whatever the contract.

A suite is a package of the harness: `headoff.harness.operator` or `headoff.harness.deformable`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from headoff.harness.finding import fail_on
from headoff.harness.forward_only import NEEDS_BACKWARD
from headoff.harness.operator import operator_findings, unsupported_dtype
from headoff.harness.plugin.patch import Patch
from headoff.timing import torch_threads


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread, except where calls are repeated: tensors are so small that threads mostly wait."""
    repeats = request.node.name.endswith("[repeatable]")
    with torch_threads(torch.get_num_threads() if repeats else 1):
        yield


def try_side_effect(suite: ModuleType, under_test: Patch, name: str) -> None:
    """Fail where the check `name` of the suite's `SIDE_EFFECTS` finds something."""
    __tracebackhide__ = True
    if under_test.settings.forward_only and name in NEEDS_BACKWARD:
        pytest.skip("it is about the backward pass")
    fail_on(
        suite.side_effect_findings(
            under_test.attention, name, under_test.dtype, under_test.device, under_test.seed
        )
    )


def try_other_dtype(suite: ModuleType, under_test: Patch, dtype: str) -> None:
    """Note what is wrong in a dtype that nobody asked for: half precision is often a kernel of its own."""
    if dtype not in under_test.other_dtypes:
        pytest.skip("all cases are tried in this dtype")
    other: torch.dtype = getattr(torch, dtype)
    attention, device, seed = under_test.attention, under_test.device, under_test.seed
    if reason := unsupported_dtype(attention, other, device, suite.PLAIN):
        under_test.not_supported(dtype, reason)
        return
    findings = [
        finding
        for case in suite.reduced_cases(other, seed)
        for finding in operator_findings(attention, case, device)
    ]
    for name, check in suite.SIDE_EFFECTS.items():
        if check.in_all_dtypes:
            findings += suite.side_effect_findings(attention, name, other, device, seed)
    first_of_each_property = {finding.property: finding for finding in reversed(findings)}
    under_test.observed(first_of_each_property.values(), dtype)


def try_tolerance(suite: ModuleType, under_test: Patch, fault: str) -> None:
    """Have the verdict name a fault whose wrong answers the suite's tolerance cannot reject in this dtype."""
    if suite.undetected(fault, under_test.dtype, under_test.device, under_test.seed):
        under_test.cannot_tell(f"{fault} (single calls)")
