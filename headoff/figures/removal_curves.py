"""How many heads can go: a value over the number of heads off, for an order by importance and for others."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from headoff.figures.canvas import figure_of
from headoff.figures.chart_axes import clean, legend_above, name_heads_below, new_axes, number_heads_off
from headoff.figures.palette import MUTED, OBJECT_COLOURS
from headoff.figures.sheets import SweepFigure
from headoff.importance.curves import RemovalCurves

CURVES_CAPTION = (
    "The probability of the objects' classes at their queries, averaged over objects, with ever more heads off in all "
    "layers, in three orders; below the axis, which head goes next. Importance is the exact Shapley value of each head "
    "in this image. The mean and the band (5th to 95th percentile) are over all subsets of so many heads, exactly."
)
_LEAST, _MOST, _NUMBER = OBJECT_COLOURS[4], OBJECT_COLOURS[1], OBJECT_COLOURS[3]


def plot_curves(curves: RemovalCurves, ax: Axes | None = None, *, value: str = "probability") -> Axes:
    """A value over the number of heads off in all layers, for three orders (the least important first, the most
    important first, by number), and its mean over all orders, with the band from the 5th to the 95th percentile.

    Args:
        curves: of `HeadImportance.curves`.
        ax: axes to draw in; by default those of a new figure.
        value: its name.
    """
    steps = list(range(len(curves.random)))
    if ax is None:
        ax = new_axes(7.2, 4.2)
    clean(ax, grid="y")
    ax.fill_between(steps, curves.low.tolist(), curves.high.tolist(), color=MUTED, alpha=0.2, linewidth=0)
    ax.plot(steps, curves.random.tolist(), color=MUTED, linewidth=1.4)
    look: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.8, "zorder": 3}
    ax.plot(steps, curves.by_number.tolist(), color=_NUMBER, linestyle=(0, (4, 1.5)), marker="o", **look)
    ax.plot(steps, curves.most_first.tolist(), color=_MOST, marker="v", **look)
    ax.plot(steps, curves.least_first.tolist(), color=_LEAST, marker="^", **look)
    number_heads_off(ax, len(steps) - 1)
    ax.set_xlim(-0.35, len(steps) - 0.65)
    ax.set_ylabel(f"{value}, mean over objects")
    ax.xaxis.labelpad = 26
    name_heads_below(ax, "least", curves.least_order, _LEAST, 15)
    name_heads_below(ax, "most", curves.most_order, _MOST, 25)
    legend_above(
        ax,
        [
            Line2D([], [], color=_LEAST, marker="^", markersize=4.5, label="least important first"),
            Line2D([], [], color=_MOST, marker="v", markersize=4.5, label="most important first"),
            Line2D([], [], color=_NUMBER, ls=(0, (4, 1.5)), marker="o", markersize=4.5, label="by number"),
            Line2D([], [], color=MUTED, label="all orders, mean"),
            Patch(color=MUTED, alpha=0.2, label="5% to 95%"),
        ],
        entry=1.5,
    )
    return ax


def curves_figure(curves: RemovalCurves) -> SweepFigure:
    """The curves among the figures of a sweep."""
    return SweepFigure("removal-curves", "How many heads can go", lambda: figure_of(plot_curves(curves)))
