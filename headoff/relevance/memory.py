"""How the engine uses a memory budget: what is stored, and how much is computed together."""

from __future__ import annotations

import torch

from headoff.detr.detector import Detr, Features
from headoff.errors import SettingError
from headoff.relevance.attention_vjp import TEMPORARIES
from headoff.relevance.kernels import Kernels
from headoff.relevance.methods import CamMethod

MEMORY_BUDGET = 2**30
"""Bytes that the engine may use in addition to the model, on devices that do not report free memory."""


def default_memory_budget(device: torch.device) -> int:
    """Bytes: half of the free memory of a CUDA device, including memory that torch has reserved; else
    `MEMORY_BUDGET`.
    """
    if device.type != "cuda":
        return MEMORY_BUDGET
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + reserve) // 2


def chosen_memory_budget(device: torch.device, budget: int | None) -> int:
    """`budget`, or the default for None. Raises SettingError where it is not positive."""
    if budget is None:
        return default_memory_budget(device)
    if budget <= 0:
        raise SettingError(f"a memory budget of {budget} bytes is too small; give a positive number")
    return budget


class MemoryPlan:
    """Sizes and choices that fit into a memory budget.

    Attributes:
        tile: numbers in a tile, see `AttentionVjp` and `FusedVjp`.
        keep_weights: whether the encoder's attention weights are stored, or recomputed tile by tile.
        keep_cams: whether the encoder's cams (N x N per layer and pair) are stored, or recomputed tile by tile.
        configurations_at_once: configurations decoded together.
        pairs_at_once: pairs of (configuration, target) sent back through the decoder together.
        encoder_pairs_at_once: pairs sent back through the encoder together.
    """

    def __init__(
        self, detector: Detr, features: Features, method: CamMethod, kernels: Kernels, budget: int
    ) -> None:
        config = detector.config
        size = torch.promote_types(detector.dtype, torch.float32).itemsize
        tokens, queries, heads = features.tokens.shape[1], config.queries, config.heads
        one_by_one = kernels == "tiles"
        # The encoder's activations, and one layer's gradients of one pair, are needed whatever the budget is.
        remaining = budget - size * tokens * config.encoder_layers * (config.feedforward + 8 * config.width)
        self.tile = int(max(1, remaining // 4 // (TEMPORARIES * size)))
        if not one_by_one:
            remaining -= self.tile * TEMPORARIES * size
        weights = size * heads * tokens**2 * config.encoder_layers
        self.keep_weights = kernels != "triton" and method.encoder is not None and weights <= remaining / 2
        if self.keep_weights:
            remaining -= weights
        states = size * queries * (2 * config.feedforward + 20 * config.width)
        configuration = config.decoder_layers * (states + size * queries * heads * (tokens + queries))
        self.configurations_at_once = int(max(1, min(64, remaining / 2 // configuration)))
        remaining -= self.configurations_at_once * configuration

        pair = size * (config.decoder_layers * queries * (tokens + queries) + tokens * (6 * config.width))
        # On a CPU, as many rows as make a matrix product efficient; on a GPU, as many as there are.
        enough = max(1, 1024 // queries) if one_by_one else 256
        self.pairs_at_once = int(max(1, min(enough, remaining / 2 // pair)))
        remaining -= self.pairs_at_once * pair

        gradients = size * tokens * (config.feedforward + 10 * config.width)
        cams = size * tokens**2 * config.encoder_layers
        self.keep_cams = cams + gradients <= remaining
        pair = gradients + (cams if self.keep_cams else size * tokens * config.width * config.encoder_layers)
        enough = max(1, 1024 // tokens) if one_by_one else 64
        self.encoder_pairs_at_once = int(max(1, min(enough, remaining // pair)))
