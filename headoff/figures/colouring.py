"""Values from 0 to 1 as colours, for the maps of figures and pages."""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from headoff.choices import SCALES, Scale
from headoff.errors import SettingError, did_you_mean

PLAIN_CMAP = "Blues_r"
"""The colour map of the paper's notebook."""
OVERLAY_CMAP = "inferno"
"""For maps on an image, whose colours are subdued: its bright end differs from all of them."""
_DARKEST = 0.32
"""Where `inferno` begins on an image: what is black there would look like a shadow."""
OPACITY = 0.9
"""Greatest opacity of a map on an image."""
_OPAQUE, _FAINT = 0.4, 0.015
"""The value from which a map on an image has its greatest opacity, and below which it is transparent."""
_SATURATION, _BRIGHTNESS = 0.12, 0.7
"""What is left of an image's colours and brightness under a map."""
SMOOTHING = 8
"""A smooth map has this many times the rows and columns."""


@dataclass(frozen=True)
class MapStyle:
    """How maps are drawn.

    Attributes:
        scale: the maximum of the colour scale: the greatest relevance of each `object` over configurations and layers,
            of the whole `sweep`, or of each `map` (whose scale begins at its minimum instead of 0). See
            `Explanation.scaled`.
        overlay: draw maps on the image, whose colours are subdued, with an opacity that grows with relevance; False
            draws them alone.
        cmap: name of a matplotlib colour map; None is `inferno` on the image, else `Blues_r`.
        smooth: interpolate between tokens. The cells of a map that is not smooth are the tokens.

    Raises:
        SettingError: the scale or the colour map does not exist.
    """

    scale: Scale = "object"
    overlay: bool = True
    cmap: str | None = None
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise SettingError(f"maps cannot be scaled per {self.scale!r}: use one of {', '.join(SCALES)}")
        if self.cmap is not None and self.cmap not in colormaps:
            hint = did_you_mean(self.cmap, colormaps)
            raise SettingError(
                f"there is no colour map {self.cmap!r}{hint}: name one of matplotlib's, such as Blues_r or magma"
            )

    @property
    def colours(self) -> np.ndarray:
        """(256, 4) uint8: red, green, blue and opacity of the values from 0 to 1."""
        values = np.linspace(0, 1, 256)
        name = self.cmap or (OVERLAY_CMAP if self.overlay else PLAIN_CMAP)
        darkest = _DARKEST if self.overlay and self.cmap is None else 0.0
        table = colormaps[name](darkest + (1 - darkest) * values)
        if self.overlay:
            table[:, 3] = OPACITY * np.minimum(values / _OPAQUE, 1) ** 0.75 * (values >= _FAINT)
        return (table * 255).round().astype(np.uint8)


def coloured(values: Tensor, style: MapStyle) -> np.ndarray:
    """`values` (h, w) in 0..1 as (h, w, 4) uint8, red, green, blue and opacity; larger if the style is smooth."""
    values = values.double()
    if style.smooth:
        values = interpolate(values[None, None], scale_factor=SMOOTHING, mode="bilinear")[0, 0]
    return style.colours[(values.clamp(0, 1) * 255).round().int().numpy()]


def subdued(picture: Image.Image) -> np.ndarray:
    """The pixels of an image with less colour and light, to draw a map on."""
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    pixels = grey + _SATURATION * (np.asarray(picture.convert("RGB"), np.float32) - grey)
    return (pixels * _BRIGHTNESS).round().clip(0, 255).astype(np.uint8)


def subdued_css() -> str:
    """The same as a CSS filter."""
    return f"saturate({_SATURATION}) brightness({_BRIGHTNESS})"
