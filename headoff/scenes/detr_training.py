"""Training of the bundled DETR, from scratch.

These make a small DETR learn in about an hour on two cores, in which plain DETR training does not learn at all:

- a dense loss on every encoder token, by the decoder's class and box heads: alone at first, without the decoder, then
  as an auxiliary loss whose weight falls to zero;
- queries that start from noisy true boxes (Li et al., DN-DETR, CVPR 2022), distant ones that must predict "no object"
  (Zhang et al., DINO, ICLR 2023), and a second group of ordinary queries (Chen et al., Group DETR, ICCV 2023). They are
  additional runs of the decoder in training only;
- cross-attention keys that are initialised equal to the queries, so that attention begins by comparing positions;
- small images first, an exponential moving average of the weights, and bfloat16 under autocast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headoff.detector import DetectorOutput
from headoff.detr import Detr, DetrConfig, Memory
from headoff.detr.checkpoints import save_native
from headoff.detr.config import BackboneConfig
from headoff.detr.transformer import DecoderLayer
from headoff.images import Preprocessing
from headoff.scenes.dataset import CLASS_NAMES
from headoff.scenes.losses import Targets, dense_loss, match, set_loss
from headoff.scenes.training import Moment, Recipe, SceneTrainer

SCENE_SIZE = 192

SCENES_CONFIG = DetrConfig(
    backbone=BackboneConfig(block="basic", depths=(1, 1, 2), widths=(32, 64, 128), stem=24),
    width=128,
    heads=8,
    feedforward=256,
    queries=20,
    classes=len(CLASS_NAMES),
    preprocessing=Preprocessing(short_side=SCENE_SIZE, long_side=2 * SCENE_SIZE),
)


@dataclass(frozen=True)
class DetrRecipe(Recipe):
    """The hyperparameters of training.

    Attributes:
        small_size, small_until: side of the images, in pixels, during the first fraction of the steps.
        dense_only_until: fraction of the steps that trains backbone and encoder alone.
        dense_until: fraction of the steps after which the dense loss has a weight of zero.
    """

    steps: int = 7200
    batch: int = 48
    learning_rate: float = 7e-4
    small_size: int = 128
    small_until: float = 0.5
    dense_only_until: float = 0.07
    dense_until: float = 0.8

    written: ClassVar[str] = "scenes.safetensors"

    def rate(self, moment: Moment) -> float:
        """Learning rate: a linear rise, then a cosine over the steps that are left."""
        step = moment.step
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def sides(self, config: DetrConfig) -> set[int]:
        """All sides that the images have, in pixels."""
        return {self.small_size, config.preprocessing.short_side}

    def side(self, config: DetrConfig, moment: Moment) -> int:
        """Side of the images at `moment`, in pixels."""
        return (
            self.small_size
            if moment.step < self.small_until * self.steps
            else config.preprocessing.short_side
        )

    def trainer(self, config: DetrConfig) -> DetrTrainer:
        """A new model with its loss."""
        return DetrTrainer(config)

    def describe(self, config: DetrConfig) -> dict[str, Any]:
        """The sizes of the model."""
        return config.as_dict()

    def dense_weight(self, step: int) -> float:
        """Weight of the dense loss at `step`: 1 while it is the only loss, then falling linearly to 0."""
        progress = step / self.steps
        if progress < self.dense_only_until:
            return 1.0
        return max(0.0, 1 - (progress - self.dense_only_until) / (self.dense_until - self.dense_only_until))


class TrainingQueries(nn.Module):
    """The decoder's runs in training: the real queries, a second group, and noisy true objects."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.second_group = nn.Embedding(config.queries, config.width)
        self.label_content = nn.Embedding(config.classes, config.width)
        self.box_content = nn.Linear(4, config.width)
        self.queries = config.queries

    def forward(
        self, detector: Detr, targets: Targets, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Content and positions (B, 3, Q, d) of the three runs, and the object that each noisy query must find (B, Q).

        Query j < n starts near object j (at most 0.4 of half its size away) and must find it. The others start farther
        from object j modulo n (up to 1.5) and must predict "no object"; their object is -1.
        """
        batch, objects = targets.labels.shape
        slot = torch.arange(self.queries)
        counts = targets.valid.sum(1, keepdim=True)
        owner = slot % counts
        near = slot < counts
        labels = targets.labels.gather(1, owner)
        boxes = targets.boxes.gather(1, owner[..., None].expand(-1, -1, 4))

        uniform = torch.rand(batch, self.queries, 4, generator=generator)
        sign = torch.randint(0, 2, uniform.shape, generator=generator) * 2.0 - 1
        amount = torch.where(near[..., None], 0.4 * uniform, 0.8 + 0.7 * uniform) * sign
        noisy = boxes + amount * boxes[..., [2, 3, 2, 3]] / 2
        noisy = noisy.clamp(0.02, 0.98)
        flip = torch.rand(batch, self.queries, generator=generator) < 0.25
        labels = torch.where(
            flip, torch.randint(0, len(CLASS_NAMES), labels.shape, generator=generator), labels
        )

        device = detector.device
        width = detector.config.width
        positions = _box_positions(noisy[..., :2], width).to(device)
        content = self.label_content(labels.to(device)) + self.box_content(noisy.to(device))
        real = detector.query_embedding.weight.expand(batch, -1, -1)
        second = self.second_group.weight.expand(batch, -1, -1)
        zeros = torch.zeros_like(content)
        assigned_objects = torch.where(near, owner, -1)
        return (
            torch.stack((zeros, zeros, content), 1),
            torch.stack((real, second, positions), 1),
            assigned_objects,
        )


def _box_positions(centres: Tensor, width: int) -> Tensor:
    """The sine embedding of tokens at box centres (..., 2) in 0..1: (..., width)."""
    half = width // 2
    exponent = torch.arange(half).div(2, rounding_mode="floor") * (2 / half)
    angle = centres.flip(-1).unsqueeze(-1) * (2 * math.pi) * 10_000.0**-exponent
    return torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=-1).flatten(-3)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """Attention for training: all heads on, no padding, in the dtype of its inputs.

    The bfloat16 backward pass of torch's fused CPU attention is 15 times slower than this (1.2 s of a 1.9 s step), and
    autocast would compute the softmax, on the largest tensors of the model, in float32.
    """
    assert attn_mask is None and head_gate is None
    with torch.autocast(query.device.type, enabled=False):
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(-1) @ value


class DetrTrainer(SceneTrainer):
    """The detector, with additional runs of its decoder."""

    def __init__(self, config: DetrConfig) -> None:
        super().__init__()
        self.detector = Detr(config, CLASS_NAMES, attention=_attention, norm=nn.BatchNorm2d)
        self.queries = TrainingQueries(config)
        _initialise(self.detector)
        self.detector.backbone.to(memory_format=torch.channels_last)

    @property
    def trained(self) -> Detr:
        """The detector."""
        return self.detector

    def write(self, path: Path) -> None:
        """Write the detector in float16, in headoff's own layout."""
        save_native(self.detector, path)

    def forward(
        self, images: Tensor, targets: Targets, recipe: DetrRecipe, moment: Moment, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss of uint8 images (B, 3, S, S); a dictionary of its parts for the log."""
        step = moment.step
        detector = self.detector
        preprocessing = detector.preprocessing
        mean, std = (torch.tensor(v)[:, None, None] * 255 for v in (preprocessing.mean, preprocessing.std))
        pixels = (
            ((images.float() - mean) / std).to(detector.device).contiguous(memory_format=torch.channels_last)
        )
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16):
            features = detector.features(pixels)
            memory = detector.encode_features(features)
            alone = step < recipe.dense_only_until * recipe.steps
            states = None if alone else self._decode(memory, targets, generator)
            dense = None if recipe.dense_weight(step) == 0 else memory.tokens
        loss = pixels.new_zeros(())
        parts: dict[str, float] = {}
        on_device = Targets(*(t.to(pixels.device) for t in (targets.boxes, targets.labels, targets.valid)))
        if dense is not None:
            dense = dense.float()
            part = dense_loss(detector.class_head(dense), detector.box_head(dense), memory.grid, on_device)
            parts["dense"] = part.item()
            loss = loss + recipe.dense_weight(step) * part
        if states is not None:
            (queries_states, assigned_objects) = states
            output = DetectorOutput(detector.class_head(queries_states), detector.box_head(queries_states))
            # The first two runs: (layers, B, runs, Q, ..) to (sets, B, Q, ..)
            logits, boxes = (
                tensor[:, :, :2].movedim(2, 0).flatten(0, 1) for tensor in (output.logits, output.boxes)
            )
            part = set_loss(logits, boxes, on_device, match(logits, boxes, on_device)) / 2
            known = (
                _denoted_queries(assigned_objects, targets)
                .to(pixels.device)
                .expand(len(output.logits), -1, -1)
            )
            noise_part = set_loss(output.logits[:, :, 2], output.boxes[:, :, 2], on_device, known)
            parts["set"], parts["denoise"] = part.item(), noise_part.item()
            loss = loss + part + 0.5 * noise_part
        return loss, parts

    def _decode(self, memory: Memory, targets: Targets, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        detector = self.detector
        content, positions, assigned_objects = self.queries(detector, targets, generator)
        states = detector.decoder(
            content, positions, memory.tokens, memory.positions, detector.attend, memory.attn_mask
        )
        return states.float(), assigned_objects


def _denoted_queries(assigned_objects: Tensor, targets: Targets) -> Tensor:
    """(B, Q) objects of queries to (B, M) queries of objects."""
    objects = torch.arange(targets.labels.shape[1])
    return (assigned_objects[:, None] == objects[:, None]).int().argmax(-1)


def _initialise(detector: Detr) -> None:
    """Xavier for the transformer, as the reference code; attention that starts by comparing positions."""
    for parameter in (*detector.encoder.parameters(), *detector.decoder.parameters()):
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for layer in detector.decoder.layers:
        assert isinstance(layer, DecoderLayer)
        attention = layer.cross_attention
        attention.key.weight.data.copy_(attention.query.weight.data)
        attention.key.bias.data.copy_(attention.query.bias.data)
    for module in detector.backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
