"""What every detector of the DETR family does: encode an image once, and decode it under many gates.

`headoff.detr.Detr` is headoff's own DETR; `headoff.family.FamilyDetector` wraps models of transformers. Everything else
works on a `Detector` and does not ask which model it is.

Shapes: B images, C configurations, Q object queries, H heads, S keys, D channels of a head.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn

from headoff.attention import Attention, resolve_attention
from headoff.calls import Attend, AttentionCall, Call, DeformableCall, Interceptor, Replacement, Split
from headoff.deformable import (
    DeformableAttention,
    Shapes,
    plain_deformable_attention,
    resolve_deformable_attention,
)
from headoff.errors import AttentionError, CheckpointError, GateError, ImageError, SettingError
from headoff.gates import Configuration, Gates, HeadLayout, Site
from headoff.images import ImageSource, Preprocessing, preprocess
from headoff.scoring import SOFTMAX, Scoring


class Features(Protocol):
    """What the encoder starts from, for B images.

    Attributes:
        grid: (h, w) of the maps that evidence is drawn on.
    """

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def shapes(self) -> Shapes:
        """(h, w) of each level of the memory."""
        ...

    def __len__(self) -> int: ...

    def to_grid(self, x: Tensor) -> Tensor:
        """Numbers of the memory's tokens (..., N) as maps (..., h, w), whose sums are the same."""
        ...

    def clone(self) -> Self:
        """The same with tensors of its own, which autograd can save even if these were made in inference mode."""
        ...


@dataclass(frozen=True)
class DetectorOutput:
    """Class logits and boxes of C configurations and B images.

    Attributes:
        logits: (C, B, Q, columns), see `Detector.scoring`.
        boxes: (C, B, Q, 4), (centre x, centre y, width, height) as fractions of each image without
            its padding.
    """

    logits: Tensor
    boxes: Tensor


class Detector(nn.Module):
    """A detector whose attention heads can be gated.

    Args:
        class_names: one per class logit, without "no object".
        attention: the attention callable of all dense sites, or its name (`eager`, `sdpa`, `package.module:name`,
            `path/to/file.py:name`).

    Attributes:
        encoder_is_attention: whether the encoder is attention from memory tokens to memory tokens, so that relevance
            goes through it. Otherwise relevance ends at the memory tokens.
        assumptions: what `load` had to assume because the checkpoint does not say it, a clause each.
        autocast_dtype: the dtype given to `autocasting`; None where everything is computed in the weights' dtype.
    """

    assumptions: tuple[str, ...] = ()
    encoder_is_attention: bool = True
    autocast_dtype: torch.dtype | None = None
    _attention: Attention
    _deformable_attention: DeformableAttention = staticmethod(plain_deformable_attention)
    _interceptors: tuple[Interceptor, ...] = ()
    _replacement: Replacement | None = None

    def __init__(self, class_names: Sequence[str], classes: int, attention: Attention | str) -> None:
        super().__init__()
        self.class_names = tuple(class_names)
        if len(self.class_names) != classes:
            raise CheckpointError(
                f"{len(self.class_names)} class names were given for a detector of {classes} classes; "
                "give one name per class, without 'no object'"
            )
        self.attention = attention

    @property
    def attention(self) -> Attention:
        """The attention callable of all dense sites. Assign a callable or a name to replace it."""
        return self._attention

    @attention.setter
    def attention(self, value: Attention | str) -> None:
        object.__setattr__(self, "_attention", resolve_attention(value))

    @property
    def deformable_attention(self) -> DeformableAttention:
        """The callable of all deformable sites. Assign a callable or a name to replace it."""
        return self._deformable_attention

    @deformable_attention.setter
    def deformable_attention(self, value: DeformableAttention | str) -> None:
        object.__setattr__(self, "_deformable_attention", resolve_deformable_attention(value))

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module registers every module that is assigned, bypassing the property: a kernel that is a module would
        # become part of the detector's weights, and never be called.
        if name in ("attention", "deformable_attention"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    @property
    @abstractmethod
    def head_layout(self) -> HeadLayout:
        """The numbers of layers, heads and queries, which determine the shapes of gates."""

    @property
    @abstractmethod
    def preprocessing(self) -> Preprocessing:
        """How images become the pixels this detector was trained with."""

    @property
    def scoring(self) -> Scoring:
        """How scores are computed from class logits."""
        return SOFTMAX

    @abstractmethod
    def stride(self, features: Any) -> int:
        """Pixels of the resized image per cell of a map of `features`, along one side."""

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""

    @abstractmethod
    def features(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> Any:
        """Run what comes before the encoder, which no gate changes: images to `Features`. See `encode`."""

    @abstractmethod
    def encode_features(self, features: Any, gate: Tensor | None = None) -> Any:
        """Run the encoder: `Features` to a memory. `gate` (encoder layers, N or 1, heads) gates its self-attention."""

    def prepare(self, memory: Any) -> Any:
        """The memory with what every decode of it would compute again, while weights and autocast stay the same."""
        return memory

    @abstractmethod
    def decode(
        self,
        memory: Any,
        gates: Any = None,
    ) -> DetectorOutput:
        """Run the decoder and the heads: memory to logits and boxes, under all gates at once.

        Args:
            memory: B images.
            gates: C configurations as `Gates`, by themselves or as text (`"first 3"`), or their `plan`, which saves
                planning gates that are decoded again; None for one configuration with all heads on.

        Raises:
            GateError: as `plan` does, or a configuration cannot be read or does not fit the detector.
        """

    def decode_layers(self, memory: Any, gates: Any = None) -> tuple[DetectorOutput, ...]:
        """What class and box heads give after each decoder layer, the last of which is `decode(memory, gates)`.

        A detector whose heads are only ever applied to the last layer gives that output for every layer.
        """
        return (self.decode(memory, gates),) * self.head_layout.decoder_layers

    @abstractmethod
    def plan(self, gates: Gates, *, share: bool = True) -> Any:
        """What `decode` needs to know of `gates`, on the detector's device.

        Args:
            gates: of decoder sites.
            share: whether configurations share layers in which their gates agree. Without it the gradients of a run
                are those of one configuration.

        Raises:
            GateError: `gates` gates the encoder, whose gate belongs to `encode`, or was made for another layout.
        """

    @abstractmethod
    def decoder_bytes(self, features: Any) -> int:
        """About how many bytes the decoder's activations take for one configuration of the images in `features`."""

    def preprocess(self, images: ImageSource | Sequence[ImageSource]) -> tuple[Tensor, Tensor]:
        """`headoff.preprocess` with this detector's preprocessing, dtype and device.

        Returns:
            Pixel values (B, 3, H, W) in the detector's dtype and pixel mask (B, H, W) bool, both on its device.

        Raises:
            ImageError: as `headoff.preprocess` does.
        """
        return preprocess(images, self.preprocessing, dtype=self.dtype, device=self.device)

    def encode(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None, *, gate: Tensor | None = None
    ) -> Any:
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

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> DetectorOutput:
        """Encode and decode with all heads on."""
        return self.decode(self.encode(pixel_values, pixel_mask))

    def attend(self, call: Call) -> Tensor:
        """Compute one attention call of the model: by `attention`, or by the interceptors in front of it."""
        proceed: Attend = self._call_attention
        for interceptor in self._interceptors:
            proceed = partial(interceptor, proceed=proceed)
        return proceed(call)

    def context_of(self, call: Call, split: Split | None = None) -> Tensor:
        """Compute one attention call, and add what heads that are off contribute (see `replacing`).

        Args:
            call: the call.
            split: for runs that differ in the gates of this call, and in nothing before: the call has the rows of the
                runs before they split, which are attended without gates; its gate, and the context, have those after.
        """
        gate = call.head_gate
        if split is None or gate is None:
            context = self.attend(call)
        else:
            context = split(self.attend(call._replace(head_gate=None))) * gate
        if self._replacement is None or gate is None:
            return context
        replacement = self._replacement(call)
        if split is not None:
            assert isinstance(call, AttentionCall)
            replacement = split(replacement.expand(len(call.query), -1, call.rows, -1))
        return context + ((1 - gate) * replacement).to(context.dtype)

    def _call_attention(self, call: Call) -> Tensor:
        if isinstance(call, DeformableCall):
            gate = None if call.head_gate is None else call.head_gate.transpose(1, 2)
            value = call.value.transpose(1, 2)
            context = self._deformable_attention(
                value, call.spatial_shapes, call.locations, call.weights, head_gate=gate
            )
            return _checked(context, call.weights.shape[:3] + call.value.shape[-1:]).transpose(1, 2)
        context = self._attention(call.query, call.key, call.value, call.attn_mask, head_gate=call.head_gate)
        return _checked(context, (*call.query.shape[:-1], call.value.shape[-1]))

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

    @contextmanager
    def autocasting(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Within this context, backbone, encoder and decoder run under `torch.autocast` to `dtype`; None has no effect.

        Convolutions, linear layers and attention calls are then in `dtype`. What comes after the decoder stays
        float32: it is small, and the 8 bits of a bfloat16 box would be 4 pixels.

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
        self.autocast_dtype = dtype
        try:
            yield
        finally:
            self.autocast_dtype = before

    def check_decoder_gates(self, gates: Gates) -> None:
        """Raise GateError unless `gates` are of decoder sites and of this detector's layout."""
        if gates.encoder_self is not None:
            raise GateError(
                "encoder_self gates have no effect in decode, as the encoder has already run; "
                "pass them to encode, or use headoff.sweep, which does both"
            )
        for site in ("decoder_self", "decoder_cross"):
            if (gate := gates.site(site)) is not None:
                self.check_gate(site, gate[0], self.head_layout.queries)

    def check_gate(self, site: Site, gate: Tensor, rows: int) -> None:
        """Raise GateError unless `gate` is (layers, rows or 1, heads) of `site`."""
        # A gate for another detector may broadcast, or have more layers than are read, and give plausible results.
        layers, heads = self.head_layout.layers(site), self.head_layout.heads_at(site)
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


GatesSpec = Gates | Configuration | str | Sequence[Configuration | str]
"""Configurations as `Detector.decode` takes them."""


def _checked(context: Tensor, shape: Sequence[int]) -> Tensor:
    """What an attention callable returned; it must be a context of this shape."""
    if not isinstance(context, Tensor) or context.shape != torch.Size(shape):
        got = (
            f"a context of shape {tuple(context.shape)}"
            if isinstance(context, Tensor)
            else repr(context)[:80]
        )
        raise AttentionError(f"the attention returned {got}: it must return one of shape {tuple(shape)}")
    return context


def check_pixels(pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
    """Raise ImageError unless the arguments are those of `Detector.encode`."""
    for given in (pixel_values, pixel_mask):
        if given is not None and not isinstance(given, Tensor) or given is pixel_values is None:
            raise ImageError(
                f"pixel values and their mask are tensors, and a {type(given).__name__} is not: use detector.preprocess"
            )
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
