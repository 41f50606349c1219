"""The operator suite's own parts: cases, tensors, truth, budgets and side effects."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headoff.attention import eager, sdpa
from headoff.errors import SettingError
from headoff.harness.operator import (
    SIDE_EFFECTS,
    OperatorCase,
    operator_cases,
    operator_findings,
    reduced_cases,
    side_effect_findings,
    unsupported_dtype,
)
from headoff.harness.operator.call import call, leaves_of, tensors_of
from headoff.harness.operator.cases import DRAWN, SHARED, WANTED
from headoff.harness.operator.compare import (
    FLOOR_LARGEST,
    FLOOR_MEAN,
    allowances_of,
    comparisons,
    errors_of,
    normalised,
)
from headoff.harness.operator.gates import GATE_KINDS, GATES_BY_SHAPE, gate_values
from headoff.harness.operator.inputs import GRAD_CONTEXT_LAYOUTS, INPUT_KINDS, LAYOUTS
from headoff.harness.operator.masks import MASK_KINDS, MASKS_BY_SHAPE, mask_values
from headoff.harness.operator.reference import truth_of
from headoff.harness.reference.implementations import STANDARD
from headoff.harness.tolerance import allowed_error
from headoff.harness.torch_settings import READERS, WRITERS, read_settings, watched_settings

SMALL = OperatorCase(
    name="small", batch=2, heads=3, queries=7, keys=11, channels=16, gate="full", mask="fully masked rows"
)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_cases_have_names_of_their_own():
    names = [case.name for case in operator_cases()]
    assert len(set(names)) == len(names)
    assert not [name for name in names if " " in name]
    assert names == [case.name for case in operator_cases(torch.float16, 5)]
    assert {case.name for case in reduced_cases(torch.float64)} <= set(names)


def test_drawn_cases_follow_the_seed():
    assert operator_cases(seed=1) == operator_cases(seed=1)
    assert operator_cases(seed=1)[-1] != replace(operator_cases(seed=2)[-1], seed=1)


@pytest.mark.parametrize("kind", [*GATE_KINDS, *GATES_BY_SHAPE, "first-2", "only-1", "without-0"])
def test_gates_broadcast(kind):
    gate = gate_values(kind, torch.Generator().manual_seed(0), 2, 3, 7)
    assert gate.expand(2, 3, 7, 1).isfinite().all()


@pytest.mark.parametrize("kind", [*MASK_KINDS, *MASKS_BY_SHAPE])
def test_masks_broadcast_and_only_some_have_fully_masked_rows(kind):
    mask = mask_values(kind, torch.Generator().manual_seed(0), (2, 3, 7, 11))
    assert mask.dim() >= 2
    attended = (mask if mask.dtype == torch.bool else mask != -math.inf).expand(2, 3, 7, 11)
    fully_masked = (
        "fully masked" in kind or kind == "all masked" or (kind.startswith("bool") and kind.endswith("1"))
    )
    if kind.rstrip("1") != "bool ":  # of one number, which is True
        assert bool(attended.any(-1).all()) != fully_masked


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_keep_the_numbers(kind):
    tensor = torch.randn(2, 3, 5, 4)
    laid = LAYOUTS[kind](tensor)
    same = {"expanded": tensor[:1], "expanded over heads": tensor[:, :1]}.get(kind, tensor)
    assert torch.equal(laid, same.expand_as(tensor))
    assert kind == "contiguous" or laid.stride() != tensor.stride()


@pytest.mark.parametrize("kind", [kind for kind in GRAD_CONTEXT_LAYOUTS if kind not in LAYOUTS])
def test_gradients_of_sums_have_strides_of_0(kind):
    laid = GRAD_CONTEXT_LAYOUTS[kind](torch.randn(2, 3, 5, 4))
    assert laid.shape == (2, 3, 5, 4)
    assert 0 in laid.stride()


def test_masks_and_gates_keep_their_strides_in_another_dtype():
    """What lies between their elements in memory is another number, which must not be read."""
    case = replace(SMALL, queries=11, gate="column of a table", dtype=torch.float16)
    strides = {"bias every second": 2, "rows every second": 2, "rows turned": 11, "bias sliced": 1}
    for mask, last in strides.items():
        tensors = tensors_of(replace(case, mask=mask))
        assert tensors.mask.stride(-1) == last
        assert not tensors.mask.is_contiguous()
        assert tensors.gate.stride(1) == 6 and tensors.gate.storage_offset() == 2


def test_flipped_padding_has_the_lengths_of_padding():
    right, left = (tensors_of(replace(SMALL, mask=mask)).mask for mask in ("padding", "padding flipped"))
    assert torch.equal(right.flip(-1), left)
    assert not torch.equal(right, left)


def test_batches_of_mixed_padding_begin_as_they_say():
    masks = [
        mask_values(kind, torch.Generator().manual_seed(0), (4, 2, 9, 9))[:, 0, 0]
        for kind in ("mixed padding", "mixed padding after all on")
    ]
    assert masks[0][0, 0] and masks[0][3].all()
    assert masks[1][0].all() and masks[1][1, 0]


@pytest.mark.parametrize("kind", ["causal window", "causal blocks"])
def test_narrow_causal_masks_have_all_of_the_diagonal_and_nothing_above(kind):
    mask = mask_values(kind, torch.Generator(), (1, 1, 24, 24))
    assert mask.diagonal().all() and not mask.triu(1).any()
    assert not torch.equal(mask, torch.ones_like(mask).tril())


@pytest.mark.parametrize("wanted", WANTED)
def test_leaves_are_what_is_wanted(wanted):
    case = replace(SMALL, queries=11, wanted=wanted)
    leaves = leaves_of(tensors_of(case), wanted)
    assert tuple(name for name, leaf in leaves.items() if leaf.requires_grad) == WANTED[wanted]
    shared = SHARED.get(wanted, ())
    assert len({id(leaf) for leaf in leaves.values()}) == 3 - max(0, len(shared) - 1)
    assert len({id(leaves[name]) for name in shared}) == bool(shared)


def test_float16_holds_all_inputs():
    for inputs in INPUT_KINDS:
        tensors = tensors_of(replace(SMALL, inputs=inputs, dtype=torch.float16))
        assert all(tensor.isfinite().all() for tensor in (tensors.query, tensors.key, tensors.value))


def test_tensors_are_made_anew_and_the_same():
    for case in (SMALL, replace(SMALL, dtype=torch.float64), replace(SMALL, layout="sliced")):
        first = tensors_of(case)
        kept = first.query.clone()
        for tensor in first.named().values():
            tensor.zero_()
        assert torch.equal(tensors_of(case).query, kept)


@pytest.mark.parametrize("mask", ["none", "bias and padding", "fully masked rows"])
@pytest.mark.parametrize("wanted", [one for one in WANTED if one not in SHARED])
def test_truth_is_what_autograd_finds(mask, wanted):
    """The formulas against the derivative of the oracle's forward pass."""
    case = replace(SMALL, mask=mask, wanted=wanted, dtype=torch.float64)
    results = call(eager, tensors_of(case), wanted)
    truth = truth_of(case)
    assert results.keys() == truth.values.keys()
    for name, true in truth.values.items():
        torch.testing.assert_close(results[name].detach(), true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("query is key", {"context", "dq", "dv"}),
        ("query is value", {"context", "dq", "dk"}),
        ("key is value", {"context", "dq", "dk"}),
        ("all are one", {"context", "dq"}),
    ],
)
def test_truth_of_one_tensor_that_is_several_inputs(wanted, names):
    case = replace(SMALL, queries=9, keys=9, wanted=wanted, dtype=torch.float64, mask="none")
    results = call(eager, tensors_of(case), case.wanted)
    truth = truth_of(case)
    assert results.keys() == truth.values.keys() == names
    for name in names:
        torch.testing.assert_close(results[name].detach(), truth.values[name])


def test_truth_does_not_depend_on_the_chunks(monkeypatch):
    whole = truth_of(SMALL)
    monkeypatch.setattr("headoff.harness.operator.reference.CHUNK", 1)
    parts = truth_of.__wrapped__(SMALL)
    for name, true in whole.values.items():
        torch.testing.assert_close(parts.values[name], true)
        torch.testing.assert_close(parts.scales[name], whole.scales[name])


def test_scales_are_zero_exactly_where_nothing_can_be_rounded():
    case = replace(SMALL, gate="first-1", mask="additive fully masked rows")
    truth = truth_of(case)
    fully_masked = (tensors_of(case).mask == -math.inf).all(-1)[:, 0]
    assert (truth.scales["context"][:, 0] == 0).all()
    for head in (1, 2):
        assert torch.equal((truth.scales["context"][:, head] == 0).all(-1), fully_masked)
        assert torch.equal((truth.scales["dq"][:, head] == 0).all(-1), fully_masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_of_the_size_of_rounding_errors(dtype):
    """Where sums are accumulated in a finer dtype, errors are hundredths of the unit to one unit, not tens."""
    case = OperatorCase(name="rounding", heads=4, queries=40, keys=60, dtype=dtype, gate="fractions")
    found, truth = call(eager, tensors_of(case)), truth_of(case)
    for name, true in truth.values.items():
        error = normalised(found[name], true, truth.scales[name], dtype)
        assert 0.02 < error.square().mean().sqrt() < 1, name


def gate_ignored(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask)


def raises_for_masks(query, key, value, attn_mask=None, *, head_gate=None):
    if attn_mask is not None:
        raise ValueError("no masks, please")
    return eager(query, key, value, head_gate=head_gate)


def without_gradients_ungated(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=head_gate if torch.is_grad_enabled() else None)


def test_what_writes_into_an_input_is_found_by_a_single_case():
    def scales_the_query(query, key, value, attn_mask=None, *, head_gate=None):
        context = eager(query, key, value, attn_mask, head_gate=head_gate)
        if attn_mask is None and not torch.is_grad_enabled():
            query.mul_(0.5)
        return context

    assert not operator_findings(scales_the_query, SMALL, "cpu")
    case = replace(SMALL, mask="none")
    (finding,) = operator_findings(scales_the_query, case, "cpu")
    assert finding.property == "in-place"
    assert finding.message.startswith("without gradients (torch.no_grad), a call writes into the query")


def test_findings_say_error_budget_and_place():
    finding = operator_findings(gate_ignored, replace(SMALL, gate="fractions", mask="none"), "cpu")[0]
    assert finding.property == "context"
    assert finding.error > finding.budget > 0
    for word in ("roundings of float32", "allowed", "batch item", "head", "query", "channel", "expected"):
        assert word in finding.message


def test_a_crash_names_the_line_of_the_patch():
    finding = operator_findings(raises_for_masks, replace(SMALL, mask="padding"), "cpu")[0]
    assert finding.property == "crash"
    assert f"{__file__}, line " in finding.message


@pytest.mark.parametrize(
    ("mask", "kind"),
    [
        ("bias and padding", "additive masks"),
        ("rows", "masks of 2 dimensions"),
        ("full", "masks per head"),
        ("fully masked rows", "masks per query"),
    ],
)
def test_masks_that_the_model_never_makes_may_raise(mask, kind):
    case, noted = replace(SMALL, mask=mask), {}
    assert not operator_findings(raises_for_masks, case, "cpu", noted.__setitem__)
    assert list(noted) == [kind]
    assert "no masks, please" in noted[kind]

    def ignores_masks(query, key, value, attn_mask=None, *, head_gate=None):
        return eager(query, key, value, head_gate=head_gate)

    assert operator_findings(ignores_masks, case, "cpu")[0].property == "context"


def test_what_raises_without_the_mask_as_well_is_a_failure():
    def raises(query, key, value, attn_mask=None, *, head_gate=None):
        raise ValueError("not today")

    assert operator_findings(raises, replace(SMALL, mask="bias"), "cpu")[0].property == "crash"


def test_a_patch_for_the_masks_of_the_model_alone_has_no_side_effects():
    def padding_only(query, key, value, attn_mask=None, *, head_gate=None):
        if attn_mask is not None and (attn_mask.dtype != torch.bool or attn_mask.shape[1:3] != (1, 1)):
            raise NotImplementedError("padding masks only")
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    for check in SIDE_EFFECTS:
        assert not side_effect_findings(padding_only, check, torch.float32, "cpu")


def test_a_refused_dtype_is_no_failure():
    def float32_only(query, key, value, attn_mask=None, *, head_gate=None):
        if query.dtype != torch.float32:
            raise TypeError("float32 only")
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    assert unsupported_dtype(float32_only, torch.float32, "cpu") is None
    assert "float32 only" in unsupported_dtype(float32_only, torch.bfloat16, "cpu")


def noisy(query, key, value, attn_mask=None, *, head_gate=None):
    context = eager(query, key, value, attn_mask, head_gate=head_gate)
    return context * (1 + 1e-7 * torch.randn_like(context))


def writes_into_the_mask(query, key, value, attn_mask=None, *, head_gate=None):
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask.clamp_(min=-1e30)
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def scales_and_restores(query, key, value, attn_mask=None, *, head_gate=None):
    with torch.no_grad():
        query.detach().mul_(2)
        query.detach().mul_(0.5)
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def sets_precision(query, key, value, attn_mask=None, *, head_gate=None):
    torch.set_float32_matmul_precision("high")
    return eager(query, key, value, attn_mask, head_gate=head_gate)


class Remembers:
    """Gives the first result of each set of shapes again, where no gradient is wanted."""

    def __init__(self):
        self.results = {}

    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        if query.requires_grad or key.requires_grad or value.requires_grad:
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        shapes = query.shape, key.shape, query.dtype
        if shapes not in self.results:
            self.results[shapes] = eager(query, key, value, attn_mask, head_gate=head_gate)
        return self.results[shapes].clone()


def expands_single_values(query, key, value, attn_mask=None, *, head_gate=None):
    if key.shape[-2] == 1 and attn_mask is None and head_gate is None:
        return value.expand_as(query)
    return eager(query, key, value, attn_mask, head_gate=head_gate)


class KeepsAll:
    """Every context."""

    def __init__(self):
        self.kept = []

    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        self.kept.append(eager(query, key, value, attn_mask, head_gate=head_gate))
        return self.kept[-1]


class KeepsSome(KeepsAll):
    """The latest ones."""

    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        self.kept = self.kept[-100:]
        return super().__call__(query, key, value, attn_mask, head_gate=head_gate)


def test_a_cache_that_is_bounded_is_no_leak():
    assert not side_effect_findings(KeepsSome(), "memory-released", torch.float32, "cpu")


class ScalesByTable:
    """The table is made by the first call of so many channels."""

    def __init__(self):
        self.tables = {}

    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        table = self.tables.setdefault(query.shape[-1], query.new_ones(query.shape[-1]))
        return eager(query * table.to(query), key, value, attn_mask, head_gate=head_gate)


def loses_rows_to_threads(query, key, value, attn_mask=None, *, head_gate=None):
    context = eager(query, key, value, attn_mask, head_gate=head_gate)
    threads, rows = torch.get_num_threads(), query.shape[-2]
    done = rows // threads * threads or rows
    return context * (torch.arange(rows) < done)[:, None]


SIDE_EFFECT_FAULTS = {
    "memory-released": (KeepsAll, "state"),
    "first-call-without-gradients": (ScalesByTable, "state"),
    "number-of-threads": (lambda: loses_rows_to_threads, "state"),
    "repeatable": (lambda: noisy, "randomness"),
    "random-state": (lambda: noisy, "state"),
    "inputs-untouched": (lambda: scales_and_restores, "in-place"),
    "changing-calls": (Remembers, "state"),
    "changed-contents": (Remembers, "state"),
    "context-owns-memory": (lambda: expands_single_values, "layout"),
}


@pytest.mark.parametrize("check", SIDE_EFFECT_FAULTS)
def test_side_effects_are_found(check):
    make, prop = SIDE_EFFECT_FAULTS[check]
    assert side_effect_findings(make(), check, torch.float32, "cpu")[0].property == prop


def test_settings_are_watched_in_every_call():
    assert operator_findings(sets_precision, SMALL, "cpu")[0].property == "state"


def test_a_mask_that_is_written_into_is_found():
    finding = side_effect_findings(writes_into_the_mask, "inputs-untouched", torch.float32, "cpu")[0]
    assert finding.property == "in-place"
    assert "mask" in finding.message


@pytest.mark.parametrize("check", SIDE_EFFECTS)
def test_a_wrong_context_is_not_called_a_side_effect(check):
    findings = side_effect_findings(gate_ignored, check, torch.float32, "cpu")
    assert {finding.property for finding in findings} <= {"context"}


def test_unknown_side_effects_are_an_error():
    with pytest.raises(SettingError, match="no check 'manners'"):
        side_effect_findings(sdpa, "manners", torch.float32, "cpu")


def test_settings_are_put_back():
    assert READERS.keys() == WRITERS.keys()
    before = read_settings()
    with watched_settings() as changes:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
    assert len(changes) >= 2
    assert read_settings() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_drawn_cases_of_any_seed_can_be_made(dtype):
    for seed in range(16):
        for case in operator_cases(dtype, seed)[-DRAWN:]:
            made = tensors_of(case, torch.device("cpu"))
            assert all(bool(one.isfinite().all()) for one in (made.query, made.key, made.value)), str(case)


def softmax_by_hand(query, key, value, attn_mask=None, *, head_gate=None):
    """In the dtype of the query throughout, and with a maximum that is not detached."""
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    largest = scores.amax(-1, keepdim=True)
    exponentials = (scores - largest.masked_fill(largest == -math.inf, 0)).exp()
    total = exponentials.sum(-1, keepdim=True)
    weights = exponentials / torch.where(total > 0, total, 1)
    return (weights if head_gate is None else weights * head_gate) @ value


def weights_from_logsumexp(query, key, value, attn_mask=None, *, head_gate=None):
    scores = query @ key.mT / query.shape[-1] ** 0.5
    if attn_mask is not None:
        masked = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
    empty = (scores == -math.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    weights = (scores - scores.logsumexp(-1, keepdim=True)).exp().masked_fill(empty, 0)
    return (weights if head_gate is None else weights * head_gate) @ value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", [softmax_by_hand, weights_from_logsumexp], ids=lambda a: a.__name__)
def test_plain_formulations_raise_no_false_alarm(attention, dtype):
    names = (
        "long-keys",
        "drawn-5",
        "mask-bias-of-rows-of--12000",
        "mask-padding",
        "gate-full",
        "sizes-1x850",
    )
    for seed in range(4):
        for case in operator_cases(dtype, seed):
            if case.name in names:
                assert not operator_findings(attention, case, "cpu")


def test_formulations_are_measured_as_far_as_a_result_needs():
    case, device = replace(SMALL, name="allowances"), torch.device("cpu")
    truth, allowances = truth_of(case), allowances_of(case, device)
    right = call(eager, tensors_of(case), case.wanted)
    assert all(one.is_right for one in comparisons(right, case, device))
    assert len(allowances.known) == 1  # rounding is within the floor

    wrong = {**right, "dq": right["dq"] * 1.01}
    found = {one.name: one for one in comparisons(wrong, case, device)}
    assert [name for name, one in found.items() if not one.is_right] == ["dq"]
    assert len(allowances.known) == 1 + len(STANDARD)
    for name, true in truth.values.items():  # the rule, written out
        errors = [
            errors_of(
                normalised(
                    call(one, tensors_of(case), case.wanted)[name], true, truth.scales[name], case.dtype
                )
            )
            for one in STANDARD.values()
        ]
        assert found[name].allowed.largest == allowed_error(max(one.largest for one in errors), FLOOR_LARGEST)
        assert found[name].allowed.mean == allowed_error(max(one.mean for one in errors), FLOOR_MEAN)
