"""The attention under test is what runs: nothing answers in its place."""

from __future__ import annotations

import torch

from headoff.harness.fallback import fallback_findings
from headoff.harness.findings import refuse
from headoff.harness.preflight import SHAPES


def test_heads_off_no_fallback(under_test):
    """At no site's shapes does something else compute the context, in silence."""

    def calling(queries: int, keys: int):
        generator = torch.Generator().manual_seed(under_test.seed)
        inputs = [
            torch.randn(1, 8, length, 32, generator=generator).to(under_test.device, under_test.dtype)
            for length in (queries, keys, keys)
        ]
        gate = torch.ones(8, 1, 1, device=under_test.device, dtype=under_test.dtype)
        return lambda: under_test.attention(*inputs, None, head_gate=gate)

    refuse(fallback_findings(under_test.attention, {site: calling(*shape) for site, shape in SHAPES.items()}))
