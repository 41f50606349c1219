"""Boxes as refinements of reference points."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def refined(model: Any, offsets: Tensor, references: Tensor) -> Tensor:
    """The sigmoid of `offsets` (..., 4) added to the logits of reference points or boxes (..., 2 or 4)."""
    # The inverse of the sigmoid is that of the model's module: types differ in where they clamp.
    logits = sys.modules[type(model).__module__].inverse_sigmoid(references)
    known = logits.shape[-1]
    return torch.cat((offsets[..., :known] + logits, offsets[..., known:]), -1).sigmoid()
