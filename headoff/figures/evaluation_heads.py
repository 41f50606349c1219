"""What heads contribute to AP over a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from headoff.errors import SettingError
from headoff.evaluation.importance import HeadScores
from headoff.figures.chart_axes import INTERVAL, LABEL_POINTS, clean, legend_above, new_axes
from headoff.figures.importance import draw_scores
from headoff.figures.matrix import colour_bar, hue_handles
from headoff.figures.palette import BLUE, GRID, INK, MUTED


def plot_heads_precision(found: HeadScores, ax: Axes | None = None) -> Axes:
    """What heads contribute to AP: cells of layers x heads, or a bar with its interval for each head in all layers.

    Cells are hatched, and bars are grey, where the 95% interval has both signs.
    """
    uncertain = ~((found.low > 0) | (found.high < 0))
    rows, columns = found.scores.shape
    if found.layers:
        ax = new_axes(max(5.4, 1.9 + 0.66 * min(columns, 32)), 1.6 + 0.42 * rows) if ax is None else ax
        clean(ax)
        limit = float(np.abs(found.scores).max()) or 1.0
        draw_scores(ax, found.scores, limit, uncertain, decimals=3)
        for axis, numbers in ((ax.xaxis, found.heads), (ax.yaxis, found.layers)):
            axis.set_ticks(range(len(numbers)), [str(number) for number in numbers])
        colour_bar(ax, limit, "AP lost without the head")
        handles: list[Any] = hue_handles("AP rises without it", "AP falls without it")
        if uncertain.any():
            handles.append(
                Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0, label="interval spans 0")
            )
        legend_above(ax, handles, entry=1.7, title=f"AP lost without a single head of {found.site}")
        return ax
    ax = new_axes(max(5.4, 1.2 + 0.62 * columns), 3.4) if ax is None else ax
    clean(ax, grid="y")
    places = np.arange(columns)
    values, low, high = found.scores[0], found.low[0], found.high[0]
    shades = [MUTED if unsure else BLUE for unsure in uncertain[0]]
    ax.bar(places, values, width=0.62, color=shades, alpha=0.75, zorder=2)
    ax.vlines(places, low, high, color=INK, linewidth=1.4, zorder=3)
    top = float(np.nanmax([*high, *values, 0]))
    for place, value, end in zip(places, values, high, strict=True):
        above = max(float(np.nan_to_num(end, nan=value)), 0)
        ax.annotate(
            f"{value:.3f}".replace("-", "−"),
            (place, above),
            (0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=LABEL_POINTS,
            color=INK,
        )
    ax.axhline(0, color=MUTED, linewidth=0.8)
    ax.set_ylim(top=1.12 * top if top > 0 else None)
    ax.set_xticks(places, [str(head) for head in found.heads])
    ax.set_xlabel("head, in all layers")
    ax.set_ylabel("Shapley value (AP)")
    sums = "" if found.off is None else f", {found.on - found.off:.3f} together"
    handles = [
        Patch(facecolor=BLUE, alpha=0.75, label="Shapley value"),
        Line2D([], [], color=INK, label=INTERVAL),
    ]
    legend_above(ax, handles, entry=2.4, title=f"Heads of {found.site}{sums}")
    return ax


def plot_heads_interactions(found: HeadScores, ax: Axes | None = None) -> Axes:
    """Shapley interactions of all pairs of heads, each in all layers: what two add beyond each of them.

    Raises:
        SettingError: the scores have none.
    """
    if found.interactions is None:
        raise SettingError(
            f"the measure {found.measure!r} has no interactions: draw those of 'shapley_columns'"
        )
    heads = len(found.heads)
    ax = new_axes(max(4.8, 1.9 + 0.5 * heads), max(4.1, 1.6 + 0.42 * heads)) if ax is None else ax
    clean(ax)
    limit = float(np.abs(found.interactions).max()) or 1.0
    draw_scores(ax, found.interactions, limit, decimals=3)
    for head in range(heads):
        ax.add_patch(Rectangle((head - 0.47, head - 0.44), 0.94, 0.88, facecolor=GRID, zorder=5))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(range(heads), [str(head) for head in found.heads])
    ax.set_xlabel("head")
    ax.set_ylabel("head")
    colour_bar(ax, limit, "interaction (AP)")
    handles = hue_handles("redundant: either will do", "they need each other")
    legend_above(ax, handles, entry=1.9, title=f"Pairs of heads of {found.site}, in all layers")
    return ax
