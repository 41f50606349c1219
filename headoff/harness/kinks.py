"""Cases that have no answer in low precision: where a ReLU's input cannot be told from zero.

Relevance is made of gradients, and the gradient of a ReLU jumps where its input crosses zero. Where a hidden unit of
the decoder comes nearer to zero than a dtype resolves, implementations that are equally right switch it on or off by
their rounding, and their maps differ by as much as maps of different heads do. Such a case is to be known and left
out: to allow for it would be to allow for anything. (A unit of the encoder is one token's among many: its jump is of
the size of rounding errors.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.detr.detector import Detector, Features
from headoff.detr.transformer import DecoderLayer
from headoff.gates import Configuration, stack


def is_undecided(
    detector: Detector, features: Features, configuration: Configuration, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether a ReLU of the decoder is undecided in `dtype`; `detector` and `features` are to be more precise."""
    return nearest_kink(detector, features, configuration) < resolution_of_hidden_units(detector, dtype)


def resolution_of_hidden_units(detector: Detector, dtype: torch.dtype) -> float:
    """A hidden unit is a sum of `width` products, whose rounding errors add up as a random walk does."""
    return torch.finfo(dtype).eps * detector.config.width**0.5


@torch.no_grad()
def nearest_kink(detector: Detector, features: Features, configuration: Configuration) -> float:
    """The smallest input of any ReLU in the decoder, relative to the root mean square of its row."""
    nearest: list[Tensor] = []

    def look(_module: torch.nn.Module, _inputs: object, hidden: Tensor) -> None:
        scale = hidden.square().mean(-1, keepdim=True).sqrt()
        nearest.append((hidden.abs() / scale).min())

    hooks = []
    for layer in detector.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        hooks.append(layer.feedforward.expand.register_forward_hook(look))
    try:
        detector.decode(detector.encode_features(features), stack([configuration], detector.head_layout))
    finally:
        for hook in hooks:
            hook.remove()
    return float(torch.stack(nearest).min())
