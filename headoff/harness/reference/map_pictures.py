"""A failure drawn: expected | got | difference of the map that is wrong most."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from headoff.harness.reference.box_pictures import picture_path
from headoff.harness.reference.maps import CaseMaps, map_errors, worst_map


def write_triptych(expected: CaseMaps, found: CaseMaps, folder: Path) -> Path:
    """Draw the worst map of `found` into `folder`, as PNG named by the case; returns its path.

    Both maps have one scale, so that a lost map looks lost; the difference has its own, both signs alike.
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
        (f"got, peak {np.nanmax(finite, initial=0.0):.3g}", finite, "Blues_r", 0.0, peak),
        (f"difference, at most {error:.3g}", difference, "RdBu_r", -error, error),
    )
    rows, columns = true.shape
    figure = Figure(figsize=(3 * 3.4, 2.8 * rows / columns + 0.8), layout="constrained")
    relative = map_errors(true, got)
    figure.suptitle(
        f"{found.case}, by {found.found_by}\n{expected.objects[place[0]]}, after layer {place[1]}: "
        f"off by {relative:.1e} of the peak, allowed {found.budget.allowed:.1e}",
        fontsize=9,
    )
    for axes, (title, values, colours, low, high) in zip(figure.subplots(1, 3), panels, strict=True):
        marked = colormaps[colours].with_extremes(bad="#CC3311")  # NaN and infinity
        image = axes.imshow(values, cmap=marked, vmin=low, vmax=high)
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
    path = picture_path(folder, f"{found.case} {found.found_by}")
    figure.savefig(path, dpi=100)
    return path
