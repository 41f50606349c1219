"""LRP by autograd: oracles of `headoff.relevance.lrp`, for one configuration and one target, in float64.

The detector runs as it is, with the operators replaced by functions that compute something else in the backward pass.

- `positive_evidence`: what is sent back is relevance. A linear layer's rule is written with the T x out x in tensor of
  all products; copies of a tensor add up by themselves.
- `modified_gradient`: what is sent back are gradients, changed where AttnLRP is not gradient x input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import Function

from headoff.calls import Attend, AttentionAddress, AttentionCall
from headoff.detr.detector import BoxHead, Detr, Features
from headoff.detr.transformer import Residual
from headoff.gates import SITES, Gates
from headoff.relevance import Target
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import Evidence

linear, layer_norm = nn.functional.linear, nn.functional.layer_norm


def shared(relevance: Tensor, z: Tensor) -> Tensor:
    return torch.where(z == 0, 0, relevance / z)


class Unchanged(Function):
    """A function of x that passes relevance on unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(x)

    @staticmethod
    def backward(ctx, relevance: Tensor):
        return relevance, None


class PositiveLinear(Function):
    """Relevance in proportion to the positive products x_i w_oi, rescaled to keep the total."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, relevance: Tensor):
        x, weight = ctx.saved_tensors
        products = (x[..., None, :] * weight).clamp(min=0)
        found = (products * shared(relevance, products.sum(-1))[..., None]).sum(-2)
        return found * shared(relevance.sum(), found.sum()), None, None


class BalancedSum(Function):
    @staticmethod
    def forward(ctx, x: Tensor, update: Tensor) -> Tensor:
        ctx.save_for_backward(x, update)
        return x + update

    @staticmethod
    def backward(ctx, relevance: Tensor):
        x, update = ctx.saved_tensors
        parts = [part * shared(relevance, x + update) for part in (x, update)]
        weights = [part.sum().abs() for part in parts]
        return tuple(
            part * shared(relevance.sum() * shared(weight, sum(weights)), part.sum())
            for part, weight in zip(parts, weights, strict=True)
        )


class HalvedProduct(Function):
    """left @ right: half of the relevance for each factor, in proportion to the products."""

    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, relevance: Tensor):
        left, right = ctx.saved_tensors
        products = torch.einsum("...ik,...kj->...ikj", left, right)
        of_products = products * shared(relevance, left @ right)[..., :, None, :] / 2
        return of_products.sum(-1), of_products.sum(-3)


class HalvedGradients(Function):
    """left @ right, with half of the gradient for each factor."""

    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right

    @staticmethod
    def backward(ctx, gradient: Tensor):
        left, right = ctx.saved_tensors
        return gradient @ right.mT / 2, left.mT @ gradient / 2


class Proportional(Function):
    """A function y of x whose gradient is taken to be y / x."""

    @staticmethod
    def forward(ctx, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        y = function(x)
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor):
        x, y = ctx.saved_tensors
        return gradient * y / x, None


def unchanged_norm(x, shape, weight, bias, eps):
    return Unchanged.apply(x, lambda x: layer_norm(x, shape, weight, bias, eps))


def norm_by_constant(x, shape, weight, bias, eps):
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt().detach()
    return (x - x.mean(-1, keepdim=True)) / deviation * weight + bias


@contextmanager
def replaced_operators(norm: Callable, identity: type[Function]) -> Iterator[ExitStack]:
    """Layer norm by `norm`, sigmoid by `identity`."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(nn.functional, "layer_norm", norm))
        boxes = lambda head, x: identity.apply(nn.Sequential.forward(head, x), torch.sigmoid)  # noqa: E731
        stack.enter_context(patch.object(BoxHead, "forward", boxes))
        yield stack


def scaled(query: Tensor) -> Tensor:
    return query / math.sqrt(query.shape[-1])


def masked_softmax(call: AttentionCall) -> Callable[[Tensor], Tensor]:
    def weights(scores: Tensor) -> Tensor:
        if call.attn_mask is not None:
            scores = scores.masked_fill(~call.attn_mask, -math.inf)
        return scores.softmax(-1)

    return weights


def run(detector: Detr, features: Features, gates: Gates | None, interceptor) -> tuple[Tensor, Tensor]:
    """Logits (Q, K + 1) and boxes (Q, 4) of one configuration."""
    encoder_gate = None if gates is None or gates.encoder_self is None else gates.encoder_self[0]
    decoder_gates = None if gates is None else replace(gates, encoder_self=None)
    with detector.intercepting(interceptor):
        memory = detector.encode_features(features, encoder_gate)
        output = detector.decode(memory, decoder_gates)
    return output.logits[0, 0], output.boxes[0, 0]


def output_gradients(target: Target, logits: Tensor, boxes: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in (logits, boxes)]
    return list(torch.autograd.grad(target.value(*leaves), leaves, allow_unused=True, materialize_grads=True))


def positive_evidence(detector: Detr, features: Features, gates: Gates | None, target: Target) -> Evidence:
    """`dense_evidence` with LRP's relevance of the gated weights in the place of the weights."""
    weights: dict[AttentionAddress, Tensor] = {}

    def attention(call: AttentionCall, proceed: Attend) -> Tensor:
        scores = HalvedProduct.apply(Unchanged.apply(call.query, scaled), call.key.mT)
        softmax = masked_softmax(call)
        gate = 1 if call.head_gate is None else call.head_gate
        found = Unchanged.apply(scores, lambda scores: softmax(scores) * gate)
        weights[call.address] = found if found.requires_grad else found.requires_grad_()
        return HalvedProduct.apply(found, call.value)

    tokens = features.tokens.clone().requires_grad_()
    with torch.enable_grad(), replaced_operators(unchanged_norm, Unchanged) as stack:
        relu = lambda x, inplace=False: Unchanged.apply(x, lambda x: x.clamp(min=0))  # noqa: E731
        stack.enter_context(patch.object(nn.functional, "relu", relu))
        stack.enter_context(patch.object(nn.functional, "linear", PositiveLinear.apply))
        leave = lambda block, x, update: (  # noqa: E731
            BalancedSum.apply(x, update) if block.pre_norm else block.norm(BalancedSum.apply(x, update))
        )
        stack.enter_context(patch.object(Residual, "leave", leave))
        logits, boxes = run(detector, replace(features, tokens=tokens), gates, attention)
    found = torch.autograd.grad(
        (logits, boxes), list(weights.values()), output_gradients(target, logits, boxes), allow_unused=True
    )
    of_weights = {
        address: torch.zeros_like(tensor) if relevance is None else relevance
        for (address, tensor), relevance in zip(weights.items(), found, strict=True)
    }
    plain = dense_evidence(detector, features, gates, target)
    layers = {}
    for site, before in zip(SITES, (plain.encoder, plain.decoder_self, plain.decoder_cross), strict=True):
        layers[site] = tuple(
            replace(evidence, weights=of_weights[AttentionAddress(site, index)][0])
            for index, evidence in enumerate(before)
        )
    return replace(
        plain,
        encoder=layers["encoder_self"],
        decoder_self=layers["decoder_self"],
        decoder_cross=layers["decoder_cross"],
    )


def modified_gradient(
    detector: Detr, features: Features, gates: Gates | None, target: Target, layer: int, *others: Tensor
) -> list[Tensor]:
    """Gradient x input of the image tokens (1, N, d) and of `others` by AttnLRP's changed gradients, and last what the
    bias of softmax gets.

    The memory is a constant for the cross-attention of decoder layers after `layer`.
    """
    of_softmax: list[Tensor] = []

    def attention(call: AttentionCall, proceed: Attend) -> Tensor:
        if call.address.site == "decoder_cross" and call.address.layer > layer:
            call = call._replace(key=call.key.detach(), value=call.value.detach())
        scores = HalvedGradients.apply(scaled(call.query), call.key.mT)
        weights = masked_softmax(call)(scores)
        if scores.requires_grad:
            of_softmax.extend((weights, scores))
        if call.head_gate is not None:
            weights = weights * call.head_gate
        return HalvedGradients.apply(weights, call.value)

    tokens = features.tokens.clone().requires_grad_()
    with torch.enable_grad(), replaced_operators(norm_by_constant, Proportional):
        logits, boxes = run(detector, replace(features, tokens=tokens), gates, attention)
        leaves = [tokens, *others, *of_softmax]
        gradients = torch.autograd.grad(
            (logits, boxes),
            leaves,
            output_gradients(target, logits, boxes),
            allow_unused=True,
            materialize_grads=True,
        )
    parts = [(leaf * gradient).detach() for leaf, gradient in zip(leaves, gradients, strict=True)]
    parts, softmax = parts[: 1 + len(others)], parts[1 + len(others) :]
    return [*parts, sum(part.sum() for part in softmax[::2]) - sum(part.sum() for part in softmax[1::2])]
