"""One check of the attention under test, made as a test makes it."""

from __future__ import annotations

import pytest

from headoff.harness.checks import (  # they register their checks  # noqa: F401
    batches,
    compiled,
    concurrent_calls,
    cuda,
    custom_ops,
    precision,
)
from headoff.harness.checks.candidate import CHECKS, Candidate, NotApplicable, Outcome
from headoff.harness.finding import fail_on
from headoff.harness.plugin.patch import Patch
from headoff.harness.torch_settings import watched_settings


def outcome_of(name: str, candidate: Candidate) -> Outcome:
    """What the check found. Raises NotApplicable."""
    with watched_settings():
        return CHECKS[name](candidate)


def run_check(name: str, patch: Patch) -> None:
    """Fail, skip or pass the running test. What is not applicable is a note of the verdict, and not a check passed."""
    __tracebackhide__ = True
    settings = patch.settings
    candidate = Candidate(
        patch.uncounted,
        settings.of_contract,
        patch.dtype,
        patch.device,
        patch.seed,
        settings.forward_only,
        settings.attention,
    )
    patch.called()
    try:
        outcome = outcome_of(name, candidate)
    except NotApplicable as reason:
        patch.remark(f"the check {name} is not applicable: {reason}")
        pytest.skip(f"not applicable: {reason}")
    except Exception:
        # Where plain calls work, it is the check that failed, which is no word about the attention.
        fail_on(candidate.raised_alone())
        raise
    for remark in outcome.remarks:
        patch.remark(remark)
    fail_on(outcome.findings)
