"""From many failures to their root: which property is wrong, and where in the model it shows first."""

from __future__ import annotations

from headoff.harness.findings import Finding
from headoff.harness.run import Run
from headoff.harness.settings import Settings


def roots_of(run: Run, settings: Settings) -> tuple[list[Finding], list[str]]:
    return [], []
