"""Weights and gradients of every attention by plain autograd, the input of `headoff.relevance.rules`.

One configuration and one target per forward and backward pass, without sharing or skipping. For float64 and small
models.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headoff.detector import AttentionAddress, AttentionCall
from headoff.detr.detector import Detr, Features
from headoff.detr.sharing import sharing_plan
from headoff.gates import SITES, Gates
from headoff.relevance.rules import AttentionEvidence, Evidence
from headoff.relevance.targets import Target


class _DenseAttention:
    """Eager attention that records weights after the gate (1, H, Q, S), values and contexts, for autograd."""

    def __init__(self) -> None:
        self.weights: dict[AttentionAddress, Tensor] = {}
        self.values: dict[AttentionAddress, Tensor] = {}
        self.contexts: dict[AttentionAddress, Tensor] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        address, query, key, value, attn_mask, head_gate = call
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        weights = scores.softmax(-1)
        if head_gate is not None:
            weights = weights * head_gate.to(weights)
        # With frozen parameters, the first self-attention of the decoder depends on nothing that requires a gradient.
        weights = weights if weights.requires_grad else weights.detach().requires_grad_()
        self.weights[address], self.values[address] = weights, value
        self.contexts[address] = weights @ value
        return self.contexts[address]


def dense_evidence(detector: Detr, features: Features, gates: Gates | None, target: Target) -> Evidence:
    """Weights and gradients of every attention, for one image, one configuration (`gates` of length 1) and a target.

    The detector's encoder, decoder and heads run, with eager attention.
    """
    attention = _DenseAttention()
    encoder_gate = None if gates is None or gates.encoder_self is None else gates.encoder_self[0]
    with torch.enable_grad():
        tokens = detector.encoder(
            features.tokens.detach().requires_grad_(),
            features.positions,
            attention,
            features.attn_mask,
            None if encoder_gate is None else encoder_gate.to(features.tokens),
        )
        plan = None
        if gates is not None:
            plan = sharing_plan(gates.decoder_self, gates.decoder_cross, detector.config.decoder_layers, 1)
        positions = detector.query_embedding.weight
        states = detector.decoder(
            positions.new_zeros(1, 1, *positions.shape),
            positions,
            tokens,
            features.positions,
            attention,
            features.attn_mask,
            plan,
        )
        output = detector.heads(states[-1], plan)
        value = target.value(output.logits[0, 0], output.boxes[0, 0])
        # Attention that the target does not depend on has no gradient.
        addresses = list(attention.weights)
        inputs = [*attention.weights.values(), *attention.contexts.values()]
        gradients = [
            torch.zeros_like(tensor) if gradient is None else gradient
            for tensor, gradient in zip(
                inputs, torch.autograd.grad(value, inputs, allow_unused=True), strict=True
            )
        ]
    found: dict[str, list[AttentionEvidence]] = {site: [] for site in SITES}
    grad_weights, grad_contexts = gradients[: len(addresses)], gradients[len(addresses) :]
    for address, grad_weight, grad_context in zip(addresses, grad_weights, grad_contexts, strict=True):
        largest_value = attention.values[address].detach().norm(dim=-1).amax(-1)
        scale = grad_context.norm(dim=-1, keepdim=True) * largest_value[..., None, None]
        found[address.site].append(
            AttentionEvidence(attention.weights[address].detach()[0], grad_weight[0], scale[0])
        )
    mask = features.attn_mask
    image = torch.ones(features.tokens.shape[1], dtype=torch.bool) if mask is None else mask.flatten()
    return Evidence(
        tuple(found["encoder_self"]), tuple(found["decoder_self"]), tuple(found["decoder_cross"]), image
    )
