"""Runs of the model that tests compare: relevance maps by the dense oracle, and forward passes of gated batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from headoff.calls import Attend, AttentionCall
from headoff.detector import DetectorOutput
from headoff.detr.detector import Detr, Features
from headoff.gates import Configuration, Gates, stack
from headoff.images import ImageSource, load_image
from headoff.relevance import Method, Target, resolve_cam_method
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import AttentionEvidence, Evidence

MEMORY = 2**30
"""Bytes that the activations of one batch may take, about."""


def features_of(detector: Detr, image: ImageSource) -> Features:
    """The image through the backbone."""
    with torch.no_grad():
        pixels, _ = detector.preprocess([load_image(image)])
        return detector.features(pixels)


def forward_batch(detector: Detr, features: Features, gates: Gates) -> tuple[DetectorOutput, Tensor, Tensor]:
    """The model's output under C configurations, as a batch of C copies of one image with a gate each.

    Unlike in a sweep nothing is shared, the encoder neither, so that no configuration's output has a gradient in
    another's activations.

    Args:
        detector: gradients are computed where they are enabled.
        features: of one image.
        gates: C configurations.

    Returns:
        The output, logits (1, C, Q, K + 1) and boxes (1, C, Q, 4); the memory and the tokens (C, N, d) that it was
        computed from.
    """
    count = len(gates)

    def gate_items(call: AttentionCall, proceed: Attend) -> Tensor:
        gate = gates.site(call.address.site)
        if gate is not None:
            gate = gate[:, call.address.layer].transpose(1, 2).unsqueeze(-1).to(call.query)
            call = call._replace(head_gate=gate)
        return proceed(call)

    tokens = features.tokens.expand(count, -1, -1).clone().requires_grad_(torch.is_grad_enabled())
    positions = features.positions.expand(count, -1, -1)
    queries = detector.query_embedding.weight
    with detector.intercepting(gate_items):
        memory = detector.encoder(tokens, positions, detector.attend, features.attn_mask)
        states = detector.decoder(
            queries.new_zeros(count, 1, *queries.shape),
            queries,
            memory,
            positions,
            detector.attend,
            features.attn_mask,
            every_layer=False,
        )
    return detector.heads(states[-1]), memory, tokens


def batches(detector: Detr, features: Features, count: int) -> Iterator[list[int]]:
    """Indices of `count` configurations, as many at a time as `forward_batch` has room for with gradients."""
    config, tokens = detector.config, features.tokens.shape[1]
    weights = (
        3 * config.heads * tokens * (config.encoder_layers * tokens + config.decoder_layers * config.queries)
    )
    hidden = config.encoder_layers * tokens * (2 * config.feedforward + 12 * config.width)
    at_once = max(1, MEMORY // ((weights + hidden) * features.tokens.element_size()))
    for start in range(0, count, at_once):
        yield list(range(start, min(count, start + at_once)))


def dense_maps(
    detector: Detr,
    features: Features,
    configuration: Configuration,
    targets: Sequence[Target],
    method: Method | str = "chefer",
) -> Tensor:
    """Maps (targets, layers, h, w) by the oracle's code, in the detector's dtype.

    One forward and one backward pass per target, eager attention, nothing shared or skipped. The attention runs on the
    detector's device; the rules, which are no part of what may be patched, on the CPU.
    """
    method = resolve_cam_method(method)
    gates = stack([configuration], detector.head_layout)
    maps = []
    for target in targets:
        evidence = _on_cpu(dense_evidence(detector, features, gates, target))
        maps.append(method.dense(evidence).relevance[:, target.query])
    return torch.stack(maps).unflatten(-1, features.grid)


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _on_cpu(evidence: Evidence) -> Evidence:
    def moved(calls: tuple[AttentionEvidence, ...]) -> tuple[AttentionEvidence, ...]:
        return tuple(
            AttentionEvidence(call.weights.cpu(), call.gradient.cpu(), call.scale.cpu()) for call in calls
        )

    return Evidence(
        moved(evidence.encoder),
        moved(evidence.decoder_self),
        moved(evidence.decoder_cross),
        evidence.tokens.cpu(),
    )
