"""`--forward-only`: the patch's own context, the formula's gradients, and what is said of it."""

from __future__ import annotations

import pytest
import torch

from headoff.attention import resolve_attention
from headoff.attention.eager import eager
from headoff.deformable import grid_sample_attention
from headoff.errors import AttentionError
from headoff.harness.contracts import DEFORMABLE, DENSE
from headoff.harness.deformable import PLAIN
from headoff.harness.forward_only import ForwardOnlyAttention, has_backward, is_forward_only
from headoff.harness.operator import case_named, operator_findings, side_effect_findings
from headoff.harness.operator.call import call, tensors_of
from headoff.harness.operator.side_effects import SIDE_EFFECTS
from headoff.harness.plugin.patch import Patch
from headoff.harness.plugin.preflight import first_calls, first_deformable_calls
from headoff.harness.plugin.run import Run
from headoff.harness.settings import Settings

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def refusing(attention):
    """What an inference kernel does with inputs that require gradients."""

    def kernel(*arguments, head_gate=None):
        tensors = [argument for argument in (*arguments, head_gate) if isinstance(argument, torch.Tensor)]
        if any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError("forward only")
        return attention(*arguments, head_gate=head_gate)

    return kernel


def wrapped(attention, contract=DENSE):
    return ForwardOnlyAttention(attention, "kernel", contract)


def off_by_a_thousandth(*arguments, **keywords):
    return eager(*arguments, **keywords) * 1.001


def counting(query, key, value, attn_mask=None, *, head_gate=None):
    """Right in its first calls of a size, and remembers its results after them."""
    context = counting.kept.setdefault(query.shape, eager(query, key, value, attn_mask, head_gate=head_gate))
    return context.clone()


counting.kept = {}


@pytest.mark.parametrize(
    "attention, contract, case",
    [
        (eager, DENSE, case_named("mask-padding", torch.float32, 0)),
        (grid_sample_attention, DEFORMABLE, PLAIN),
    ],
    ids=["dense", "deformable"],
)
def test_a_kernel_without_a_backward_pass_gets_the_formulas(attention, contract, case):
    tensors = tensors_of(case)
    twice = wrapped(refusing(lambda *args, **keywords: 2 * attention(*args, **keywords)), contract)
    found, true = call(twice, tensors), call(attention, tensors)
    assert torch.equal(found.pop("context"), 2 * true.pop("context")), "the kernel's own"
    assert all(torch.equal(found[name], gradient) for name, gradient in true.items()), "not those of twice"
    assert not operator_findings(wrapped(refusing(attention), contract), case, CPU)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_but_the_kernel_runs_where_no_gradient_is_needed(mode):
    formula = wrapped(refusing(eager))
    object.__setattr__(formula, "formula", None)
    query = torch.rand(1, 2, 3, 4, requires_grad=True)
    with mode():
        assert not formula(query, query, query).requires_grad


def test_wrong_contexts_and_side_effects_are_found_and_gradients_not_judged():
    case = case_named("mask-padding", torch.float32, 0)
    found = operator_findings(wrapped(refusing(off_by_a_thousandth)), case, CPU)
    assert [finding.property for finding in found] == ["context"]
    found = side_effect_findings(wrapped(refusing(counting)), "changing-calls", torch.float32, CPU)
    assert [finding.property for finding in found] == ["state"]


@pytest.mark.parametrize("name", SIDE_EFFECTS)
def test_a_right_kernel_has_no_side_effects(name):
    if name not in ("changing-calls", "repeatable", "memory-released"):  # which take seconds
        assert not side_effect_findings(wrapped(refusing(eager)), name, torch.float32, CPU)


def test_a_backward_pass_that_is_there_is_known():
    assert has_backward(eager, DENSE, CPU, torch.float32)
    assert not has_backward(refusing(eager), DENSE, CPU, torch.float32)
    patch = Patch.of(Settings(attention="eager", forward_only=True))
    assert is_forward_only(patch.attention) and not is_forward_only(patch.uncounted)
    assert not is_forward_only(Patch.of(Settings(attention="eager")).attention)


def test_first_calls_name_the_option_and_with_it_need_no_backward_pass():
    kernel = resolve_attention(refusing(eager))
    with pytest.raises(AttentionError, match="and not with others: add --forward-only to have its forward"):
        first_calls(kernel, "kernel", CPU, torch.float32)
    first_calls(kernel, "kernel", CPU, torch.float32, forward_only=True)
    deformable = refusing(grid_sample_attention)
    first_deformable_calls(deformable, "kernel", CPU, torch.float32, forward_only=True)
    with pytest.raises(AttentionError, match="raised ValueError: nothing works [^:]*$"):
        first_calls(
            lambda *_, **__: (_ for _ in ()).throw(ValueError("nothing works")), "it", CPU, torch.float32
        )


def test_the_headline_says_what_a_verdict_is_about():
    about = {"attention": "a.py:b", "passes": "forward only"}
    run = Run(about)
    run.add("test_heads_off_x.py::a", "call", "passed", 0.1, {"calls_credited": 1})
    assert run.headline() == "a.py:b (forward pass only) is right: 1 check passed"
