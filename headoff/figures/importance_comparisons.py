"""Measures and ablation kinds compared: rank correlations, and one kind against another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from headoff.choices import AblationKind
from headoff.errors import SettingError
from headoff.figures.canvas import DPI
from headoff.figures.chart_axes import clean, empty, legend_above, new_axes
from headoff.figures.importance import (
    NOTHING_TO_SCORE,
    draw_scores,
    measure_title,
    score_handles,
    score_limit,
    value_title,
)
from headoff.figures.palette import GRID, INK, MUTED, OBJECT_COLOURS
from headoff.importance.result import HeadImportance, Key

MOST_LABELLED = 16
"""Heads that are named in a scatter; the others contribute less."""
_LABELLED = 0.05
"""Heads nearer to the origin than this part of the axes have no name."""


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors, with mean ranks for ties; NaN if one of them is constant."""
    ranks = [_ranks(np.asarray(one, dtype=np.float64)) for one in (a, b)]
    x, y = (one - one.mean() for one in ranks)
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place]


def rank_correlations(
    importance: HeadImportance, value: str | None = None, ablation: AblationKind | None = None
) -> tuple[tuple[str, ...], np.ndarray]:
    """Rank correlations of all measures that score a value, by the mean over objects.

    A measure of heads in all layers is compared with the sums over layers of the others.

    Returns:
        The measures' names, and their correlations (n, n).
    """
    value, ablation = value or importance.values[0], ablation or importance.ablations[0]
    names = tuple(name for name in importance.measures if Key(ablation, name, value) in importance.scores)
    means = [importance.mean_scores(name, value, ablation).numpy() for name in names]
    found = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(means):
        for j, b in enumerate(means):
            same = a.shape == b.shape
            found[i, j] = rank_correlation(*(one.ravel() if same else one.sum(0) for one in (a, b)))
    return names, found


def compare_measures(
    importance: HeadImportance, *, value: str | None = None, ablation: AblationKind | None = None
) -> Figure:
    """The mean over objects by every measure side by side, each on its own scale, and their rank correlations."""
    value, ablation = value or importance.values[0], ablation or importance.ablations[0]
    names, correlations = rank_correlations(importance, value, ablation)
    panels = len(names) + 1
    across = min(panels, 3)
    down = -(-panels // across)
    rows, columns = importance.shape
    figure = Figure(
        figsize=(0.6 + across * max(0.5 * columns, 2.6), 0.9 + down * max(0.9 + 0.3 * rows, 2.2)),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(down, across, squeeze=False).ravel()
    for ax, name in zip(axes, names, strict=False):
        scores = importance.mean_scores(name, value, ablation)
        clean(ax)
        if len(importance.get(name, value, ablation).scores):
            draw_scores(ax, scores.numpy(), score_limit(scores))
        else:
            empty(ax, NOTHING_TO_SCORE)
        ax.set_title(f"{name}\n{measure_title(name)}", loc="left", fontsize=8, color=INK).set_parse_math(
            False
        )
    ax = axes[len(names)]
    clean(ax)
    draw_scores(ax, np.nan_to_num(correlations), 1.0, decimals=2)
    ax.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.set(xlabel="", ylabel="")
    ax.set_title("rank correlation of heads\n(Spearman)", loc="left", fontsize=8, color=INK)
    for ax in axes[panels:]:
        ax.set_visible(False)
    title = f"{value_title(value)}, {ablation} ablation: every matrix on its own scale"
    legend_above(figure, score_handles(False), entry=1.6, title=title)
    return figure


def plot_ablations(
    importance: HeadImportance,
    ax: Axes | None = None,
    *,
    kinds: Sequence[AblationKind] | None = None,
    measure: str | None = None,
    value: str | None = None,
) -> Axes:
    """The scores under one ablation kind against those under another: a point for each head, by the mean over objects.

    Heads on the diagonal matter as much under both. Above it, what the head contributes on average is needed; below it,
    zero ablation overstates the head.

    Args:
        importance: the scores.
        ax: axes to draw in; by default those of a new figure.
        kinds: of the x and the y axis; by default the first two.
        measure, value: by default the first of each.

    Raises:
        SettingError: there is only one ablation kind, or there are no such scores.
    """
    chosen = tuple(kinds or importance.ablations[:2])
    if len(chosen) != 2:
        raise SettingError(
            "two ablation kinds are compared: score heads with both, such as ablations=('zero', 'uniform')"
        )
    measure, value = measure or importance.measures[0], value or importance.values[0]
    x, y = (importance.mean_scores(measure, value, kind).numpy() for kind in chosen)
    if ax is None:
        ax = new_axes(5.6, 5.2)
    clean(ax)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    if not len(importance.get(measure, value, chosen[0]).scores):
        return empty(ax, NOTHING_TO_SCORE)
    low, high = min(x.min(), y.min(), 0.0), max(x.max(), y.max(), 0.0)
    room = 0.09 * (high - low) or 1.0
    ends = (low - room, high + room)
    ax.plot(ends, ends, color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)))
    for line in (ax.axhline, ax.axvline):
        line(0, color=MUTED, linewidth=0.7)
    layers = len(x)
    distance = np.hypot(x, y).ravel()
    far = np.argsort(-distance)[:MOST_LABELLED]
    labelled = far[distance[far] >= _LABELLED * (high - low)]
    for layer in range(layers):
        colour = OBJECT_COLOURS[layer % len(OBJECT_COLOURS)]
        ax.plot(
            x[layer], y[layer], "o", color=colour, markersize=5, markeredgecolor="white", markeredgewidth=0.5
        )
    for index in labelled.tolist():
        layer, head = divmod(index, x.shape[1])
        place = (float(x[layer, head]), float(y[layer, head]))
        ax.annotate(
            f"L{layer}H{head}" if layers > 1 else f"H{head}",
            xy=place,
            xytext=(4, 3 if place[1] >= place[0] else -9),
            textcoords="offset points",
            fontsize=7,
            color=INK,
        )
    ax.set(xlim=ends, ylim=ends, aspect="equal")
    ax.set_xlabel(f"{chosen[0]} ablation")
    ax.set_ylabel(f"{chosen[1]} ablation")
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            color=OBJECT_COLOURS[n % len(OBJECT_COLOURS)],
            label=f"layer {n}",
        )
        for n in range(min(layers, len(OBJECT_COLOURS)))
    ]
    handles = handles if layers > 1 else []
    handles.append(Line2D([], [], color=MUTED, linewidth=0.9, linestyle=(0, (3, 3)), label="equal"))
    correlation = rank_correlation(x.ravel(), y.ravel())
    title = f"{measure_title(measure)}, by {value_title(value)}\nmean over objects; rank correlation {correlation:.2f}"
    legend_above(ax, handles, entry=0.95, title=title)
    return ax
