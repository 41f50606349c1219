"""A single call of a deformable attention is right: context and gradients are the float64 oracle's, no side effects.

Run with `--contract deformable`, and left out otherwise. The last test is a tolerance self-test: it compares answers
that are known to be wrong, and never calls the attention under test.
"""

from __future__ import annotations

import pytest

from headoff.choices import DTYPES
from headoff.harness import deformable
from headoff.harness.finding import fail_on
from headoff.harness.operator import operator_findings
from headoff.harness.single_calls import threads, try_other_dtype, try_side_effect, try_tolerance

CASES = [case.name for case in deformable.deformable_cases()]
pytestmark = pytest.mark.usefixtures(threads.__name__)


@pytest.mark.parametrize("name", CASES)
def test_heads_off_deformable(under_test, name):
    """Context and gradients of value, sampling locations and attention weights, in the dtype asked for."""
    case = deformable.case_named(name, under_test.dtype, under_test.seed)
    if case is None:
        pytest.skip("its levels are too large for locations in half precision")
    fail_on(operator_findings(under_test.attention, case, under_test.device, under_test.not_supported))


@pytest.mark.parametrize("name", deformable.SIDE_EFFECTS)
def test_heads_off_side_effects(under_test, name):
    """Inputs, settings and earlier results stay as they are; the same inputs give the same bits."""
    try_side_effect(deformable, under_test, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_off_deformable_in_other_dtypes(under_test, dtype):
    """What is wrong in a dtype that nobody asked for is a note."""
    try_other_dtype(deformable, under_test, dtype)


@pytest.mark.parametrize("fault", deformable.SELF_TESTS)
def test_heads_off_tolerance_rejects(under_test, fault):
    """The tolerance rejects wrong answers; those that it cannot reject in this dtype are named in the verdict."""
    try_tolerance(deformable, under_test, fault)
