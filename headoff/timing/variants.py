"""A detector again: with another attention, or in another dtype."""

from __future__ import annotations

import copy

import torch

from headoff.attention import Attention
from headoff.detr.detector import Detector


def with_attention(detector: Detector, attention: Attention | str) -> Detector:
    """The same weights, not copied, and another attention."""
    # A shallow copy has the same modules and parameters; the attention is neither, so that each copy has its own.
    other = copy.copy(detector)
    other.attention = attention
    return other


def in_dtype(detector: Detector, dtype: torch.dtype) -> Detector:
    """A copy whose weights are in `dtype`."""
    return copy.deepcopy(detector).to(dtype)
