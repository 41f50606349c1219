"""Pictures of failures: expected and found boxes, expected and found relevance maps."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np

from headoff.detections import Detections
from headoff.files import marked_folder
from headoff.harness.reference.maps import CaseMaps, map_errors, worst_map


def draw_detections(image: Path, expected: Detections, found: Detections, case: str, folder: Path) -> Path:
    """Two panels as PNG in `folder`, named by the case; returns its path."""
    # Only a failure needs these.
    from headoff.figures.canvas import image_figure
    from headoff.figures.pictures import plot_detections

    figure, panels = image_figure(expected.image_size, 2)
    for axes, what, shown in zip(panels, ("expected", "found"), (expected, found), strict=True):
        plot_detections(image, shown, axes, title=f"{what}: {len(shown)} · {case}")
    path = _path(folder, f"{case} boxes")
    figure.savefig(path, dpi=100)
    return path


def draw_maps(expected: CaseMaps, found: CaseMaps, folder: Path) -> Path:
    """The worst map of `found`, expected and found and their difference, as PNG named by the case; returns its path.

    Expected and found have one scale, so that a lost map looks lost; the difference has its own.
    """
    # Only a failure needs these.
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    place = worst_map(expected, found)
    true, got = expected.maps[place], found.maps[place]
    finite = np.where(np.isfinite(got), got, np.nan)
    difference = finite - true
    peak = max(true.max(), np.nanmax(np.abs(finite), initial=0.0)) or 1.0
    error = np.nanmax(np.abs(difference), initial=0.0) or 1.0
    panels = (
        (f"expected, peak {true.max():.3g}", true, "Blues_r", 0.0, peak),
        (f"found, peak {np.nanmax(finite, initial=0.0):.3g}", finite, "Blues_r", 0.0, peak),
        (f"difference, at most {error:.3g}", difference, "RdBu_r", -error, error),
    )
    rows, columns = true.shape
    figure = Figure(figsize=(3 * 3.4, 2.8 * rows / columns + 0.8), layout="constrained")
    figure.suptitle(
        f"{found.case}, by {found.found_by}\n{expected.objects[place[0]]}, after layer {place[1]}: "
        f"off by {map_errors(true, got):.1e} of the peak, allowed {found.tolerance.allowed:.1e}",
        fontsize=9,
    )
    for axes, (title, values, colours, low, high) in zip(figure.subplots(1, 3), panels, strict=True):
        marked = colormaps[colours].with_extremes(bad="#CC3311")  # NaN and infinity
        image = axes.imshow(values, cmap=marked, vmin=low, vmax=high)
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    path = _path(folder, f"{found.case} {found.found_by}")
    figure.savefig(path, dpi=100)
    return path


def _path(folder: Path, name: str) -> Path:
    """Where a picture called `name` goes: into `folder`, or a temporary one if that cannot be made.

    A test that reports a failure should not fail for another reason.
    """
    try:
        marked_folder(folder)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="headoff-failures-"))
    return folder / (re.sub(r"[^\w.-]+", "-", name).strip("-") + ".png")
