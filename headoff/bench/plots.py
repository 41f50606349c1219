"""The report as plots: ratios with their intervals, and attention calls under the roofline."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from headoff.bench.attentions import ATTENTIONS
from headoff.bench.results import Measurement, Report, by_case
from headoff.bench.roofline import Peaks
from headoff.bench.tables import TITLES, where
from headoff.figures.canvas import DPI
from headoff.figures.palette import GRID, INK, MUTED, OBJECT_COLOURS

BAR = 0.17
"""Height of a bar with the space below it, in inches."""

GAP = 0.16
"""Space between cases, in inches."""

PLOT_WIDTH = 5.2
TOP, BOTTOM, RIGHT = 0.95, 0.62, 0.75
"""Space around the bars, in inches: for title and legend, for the axis, for the number next to the longest bar."""

CHARACTER = 0.062
"""Approximate width of a character of a label, in inches."""


def plots_of(report: Report) -> dict[str, bytes]:
    """PNG files by name."""
    figures: dict[str, Figure] = {}
    for suite in report.suites:
        for dtype in report.peaks:
            rows = [row for row in report.of_suite(suite) if row.dtype == dtype and row.was_timed]
            for name, some in (
                _by_shape(rows).items() if suite in ("attention", "skipping") else {"": rows}.items()
            ):
                if some:
                    figures[f"{suite}-{dtype}{name}.png"] = plot_ratios(some, suite, dtype, report)
    for dtype, peaks in report.peaks.items():
        rows = [
            row for row in report.measurements if row.dtype == dtype and row.roofline and row.roofline.flops
        ]
        if rows:
            figures[f"roofline-{dtype}.png"] = plot_roofline(rows, peaks, dtype, report)
    return {name: _png(figure) for name, figure in figures.items()}


def plot_ratios(rows: Sequence[Measurement], suite: str, dtype: str, report: Report) -> Figure:
    """Bars of the time relative to each case's reference, on a logarithmic axis that starts at 1, with intervals."""
    colours = _colours(report)
    cases = by_case(rows)
    height = sum(len(some) * BAR + GAP for some in cases.values())
    left = 0.3 + CHARACTER * max(len(line) for _, case in cases for line in _lines(case))
    figure = Figure(figsize=(left + PLOT_WIDTH + RIGHT, TOP + height + BOTTOM), dpi=DPI, facecolor="white")
    ax = _axes(figure, left, height)
    place, ticks, labels = 0.0, [], []
    for (_, case), some in cases.items():
        start = place
        for row in sorted(some, key=lambda row: row.ratio or 1.0):
            _bar(ax, place, row, colours[row.provider])
            place += BAR
        ticks.append((start + place - BAR) / 2)
        labels.append("\n".join(_lines(case)))
        place += GAP
    ax.set_yticks(ticks, labels, fontsize=7.5)
    ax.set_ylim(place - GAP - BAR / 2 + 0.06, -BAR / 2 - 0.06)
    _ratio_axis(ax, rows)
    _titles(figure, ax, f"{TITLES[suite]}, {dtype}: time relative to the reference", report)
    _legend(figure, {row.provider: colours[row.provider] for row in rows})
    return figure


def plot_roofline(rows: Sequence[Measurement], peaks: Peaks, dtype: str, report: Report) -> Figure:
    """Achieved FLOP/s against operations per byte, under the peaks that the device reached in the same run."""
    colours = _colours(report)
    figure = Figure(figsize=(7.6, 5.4), dpi=DPI, facecolor="white")
    ax = figure.add_axes((0.1, 0.115, 0.865, 0.70))
    intensities = []
    for row in rows:
        assert row.roofline is not None
        intensity = row.roofline.flops / row.roofline.bytes
        intensities.append(intensity)
        forward = "backward" not in row.case
        colour = colours[row.provider]
        ax.plot(
            [intensity],
            [row.roofline.flops],
            marker="o" if forward else "s",
            markersize=5,
            markerfacecolor=colour if forward else "none",
            markeredgecolor=colour,
            linestyle="none",
            alpha=0.85,
            zorder=3,
        )
    ridge = peaks.flops / peaks.bytes
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    ax.plot(
        [low, ridge, high],
        [low * peaks.bytes, peaks.flops, peaks.flops],
        color=INK,
        linewidth=1.3,
        zorder=2,
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(low, high)
    achieved = [row.roofline.flops for row in rows if row.roofline]
    ax.set_ylim(min(*achieved, low * peaks.bytes) / 2, peaks.flops * 2)
    ax.annotate(
        "matrix product",
        (high, peaks.flops),
        (-4, 4),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=INK,
    )
    ax.annotate(
        "copy", (low, low * peaks.bytes), (6, -2), textcoords="offset points", ha="left", va="top", fontsize=8,
        color=INK,
    )  # fmt: skip
    ax.set_xlabel("operations per byte that has to be moved", fontsize=8, color=INK)
    ax.set_ylabel("FLOP/s achieved", fontsize=8, color=INK)
    _clean(ax)
    ax.grid(axis="both", color=GRID, linewidth=0.6, zorder=0)
    _titles(figure, ax, f"Attention under the roofline, {dtype}", report)
    _legend(figure, {row.provider: colours[row.provider] for row in rows}, directions=True)
    return figure


def _bar(ax: Axes, place: float, row: Measurement, colour: str) -> None:
    ratio = row.ratio or 1.0
    if row.low is None or row.high is None:
        # The reference is where the axis starts.
        ax.plot([1], [place], marker="|", markersize=7, markeredgewidth=2.4, color=colour, zorder=3)
        edge = 1.0
    else:
        ax.barh(place, ratio - 1, left=1, height=BAR * 0.8, color=colour, zorder=2)
        ax.plot([row.low, row.high], [place, place], color=INK, linewidth=1, zorder=4)
        edge = max(1.0, ratio, row.high)
    label = "reference" if row.low is None else f"{ratio:.2f}" if 0.1 <= ratio < 10 else f"{ratio:.2g}"
    ax.annotate(
        label, (edge, place), (4, 0), textcoords="offset points", va="center", fontsize=6.5, color=MUTED,
        annotation_clip=False,
    )  # fmt: skip


def _ratio_axis(ax: Axes, rows: Sequence[Measurement]) -> None:
    values = [value for row in rows for value in (row.ratio, row.low, row.high) if value]
    low, high = min(*values, 0.8) / 1.1, max(*values, 1.3) * 1.1
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    steps = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    ticks = [step for step in steps if low <= step <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=8)
    ax.minorticks_off()
    ax.axvline(1, color=INK, linewidth=0.9, zorder=1)
    ax.set_xlabel("x the reference; left of 1 is faster", fontsize=8, color=INK)
    _clean(ax)
    ax.grid(axis="x", color=GRID, linewidth=0.6, zorder=0)
    ax.tick_params(axis="y", length=0)


def _axes(figure: Figure, left: float, height: float) -> Axes:
    width, whole = figure.get_size_inches()
    return figure.add_axes((left / width, BOTTOM / whole, PLOT_WIDTH / width, height / whole))


def _clean(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(GRID)
    ax.tick_params(colors=INK, labelsize=8)
    ax.set_axisbelow(True)


def _titles(figure: Figure, ax: Axes, title: str, report: Report) -> None:
    inches = figure.get_size_inches()[1]
    figure.text(0.012, 1 - 0.1 / inches, title, fontsize=10.5, color=INK, va="top", ha="left", weight="bold")
    about = f"{report.made_with['date']}, {where(report)}, torch {report.made_with['torch']}"
    figure.text(0.012, 1 - 0.32 / inches, about, fontsize=7.5, color=MUTED, va="top", ha="left")


def _legend(figure: Figure, colours: dict[str, str], directions: bool = False) -> None:
    handles = [
        Line2D([], [], linestyle="none", marker="s", markersize=6, color=colour, label=name)
        for name, colour in colours.items()
    ]
    if directions:
        handles += [
            Line2D([], [], linestyle="none", marker="o", color=MUTED, markersize=5, label="forward"),
            Line2D(
                [], [], linestyle="none", marker="s", color=MUTED, markerfacecolor="none", markersize=5,
                label="forward + backward",
            ),
        ]  # fmt: skip
    width, height = figure.get_size_inches()
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.0, 1 - 0.46 / height),
        ncols=max(2, int(width / 1.75)),
        frameon=False,
        fontsize=7.5,
        labelcolor=INK,
        handletextpad=0.3,
        columnspacing=1.2,
    )


def _colours(report: Report) -> dict[str, str]:
    """One colour for each provider, the same in all plots of all reports."""
    known = dict(zip(ATTENTIONS, OBJECT_COLOURS, strict=True))
    others = dict.fromkeys(one.provider for one in report.measurements if one.provider not in known)
    return {**known, **dict(zip(others, cycle((MUTED, INK, GRID)), strict=False))}


def _by_shape(rows: Sequence[Measurement]) -> dict[str, list[Measurement]]:
    """Attention calls by the end of their file's name, one plot for each shape: one for all would be too long."""
    found: dict[str, list[Measurement]] = {}
    for row in rows:
        words = "".join(each if each.isalnum() else " " for each in _lines(row.case)[0])
        found.setdefault(f"-{'-'.join(words.lower().split())}", []).append(row)
    return found


def _lines(case: str) -> list[str]:
    """A long case name in two lines: the shape, and the rest."""
    parts = case.split(", ")
    if len(parts) < 3:
        return [case]
    return [", ".join(parts[:-2]), ", ".join(parts[-2:])]


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()
