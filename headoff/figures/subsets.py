"""The survival chart of all subsets of heads: how many objects are found with how many heads off."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from headoff.figures.canvas import width_of
from headoff.figures.chart_axes import clean, legend_above, new_axes
from headoff.figures.palette import GRID, INK, MUTED, OBJECT_COLOURS
from headoff.gates import SubsetSweep, kind_of
from headoff.outcomes import Status
from headoff.sweeps import SweepResult
from headoff.wording import counted, number_ranges

FOUND = (Status.KEPT, Status.MOVED, Status.DUPLICATED)
"""Statuses of objects that are found."""

_BEST, _WORST = OBJECT_COLOURS[4], OBJECT_COLOURS[1]
_NAME_POINTS = 7.0


@dataclass(frozen=True)
class SubsetsOfSize:
    """The subsets of one number of heads off.

    Attributes:
        size: how many heads are off.
        found: how many objects each subset leaves found.
        best, worst: the heads that are off in the subsets that leave most and fewest objects found; of equal ones,
            those with the highest and lowest mean probability.
        most, fewest: how many objects these leave found.
    """

    size: int
    found: tuple[int, ...]
    best: tuple[int, ...]
    worst: tuple[int, ...]

    @property
    def most(self) -> int:
        return max(self.found)

    @property
    def fewest(self) -> int:
        return min(self.found)


def subsets_by_size(result: SweepResult, sweep: SubsetSweep) -> list[SubsetsOfSize]:
    """The subsets of 0, 1, 2, ... heads."""
    found = [sum(outcome.counts[status] for status in FOUND) for outcome in result.outcomes]
    means = result.survival().mean(dim=0).tolist()
    sizes = []
    for size in range(len(sweep.heads) + 1):
        members = [index for index, off in enumerate(sweep.off) if len(off) == size]
        ordered = sorted(members, key=lambda index: (found[index], means[index]))
        counts = tuple(found[index] for index in members)
        sizes.append(SubsetsOfSize(size, counts, sweep.off[ordered[-1]], sweep.off[ordered[0]]))
    return sizes


def heads_text(heads: Sequence[int]) -> str:
    """`H0-2+5`; `none` without heads."""
    return f"H{number_ranges(heads, '+')}" if heads else "none"


def plot_subsets(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The fraction of objects found over the number of heads off, for all subsets of heads.

    The area of a circle is the share of subsets, among those of the same size, that leave this fraction found. The
    best and the worst subset of each size are marked, and named below the axis.
    """
    sweep = kind_of(result.configurations)
    assert isinstance(sweep, SubsetSweep)
    objects, sizes = len(result.baseline), subsets_by_size(result, sweep)
    if ax is None:
        ax = new_axes(max(6.4, 1.2 + 0.95 * len(sizes)), 4.8)
    clean(ax, grid="y")
    column = 72 * width_of(ax) / len(sizes)
    widest = min(0.62 * column, 26.0)
    for one in sizes:
        for found, count in Counter(one.found).items():
            area = (widest * (count / len(one.found)) ** 0.5) ** 2
            ax.scatter(one.size, found / objects, s=max(area, 4.0), color=MUTED, alpha=0.45, lw=0, zorder=2)
        middle = median(one.found) / objects
        ax.plot([one.size - 0.36, one.size + 0.36], [middle, middle], color=INK, linewidth=2.0, zorder=3)
    steps = [one.size for one in sizes]
    # To the sides of the circles, so that neither covers the other where best and worst are equal.
    look: dict[str, Any] = {
        "linestyle": "none",
        "markersize": 5.5,
        "markeredgecolor": "white",
        "markeredgewidth": 0.5,
        "zorder": 4,
    }
    best = ax.plot([k - 0.4 for k in steps], [one.most / objects for one in sizes], "^", color=_BEST, **look)
    worst = ax.plot(
        [k + 0.4 for k in steps], [one.fewest / objects for one in sizes], "v", color=_WORST, **look
    )
    for k in steps[:-1]:
        ax.axvline(k + 0.5, color=GRID, linewidth=0.6, zorder=0)
    ax.set_xlim(-0.5, len(sizes) - 0.5)
    ax.set_ylim(-0.06, 1.06)
    ax.set_ylabel(f"fraction of {counted(objects, 'object')} found\n(kept, moved or duplicated)")
    _name_below(ax, sizes, column)
    best[0].set_label("best subset (ties: mean probability)")
    worst[0].set_label("worst subset")
    circle = Line2D(
        [],
        [],
        linestyle="none",
        marker="o",
        markersize=8,
        color=MUTED,
        alpha=0.45,
        markeredgewidth=0,
        label="area: share of the subsets of that size",
    )
    middle_line = Line2D([], [], color=INK, linewidth=2.0, label="median")
    legend_above(ax, [best[0], worst[0], middle_line, circle], entry=2.6)
    return ax


def _name_below(ax: Axes, sizes: Sequence[SubsetsOfSize], column: float) -> None:
    """The number of heads off, and the best and worst subset, below each column; upright where that is too narrow."""
    rows = [[heads_text(one.best) for one in sizes], [heads_text(one.worst) for one in sizes]]
    longest = max(len(text) for row in rows for text in row)
    fits = longest * _NAME_POINTS * 0.6 <= column
    height = 11.0 if fits else longest * _NAME_POINTS * 0.62 + 5
    ax.set_xticks([one.size for one in sizes])
    ax.tick_params(axis="x", length=0)
    below = 18.0
    for label, row, colour in zip(("best", "worst"), rows, (_BEST, _WORST), strict=True):
        for one, text in zip(sizes, row, strict=True):
            ax.annotate(
                text,
                xy=(one.size, 0),
                xycoords=("data", "axes fraction"),
                xytext=(0, -below),
                textcoords="offset points",
                ha="center",
                va="top",
                rotation=0 if fits else 90,
                fontsize=_NAME_POINTS,
                color=INK,
            )
        ax.annotate(
            label,
            xy=(0, 0),
            xycoords="axes fraction",
            xytext=(-6, -below),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=_NAME_POINTS,
            color=colour,
            fontweight="bold",
        )
        below += height
    ax.annotate(
        "number of heads off, and which ones",
        xy=(0.5, 0),
        xycoords="axes fraction",
        xytext=(0, -below - 3),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=9,
        color=INK,
    )
