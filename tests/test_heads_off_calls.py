"""The attention under test is what runs: nothing answers in its place."""

from __future__ import annotations

from headoff.harness.fallback import fallback_findings, model_calls
from headoff.harness.finding import fail_on


def test_heads_off_no_fallback(under_test):
    """At no site's shapes, with a mask or without, does something else compute the context, in silence."""
    attention = under_test.attention
    calls = model_calls(attention, under_test.device, under_test.dtype, under_test.seed)
    fail_on(fallback_findings(attention, calls))
