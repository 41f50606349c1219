"""Which of headoff's own attentions is used where nobody chose one."""

from __future__ import annotations

import warnings

import pytest
import torch

import headoff
from headoff.attention import attention_label, choice, chosen_attention


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

    assert problem(monkeypatch, sdpa, dtype) is None
    assert problem(monkeypatch, ungated, dtype) == "its first results disagree with eager attention"
    assert problem(monkeypatch, nothing, dtype) == "its first results disagree with eager attention"
    assert problem(monkeypatch, failing, dtype) == "RuntimeError: out of shared memory"


def test_a_detector_is_loaded_with_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert attention_label(headoff.load("scenes").attention) == "sdpa"
    assert attention_label(headoff.load("scenes", attention="eager").attention) == "eager"
