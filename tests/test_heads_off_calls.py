"""The attention under test is what runs: nothing answers in its place."""

from __future__ import annotations

from headoff.harness.fallback import fallbacks, model_calls
from headoff.harness.finding import fail_on


def test_heads_off_no_fallback(under_test):
    """At no site's shapes, with a mask or without, does something else compute the context, in silence."""
    attention = under_test.attention
    calls = model_calls(attention, under_test.device, under_test.dtype, under_test.seed)
    allowed, undeclared = under_test.settings.allow_fallback, []
    for fallback in fallbacks(attention, calls):
        if fallback.is_declared(allowed, under_test.device):
            under_test.remark(f"a fallback that is intended (--allow-fallback): {fallback.finding.message}")
        else:
            undeclared.append(fallback.finding)
    fail_on(undeclared)
