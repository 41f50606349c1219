"""The deformable suite rejects wrong attentions, says what is wrong with them, and passes right ones."""

from __future__ import annotations

import pytest
import torch
from deformable_mutants import RIGHT, WRONG

from headoff.harness.deformable import (
    SIDE_EFFECTS,
    deformable_cases,
    diagnose,
    reduced_cases,
    side_effect_findings,
)
from headoff.harness.operator import operator_findings

CPU = torch.device("cpu")
SIDE = ("in-place", "randomness", "state")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_attentions_are_rejected_by_their_fault(name):
    """By what the plugin does: side effects come first, then a diagnosis of the failing cases."""
    mutant, attention = WRONG[name], WRONG[name].make()
    if mutant.property in SIDE:
        checks = {"in-place": "inputs-untouched", "randomness": "repeatable", "state": "changing-calls"}
        (found, *_) = side_effect_findings(attention, checks[mutant.property], torch.float32, CPU)
    else:
        failing = [case for case in reduced_cases(torch.float32) if operator_findings(attention, case, CPU)]
        found = diagnose(attention, failing, CPU)
    assert found is not None and found.property == mutant.property, found
    assert mutant.said in found.message.split("; ")[0]


@pytest.mark.parametrize("name", RIGHT)
def test_right_attentions_pass(name):
    attention = RIGHT[name]()
    for dtype in (torch.float32, torch.float16) if "float32" in name else (torch.float32,):
        for case in reduced_cases(dtype):
            assert not operator_findings(attention, case, CPU)


@pytest.mark.mutation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_right_attentions_pass_everything(name, dtype):
    attention = RIGHT[name]()
    for case in deformable_cases(dtype):
        assert not operator_findings(attention, case, CPU)
    for check in SIDE_EFFECTS:
        assert not side_effect_findings(attention, check, dtype, CPU)
