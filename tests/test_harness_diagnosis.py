"""The diagnosis names a cause only if it reproduces it, on patches that no suite was written against."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headoff.attention import eager, sdpa
from headoff.harness.finding import Finding
from headoff.harness.operator import OperatorCase, diagnose, operator_cases, operator_findings
from headoff.harness.operator.call import tensors_of
from headoff.harness.operator.cases import SHARED
from headoff.harness.operator.compare import allowed_for, compare
from headoff.harness.operator.conditions import CONDITIONS
from headoff.harness.operator.diagnosis import OperatorExperiments
from headoff.harness.operator.known_faults import backward_faults, forward_faults, right_weights
from headoff.harness.operator.reference import truth_of
from headoff.harness.operator.weights import (
    Measured,
    crossing,
    effective_weights,
    faulty_part,
    in_words,
)
from headoff.harness.plugin.diagnosis import causes_of
from headoff.harness.settings import Settings

SMALL = OperatorCase(
    name="small", batch=2, heads=3, queries=7, keys=11, channels=16, gate="full", mask="fully masked rows"
)
FAILING = 3
"""Failing cases that a diagnosis begins with, the smallest first."""


pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(query, key, attn_mask, scale=None):
    identity = torch.eye(key.shape[-2], dtype=query.dtype).expand(*key.shape[:2], -1, -1)
    factor = 1.0 if scale is None else scale * math.sqrt(query.shape[-1])
    # Values of as many channels as keys: the context is the weights.
    return eager(query * factor, key, identity, attn_mask)


def gated(context, head_gate):
    return context if head_gate is None else context * head_gate


def gate_ignored(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask)


def gates_of_heads_rolled(query, key, value, attn_mask=None, *, head_gate=None):
    if head_gate is not None:
        head_gate = head_gate.expand(-1, query.shape[1], -1, -1).roll(1, 1)
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def ungated_when_all_off(query, key, value, attn_mask=None, *, head_gate=None):
    if head_gate is not None and not head_gate.any():
        head_gate = None
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def mask_of_first_item(query, key, value, attn_mask=None, *, head_gate=None):
    if attn_mask is not None and attn_mask.dim() == 4:
        attn_mask = attn_mask[:1]
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def scaled_by_a_thousandth_more(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query * 1.001, key, value, attn_mask, head_gate=head_gate)


def last_keys_dropped(query, key, value, attn_mask=None, *, head_gate=None):
    kept = key.shape[-2] // 16 * 16 or key.shape[-2]
    if attn_mask is not None and attn_mask.shape[-1] > 1:
        attn_mask = attn_mask[..., :kept]
    return eager(query, key[..., :kept, :], value[..., :kept, :], attn_mask, head_gate=head_gate)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, power):
        ctx.power = power
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * grad.shape[-1] ** ctx.power, None


def dq_unscaled(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(ScaledGradient.apply(query, 0.5), key, value, attn_mask, head_gate=head_gate)


def dk_scaled_twice(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, ScaledGradient.apply(key, -0.5), value, attn_mask, head_gate=head_gate)


def dv_detached(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value.detach() + 0 * value, attn_mask, head_gate=head_gate)


def delta_missing(query, key, value, attn_mask=None, *, head_gate=None):
    """The normaliser is not differentiated: dS = A * dA."""
    identity = torch.eye(key.shape[-2], dtype=query.dtype).expand(*key.shape[:2], -1, -1)
    with torch.no_grad():
        weights = eager(query, key, identity, attn_mask)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = weights + weights * (scores - scores.detach())
    return gated(weights @ value, head_gate)


def bfloat16_inside(query, key, value, attn_mask=None, *, head_gate=None):
    low = ((tensor.bfloat16().to(tensor) - tensor).detach() + tensor for tensor in (query, key, value))
    return eager(*low, attn_mask, head_gate=head_gate)


def diagonal_half_a_percent_more(query, key, value, attn_mask=None, *, head_gate=None):
    weights = weights_of(query, key, attn_mask)
    more = 1 + 0.005 * torch.eye(*weights.shape[-2:], dtype=query.dtype)
    return gated((weights * more) @ value, head_gate)


def softmax_over_queries_when_square(query, key, value, attn_mask=None, *, head_gate=None):
    if query.shape[-2] != key.shape[-2]:
        return eager(query, key, value, attn_mask, head_gate=head_gate)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None:
        hidden = (
            0.0
            if attn_mask.dtype != torch.bool
            else torch.zeros_like(scores).masked_fill(~attn_mask, -math.inf)
        )
        scores = scores + (attn_mask if attn_mask.dtype != torch.bool else hidden)
    return gated(scores.softmax(-2).nan_to_num(0.0) @ value, head_gate)


def zeros_where_not_built(query, key, value, attn_mask=None, *, head_gate=None):
    if query.shape[-1] % 16:
        return 0 * query * key.sum() * value.sum()
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def low_bias_inverted(query, key, value, attn_mask=None, *, head_gate=None):
    """An additive mask without a positive number is taken for padding."""
    if attn_mask is not None and attn_mask.dtype != torch.bool and not (attn_mask > 0).any():
        attn_mask = attn_mask > -1
    return eager(query, key, value, attn_mask, head_gate=head_gate)


class KeysOfFirstCall:
    """Key and value of the first call of a shape serve all later ones."""

    def __init__(self):
        self.cached = {}

    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        old = self.cached.setdefault((query.shape, key.shape, key.dtype), (key.detach(), value.detach()))
        key, value = (
            tensor + (before - tensor).detach() for tensor, before in zip((key, value), old, strict=True)
        )
        return eager(query, key, value, attn_mask, head_gate=head_gate)


class GateOfFirstCall:
    """The gate of the first call of a shape serves all later ones."""

    def __init__(self):
        self.cached = {}

    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        if head_gate is not None:
            head_gate = self.cached.setdefault(
                (query.shape, key.shape, head_gate.shape, query.dtype), head_gate
            )
        return eager(query, key, value, attn_mask, head_gate=head_gate)


def dropout_left_on(query, key, value, attn_mask=None, *, head_gate=None):
    weights = torch.nn.functional.dropout(weights_of(query, key, attn_mask), 0.1)
    return gated(weights @ value, head_gate)


def ripple(query, key, value, attn_mask=None, *, head_gate=None):
    """An error that no known fault makes."""
    context = eager(query, key, value, attn_mask, head_gate=head_gate)
    return context * (1 + 1e-3 * torch.arange(query.shape[-1]).sin().to(context))


def values_of_next_key(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value.roll(-1, 2), attn_mask, head_gate=head_gate)


def two_faults(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query * 1.1, key, value, attn_mask)


def value_read_as_contiguous(query, key, value, attn_mask=None, *, head_gate=None):
    if (
        not value.is_contiguous()
        and value.numel() == value.untyped_storage().nbytes() // value.element_size()
    ):
        memory = value.detach().as_strided((value.numel(),), (1,), 0).view(value.shape)
        value = value + (memory - value).detach()
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def raises_for_masks(query, key, value, attn_mask=None, *, head_gate=None):
    if attn_mask is not None:
        raise ValueError("no masks, please")
    return eager(query, key, value, head_gate=head_gate)


def without_gradients_ungated(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=head_gate if torch.is_grad_enabled() else None)


def noise_of_many_keys(query, key, value, attn_mask=None, *, head_gate=None):
    context = eager(query, key, value, attn_mask, head_gate=head_gate)
    return context * (1 + 1e-3 * torch.randn_like(context)) if key.shape[-2] >= 64 else context


CAUSES = {
    gate_ignored: "gate: it is ignored",
    gates_of_heads_rolled: "gate: each head gets the gate of the previous head",
    mask_of_first_item: "mask: all batch items get the mask of the first batch item",
    scaled_by_a_thousandth_more: "scale: it is 1.001 / sqrt(D)",
    last_keys_dropped: "sizes: keys after the last whole block of 16 are dropped",
    dq_unscaled: "dq: dq is not scaled",
    dk_scaled_twice: "dk: dk is scaled twice",
    dv_detached: "dv: dv is zero",
    delta_missing: "softmax backward: the term delta is missing",
    bfloat16_inside: "precision: query, key and value are rounded to bfloat16",
    zeros_where_not_built: "context: it is zero, only with channels that are no multiple of 16",
    without_gradients_ungated: "gate: without gradients (torch.no_grad), it is ignored",
}
"""Patches with one fault that is known, and the sentence that is due."""

UNNAMED = {
    softmax_over_queries_when_square: ("context", "softmax"),
    diagonal_half_a_percent_more: ("context",),
    low_bias_inverted: ("mask",),
    ripple: ("context",),
    values_of_next_key: ("context", "sizes"),
    two_faults: ("context",),
    value_read_as_contiguous: ("layout",),
    ungated_when_all_off: ("gate",),
}
"""Patches whose fault is none that is known, or not to be told from another; and the properties that may be said."""

MEASURED = {
    diagonal_half_a_percent_more: "in effect, the attention weights of a row add up to 1",
    values_of_next_key: "in effect, the attention weights are wrong, though those of a row add up to 1",
}
"""What is measured of the attention weights of some of them."""

UNSTEADY = {
    "keys of the first call": (KeysOfFirstCall, "state"),
    "gate of the first call": (GateOfFirstCall, "state"),
    "dropout": (lambda: dropout_left_on, "randomness"),
    "noise": (lambda: noise_of_many_keys, "randomness"),
}
"""Patches whose numbers depend on more than their inputs: nothing of these may be explained by numbers."""


def failing_cases(attention):
    """The smallest cases that fail."""
    failing = []
    for case in sorted(operator_cases(), key=lambda case: case.weights):
        if case.weights > 200 and operator_findings(attention, case, "cpu"):
            failing.append(case)
            if len(failing) == FAILING:
                break
    return failing


@pytest.mark.parametrize("attention", CAUSES, ids=lambda attention: attention.__name__)
def test_a_known_fault_is_named(attention):
    finding = diagnose(attention, failing_cases(attention), "cpu")
    assert f"{finding.property}: {finding.message}".startswith(CAUSES[attention])
    assert "failing cases)" in finding.message
    assert finding.error > finding.budget > 0


@pytest.mark.parametrize("attention", UNNAMED, ids=lambda attention: attention.__name__)
def test_an_unknown_fault_is_not_named(attention):
    finding = diagnose(attention, failing_cases(attention), "cpu")
    assert finding.property in UNNAMED[attention]
    assert "reproduced" not in finding.message or " or " in finding.message
    assert MEASURED.get(attention, "") in finding.message


def test_an_infinite_result_is_that_of_no_finite_fault():
    def infinite(*args, **kwargs):
        return eager(*args, **kwargs) + torch.inf

    experiments = OperatorExperiments(infinite, torch.device("cpu"))
    observation = experiments.observe(SMALL)
    assert not any(experiments.reproduces(fault, observation) for fault in forward_faults(torch.float32))


@pytest.mark.parametrize("name", UNSTEADY)
def test_what_depends_on_more_than_the_inputs_gets_no_numeric_cause(name):
    make, prop = UNSTEADY[name]
    failing = failing_cases(make()) or [SMALL]
    finding = diagnose(make(), failing, "cpu")
    assert finding.property == prop
    assert "reproduced" not in finding.message


def test_conditions_that_are_claimed_are_said_with_the_cause():
    finding = diagnose(ungated_when_all_off, failing_cases(ungated_when_all_off), "cpu")
    assert "only with a gate of zeros" in finding.message


@pytest.mark.parametrize("is_backward", [False, True])
def test_reference_without_a_fault_is_right(is_backward):
    """Each of the faulty references is the right attention, but for the steps that it replaces."""
    case = replace(SMALL, keys=16, queries=16, channels=32)
    tensors, truth = tensors_of(case), truth_of(case)
    fault = replace((backward_faults if is_backward else forward_faults)(torch.float32)[0], steps={})
    allowed = allowed_for(case, torch.device("cpu"))
    for name, found in fault.answer(tensors, case).items():
        assert compare(
            name, found, truth.values[name], truth.scales[name], allowed[name], case.dtype
        ).is_right


def test_known_faults_have_names_of_their_own():
    for faults in (forward_faults(torch.float32), backward_faults(torch.float32)):
        names = [(fault.property, fault.clause) for fault in faults]
        assert len(set(names)) == len(names)


def test_conditions_are_taken_away():
    """A call without something has it no longer, and is a call like any other: a right attention is right."""
    seen, experiments = set(), OperatorExperiments(eager, torch.device("cpu"))
    for case in operator_cases():
        if case.weights > 10_000:
            continue
        tensors = tensors_of(case)
        for condition in CONDITIONS:
            kind = condition.words, case.wanted in SHARED
            if kind in seen or not condition.holds(tensors):
                continue
            seen.add(kind)
            for without in condition.without:
                changed = without(tensors)
                assert not condition.holds(changed), condition.words
                if min(case.queries, case.keys) > 1 and case.mask != "all masked" and case.gate != "all off":
                    is_right = experiments._is_right_on(changed, case)
                    assert is_right or case.wanted in SHARED, (condition.words, str(case))
    assert len(seen) > len(CONDITIONS) / 2


def test_weights_in_effect_are_those_of_an_attention():
    case = replace(SMALL, gate="none", mask="padding", keys=40)
    tensors = tensors_of(case)

    def context_of(changed, attention=eager):
        return attention(changed.query, changed.key, changed.value, changed.mask).double()

    weights = effective_weights(context_of, tensors)
    torch.testing.assert_close(weights, right_weights(tensors), rtol=1e-4, atol=1e-6)
    found, true = context_of(tensors), truth_of(case).values["context"]
    assert faulty_part(weights, tensors, 1.01 * found, true).part == "product"
    assert faulty_part(1.01 * weights, tensors, 1.01 * found, true).part == "sums"
    assert faulty_part(2 * weights, tensors, found.square(), true) is None
    dims = {"batch item": 0, "head": 1, "channel": 3}
    assert not crossing(context_of, tensors, dims)
    made_of_keys = replace(tensors, value=tensors.key)
    said = crossing(lambda changed: context_of(made_of_keys), tensors, dims)
    assert said == "it is not 0 where all values are"
    sums, others = faulty_part(1.01 * weights, tensors, 1.01 * found, true), Measured("weights", 1.0, 1.0)
    assert in_words([sums, others]) == "in effect, the attention weights are wrong"
    assert in_words([sums, None]) == in_words([]) == ""
    for what, dim in dims.items():
        rolled = crossing(lambda changed, dim=dim: context_of(changed).roll(1, dim), tensors, dims)
        assert rolled == f"values of one {what} reach the context of another"


def test_no_failing_cases_no_diagnosis():
    assert diagnose(sdpa, [], "cpu") is None


def test_a_failing_case_that_is_right_when_called_again_is_state():
    assert diagnose(sdpa, [SMALL], "cpu").property == "state"


def test_an_exception_is_shown_with_the_simplest_call():
    finding = diagnose(raises_for_masks, [replace(SMALL, mask="padding")], "cpu")
    assert finding.property == "crash" and "no masks, please" in finding.message


def test_what_writes_into_an_input_is_found_by_a_single_case():
    def scales_the_query(query, key, value, attn_mask=None, *, head_gate=None):
        context = eager(query, key, value, attn_mask, head_gate=head_gate)
        if attn_mask is None and not torch.is_grad_enabled():
            query.mul_(0.5)
        return context

    case = replace(SMALL, mask="none")
    (finding,) = operator_findings(scales_the_query, case, "cpu")
    assert finding.property == "in-place"
    assert finding.message.startswith("without gradients (torch.no_grad), a call writes into the query")
    assert diagnose(scales_the_query, [case], "cpu") == finding


def test_side_effects_come_first_and_keep_numbers_from_being_explained():
    case = next(iter(failing_cases(gate_ignored)))
    wrong = operator_findings(gate_ignored, case, "cpu")
    state = Finding("state", "the mask of an earlier call is used")
    settings = Settings()
    assert [finding.property for finding in causes_of(gate_ignored, wrong, settings)] == ["gate"]
    assert [finding.property for finding in causes_of(gate_ignored, [*wrong, state], settings)] == ["state"]


def test_a_diagnosis_counts_what_it_tried():
    experiments = OperatorExperiments(gate_ignored, torch.device("cpu"))
    finding = experiments.explain(failing_cases(gate_ignored))
    diagnosis = experiments.diagnosis
    assert 10 < diagnosis.failing < diagnosis.tried
    assert f"reproduced in {diagnosis.failing} of {diagnosis.failing} failing cases" in finding.message
