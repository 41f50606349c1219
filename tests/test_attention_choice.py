"""Which of headoff's own attentions is used where nobody chose one."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

import headoff
from headoff.attention import attention_label, choice, chosen_attention, eager


def test_sdpa_on_a_cpu_and_where_the_kernels_do_not_reach(monkeypatch):
    monkeypatch.setattr(choice, "problem_on", lambda *_: None)
    assert chosen_attention("cpu", torch.float32, 32) == "sdpa"
    assert chosen_attention("cuda", torch.float64, 32) == "sdpa"
    assert chosen_attention("cuda", torch.float32, 256) == "sdpa"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_attention("cuda", torch.float32, 32) == "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_on_a_gpu_where_its_first_call_is_right(monkeypatch, dtype):
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "problem_on", lambda *_: None)
    assert chosen_attention("cuda:1", dtype, 32) == "triton"


def test_sdpa_and_a_warning_where_it_is_not(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(choice, "problem_on", lambda *_: "no such instruction")
    with pytest.warns(RuntimeWarning, match=r"not used on cuda \(no such instruction\)"):
        assert chosen_attention("cuda", torch.float32, 32) == "sdpa"


def problem(monkeypatch, attention, dtype=torch.float32):
    choice.problem_on.cache_clear()
    monkeypatch.setattr(choice, "triton_attention", attention)
    try:
        return choice.problem_on(torch.device("cpu"), dtype, 32)
    finally:
        choice.problem_on.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_first_call_tells_right_from_wrong(monkeypatch, dtype):
    from headoff.attention.sdpa import sdpa

    def ungated(query, key, value, attn_mask=None, *, head_gate=None):
        return sdpa(query, key, value, attn_mask)

    def nothing(query, key, value, attn_mask=None, *, head_gate=None):
        return (query * key[..., :1, :] * value[..., :1, :]) * torch.nan

    def failing(*_, **__):
        raise RuntimeError("out of\n shared memory")

    for mode in (nullcontext, torch.no_grad, torch.inference_mode):
        with mode():
            assert problem(monkeypatch, sdpa, dtype) is None
    assert problem(monkeypatch, ungated, dtype) == "its first results disagree with eager attention"
    assert problem(monkeypatch, nothing, dtype) == "its first results disagree with eager attention"
    assert problem(monkeypatch, failing, dtype) == "RuntimeError: out of shared memory"

    def without_padding(query, key, value, attn_mask=None, *, head_gate=None):
        return sdpa(query, key, value, head_gate=head_gate)

    assert problem(monkeypatch, without_padding, dtype) == "its first results disagree with eager attention"


def test_a_setting_that_rounds_products_does_not_make_it_wrong(monkeypatch):
    """Eager attention in float32 would be the wrong one: it is not what is compared with."""
    calls = []

    def noting(*inputs, head_gate):
        calls.append(inputs[0].dtype)
        return eager(*inputs, head_gate=head_gate)

    monkeypatch.setattr(choice, "eager", noting)
    assert problem(monkeypatch, eager) is None
    assert set(calls) == {torch.float64}


def test_a_gpu_that_is_too_old_is_not_tried(monkeypatch):
    monkeypatch.setattr(choice, "too_old", lambda device: "it is of 2017")
    monkeypatch.setattr(choice, "triton_attention", None)
    reason = choice.problem_on.__wrapped__(torch.device("cuda", 0), torch.float32, 32)
    assert reason == "it is of 2017"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [32, 64, 128])
def test_the_kernels_are_right_here(dtype, channels):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("they are not for a GPU as old as this")
    assert choice.problem_on(torch.device("cuda"), dtype, channels) is None


def test_a_detector_is_loaded_with_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_label(headoff.load("scenes").attention) == "sdpa"
    assert attention_label(headoff.load("scenes", attention="eager").attention) == "eager"
