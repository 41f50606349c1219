"""The sizes that determine a detector's architecture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from headoff.errors import CheckpointError
from headoff.images import Preprocessing


@dataclass(frozen=True)
class BackboneConfig:
    """A torchvision-style ResNet. The defaults are ResNet-50.

    Attributes:
        block: residual block, `basic` (two 3x3 convolutions) or `bottleneck` (1x1, 3x3, 1x1; 4 times as wide).
        depths: residual blocks per stage; each stage after the first halves the resolution.
        widths: channels per stage, before a bottleneck's expansion.
        stem: channels of the 7x7 stem.
        dilate_last: the last stage does not halve the resolution, and is dilated instead (DC5).
    """

    block: Literal["basic", "bottleneck"] = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: int = 64
    dilate_last: bool = False

    @property
    def stride(self) -> int:
        """Pixels of the image per token, along one side: 32 for a four-stage ResNet, 16 for its DC5 variant."""
        return 4 * 2 ** (len(self.depths) - 1 - self.dilate_last)


@dataclass(frozen=True)
class DetrConfig:
    """Sizes of a DETR (Carion et al., ECCV 2020). The defaults are the published `detr-resnet-50`.

    Attributes:
        backbone: the ResNet.
        width: channels of the transformer (d_model).
        heads: heads of every attention; `width` is a multiple of it.
        encoder_layers, decoder_layers: depth of the two stacks.
        feedforward: hidden channels of the feed-forward blocks.
        queries: object queries.
        classes: class logits without "no object" (91 for COCO: ids 0-90, with gaps).
        pre_norm: layer norm before each block instead of after it.
        preprocessing: size and normalisation of the images that the weights were trained with.
    """

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    width: int = 256
    heads: int = 8
    encoder_layers: int = 6
    decoder_layers: int = 6
    feedforward: int = 2048
    queries: int = 100
    classes: int = 91
    pre_norm: bool = False
    preprocessing: Preprocessing = field(default_factory=Preprocessing)

    def __post_init__(self) -> None:
        if self.heads < 1 or self.width % self.heads:
            raise CheckpointError(
                f"a transformer of width {self.width} cannot be split into {self.heads} heads; "
                f"give a number of heads that divides {self.width}"
            )

    def as_dict(self) -> dict[str, Any]:
        """The sizes as nested dicts, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DetrConfig:
        """The inverse of `as_dict`.

        Raises:
            CheckpointError: a field is unknown or missing.
        """
        try:
            values = dict(values)
            backbone = dict(values.pop("backbone"))
            for name in ("depths", "widths"):
                backbone[name] = tuple(backbone[name])
            preprocessing = dict(values.pop("preprocessing"))
            for name in ("mean", "std", "size"):
                if preprocessing.get(name) is not None:
                    preprocessing[name] = tuple(preprocessing[name])
            return cls(
                backbone=BackboneConfig(**backbone), preprocessing=Preprocessing(**preprocessing), **values
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the detector configuration in the checkpoint cannot be read ({error}); "
                "write the checkpoint again with this version of headoff"
            ) from error
