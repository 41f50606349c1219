"""Deformable attention: two formulations against the definition, what the contract promises, and the registry."""

from __future__ import annotations

import functools

import pytest
import torch

from headoff.deformable import (
    conform,
    embedding_bag,
    embedding_bag_attention,
    gather_attention,
    grid_sample_attention,
    host_shapes,
    level_tensors,
    register_deformable_attention,
    registry,
    resolve_deformable_attention,
)
from headoff.errors import AttentionError

SHAPES = ((4, 3), (2, 5), (1, 1))
REFERENCES = [grid_sample_attention, gather_attention, embedding_bag_attention]


def inputs(batch=2, queries=5, heads=3, points=2, channels=4, dtype=torch.float64, seed=0):
    """Value, locations (some outside the image), weights, gate."""
    generator = torch.Generator().manual_seed(seed)
    random = functools.partial(torch.rand, generator=generator, dtype=torch.float64)
    tokens = sum(height * width for height, width in SHAPES)
    made = (
        random(batch, tokens, heads, channels) - 0.5,
        random(batch, queries, heads, len(SHAPES), points, 2) * 1.6 - 0.3,
        random(batch, queries, heads, len(SHAPES), points),
        random(batch, queries, heads, 1),
    )
    return tuple(tensor.to(dtype) for tensor in made)


def by_definition(value, locations, weights, gate):
    """One number at a time: each cell has the weight max(0, 1 - |dx|) max(0, 1 - |dy|)."""
    context = torch.zeros(*locations.shape[:3], value.shape[-1], dtype=value.dtype)
    first = 0
    for level, (height, width) in enumerate(SHAPES):
        for row in range(height):
            for column in range(width):
                position = locations[:, :, :, level] * torch.tensor([width, height]) - 0.5
                distance = (position - torch.tensor([column, row])).abs()
                share = ((1 - distance).clamp(min=0).prod(-1) * weights[:, :, :, level]).sum(-1, keepdim=True)
                context = context + gate * share * value[:, None, first + row * width + column]
        first += height * width
    return context


@pytest.mark.parametrize("attention", REFERENCES)
def test_context_and_gradients_are_those_of_the_definition(attention):
    value, locations, weights, gate = (tensor.requires_grad_() for tensor in inputs())
    expected = by_definition(value, locations, weights, gate)
    found = attention(value, SHAPES, locations, weights, head_gate=gate)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), (value, locations, weights, gate)),
        torch.autograd.grad(expected.sin().sum(), (value, locations, weights, gate)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@pytest.mark.parametrize("at_once", [1, 72], ids=["one query", "two queries"])
@pytest.mark.parametrize("gates", [5, 1], ids=["by query", "for all queries"])
def test_queries_of_an_embedding_bag_are_computed_some_at_once(monkeypatch, at_once, gates):
    value, locations, weights, gate = inputs()
    gate = gate[:, :gates]
    whole = embedding_bag_attention(value, SHAPES, locations, weights, head_gate=gate)
    monkeypatch.setattr(embedding_bag, "AT_ONCE", at_once)
    assert torch.equal(embedding_bag_attention(value, SHAPES, locations, weights, head_gate=gate), whole)


@pytest.mark.parametrize("attention", REFERENCES)
def test_points_of_weight_0_contribute_nothing_wherever_they_are(attention):
    value, locations, weights, gate = inputs()
    weights[..., 1] = 0
    moved = locations.clone()
    moved[..., 1, :] = 1e12
    plain = attention(value, SHAPES, locations, weights)
    assert torch.equal(plain, attention(value, SHAPES, moved, weights))
    one_point = attention(value, SHAPES, locations[..., :1, :], weights[..., :1])
    torch.testing.assert_close(plain, one_point, rtol=0, atol=1e-15)


@pytest.mark.parametrize("attention", REFERENCES)
@pytest.mark.parametrize("queries", [0, 1])
def test_few_queries(attention, queries):
    value, locations, weights, gate = inputs(queries=queries, dtype=torch.float32)
    context = attention(value, SHAPES, locations, weights, head_gate=gate)
    assert context.shape == (2, queries, 3, 4) and context.is_contiguous()


@pytest.mark.parametrize("attention", REFERENCES)
def test_a_first_call_in_inference_mode_leaves_training_possible(attention):
    value, locations, weights, _ = inputs(seed=1)
    level_tensors.cache_clear()
    with torch.inference_mode():
        attention(value, SHAPES, locations, weights)
    attention(value, SHAPES, locations.requires_grad_(), weights).sum().backward()
    assert locations.grad is not None


def test_forms_of_spatial_shapes():
    tensor, first = level_tensors(SHAPES, torch.device("cpu"))
    assert tensor.tolist() == [[4, 3], [2, 5], [1, 1]] and first.tolist() == [0, 12, 22]
    assert host_shapes(tensor) == host_shapes([[4, 3], [2, 5], [1, 1]]) == SHAPES


def test_a_callable_without_a_gate_is_gated():
    def plain(value, spatial_shapes, locations, weights):
        return grid_sample_attention(value, spatial_shapes, locations, weights)

    value, locations, weights, gate = inputs()
    found = conform(plain, "plain")(value, SHAPES, locations, weights, head_gate=gate)
    expected = grid_sample_attention(value, SHAPES, locations, weights, head_gate=gate)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda context: context.flatten(2), r"return context.unflatten\(-1, \(heads, channels\)\)"),
        (lambda context: context.transpose(1, 2), "must keep the order"),
        (lambda context: (context, None), "returned a tuple"),
    ],
)
def test_what_is_no_context_is_said(change, said):
    value, locations, weights, gate = inputs()
    call = conform(lambda *inputs: change(grid_sample_attention(*inputs)), "mine")
    with pytest.raises(AttentionError, match=said):
        call(value, SHAPES, locations, weights, head_gate=gate)


@pytest.mark.parametrize(
    "call, said",
    [
        (torch.nn.Linear, "mine is a class"),
        (3, "mine cannot be called"),
        (lambda value, shapes, first, locations, weights, step: value, "wrap it in a function of these"),
    ],
)
def test_what_cannot_be_adapted_is_said(call, said):
    with pytest.raises(AttentionError, match=said):
        conform(call, "mine")


def test_names(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    assert resolve_deformable_attention("gather") is gather_attention
    assert register_deformable_attention("mine", grid_sample_attention) is resolve_deformable_attention(
        "mine"
    )
    file = tmp_path / "kernel.py"
    file.write_text("from headoff.deformable import gather_attention as kernel")
    assert resolve_deformable_attention(f"{file}:kernel") is gather_attention
    with pytest.raises(AttentionError, match=r"no deformable attention 'gathr' \(did you mean 'gather'\?\)"):
        resolve_deformable_attention("gathr")
    with pytest.raises(AttentionError, match="cannot be the name"):
        register_deformable_attention("a:b", gather_attention)
