"""A single attention call is right: context and gradients are the float64 oracle's, and there are no side effects.

How far numbers may be off is in `headoff.harness.operator.compare`. That this is small enough is shown by the last
test, a tolerance self-test: it compares answers that are known to be wrong, and never calls the attention under test.
"""

from __future__ import annotations

import pytest

from headoff.choices import DTYPES
from headoff.harness import operator
from headoff.harness.finding import fail_on
from headoff.harness.single_calls import threads, try_other_dtype, try_side_effect, try_tolerance

CASES = [case.name for case in operator.operator_cases()]
pytestmark = pytest.mark.usefixtures(threads.__name__)


@pytest.mark.parametrize("name", CASES)
def test_heads_off_operator(under_test, name):
    """Context and gradients, in the dtype asked for."""
    case = operator.case_named(name, under_test.dtype, under_test.seed)
    fail_on(
        operator.operator_findings(under_test.attention, case, under_test.device, under_test.not_supported)
    )


@pytest.mark.parametrize("name", operator.SIDE_EFFECTS)
def test_heads_off_side_effects(under_test, name):
    """Inputs, settings and earlier results stay as they are; the same inputs give the same bits."""
    try_side_effect(operator, under_test, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_off_operator_in_other_dtypes(under_test, dtype):
    """What is wrong in a dtype that nobody asked for is a note."""
    try_other_dtype(operator, under_test, dtype)


@pytest.mark.parametrize("fault", operator.SELF_TESTS)
def test_heads_off_tolerance_rejects(under_test, fault):
    """The tolerance rejects wrong answers; those that it cannot reject in this dtype are named in the verdict."""
    try_tolerance(operator, under_test, fault)
