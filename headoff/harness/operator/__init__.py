"""Whether a single attention call is right: context and gradients against the float64 oracle, conduct, diagnosis."""

from headoff.harness.operator.cases import (
    OperatorCase,
    case_named,
    case_of_text,
    operator_cases,
    reduced_cases,
)
from headoff.harness.operator.compare import operator_findings, unsupported_reason
from headoff.harness.operator.diagnosis import diagnose
from headoff.harness.operator.side_effects import (
    SIDE_EFFECTS,
    SIDE_EFFECTS_IN_ALL_DTYPES,
    side_effect_findings,
)

__all__ = [
    "SIDE_EFFECTS",
    "SIDE_EFFECTS_IN_ALL_DTYPES",
    "OperatorCase",
    "case_named",
    "case_of_text",
    "side_effect_findings",
    "diagnose",
    "operator_cases",
    "operator_findings",
    "reduced_cases",
    "unsupported_reason",
]
