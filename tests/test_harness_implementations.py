"""The implementations that tolerances are measured on compute attention, and round in different ways."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from headoff.attention import eager
from headoff.harness.reference.implementations import (
    STANDARD,
    ExtraRounding,
    Formulation,
    right_implementations,
)

EVERY_FORMULATION = [
    Formulation(*choices)
    for choices in itertools.product(
        ("query", "scores", "both"),
        ("first", "last", "logsumexp"),
        (None, 4),
        (False, True),
        ("weights", "context"),
    )
]


def example(dtype=torch.float64, mask="fully masked rows"):
    """Inputs, gradient of the context, and keywords of a call with 5 queries and 7 keys."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_context = (
        torch.randn(2, 3, tokens, 4, generator=generator, dtype=torch.float64).to(dtype)
        for tokens in (5, 7, 7, 5)
    )
    gate = torch.rand(2, 3, 1, 1, generator=generator).round(decimals=1).to(dtype)
    attn_mask = torch.rand(2, 1, 5, 7, generator=generator) < 0.5
    attn_mask[1, 0, 2] = False
    if mask == "additive":
        bias = torch.randn(attn_mask.shape, generator=generator, dtype=torch.float64).to(dtype)
        attn_mask = bias.masked_fill(~attn_mask, -math.inf)
    return (query, key, value), grad_context, {"attn_mask": attn_mask if mask else None, "head_gate": gate}


def results(attention, inputs, grad_context, keywords):
    leaves = [x.clone().requires_grad_() for x in inputs]
    context = attention(*leaves, **keywords)
    return context, *torch.autograd.grad(context, leaves, grad_context)


@pytest.mark.parametrize("mask", [None, "fully masked rows", "additive"])
def test_context_and_gradients_are_those_of_the_formula(mask):
    """In float64, where they differ by rounding alone; fully masked rows are zeros."""
    call = example(mask=mask)
    truth = results(eager, *call)
    for attention in [*STANDARD.values(), *EVERY_FORMULATION, ExtraRounding(1)]:
        for found, expected in zip(results(attention, *call), truth, strict=True):
            assert torch.allclose(found, expected, rtol=1e-12, atol=1e-13), attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_round_differently_in_the_dtype_of_the_query(dtype):
    found = [results(attention, *example(dtype)) for attention in right_implementations()]
    assert all(result.dtype == dtype for some in found for result in some)
    for one, other in itertools.combinations(found, 2):
        assert any(not torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_extra_rounding_is_one_rounding_and_repeatable():
    inputs, _, _ = example(torch.float32)
    expected, found, again = eager(*inputs), ExtraRounding(1)(*inputs), ExtraRounding(1)(*inputs)
    assert torch.equal(found, again)
    assert not torch.equal(found, expected)
    assert ((found - expected).abs() <= torch.finfo(torch.float32).eps * expected.abs()).all()
