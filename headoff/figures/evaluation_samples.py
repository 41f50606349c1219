"""Relevance and its faithfulness in a sample of a data set, for each configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from headoff.evaluation.relevance import CONTROL, SampleStatistics
from headoff.figures.chart_axes import clean, legend_above, name_configurations, new_axes, number_heads_off
from headoff.figures.palette import BLUE
from headoff.gates import CumulativeSweep, kind_of
from headoff.wording import counted


def plot_relevance_statistics(found: SampleStatistics, ax: Axes | None = None) -> Axes:
    """The share of relevance in the object's box, and its mass, for each configuration, with 95% intervals."""
    ax = new_axes(7.2, 3.8) if ax is None else ax
    names = ("share of relevance in the object's box", "mass of relevance, of that with nothing off")
    handles = _statistics(ax, found, [(0, BLUE, "-", names[0]), (1, "#DDAA33", "-", names[1])])
    ax.set_ylim(0, max(1.02, 1.05 * float(np.nan_to_num([*found.high.flat, *found.mean.flat]).max())))
    ax.set_ylabel("mean over objects")
    objects, images = counted(int(found.objects[0]), "detection"), counted(int(found.images[0]), "image")
    legend_above(ax, handles, entry=2.6, title=f"{objects} with nothing off in a sample of {images}")
    return ax


def plot_faithfulness_statistics(found: SampleStatistics, ax: Axes | None = None) -> Axes:
    """Areas under deletion and insertion curves for each configuration, of a method (lines) and of the control
    (dashed), with 95% intervals.
    """
    ax = new_axes(7.2, 3.8) if ax is None else ax
    looks = {"insertion": BLUE, "deletion": "#CC6633"}
    series = [
        (
            column,
            looks[about["quantity"]],
            "-" if about["method"] != CONTROL else (0, (3, 2)),
            f"{about['quantity']}, {about['method']}",
        )
        for column, about in enumerate(found.columns)
        if about["quantity"] in looks
    ]
    handles = _statistics(ax, found, series)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("area under the curve")
    least, most = int(found.objects.min()), int(found.objects.max())
    objects = counted(most, "detection") if least == most else f"{least:,} to {counted(most, 'detection')}"
    title = f"{objects} under the configuration in a sample of {counted(int(found.images.max()), 'image')}"
    # In two columns, of the method and of the control.
    legend_above(ax, handles, entry=2.6, title=title)
    return ax


def _statistics(
    ax: Axes, found: SampleStatistics, series: Sequence[tuple[int, str, Any, str]]
) -> list[Line2D]:
    """Lines with bands over the configurations, each of a column, colour, style and name; what the legend has."""
    clean(ax, grid="y")
    places = np.arange(len(found.configurations))
    for column, hue, style, _ in series:
        ax.fill_between(
            places, found.low[:, column], found.high[:, column], color=hue, alpha=0.18, linewidth=0
        )
        ax.plot(
            places,
            found.mean[:, column],
            marker="o",
            color=hue,
            linestyle=style,
            markersize=4.5,
            linewidth=1.6,
        )
    if isinstance(kind_of(found.configurations), CumulativeSweep):
        number_heads_off(ax, len(places) - 1)
    else:
        name_configurations(ax, found.configurations)
    return [
        Line2D([], [], color=hue, linestyle=style, marker="o", label=name) for _, hue, style, name in series
    ]
