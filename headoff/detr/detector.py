"""headoff's own DETR: pixels to memory, memory to logits and boxes under many gates at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headoff.attention import Attention, sdpa
from headoff.detector import Detector, DetectorOutput, GatesSpec, check_pixels
from headoff.detr.backbone import FrozenBatchNorm2d, ResNet
from headoff.detr.config import DetrConfig
from headoff.detr.positions import sine_positions
from headoff.detr.sharing import SharingPlan, separate_runs, sharing_plan
from headoff.detr.transfers import copy_to_device
from headoff.detr.transformer import Decoder, Encoder, KeysValues
from headoff.devices import autocast
from headoff.gates import Gates, HeadLayout, read_configurations, stack
from headoff.images import Preprocessing


@dataclass(frozen=True)
class Features:
    """Projected backbone features of B images: what the encoder starts from.

    Attributes:
        tokens: (B, N, d), row by row.
        positions: (B, N, d) sine position embedding.
        attn_mask: (B, 1, 1, N) bool, True = image; None when there is no padding, as attention is faster without it.
        grid: (h, w) with h * w = N.
    """

    tokens: Tensor
    positions: Tensor
    attn_mask: Tensor | None
    grid: tuple[int, int]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        return (self.grid,)

    def to_grid(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.grid)

    def filled(self, kept: Tensor, fill: Literal["zero", "mean"]) -> Features:
        """P copies of one image without padding, in which tokens are replaced by zeros or by the mean of all tokens.

        Args:
            kept: (P, h, w) bool, the tokens that are not. Positions stay as they are.
            fill: by what.
        """
        other = self.tokens.mean(1, keepdim=True) if fill == "mean" else self.tokens.new_zeros(())
        tokens = torch.where(kept.flatten(1)[..., None], self.tokens, other)
        return Features(tokens, self.positions.expand(len(kept), -1, -1), None, self.grid)

    def clone(self) -> Self:
        mask = None if self.attn_mask is None else self.attn_mask.clone()
        return type(self)(self.tokens.clone(), self.positions.clone(), mask, self.grid)


@dataclass(frozen=True)
class Memory(Features):
    """Encoder output of B images: `Features` whose tokens have been through the encoder.

    Attributes:
        keys_values: of each decoder layer's cross-attention, see `Detr.prepare`.
    """

    keys_values: tuple[KeysValues, ...] | None = None


class BoxHead(nn.Sequential):
    """Three linear layers, and a sigmoid: (..., d) to (..., 4) in 0..1."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Detr(Detector):
    """DETR (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020).

    Encoding and decoding are separate: `encode` an image once, and `decode` its memory under many gates.

    Args:
        config: sizes.
        class_names: one per class logit, without "no object"; `class 0`, `class 1`, ... by default.
        attention: the attention callable of all three sites, or its name (`eager`, `sdpa`, `package.module:name`,
            `path/to/file.py:name`).
        norm: normalisation of the backbone; frozen batch norm unless trained from scratch.
    """

    def __init__(
        self,
        config: DetrConfig,
        class_names: Sequence[str] | None = None,
        *,
        attention: Attention | str = "sdpa",
        norm: Callable[[int], nn.Module] = FrozenBatchNorm2d,
    ) -> None:
        names = class_names or tuple(f"class {index}" for index in range(config.classes))
        super().__init__(names, config.classes, attention)
        self.config = config
        self.backbone = ResNet(config.backbone, norm)
        self.input_projection = nn.Conv2d(self.backbone.channels, config.width, 1)
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        # As `nn.Embedding` draws it. On the meta device, where nothing is drawn, torch would import its compiler for
        # that, which takes longer than a sweep.
        queries = torch.empty(config.queries, config.width)
        self.query_embedding = nn.Embedding.from_pretrained(queries, freeze=False)
        if not queries.is_meta:
            nn.init.normal_(self.query_embedding.weight)
        self.class_head = nn.Linear(config.width, config.classes + 1)
        self.box_head = BoxHead(config.width)

    @property
    def head_layout(self) -> HeadLayout:
        """The numbers of layers, heads and queries, which determine the shapes of gates."""
        return HeadLayout(
            encoder_layers=self.config.encoder_layers,
            decoder_layers=self.config.decoder_layers,
            heads=self.config.heads,
            queries=self.config.queries,
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """How images become the pixels this detector was trained with."""
        return self.config.preprocessing

    @property
    def device(self) -> torch.device:
        return self.class_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.class_head.weight.dtype

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype given to `autocasting`; None where everything is computed in the weights' dtype."""
        return self.encoder.autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, dtype: torch.dtype | None) -> None:
        self.encoder.autocast_dtype = self.decoder.autocast_dtype = dtype

    def stride(self, features: Features) -> int:
        """Pixels of the resized image per token, along one side."""
        return self.config.backbone.stride

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Features:
        """Run backbone and input projection; see `encode` for the arguments."""
        check_pixels(pixel_values, pixel_mask)
        with autocast(self.device, self.autocast_dtype):
            features = self.backbone(pixel_values.to(self.device, self.dtype))
            projected = self.input_projection(features).to(self.dtype)
        batch, _, height, width = features.shape
        if pixel_mask is None:
            token_mask = torch.ones(batch, height, width, dtype=torch.bool, device=features.device)
            attn_mask = None
        else:
            # Nearest neighbour, as in the reference code: a token belongs to the image if its top left pixel does.
            shrunk = F.interpolate(pixel_mask[:, None].float(), size=(height, width))
            padded = not bool(pixel_mask.all())
            token_mask = shrunk[:, 0].bool().to(features.device)
            attn_mask = token_mask.flatten(1)[:, None, None] if padded else None
        tokens = projected.flatten(2).transpose(1, 2)
        positions = sine_positions(token_mask, self.config.width, self.dtype)
        return Features(tokens, positions, attn_mask, (height, width))

    def encode_features(self, features: Features, gate: Tensor | None = None) -> Memory:
        """Run the encoder; `gate` (encoder layers, N or 1, heads) gates its self-attention."""
        if gate is not None:
            self.check_gate("encoder_self", gate, features.tokens.shape[1])
            (gate,) = copy_to_device([gate], features.tokens.device, features.tokens.dtype)
        tokens = self.encoder(features.tokens, features.positions, self.context_of, features.attn_mask, gate)
        return Memory(tokens, features.positions, features.attn_mask, features.grid)

    def prepare(self, memory: Memory) -> Memory:
        tokens, positions = memory.tokens, memory.positions
        return replace(memory, keys_values=self.decoder.project(tokens, positions))

    def decode(
        self,
        memory: Memory,
        gates: GatesSpec | SharingPlan | None = None,
    ) -> DetectorOutput:
        """Run the decoder and the heads: memory to logits and boxes, under all gates at once.

        The host does not wait for the device: gates are read on the CPU, and copied to a GPU once.

        Args:
            memory: B images.
            gates: C configurations as `Gates`, by themselves or as text (`"first 3"`), or their `plan`, which saves
                planning gates that are decoded again; None for one configuration with all heads on.

        Raises:
            GateError: as `plan` does, or a configuration cannot be read or does not fit the detector.
        """
        states, plan = self._states(memory, gates, every_layer=False)
        return self.heads(states[-1], plan)

    def decode_layers(
        self, memory: Memory, gates: GatesSpec | SharingPlan | None = None
    ) -> tuple[DetectorOutput, ...]:
        states, plan = self._states(memory, gates, every_layer=True)
        return tuple(self.heads(layer, plan) for layer in states)

    def _states(
        self, memory: Memory, gates: GatesSpec | SharingPlan | None, every_layer: bool
    ) -> tuple[Tensor, SharingPlan | None]:
        """The decoder's states (layers or 1, B, runs, Q, d), and the plan of the runs."""
        if gates is not None and not isinstance(gates, Gates | SharingPlan):
            gates = stack(read_configurations(gates), self.head_layout)
        plan = self.plan(gates) if isinstance(gates, Gates) else gates
        positions = self.query_embedding.weight
        states = self.decoder(
            positions.new_zeros(len(memory), 1, *positions.shape),
            positions,
            memory.tokens,
            memory.positions,
            self.context_of,
            memory.attn_mask,
            plan,
            every_layer=every_layer,
            keys_values=memory.keys_values,
            # An attention under test computes all that it is asked for, and interceptors see every run.
            share_attention=self.attention is sdpa and not self.is_intercepted,
        )
        return states, plan

    def plan(self, gates: Gates, *, share: bool = True) -> SharingPlan:
        """The decoder's runs under `gates`, and where they split, on this detector's device; see `Detector.plan`."""
        self.check_decoder_gates(gates)
        make = sharing_plan if share else separate_runs
        plan = make(gates.decoder_self, gates.decoder_cross, self.config.decoder_layers, len(gates))
        return plan.to(self.device, self.dtype)

    def decoder_bytes(self, features: Features) -> int:
        """Bytes of the decoder's activations for one configuration.

        Per query these are the hidden layer of the feed-forward block, a dozen vectors of the model's width, and the
        attention weights of all heads over all tokens, which a fused kernel does not store but a patch may.
        """
        config = self.config
        weights = config.heads * (features.tokens.shape[1] + config.queries)
        numbers = len(features) * config.queries * (config.feedforward + 12 * config.width + weights)
        return numbers * features.tokens.element_size()

    def heads(self, states: Tensor, plan: SharingPlan | None = None) -> DetectorOutput:
        """Run class and box heads on states (B, runs, Q, d), and copy each run's output to its configurations."""
        logits = self.class_head(states).transpose(0, 1)
        boxes = self.box_head(states).transpose(0, 1)
        if plan is not None:
            (member,) = copy_to_device([plan.member], states.device)
            logits, boxes = logits.index_select(0, member), boxes.index_select(0, member)
        return DetectorOutput(logits, boxes)
