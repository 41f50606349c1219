"""Images that a detector of transformers has encoded: their memory, and the backbone's features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from headoff.deformable import Shapes
from headoff.family.levels import on_finest_grid, on_level


@dataclass(frozen=True, eq=False)
class FamilyMemory:
    """Encoder output of B images.

    Attributes:
        arguments: what transformers' model gives to its decoder.
        images: B.
        is_padded: whether an image is padded.
        values: tokens, the autocast dtype, and what each deformable cross-attention projects these tokens to under it;
            see `FamilyDetector.prepare`.
    """

    arguments: Mapping[str, Any]
    images: int
    is_padded: bool
    values: tuple[Tensor, torch.dtype | None, Mapping[nn.Module, Tensor]] | None = None

    def __len__(self) -> int:
        return self.images

    def clone(self) -> Self:
        return replace(self, arguments=_cloned(self.arguments), values=None)

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same on a device, floating point numbers in `dtype`."""
        return replace(self, arguments=moved(self.arguments, device, dtype), values=None)


@dataclass(frozen=True, eq=False)
class FamilyFeatures:
    """Backbone features of B images.

    Attributes:
        pixel_values: (B, 3, H, W).
        pixel_mask: (B, H, W) int64, 1 = image; None where nothing is padded.
        backbone: the output of transformers' backbone module.
        shapes: (h, w) of each level of the memory.
        memory: the memory with all heads on, and the attention callables that computed it.
    """

    pixel_values: Tensor
    pixel_mask: Tensor | None
    backbone: Any
    shapes: Shapes
    memory: tuple[FamilyMemory, tuple[Any, Any]]

    def __len__(self) -> int:
        return len(self.pixel_values)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w) of the finest level."""
        return self.shapes[0]

    def to_grid(self, x: Tensor) -> Tensor:
        return on_finest_grid(x, self.shapes)

    @property
    def feature_maps(self) -> list[tuple[Tensor, Tensor]]:
        """The feature maps of the backbone's output (B, channels, h, w), with their masks (B, h, w), True = image."""
        leaves, places = self._feature_maps()
        return [(leaves[place], leaves[place + 1].bool()) for place in places]

    def with_feature_maps(self, maps: Sequence[Tensor]) -> Self:
        """The same with other feature maps (S, channels, h, w) of one image, from which the encoder runs again."""
        leaves, places = self._feature_maps()
        _, structure = pytree.tree_flatten(self.backbone)
        images = len(maps[0])
        leaves = [x.expand(images, *x.shape[1:]) for x in leaves]
        for place, feature_map in zip(places, maps, strict=True):
            leaves[place] = feature_map
        mask = self.pixel_mask
        return replace(
            self,
            pixel_values=self.pixel_values.expand(images, -1, -1, -1),
            pixel_mask=None if mask is None else mask.expand(images, -1, -1),
            backbone=pytree.tree_unflatten(leaves, structure),
            memory=(self.memory[0], (None, None)),
        )

    def _feature_maps(self) -> tuple[list[Any], list[int]]:
        """The tensors of the backbone's output, and the indices of its feature maps, which are before their masks."""
        leaves, _ = pytree.tree_flatten(self.backbone)
        return leaves, [
            index
            for index in range(len(leaves) - 1)
            if leaves[index].ndim == 4 and leaves[index + 1].ndim == 3
        ]

    def filled(self, kept: Tensor, fill: Literal["zero", "mean"]) -> Self:
        """P copies of one image, in which cells of the backbone's maps are replaced by zeros or by the map's mean.

        Args:
            kept: (P, h, w) bool, the cells of the finest level that are not. A coarser cell is replaced in proportion
                to its area.
            fill: by what.
        """

        def change(x: Tensor) -> Tensor:
            if x.ndim != 4:  # a mask
                return x
            share = on_level(kept.to(x), (x.shape[-2], x.shape[-1]))[:, None]
            other = x.mean((-2, -1), keepdim=True) if fill == "mean" else 0.0
            return x * share + other * (1 - share)

        # Maps, with or without masks, and for some models, in a tuple, positions or masks.
        maps, *rest = self.backbone if isinstance(self.backbone, tuple) else (self.backbone,)
        maps = pytree.tree_map_only(Tensor, change, maps)
        backbone = (maps, *rest) if isinstance(self.backbone, tuple) else maps
        return replace(
            self,
            pixel_values=self.pixel_values.expand(len(kept), -1, -1, -1),
            backbone=pytree.tree_map_only(Tensor, lambda x: x.expand(len(kept), *x.shape[1:]), backbone),
            memory=(self.memory[0], (None, None)),
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same on a device, floating point numbers in `dtype`; the encoder runs again where it is asked to."""
        memory, _ = self.memory
        return replace(
            self,
            pixel_values=self.pixel_values.to(device, dtype),
            pixel_mask=moved(self.pixel_mask, device, dtype),
            backbone=moved(self.backbone, device, dtype),
            memory=(memory.to(device, dtype), (None, None)),
        )

    def clone(self) -> Self:
        memory, made_by = self.memory
        return replace(
            self,
            pixel_values=self.pixel_values.clone(),
            pixel_mask=_cloned(self.pixel_mask),
            backbone=_cloned(self.backbone),
            memory=(memory.clone(), made_by),
        )


def moved(values: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Nested values with all tensors on a device, floating point numbers in `dtype`."""
    return pytree.tree_map_only(
        Tensor, lambda x: x.to(device, dtype if x.is_floating_point() else None), values
    )


def _cloned(values: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.clone, values)
