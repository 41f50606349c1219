"""The chart of totals: mean survival over many images, with its interval."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from headoff.errors import GateError
from headoff.figures.captions import shorten
from headoff.figures.chart_axes import (
    INTERVAL,
    LABEL_POINTS,
    clean,
    empty,
    legend_above,
    new_axes,
    number_heads_off,
    plain_text,
)
from headoff.figures.palette import BLUE, INK, MUTED
from headoff.gates import CumulativeSweep, kind_of, parse_configuration
from headoff.totals import Totals
from headoff.wording import counted

MOST_NAMED = 60
"""Most configurations that are named in the chart; of more, their order by survival is drawn."""


def plot_totals(totals: Totals, ax: Axes | None = None) -> Axes:
    """Mean survival for each configuration, with its 95% interval, a bootstrap over images.

    - Cumulative sweep: a line over the number of heads off, with the interval as a band.
    - Up to 60 other configurations: a point for each, with the interval as a bar.
    - More: all of them in the order of their survival, with the intervals as a band.

    Returns:
        `ax`, or the axes of a new figure.
    """
    named = not _is_cumulative(totals) and len(totals) <= MOST_NAMED
    if ax is None:
        ax = new_axes(7.2, 1.5 + 0.17 * len(totals) if named else 3.8)
    clean(ax, grid="x" if named else "y")
    if not totals.objects:
        return empty(ax, "No object is detected with none off.")
    order = list(range(len(totals)))
    if not named and not _is_cumulative(totals):
        order.sort(key=lambda index: -totals.configurations[index].survival)
    chosen = [totals.configurations[index] for index in order]
    places = np.arange(len(chosen))
    means = np.array([total.survival for total in chosen])
    lows, highs = np.array([total.low for total in chosen]), np.array([total.high for total in chosen])
    has_interval = not math.isnan(lows[0])
    if named:
        if has_interval:
            ax.hlines(places, lows, highs, color=BLUE, alpha=0.4, linewidth=4)
        ax.plot(means, places, "o", color=BLUE, markersize=5, markeredgecolor="white")
        ax.set_yticks(places, [shorten(total.name, 40) for total in chosen], fontsize=LABEL_POINTS)
        plain_text(ax.yaxis)
        ax.set_ylim(len(chosen) - 0.4, -0.6)
        # Points can do without zero, and single heads often change little.
        least = min(np.nanmin(lows) if has_interval else 1, means.min())
        ax.set_xlim(max(0, math.floor(10 * least - 0.5) / 10), 1.02)
    else:
        if has_interval:
            ax.fill_between(places, lows, highs, color=BLUE, alpha=0.22, linewidth=0)
        dots = "o" if _is_cumulative(totals) else ""
        ax.plot(places, means, marker=dots, color=BLUE, markersize=4.5, linewidth=1.6)
        ax.set_ylim(0, 1.02)
        if _is_cumulative(totals):
            number_heads_off(ax, len(chosen) - 1)
        else:
            ax.set_xlabel(f"{counted(len(chosen), 'configuration')}, from the greatest to the least mean")
    words = "mean probability of an object's class\nat its own query"
    ax.set(**{"xlabel" if named else "ylabel": words})
    where = f"{counted(totals.objects, 'object')} in {counted(totals.images, 'image')}"
    handles: list[Line2D | Patch] = [Line2D([], [], color=BLUE, marker="o", label=f"mean of {where}")]
    if has_interval:
        band = Patch(color=BLUE, alpha=0.3, label=INTERVAL)
        handles.append(band)
    legend_above(ax, handles, entry=2.8)
    ax.tick_params(colors=MUTED, labelcolor=INK)
    return ax


def _is_cumulative(totals: Totals) -> bool:
    # Where texts differ between images, names still say what kind of sweep it is.
    try:
        configurations = [
            parse_configuration(total.text or total.name).named(total.name) for total in totals.configurations
        ]
    except GateError:  # a name of somebody's own
        return False
    return isinstance(kind_of(configurations), CumulativeSweep)
