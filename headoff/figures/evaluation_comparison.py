"""Two results on the same images, as pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from headoff.evaluation.comparison import Comparison
from headoff.figures.captions import shorten
from headoff.figures.chart_axes import (
    INTERVAL,
    LABEL_POINTS,
    clean,
    legend_above,
    new_axes,
    number_heads_off,
    plain_text,
)
from headoff.figures.evaluation import MOST_NAMED, cumulative_in
from headoff.figures.palette import BLUE, INK, MUTED
from headoff.wording import counted

COLOURS = (BLUE, "#CC3311")


def plot_comparison(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """AP of A and of B, with 95% intervals, over the number of heads off, or for up to 60 configurations by name."""
    chosen, numbered = _shown(comparison)
    ax = _axes(ax, len(chosen), numbered)
    clean(ax, grid="y" if numbered else "x")
    places = np.arange(len(chosen))
    for side, hue, shift in zip((comparison.a, comparison.b), COLOURS, (-0.17, 0.17), strict=True):
        values = [side.configurations[index]["AP"] for index in chosen]
        low, high = np.array([side.configurations[index].interval("AP") for index in chosen]).T
        if numbered:
            ax.fill_between(places, low, high, color=hue, alpha=0.2, linewidth=0)
            ax.plot(places, values, marker="o", color=hue, markersize=4.5, linewidth=1.6)
        else:
            ax.hlines(places + shift, low, high, color=hue, alpha=0.4, linewidth=3)
            ax.plot(values, places + shift, "o", color=hue, markersize=4.5, markeredgecolor="white")
    _label(ax, comparison, chosen, numbered, "average precision (AP)")
    if numbered:
        ax.set_ylim(0, 1.02)
    else:
        ax.set_xlim(0, 1.02)
    handles: list[Any] = [
        Line2D(
            [],
            [],
            color=hue,
            marker="o",
            label=letter if name == letter else f"{letter}: {shorten(name, 40)}",
        )
        for letter, hue, name in zip("AB", COLOURS, comparison.names, strict=True)
    ]
    if comparison.a.resamples > 1:
        handles.append(Patch(color=MUTED, alpha=0.3, label=INTERVAL))
    legend_above(ax, handles, entry=2.6, title=f"Both over {counted(len(comparison.image_ids), 'image')}")
    return ax


def plot_differences(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """AP of B less that of A, with 95% intervals paired by image."""
    chosen, numbered = _shown(comparison)
    ax = _axes(ax, len(chosen), numbered)
    clean(ax, grid="y" if numbered else "x")
    places = np.arange(len(chosen))
    values, low, high = np.array([comparison.difference(index) for index in chosen]).T
    shades = [
        COLOURS[1] if top < 0 else COLOURS[0] if bottom > 0 else MUTED
        for bottom, top in zip(low, high, strict=True)
    ]
    zero, lines = (ax.axhline, ax.vlines) if numbered else (ax.axvline, ax.hlines)
    zero(0, color=INK, linewidth=0.8)
    lines(places, low, high, color=shades, alpha=0.45, linewidth=4)
    across, up = (places, values) if numbered else (values, places)
    ax.scatter(across, up, c=shades, s=26, edgecolors="white", linewidths=0.6, zorder=3)
    limit = 1.15 * max(float(np.nanmax(np.abs([*values, *np.nan_to_num(low), *np.nan_to_num(high)]))), 1e-4)
    (ax.set_ylim if numbered else ax.set_xlim)(-limit, limit)
    _label(ax, comparison, chosen, numbered, "AP of B less AP of A")
    handles = [
        Line2D([], [], ls="none", marker="o", color=hue, label=words)
        for hue, words in (
            (COLOURS[0], "B is higher"),
            (COLOURS[1], "B is lower"),
            (MUTED, "interval spans 0"),
        )
    ]
    legend_above(ax, handles, entry=1.5, title="Difference, with its 95% interval, paired by image")
    return ax


def _shown(comparison: Comparison) -> tuple[list[int], bool]:
    """The configurations that are drawn, and whether they are a cumulative sweep."""
    cumulative = cumulative_in(comparison.a)
    if cumulative:
        return list(cumulative), True
    if len(comparison) <= MOST_NAMED:
        return list(range(len(comparison))), False
    size = [abs(comparison.difference(index)[0]) for index in range(len(comparison))]
    largest = sorted(range(1, len(comparison)), key=lambda index: -size[index])[: MOST_NAMED - 1]
    return [0, *sorted(largest)], False


def _axes(ax: Axes | None, count: int, numbered: bool) -> Axes:
    return ax if ax is not None else new_axes(7.2, 3.8 if numbered else 1.7 + 0.2 * count)


def _label(ax: Axes, comparison: Comparison, chosen: list[int], numbered: bool, words: str) -> None:
    if numbered:
        number_heads_off(ax, len(chosen) - 1)
        ax.set_ylabel(words)
        return
    names = [shorten(comparison.a.configurations[index].configuration.name, 40) for index in chosen]
    ax.set_yticks(range(len(chosen)), names, fontsize=LABEL_POINTS)
    plain_text(ax.yaxis)
    ax.set_ylim(len(chosen) - 0.4, -0.6)
    ax.set_xlabel(words)
