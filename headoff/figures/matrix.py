"""Matrices of signed numbers in diverging colours, as of layers x heads."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_hex
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from headoff.figures.canvas import figure_of
from headoff.figures.chart_axes import draw_cells, without_frame
from headoff.figures.palette import INK, MUTED

COLOURS = ListedColormap(colormaps["RdBu"](np.linspace(0.14, 0.86, 101)))
"""Red below zero, blue above, near white at zero: distinct in protanopia and deuteranopia too. The darkest colours are
left out, as frames would not be visible on them."""
_MOST_NUMBERED = 32


def colour(value: float, limit: float) -> str:
    """The colour of a value on the scale from -`limit` to `limit`."""
    return to_hex(COLOURS(0.5 + 0.5 * value / limit))


def signed(value: float, decimals: int = 2) -> str:
    """`−0.93`, `+0.02`."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def draw_matrix(
    ax: Axes, values: np.ndarray, limit: float, *, rows: Sequence[object], columns: Sequence[object]
) -> None:
    """Cells of `values` (rows, columns), and names of rows and columns; of very many, not all are named."""
    draw_values(ax, values, limit)
    for axis, names in ((ax.xaxis, columns), (ax.yaxis, rows)):
        every = -(-len(names) // _MOST_NUMBERED)
        axis.set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])


def draw_values(ax: Axes, values: np.ndarray, limit: float) -> None:
    """Cells of `values` (rows, columns)."""
    rows, columns = values.shape
    draw_cells(ax, [(c, r, colour(float(values[r, c]), limit)) for r, c in np.ndindex(rows, columns)])
    without_frame(ax)
    ax.set_xlim(-0.55, columns - 0.45)
    ax.set_ylim(rows - 0.45, -0.55)


def hue_handles(below: str, above: str) -> list[Patch | Line2D]:
    """Legend entries of what the two colours mean."""
    return [
        Patch(facecolor=to_hex(COLOURS(0.1)), label=below),
        Patch(facecolor=to_hex(COLOURS(0.9)), label=above),
    ]


def text_handle(label: str) -> Line2D:
    """A legend entry without a symbol."""
    return Line2D([], [], linestyle="none", label=label)


def colour_bar(axes: Axes | np.ndarray, limit: float, label: str) -> None:
    """The colour scale beside one or several axes."""
    first = axes if isinstance(axes, Axes) else axes.flat[0]
    scale = ScalarMappable(Normalize(-limit, limit), COLOURS)
    bar = figure_of(first).colorbar(scale, ax=axes, aspect=14, pad=0.02, fraction=0.05)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=7)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}".replace("-", "−"))
    bar.set_label(label, color=INK, fontsize=8)
