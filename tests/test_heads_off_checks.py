"""What engineers ask of a kernel besides numbers, each where `--check` names it and left out otherwise."""

from __future__ import annotations

import pytest

from headoff.harness.checks.names import CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_heads_off_check(under_test, check):
    """Passes, fails, or is skipped as not applicable with the reason."""
    from headoff.harness.checks.run import run_check

    run_check(check, under_test)
