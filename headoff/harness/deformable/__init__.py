"""Whether a single call of deformable attention is right: `headoff.harness.operator` for the other contract."""

from headoff.harness.deformable import implementations, reference  # they register what they are  # noqa: F401
from headoff.harness.deformable.cases import (
    DeformableCase,
    case_named,
    case_of_text,
    deformable_cases,
    reduced_cases,
)
from headoff.harness.deformable.diagnosis import diagnose
from headoff.harness.deformable.mutations import SELF_TESTS, undetected
from headoff.harness.deformable.side_effects import PLAIN, SIDE_EFFECTS, side_effect_findings

__all__ = [
    "PLAIN",
    "SELF_TESTS",
    "SIDE_EFFECTS",
    "DeformableCase",
    "case_named",
    "case_of_text",
    "deformable_cases",
    "diagnose",
    "reduced_cases",
    "side_effect_findings",
    "undetected",
]
