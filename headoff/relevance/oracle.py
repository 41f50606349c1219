"""Weights and gradients of every attention by plain autograd, the input of `headoff.relevance.rules`.

One configuration and one target per forward and backward pass, without sharing or skipping. For float64 and small
models.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from headoff.calls import Attend, AttentionAddress, Call, DeformableCall
from headoff.deformable import grid_sample_attention
from headoff.detector import Detector
from headoff.gates import SITES, Gates
from headoff.relevance.rules import AttentionEvidence, Evidence
from headoff.relevance.targets import Target


class _DenseAttention:
    """An interceptor: eager attention that records weights after the gate (1, H, Q, S), values and contexts, for
    autograd.
    """

    def __init__(self) -> None:
        self.weights: dict[AttentionAddress, Tensor] = {}
        self.values: dict[AttentionAddress, Tensor] = {}
        self.contexts: dict[AttentionAddress, Tensor] = {}
        self.keys: dict[AttentionAddress, Tensor | None] = {}

    def __call__(self, call: Call, proceed: Attend) -> Tensor:
        weights = _sampled_weights(call) if isinstance(call, DeformableCall) else _weights(call)
        if call.head_gate is not None:
            weights = weights * call.head_gate.to(weights)
        # With frozen parameters, the first self-attention of the decoder depends on nothing that requires a gradient.
        weights = weights if weights.requires_grad else weights.detach().requires_grad_()
        address = call.address
        self.keys[address] = call.attn_mask
        self.weights[address], self.values[address] = weights, call.value
        self.contexts[address] = weights @ call.value
        return self.contexts[address]


def _weights(call: Any) -> Tensor:
    scores = call.query @ call.key.transpose(-2, -1) / math.sqrt(call.query.shape[-1])
    if call.attn_mask is not None:
        scores = scores.masked_fill(~call.attn_mask, -math.inf)
    return scores.softmax(-1)


def _sampled_weights(call: DeformableCall) -> Tensor:
    """The dense equivalent (1, H, Q, S) of deformable attention: its context where every token is a unit vector."""
    heads, tokens = call.value.shape[1:3]
    unit = torch.eye(tokens, dtype=call.value.dtype)[None, :, None].expand(1, -1, heads, -1)
    return grid_sample_attention(unit, call.spatial_shapes, call.locations, call.weights).transpose(1, 2)


def dense_evidence(detector: Detector, features: Any, gates: Gates | None, target: Target) -> Evidence:
    """Weights and gradients of every attention, for one image, one configuration (`gates` of length 1) and a target.

    The encoder's are left out where relevance does not go through it.
    """
    attention = _DenseAttention()
    decoder_gates = (
        None if gates is None else Gates(gates.names, None, gates.decoder_self, gates.decoder_cross)
    )
    encoder_gate = None if gates is None or gates.encoder_self is None else gates.encoder_self[0]
    with torch.enable_grad(), detector.intercepting(attention):
        memory = detector.encode_features(features.clone(), encoder_gate)
        output = detector.decode(memory, decoder_gates)
        value = target.value(output.logits[0, 0], output.boxes[0, 0])
        # Attention that the target does not depend on has no gradient.
        addresses = [
            address
            for address in attention.weights
            if detector.encoder_is_attention or address.site != "encoder_self"
        ]
        inputs = [
            tensors[address] for tensors in (attention.weights, attention.contexts) for address in addresses
        ]
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
    cross = AttentionAddress("decoder_cross", 0)
    mask = attention.keys[cross]
    tokens = attention.values[cross].shape[2]
    image = torch.ones(tokens, dtype=torch.bool) if mask is None else mask.flatten()
    return Evidence(
        tuple(found["encoder_self"]), tuple(found["decoder_self"]), tuple(found["decoder_cross"]), image
    )
