"""A failure drawn: the boxes expected beside the boxes got, on the image."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from headoff.detections import Detections


def draw_detections(image: Path, expected: Detections, got: Detections, case: str, folder: Path) -> Path:
    """Two panels as PNG, named by the case, in `folder`; returns its path."""
    # Only a failure needs these.
    from headoff.figures.canvas import image_figure
    from headoff.figures.pictures import plot_detections

    figure, panels = image_figure(expected.image_size, 2)
    for axes, what, found in zip(panels, ("expected", "got"), (expected, got), strict=True):
        plot_detections(image, found, axes, title=f"{what}: {len(found)} · {case}")
    path = picture_path(folder, f"{case} boxes")
    figure.savefig(path, dpi=100)
    return path


def picture_path(folder: Path, name: str) -> Path:
    """Where a picture called `name` goes: in `folder`, which is made, or another one where it cannot be.

    A failure is to be reported, not to fail.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="headoff-failures-"))
    return folder / (re.sub(r"[^\w.-]+", "-", name).strip("-") + ".png")
