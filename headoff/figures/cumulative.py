"""The survival chart of a cumulative sweep: lines over the number of heads off."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from headoff.figures.canvas import figure_of
from headoff.figures.chart_axes import (
    CONFIDENCE_DASHES,
    LABEL_POINTS,
    clean,
    confidence_handle,
    legend_above,
    marker,
    new_axes,
    number_heads_off,
    object_names,
    status_handles,
)
from headoff.figures.palette import INK, MUTED, STATUS_STYLES, object_colour
from headoff.sweeps import SweepResult

_LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""Line styles distinguish objects with the same colour; there are eight colours."""


def plot_cumulative(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The probability of each object's class at the object's query, over the number of heads off.

    Lines have the objects' colours, and numbers and classes at their right end. Markers show the object's status. The
    dotted line is the confidence above which a prediction is a detection.
    """
    configurations, objects = len(result), len(result.baseline)
    if ax is None:
        width = min(max(7.2, 2.6 + 0.2 * configurations), 22.0)
        ax = new_axes(width, max(4.0, 1.2 + objects * 0.155))
    clean(ax, grid="y")
    survival = result.survival().tolist()
    ax.axhline(result.confidence, color=MUTED, linewidth=0.9, linestyle=CONFIDENCE_DASHES, zorder=1)
    for index, scores in enumerate(survival):
        colour = object_colour(index)
        style = _LINE_STYLES[index // 8 % len(_LINE_STYLES)]
        ax.plot(scores, color=colour, linestyle=style, linewidth=1.7, zorder=2)
        for status, look in STATUS_STYLES.items():
            at = [c for c, one in enumerate(result.outcomes) if one.outcomes[index].status is status]
            if at:
                heights = [scores[c] for c in at]
                ax.plot(at, heights, linestyle="none", zorder=3, **marker(look, colour, 5.2))
    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(-0.35, configurations - 0.65)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_ylabel("probability of the object's class\nat its own query")
    number_heads_off(ax, configurations - 1)
    _label_ends(ax, object_names(result), [row[-1] for row in survival])
    seen = {outcome.status for one in result.outcomes for outcome in one.outcomes}
    legend_above(ax, [*status_handles(seen), confidence_handle(result.confidence)])
    return ax


def _label_ends(ax: Axes, names: Sequence[str], ends: Sequence[float]) -> None:
    """Names at the right of the lines, moved apart to be readable, and connected to the ends of the lines."""
    points = ax.get_window_extent().height / figure_of(ax).dpi * 72
    low, high = ax.get_ylim()
    size = min(LABEL_POINTS, points / len(names) / 1.15)
    heights = spread(ends, size * 1.3 / points * (high - low), low, high)
    for index, (name, end, height) in enumerate(zip(names, ends, heights, strict=True)):
        label = ax.annotate(
            name,
            xy=(ax.get_xlim()[1] - 0.35, end),
            xytext=(1.02, height),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=size,
            color=INK,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": object_colour(index),
                "linewidth": 0.8,
                "relpos": (0, 0.5),
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )
        label.set_parse_math(False)


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """`values` moved to be at least `gap` apart, in the same order, between `low` and `high`."""
    order = sorted(range(len(values)), key=lambda index: (values[index], -index))
    gap = min(gap, (high - low) / max(len(values), 1))
    placed: list[float] = []
    for index in order:
        placed.append(max(values[index], low + gap / 2, placed[-1] + gap if placed else low))
    # Values that were moved above the top are moved back down, and with them those below.
    ceiling = high - gap / 2
    for place in reversed(range(len(placed))):
        placed[place] = min(placed[place], ceiling)
        ceiling = placed[place] - gap
    result = [0.0] * len(values)
    for value, index in zip(placed, order, strict=True):
        result[index] = value
    return result
