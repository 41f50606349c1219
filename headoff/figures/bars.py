"""The survival chart of a few configurations: a bar for each object, in a group for each configuration."""

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from headoff.figures.canvas import figure_of
from headoff.figures.captions import shorten, views
from headoff.figures.chart_axes import (
    CONFIDENCE_DASHES,
    LABEL_POINTS,
    clean,
    confidence_handle,
    legend_above,
    marker,
    new_axes,
    object_names,
    plain_text,
    status_handles,
)
from headoff.figures.palette import INK, MUTED, STATUS_STYLES, object_colour
from headoff.sweeps import SweepResult

MOST_BARS = 160
"""More bars make a figure higher than a page."""

_BAR = 0.17
"""Height of a bar and its gap in inches."""
_LONGEST_TITLE = 80


def bars_of(result: SweepResult) -> int:
    """The number of bars of `plot_bars`."""
    return len(views(result)) * len(result.baseline)


def plot_bars(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The probability of each object's class at the object's query, in one group for each configuration.

    None off comes first. Bars have the objects' colours; markers at their ends show the object's status. The dotted
    line is the confidence above which a prediction is a detection.
    """
    shown, objects = views(result), len(result.baseline)
    # A group is a line for its title, its bars, and a gap.
    group = objects + 1.7
    rows = group * len(shown)
    if ax is None:
        ax = new_axes(7.2, 1.15 + _BAR * rows)
    clean(ax, grid="x")
    ax.axvline(result.confidence, color=MUTED, linewidth=0.9, linestyle=CONFIDENCE_DASHES, zorder=3)
    points = min(LABEL_POINTS, 0.8 * ax.get_window_extent().height / figure_of(ax).dpi * 72 / rows)
    known, places, names = object_names(result), [], []
    for number, view in enumerate(shown):
        top = number * group
        title = ax.text(
            0.004, top, shorten(view.title, _LONGEST_TITLE), va="center", fontsize=points * 1.05, color=INK
        )
        title.set(parse_math=False, fontweight="bold")
        for outcome in view.outcome.outcomes:
            place = top + 1 + outcome.object
            colour = object_colour(outcome.object)
            ax.barh(place, outcome.query_score, height=0.72, color=colour, zorder=2)
            look = marker(STATUS_STYLES[outcome.status], colour, min(5.2, points * 0.65))
            ax.plot([outcome.query_score], [place], linestyle="none", zorder=4, clip_on=False, **look)
            ax.annotate(
                f"{outcome.query_score:.2f}",
                xy=(outcome.query_score, place),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=points * 0.85,
                color=INK,
            )
            places.append(place)
            names.append(known[outcome.object])
    ax.set_yticks(places, names, fontsize=points)
    plain_text(ax.yaxis)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(rows - 0.9, -0.9)
    ax.set_xlim(0, 1.09)
    ax.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_xlabel("probability of the object's class\nat its own query")
    seen = {outcome.status for view in shown for outcome in view.outcome.outcomes}
    bars = Patch(facecolor=MUTED, label="probability")
    legend_above(ax, [bars, *status_handles(seen), confidence_handle(result.confidence)], entry=1.3)
    return ax
