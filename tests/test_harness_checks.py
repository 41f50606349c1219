"""Checks that are asked for by name: each fails a mutant of its own, and passes right attentions of both contracts."""

from __future__ import annotations

import functools
import threading

import pytest
import torch

from headoff.attention.eager import eager
from headoff.deformable import gather_attention, grid_sample_attention
from headoff.errors import SettingError
from headoff.harness.checks import compiled, concurrent_calls
from headoff.harness.checks.candidate import CHECKS as REGISTERED
from headoff.harness.checks.candidate import Candidate, NotApplicable
from headoff.harness.checks.names import CHECKS
from headoff.harness.checks.run import outcome_of
from headoff.harness.contracts import DEFORMABLE, DENSE
from headoff.harness.fallback import fallbacks, model_calls
from headoff.harness.settings import read_settings

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def checked(name, attention, contract=DENSE, **keywords):
    return outcome_of(name, Candidate(attention, contract, torch.float32, CPU, **keywords))


def messages(name, attention, contract=DENSE):
    # Graphs are counted with the forward pass alone as well, in half the time.
    forward_only = isinstance(attention, Specialised)
    found = checked(name, attention, contract, forward_only=forward_only).findings
    assert all(finding.property == name for finding in found)
    return "\n".join(finding.message for finding in found)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(concurrent_calls, "SECONDS", 1.0)


@pytest.fixture
def no_inductor(monkeypatch):
    """Which takes ten seconds for a kernel."""
    monkeypatch.setattr(compiled, "has_compiler", lambda: False)


# A custom operator, right and wrong in what is registered with it


def operator(name, *, fake=torch.empty_like, register=True):
    """Attention by two operators, its forward and its backward pass; `register`: else in an autograd.Function."""

    @torch.library.custom_op(f"headoff_checks::{name}", mutates_args=())
    def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return eager(query, key, value)

    @torch.library.custom_op(f"headoff_checks::{name}_backward", mutates_args=())
    def backward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor
    ) -> list[torch.Tensor]:
        scale = query.shape[-1] ** 0.5
        weights = (query @ key.mT / scale).softmax(-1)
        of_weights = gradient @ value.mT
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) / scale
        return [of_scores @ key, of_scores.mT @ query, weights.mT @ gradient]

    forward.register_fake(lambda query, key, value: fake(query))
    backward.register_fake(lambda *inputs: [torch.empty_like(tensor) for tensor in inputs[:3]])

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            ctx.save_for_backward(*inputs)
            return forward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            return tuple(backward(*ctx.saved_tensors, gradient.contiguous()))

    if register:
        forward.register_autograd(
            lambda ctx, gradient: tuple(backward(*ctx.saved_tensors, gradient.contiguous())),
            setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        )

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        if attn_mask is not None:
            return eager(query, key, value, attn_mask, head_gate=head_gate)
        context = forward(query, key, value) if register else Function.apply(query, key, value)
        return context if head_gate is None else context * head_gate

    return attention


OPERATORS = {
    "right": operator("right"),
    "function": operator("function", register=False),
    "fake": operator("fake", fake=lambda query: query.new_empty(query.mT.shape)),
}


def test_custom_operators():
    for name in ("right", "function"):
        outcome = checked("opcheck", OPERATORS[name])
        names = f"headoff_checks::{name}, headoff_checks::{name}_backward"
        assert not outcome.findings and outcome.remarks == [f"opcheck: right for {names}"]
    assert "rejects its fake implementation" in messages("opcheck", OPERATORS["fake"])
    with pytest.raises(NotApplicable, match="no custom operator"):
        checked("opcheck", eager)


# Mutants of the other checks


def branching(query, key, value, attn_mask=None, *, head_gate=None):
    if query.sum() > 1e9:  # numbers decide which code runs
        return query
    return eager(query, key, value, attn_mask, head_gate=head_gate)


class Specialised:
    def __call__(self, query, key, value, attn_mask=None, *, head_gate=None):
        length = int(torch.empty(query.shape[2], device="meta").numel())
        if length % 3 == 0 or length % 3 == 1:
            value = value * 1.0
        if query.shape[0] == 3:
            value = value + 0.0
        return eager(query, key, value, attn_mask, head_gate=head_gate)


def wrong_if_compiled(query, key, value, attn_mask=None, *, head_gate=None):
    factor = 1.01 if torch.compiler.is_compiling() else 1.0
    return eager(query, key, value, attn_mask, head_gate=head_gate) * factor


def wrong_if_exported(query, key, value, attn_mask=None, *, head_gate=None):
    factor = 1.01 if torch.compiler.is_exporting() else 1.0
    return eager(query, key, value, attn_mask, head_gate=head_gate) * factor


def mixed(query, key, value, attn_mask=None, *, head_gate=None):
    """Weights in autocast's dtype meet values that stay as they are: matmul in place of the operator autocast knows."""
    if torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            weights = (query.bfloat16() @ key.bfloat16().mT / query.shape[-1] ** 0.5).softmax(-1)
            return weights @ value
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def coarse(query, key, value, attn_mask=None, *, head_gate=None):
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.float8_e5m2).float() for x in (query, key, value))
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def shared_buffer(attention):
    """The first input is copied into a buffer that calls of one size share."""
    buffers = {}

    @functools.wraps(attention)
    def call(first, *others, **keywords):
        buffer = buffers.setdefault(first.shape, torch.empty_like(first)).detach()
        with torch.no_grad():
            buffer.copy_(first)
        return attention(buffer + (first - first.detach()), *others, **keywords)

    return call


def item_by_item(query, key, value, attn_mask=None, *, head_gate=None):
    for row in query.flatten(0, 2)[:1]:
        row.sum().item()
    return eager(query, key, value, attn_mask, head_gate=head_gate)


@pytest.mark.parametrize(
    "name, mutant, said",
    [
        ("compile", branching, "torch.compile(fullgraph=True) for static shapes it raises"),
        ("compile", wrong_if_compiled, "for static shapes, the context is off by"),
        pytest.param("compile", Specialised(), "it is compiled 3 times for", marks=pytest.mark.slow),
        ("export", branching, "with static shapes it raises"),
        ("export", wrong_if_exported, "with static shapes, the context is off by"),
        ("export", Specialised(), "with dynamic shapes it raises"),
        ("autocast", mixed, "with inputs in float32 it raises RuntimeError"),
        ("autocast", coarse, "the context is off by"),
        ("threads", shared_buffer(eager), "something is shared between calls"),
        ("vmap", item_by_item, "it raises RuntimeError: vmap"),
    ],
)
def test_each_check_fails_its_mutant(no_inductor, name, mutant, said):
    assert said in messages(name, mutant)


def test_deformable_mutants_fail_by_the_same_checks(no_inductor):
    assert "something is shared" in messages("threads", shared_buffer(gather_attention), DEFORMABLE)

    def branching(value, *others, **keywords):
        return value if value.sum() > 1e9 else grid_sample_attention(value, *others, **keywords)

    assert "it raises" in messages("export", branching, DEFORMABLE)


RIGHT = {"dense": (eager, DENSE), "deformable": (gather_attention, DEFORMABLE)}


@pytest.mark.parametrize("contract", RIGHT)
@pytest.mark.parametrize("name", ["autocast", "threads", "batch-invariance", "vmap"])
def test_right_attentions_pass(contract, name):
    outcome = checked(name, *RIGHT[contract])
    assert not outcome.findings


@pytest.mark.parametrize("name", ["compile", "export"])
def test_a_right_attention_compiles(no_inductor, name):
    outcome = checked(name, eager, forward_only=name == "export")
    assert not outcome.findings
    assert outcome.remarks


@pytest.mark.slow
@pytest.mark.parametrize("contract", RIGHT)
@pytest.mark.parametrize("name", ["compile", "export"])
def test_right_attentions_compile_with_inductor(contract, name):
    assert not checked(name, *RIGHT[contract]).findings


def test_batches_that_round_otherwise_are_a_note():
    def by_batch(query, key, value, attn_mask=None, *, head_gate=None):
        tiny = torch.finfo(query.dtype).eps * (len(query) > 1)
        return eager(query, key, value, attn_mask, head_gate=head_gate) * (1 + tiny)

    outcome = checked("batch-invariance", by_batch)
    assert not outcome.findings and "other bits than in a batch of 5 (context by up to" in outcome.remarks[0]


@pytest.mark.parametrize("name", ["streams", "graph", "sanitizer"])
def test_checks_of_a_gpu_are_not_applicable_without_one(name):
    with pytest.raises(NotApplicable, match="use --device cuda"):
        checked(name, eager)


def test_kernels_without_a_backward_pass_are_checked_forward(no_inductor):
    def kernel(query, key, value, attn_mask=None, *, head_gate=None):
        assert not query.requires_grad
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    for name in ("autocast", "threads", "batch-invariance", "vmap"):
        assert not checked(name, kernel, forward_only=True).findings


def test_names_of_checks_and_fallbacks():
    assert set(CHECKS) == set(REGISTERED)
    (settings,) = read_settings({"check": ["compile,opcheck", "vmap"], "allow-fallback": ["masked,cpu"]})
    assert settings.checks == ("compile", "opcheck", "vmap") and settings.allow_fallback == ("masked", "cpu")
    (settings,) = read_settings({"check": ["all"]})
    assert settings.checks == tuple(name for name in CHECKS if name != "vmap")
    with pytest.raises(SettingError, match="no check 'compiled': did you mean|no check 'compiled'"):
        read_settings({"check": ["opcheck,compiled"]})
    with pytest.raises(SettingError, match="no kind of fallback 'mask'"):
        read_settings({"allow-fallback": ["mask"]})


def masked_by_torch(query, key, value, attn_mask=None, *, head_gate=None):
    if attn_mask is not None:
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)
        return context if head_gate is None else context * head_gate
    return eager(query, key, value, head_gate=head_gate)


def small_by_torch(query, key, value, attn_mask=None, *, head_gate=None):
    if query.shape[2] == 100:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)
    return eager(query, key, value, attn_mask, head_gate=head_gate)


def after_an_exception(query, key, value, attn_mask=None, *, head_gate=None):
    try:
        raise ValueError("not compiled for this")
    except ValueError:
        return eager(query, key, value, attn_mask, head_gate=head_gate)


@pytest.mark.parametrize(
    "attention, kind",
    [(masked_by_torch, "masked"), (small_by_torch, "sizes"), (after_an_exception, "exception")],
)
def test_fallbacks_that_are_declared(attention, kind):
    found = fallbacks(attention, model_calls(attention, CPU, torch.float32, 0))
    assert found
    assert all(fallback.is_declared([kind], CPU) and fallback.is_declared(["cpu"], CPU) for fallback in found)
    others = [name for name in ("masked", "sizes", "exception") if name != kind]
    assert not all(fallback.is_declared(others, CPU) for fallback in found)
    assert not any(fallback.is_declared(["cpu"], torch.device("cuda")) for fallback in found)


def test_threads_end_with_the_check():
    before = threading.active_count()
    checked("threads", eager)
    assert threading.active_count() == before


def test_an_attention_that_raises_is_told_from_a_check_that_fails():
    def raising(query, key, value, attn_mask=None, *, head_gate=None):
        raise ValueError("out of luck")

    (found,) = Candidate(raising, DENSE, torch.float32, CPU).raised_alone()
    assert found.property == "crash" and "ValueError: out of luck" in found.message
    assert not Candidate(eager, DENSE, torch.float32, CPU).raised_alone()
