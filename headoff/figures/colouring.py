"""Numbers from 0 to 1 to colours: the one rule by which figures and page draw maps."""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from torch import Tensor

from headoff.choices import SCALES, Scale
from headoff.errors import SettingError, did_you_mean

PLAIN_CMAP = "Blues_r"
"""As the notebook of the paper draws maps."""
OVERLAY_CMAP = "inferno"
"""Over an image in grey: its bright end is seen on dark and on light."""
OPACITY = 0.88
"""Of the greatest relevance on an image; none hides nothing."""


@dataclass(frozen=True)
class MapStyle:
    """How maps are drawn.

    - `scale`: what full colour stands for: the greatest relevance of the whole `sweep`, of each `object`, or of each
      `map` (which starts from its own least instead of from 0). See `Explanation.scaled`
    - `overlay`: on the image in grey, the more opaque the more relevance; a plain map otherwise
    - `cmap`: name of a matplotlib colour map; None stands for `Blues_r`, on an image for `inferno`

    Raises SettingError for a scale or a colour map that does not exist.
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
        """(256, 3) uint8: the colours from 0 to 1."""
        name = self.cmap or (OVERLAY_CMAP if self.overlay else PLAIN_CMAP)
        return (colormaps[name](np.linspace(0, 1, 256))[:, :3] * 255).round().astype(np.uint8)


def coloured(values: Tensor, style: MapStyle) -> np.ndarray:
    """`values` (h, w) in 0..1 as (h, w, 4) uint8, red, green, blue and opacity."""
    numbers = values.double().clamp(0, 1).numpy()
    # The root, for what is faint is of a dark colour already: both together would hide it.
    opacity = np.sqrt(numbers) * OPACITY if style.overlay else np.ones_like(numbers)
    colours = style.colours[(numbers * 255).round().astype(np.uint8)]
    return np.concatenate([colours, (opacity * 255).round().astype(np.uint8)[..., None]], axis=-1)
