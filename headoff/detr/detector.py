"""The detector: pixels to memory, memory to logits and boxes under many gates at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headoff.attention import Attention, resolve_attention
from headoff.detr.backbone import FrozenBatchNorm2d, ResNet
from headoff.detr.config import DetrConfig
from headoff.detr.positions import sine_positions
from headoff.detr.sharing import SharingPlan, sharing_plan
from headoff.detr.transfers import copy_to_device
from headoff.detr.transformer import (
    Attend,
    AttentionCall,
    Decoder,
    Encoder,
    Interceptor,
    Replacement,
    autocast,
)
from headoff.errors import CheckpointError, GateError, ImageError, SettingError
from headoff.gates import Configuration, Gates, HeadLayout, Site, read_configurations, stack
from headoff.images import ImageSource, Preprocessing, preprocess


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


class Memory(Features):
    """Encoder output of B images: `Features` whose tokens have been through the encoder."""


@dataclass(frozen=True)
class DetectorOutput:
    """Class logits and boxes of C configurations and B images.

    Attributes:
        logits: (C, B, Q, classes + 1); the last one is "no object".
        boxes: (C, B, Q, 4), (centre x, centre y, width, height) as fractions of each image without
            its padding.
    """

    logits: Tensor
    boxes: Tensor


class BoxHead(nn.Sequential):
    """Three linear layers, and a sigmoid: (..., d) to (..., 4) in 0..1."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


class Detector(nn.Module):
    """DETR (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020).

    Encoding and decoding are separate: `encode` an image once, and `decode` its memory under many gates.

    Args:
        config: sizes.
        class_names: one per class logit, without "no object"; `class 0`, `class 1`, ... by default.
        attention: the attention callable of all three sites, or its name (`eager`, `sdpa`, `package.module:name`,
            `path/to/file.py:name`).
        norm: normalisation of the backbone; frozen batch norm unless trained from scratch.

    Attributes:
        assumptions: what `load` had to assume because the checkpoint does not say it, a clause each.
    """

    assumptions: tuple[str, ...] = ()
    _attention: Attention
    _interceptors: tuple[Interceptor, ...] = ()
    _replacement: Replacement | None = None

    def __init__(
        self,
        config: DetrConfig,
        class_names: Sequence[str] | None = None,
        *,
        attention: Attention | str = "sdpa",
        norm: Callable[[int], nn.Module] = FrozenBatchNorm2d,
    ) -> None:
        super().__init__()
        self.config = config
        self.class_names = tuple(class_names or (f"class {index}" for index in range(config.classes)))
        if len(self.class_names) != config.classes:
            raise CheckpointError(
                f"{len(self.class_names)} class names were given for a detector of {config.classes} classes; "
                "give one name per class, without 'no object'"
            )
        self.attention = attention
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
    def attention(self) -> Attention:
        """The attention callable of all three sites. Assign a callable or a name to replace it."""
        return self._attention

    @attention.setter
    def attention(self, value: Attention | str) -> None:
        object.__setattr__(self, "_attention", resolve_attention(value))

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers every module that is assigned, bypassing the property: a kernel that is a module would
        # become part of the detector's weights, and never be called.
        if name == "attention":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

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

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> tuple[Tensor, Tensor]:
        """`headoff.preprocess` with this detector's preprocessing, dtype and device.

        Returns:
            Pixel values (B, 3, H, W) in the detector's dtype and pixel mask (B, H, W) bool, both on its device.

        Raises:
            ImageError: as `headoff.preprocess` does.
        """
        return preprocess(images, self.preprocessing, dtype=self.dtype, device=self.device)

    def attend(self, call: AttentionCall) -> Tensor:
        """Compute one attention call of the model: by `attention`, or by the interceptors in front of it."""
        proceed: Attend = self._call_attention
        for interceptor in self._interceptors:
            proceed = partial(interceptor, proceed=proceed)
        return proceed(call)

    def context_of(self, call: AttentionCall) -> Tensor:
        """Compute one attention call, and add what heads that are off contribute (see `replacing`)."""
        context = self.attend(call)
        if self._replacement is None or call.head_gate is None:
            return context
        return context + ((1 - call.head_gate) * self._replacement(call)).to(context.dtype)

    def _call_attention(self, call: AttentionCall) -> Tensor:
        return self._attention(call.query, call.key, call.value, call.attn_mask, head_gate=call.head_gate)

    @contextmanager
    def intercepting(self, interceptor: Interceptor) -> Iterator[None]:
        """Within this context, `interceptor(call, proceed)` computes every attention call of the model.

        `proceed(call)` computes the call as if there were no interceptor. So an interceptor can count calls, record
        their tensors, or change arguments (`call._replace(...)`). With several, the latest is called first.

        Example:
            >>> counts = Counter()
            >>> def count(call, proceed):
            ...     counts[call.address.site] += 1
            ...     return proceed(call)
            >>> with detector.intercepting(count):
            ...     detector.decode(memory)
        """
        self._interceptors = (*self._interceptors, interceptor)
        try:
            yield
        finally:
            self._interceptors = tuple(other for other in self._interceptors if other is not interceptor)

    @property
    def replacement(self) -> Replacement | None:
        """What heads that are off contribute, see `replacing`; None for nothing."""
        return self._replacement

    @contextmanager
    def replacing(self, replacement: Replacement | None) -> Iterator[None]:
        """Within this context, a head with the gate g contributes g A V + (1 - g) r to the output projection.

        `replacement(call)` computes r, broadcastable to the context (B, H, Q, D); None has no effect. It is added
        outside the attention callable and its interceptors, which therefore know nothing of it.
        """
        before = self._replacement
        self._replacement = replacement if replacement is not None else before
        try:
            yield
        finally:
            self._replacement = before

    @property
    def is_intercepted(self) -> bool:
        """Whether an interceptor, or an override of `attend`, comes between the model and `attention`."""
        return bool(self._interceptors) or type(self).attend is not Detector.attend

    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Features:
        """Run backbone and input projection; see `encode` for the arguments."""
        _check_pixels(pixel_values, pixel_mask)
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
            self._check_gate("encoder_self", gate, features.tokens.shape[1])
            (gate,) = copy_to_device([gate], features.tokens.device, features.tokens.dtype)
        tokens = self.encoder(features.tokens, features.positions, self.context_of, features.attn_mask, gate)
        return Memory(tokens, features.positions, features.attn_mask, features.grid)

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, *, gate: Tensor | None = None
    ) -> Memory:
        """Run backbone and encoder: images to memory.

        Args:
            pixel_values: (B, 3, H, W) normalised pixels, padded to one size; see `headoff.images.preprocess`.
            pixel_mask: (B, H, W) bool, True = image, False = padding; None where nothing is padded.
            gate: (encoder layers, N or 1, heads) head gate of the encoder; None = all on.

        Raises:
            ImageError: pixels or mask are of another shape or dtype, an image is all padding, or (looked for on the
                CPU alone, for a GPU would have to wait) a pixel is NaN or infinite.
            GateError: the gate does not fit the encoder.
        """
        return self.encode_features(self.features(pixel_values, pixel_mask), gate)

    def decode(
        self,
        memory: Memory,
        gates: Gates | SharingPlan | Configuration | str | Sequence[Configuration | str] | None = None,
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
            every_layer=False,
        )
        return self.heads(states[-1], plan)

    def plan(self, gates: Gates) -> SharingPlan:
        """The decoder's runs under `gates`, and where they split, on this detector's device.

        Raises:
            GateError: `gates` gates the encoder, whose gate belongs to `encode`, or was made for another layout.
        """
        if gates.encoder_self is not None:
            raise GateError(
                "encoder_self gates have no effect in decode, as the encoder has already run; "
                "pass them to encode, or use headoff.sweep, which does both"
            )
        for site in ("decoder_self", "decoder_cross"):
            if (gate := gates.site(site)) is not None:
                self._check_gate(site, gate[0], self.config.queries)
        plan = sharing_plan(gates.decoder_self, gates.decoder_cross, self.config.decoder_layers, len(gates))
        return plan.to(self.device, self.dtype)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype given to `autocasting`; None where everything is computed in the weights' dtype."""
        return self.encoder.autocast_dtype

    @contextmanager
    def autocasting(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Within this context, backbone, encoder and decoder run under `torch.autocast` to `dtype`; None has no effect.

        Convolutions, linear layers and attention calls are then in `dtype`. The residual stream stays float32, and so
        do class and box heads: they are small, and the 8 bits of a bfloat16 box would be 4 pixels.

        Raises:
            SettingError: `dtype` is neither bfloat16 nor float16, or the weights are not float32.
        """
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise SettingError(f"autocast does not support {dtype}: use torch.bfloat16 or torch.float16")
        if dtype is not None and self.dtype != torch.float32:
            raise SettingError(
                f"autocast needs float32 weights, and this detector's are {self.dtype}: load it in float32, or do "
                "not use autocast"
            )
        before = self.autocast_dtype
        self.encoder.autocast_dtype = self.decoder.autocast_dtype = dtype
        try:
            yield
        finally:
            self.encoder.autocast_dtype = self.decoder.autocast_dtype = before

    def _check_gate(self, site: Site, gate: Tensor, rows: int) -> None:
        # A gate for another detector may broadcast, or have more layers than are read, and give plausible results.
        layers, heads = self.head_layout.layers(site), self.config.heads
        if (
            gate.ndim != 3
            or gate.shape[0] != layers
            or gate.shape[1] not in (1, rows)
            or gate.shape[2] != heads
        ):
            raise GateError(
                f"the {site} gate is of shape {tuple(gate.shape)} and this detector has ({layers}, {rows} or 1, "
                f"{heads}) layers, queries and heads there; stack the configurations for detector.head_layout"
            )

    def heads(self, states: Tensor, plan: SharingPlan | None = None) -> DetectorOutput:
        """Run class and box heads on states (B, runs, Q, d), and copy each run's output to its configurations."""
        logits = self.class_head(states).transpose(0, 1)
        boxes = self.box_head(states).transpose(0, 1)
        if plan is not None:
            (member,) = copy_to_device([plan.member], states.device)
            logits, boxes = logits.index_select(0, member), boxes.index_select(0, member)
        return DetectorOutput(logits, boxes)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DetectorOutput:
        """Encode and decode with all heads on."""
        return self.decode(self.encode(pixel_values, pixel_mask))


def _check_pixels(pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or not pixel_values.is_floating_point():
        raise ImageError(
            f"pixel values are {pixel_values.dtype} of shape {tuple(pixel_values.shape)}, and the detector needs "
            "floating point of shape (B, 3, H, W): use detector.preprocess, or pixel_values[None] for one image"
        )
    if pixel_values.device.type == "cpu" and not pixel_values.isfinite().all():
        raise ImageError("pixel values hold NaN or infinity: look at what they were computed from")
    if pixel_mask is None:
        return
    wanted = (len(pixel_values), *pixel_values.shape[2:])
    if pixel_mask.shape != wanted or pixel_mask.dtype != torch.bool:
        raise ImageError(
            f"the pixel mask is {pixel_mask.dtype} of shape {tuple(pixel_mask.shape)}, and torch.bool of shape "
            f"{wanted} was expected, True = image"
        )
    if not pixel_mask.flatten(1).any(1).all():
        raise ImageError("the pixel mask marks all of an image as padding: True = image")
