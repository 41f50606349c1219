"""Relevance maps by the dense oracle: the truth in float64, and the measure of rounding errors in anything less."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from headoff.detr.detector import Detector, Features
from headoff.gates import Configuration, stack
from headoff.images import ImageSource, load_image
from headoff.relevance import Method, Target, resolve_method
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import AttentionEvidence, Evidence


def features_of(detector: Detector, image: ImageSource) -> Features:
    """The image through the backbone."""
    with torch.no_grad():
        pixels, _ = detector.preprocess([load_image(image)])
        return detector.features(pixels)


def dense_maps(
    detector: Detector,
    features: Features,
    configuration: Configuration,
    targets: Sequence[Target],
    method: Method | str = "chefer",
) -> Tensor:
    """Maps (targets, layers, h, w) by the oracle's code, in the detector's dtype.

    One forward and one backward pass per target, eager attention, nothing shared or skipped. The attention runs on the
    detector's device; the rules, which are no part of what may be patched, on the CPU.
    """
    method = resolve_method(method)
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
