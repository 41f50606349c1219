"""Held-out scenes in the place of files: `scenes:N` and `scenes:N:FIRST` on a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from headoff.detector import Detector
from headoff.errors import SettingError

MOST_SCENES = 1_000_000
LARGEST_SIDE = 4096
"""Side in pixels of the largest scene: one of 100,000 pixels would need more memory than there is."""
_PATTERN = re.compile(r"scenes:(\d+)(?::(\d+))?")


@dataclass(frozen=True)
class HeldOutScenes:
    """Scenes of the held-out split, in the size that a detector takes.

    Attributes:
        count: how many.
        first: seed of the first; the others follow.
        side: pixels of each side.
    """

    count: int
    first: int
    side: int


def held_out_scenes(text: str, detector: Detector) -> HeldOutScenes | None:
    """The scenes that `scenes:N` or `scenes:N:FIRST` names; None for a text that does not begin with `scenes:`.

    Raises:
        SettingError: it names no scenes, or too many; the detector has other classes, or takes scenes that are too
            large to draw.
    """
    from headoff.scenes.dataset import CLASS_NAMES

    if not text.startswith("scenes:"):
        return None
    match = _PATTERN.fullmatch(text)
    count, first = (int(match[1]), int(match[2] or 0)) if match else (0, 0)
    if not 1 <= count <= MOST_SCENES or first > MOST_SCENES:
        raise SettingError(
            f"{text!r} names no scenes: give scenes:N or scenes:N:FIRST, such as scenes:100 or scenes:100:5000, up to "
            f"{MOST_SCENES:,}"
        )
    if detector.class_names != CLASS_NAMES:
        raise SettingError(
            "held-out scenes suit only a detector trained on scenes, such as `scenes`; this one knows "
            f"{len(detector.class_names)} other classes: give images and their annotations"
        )
    side, _ = detector.preprocessing.resized_size(1, 1)  # scenes are square
    if side > LARGEST_SIDE:
        raise SettingError(
            f"scenes of {side} x {side} pixels are too large: give a short side of at most {LARGEST_SIDE} "
            "(--short-side)"
        )
    return HeldOutScenes(count, first, side)
