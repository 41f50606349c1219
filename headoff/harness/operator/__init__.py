"""Whether a single attention call is right: context and gradients compared with the float64 oracle, side effects."""

from headoff.harness.operator import call_order, determinism, memory  # they register their checks  # noqa: F401
from headoff.harness.operator.cases import (
    OperatorCase,
    case_named,
    case_of_text,
    operator_cases,
    reduced_cases,
)
from headoff.harness.operator.compare import PLAIN, operator_findings, unsupported_dtype
from headoff.harness.operator.diagnosis import diagnose
from headoff.harness.operator.mutations import SELF_TESTS, undetected
from headoff.harness.operator.side_effects import SIDE_EFFECTS, side_effect_findings

__all__ = [
    "PLAIN",
    "SELF_TESTS",
    "SIDE_EFFECTS",
    "OperatorCase",
    "case_named",
    "case_of_text",
    "diagnose",
    "operator_cases",
    "operator_findings",
    "reduced_cases",
    "side_effect_findings",
    "undetected",
    "unsupported_dtype",
]
