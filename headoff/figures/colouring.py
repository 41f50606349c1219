"""Values from 0 to 1 as colours, for the maps of figures and pages."""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from headoff.choices import SCALES, Scale
from headoff.errors import SettingError, did_you_mean

PLAIN_CMAP = "Blues_r"
"""The colour map of the paper's notebook."""
OVERLAY_CMAP = "inferno"
"""For maps over a grey image: its bright end is visible on dark and on light pixels."""
OPACITY = 0.88
"""Opacity of the greatest relevance over an image; zero relevance is transparent."""


@dataclass(frozen=True)
class MapStyle:
    """How maps are drawn.

    Attributes:
        scale: the maximum of the colour scale: the greatest relevance of the whole `sweep`, of each `object`, or of
            each `map` (whose scale begins at its minimum instead of 0). See `Explanation.scaled`.
        overlay: draw maps over the grey image, with an opacity that grows with relevance, instead of plain maps.
        cmap: name of a matplotlib colour map; None is `Blues_r`, or `inferno` for an overlay.

    Raises:
        SettingError: the scale or the colour map does not exist.
    """

    scale: Scale = "sweep"
    overlay: bool = False
    cmap: str | None = None

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
        """(256, 3) uint8: the colours of the values from 0 to 1."""
        name = self.cmap or (OVERLAY_CMAP if self.overlay else PLAIN_CMAP)
        return (colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def coloured(values: Tensor, style: MapStyle) -> np.ndarray:
    """`values` (h, w) in 0..1 as (h, w, 4) uint8, red, green, blue and opacity."""
    numbers = values.double().clamp(0, 1).numpy()
    # The square root, because faint relevance already has a dark colour, and would be invisible if transparent too.
    opacity = np.sqrt(numbers) * OPACITY if style.overlay else np.ones_like(numbers)
    colours = style.colours[(numbers * 255).round().astype(np.uint8)]
    return np.concatenate([colours, (opacity * 255).round().astype(np.uint8)[..., None]], axis=-1)
