"""The deformable suite rejects wrong attentions, says what is wrong with them, and passes right ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from deformable_mutants import RIGHT, WRONG, changed

from headoff.bench.deformable import DeformableShape, DeformableWorkload
from headoff.bench.outputs import ExpectedOutputs
from headoff.deformable import conform, grid_sample_attention
from headoff.harness.deformable import (
    SIDE_EFFECTS,
    DeformableCase,
    case_named,
    deformable_cases,
    diagnose,
    reduced_cases,
    side_effect_findings,
)
from headoff.harness.deformable.known_faults import Steps, context_by, exact_with_gate
from headoff.harness.deformable.mutations import SELF_TESTS, undetected
from headoff.harness.deformable.reads import ELSEWHERE, MIXED, SUM, faulty_part
from headoff.harness.operator import operator_findings
from headoff.harness.operator.call import tensors_of
from headoff.harness.operator.compare import comparisons

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
        wrong = (case for case in reduced_cases(torch.float32) if operator_findings(attention, case, CPU))
        found = diagnose(attention, [*itertools.islice(wrong, 3)], CPU)
    assert found is not None and found.property == mutant.property, found
    assert mutant.said in found.message.split("; ")[0]


@pytest.mark.parametrize("name", RIGHT)
def test_right_attentions_pass(name):
    attention = RIGHT[name]()
    for dtype in (torch.float32, torch.float16) if "float32" in name else (torch.float32,):
        for case in reduced_cases(dtype):
            assert not operator_findings(attention, case, CPU)


@pytest.mark.parametrize("fault", SELF_TESTS[::9])
def test_the_tolerance_rejects_known_faults(fault):
    assert not undetected(fault, torch.float32, CPU, seed=0)


def test_the_oracles_steps_are_right_where_none_is_replaced():
    for case in reduced_cases(torch.float64):
        context = context_by(Steps(), exact_with_gate(tensors_of(case)))
        assert comparisons({"context": context}, case, CPU)[0].is_right


def _level_1_moved(locations):
    return locations + 0.1 * (torch.arange(locations.shape[3]) == 1)[:, None, None]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": lambda weights: weights.roll(2, -1)}, MIXED),
        ({"weights": lambda weights: weights / weights.square().sum((-2, -1), keepdim=True)}, SUM),
        ({"locations": lambda locations: locations * 0.7}, ELSEWHERE),
        ({"locations": _level_1_moved}, ("levels", "the points of level 1 of 3 alone are read wrongly")),
        ({"weights": lambda weights: weights * torch.tensor([1, 0, 0])[:, None]},
         ("levels", "nothing is read at the points of level 1 and 2 of 3")),
    ],
)  # fmt: skip
def test_which_part_is_wrong_is_measured(changes, said):
    attention = changed(**changes)
    tensors = tensors_of(DeformableCase(name="small", queries=6, heads=2, inputs="inside"))

    def context_of(tensors):
        context = attention(
            tensors.value, tensors.spatial_shapes, tensors.sampling_locations, tensors.attention_weights
        )
        return context.double()

    assert faulty_part(context_of, tensors) == said


def test_a_call_without_queries_may_be_rejected():
    def attention(value, shapes, locations, weights):
        if not locations.shape[1]:
            raise ValueError("nothing to launch")
        return grid_sample_attention(value, shapes, locations, weights)

    noted = {}
    case = case_named("queries-0", torch.float32, 0)
    assert not operator_findings(conform(attention, "mine"), case, CPU, noted.__setitem__)
    assert "nothing to launch" in noted["a call without queries"]


def test_what_is_timed_is_checked():
    shape = DeformableShape("small", ((6, 5), (3, 2)), queries=9, channels=4)
    workload = DeformableWorkload.of(shape, "forward + backward", 4, CPU, torch.float32)
    expected = ExpectedOutputs(workload)

    def wrong(attention):
        findings = expected.findings(workload.timed_call(attention)(), attention)
        return {finding.property for finding in findings}

    assert not wrong(RIGHT["by_an_autograd_function"]())
    assert "context" in wrong(WRONG["half_a_cell_off"].make())
    assert wrong(WRONG["no_gradient_of_locations"].make()) == {"dlocations"}
    assert wrong(WRONG["gradient_of_value_without_the_gate"].make()) == {"dv"}


@pytest.mark.mutation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RIGHT)
def test_right_attentions_pass_everything(name, dtype):
    attention = RIGHT[name]()
    for case in deformable_cases(dtype):
        assert not operator_findings(attention, case, CPU)
    for check in SIDE_EFFECTS:
        assert not side_effect_findings(attention, check, dtype, CPU)


@pytest.mark.parametrize("seed", [2, 5])
def test_a_gate_gradient_may_be_off_by_the_rounding_of_positions(seed):
    found = side_effect_findings(
        grid_sample_attention,
        name="gate-gradient",
        dtype=torch.float32,
        device=torch.device("cpu"),
        seed=seed,
    )
    assert found == []


def test_a_wrong_gate_gradient_is_found():
    def doubled(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None):
        gate = None if head_gate is None else 1.001 * head_gate - 0.001 * head_gate.detach()
        return grid_sample_attention(
            value, spatial_shapes, sampling_locations, attention_weights, head_gate=gate
        )

    found = side_effect_findings(
        doubled, name="gate-gradient", dtype=torch.float32, device=torch.device("cpu"), seed=2
    )
    assert found and found[0].property == "gate"
