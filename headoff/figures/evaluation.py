"""What heads off cost over a data set, as pictures: AP, outcomes, classes, heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from headoff.choices import Site
from headoff.errors import SettingError
from headoff.evaluation.importance import head_scores
from headoff.evaluation.outcomes import STATUSES
from headoff.evaluation.relevance import SampleStatistics
from headoff.evaluation.scores import REFERENCES, Scores
from headoff.figures.canvas import figure_of
from headoff.figures.captions import shorten
from headoff.figures.chart_axes import (
    INTERVAL,
    LABEL_POINTS,
    clean,
    legend_above,
    name_heads_below,
    new_axes,
    number_heads_off,
    plain_text,
)
from headoff.figures.evaluation_heads import plot_heads_interactions, plot_heads_precision
from headoff.figures.evaluation_samples import plot_faithfulness_statistics, plot_relevance_statistics
from headoff.figures.importance import draw_scores
from headoff.figures.matrix import colour_bar, hue_handles
from headoff.figures.palette import BLUE, INK, MUTED, OBJECT_COLOURS, STATUS_STYLES, ink_on
from headoff.gates import CumulativeSweep, SubsetSweep, order_of, sweeps_among
from headoff.wording import counted

LINES = {"AP": BLUE, "AP50": "#DDAA33", "AP75": "#009988"}
MOST_NAMED = 60
"""Most configurations that are named in a chart."""
MOST_COLUMNS = 12
"""Most configurations that are columns of the matrix of classes."""


def cumulative_in(scores: Scores, site: Site | None = None) -> tuple[int, ...]:
    """Indices of the cumulative sweep (of a site) among the configurations, with no heads off first; empty if there is
    none.
    """
    return _sweep_in(scores, CumulativeSweep, site)[1]


def _sweep_in(scores: Scores, wanted: type, site: Site | None = None) -> tuple[Any, tuple[int, ...]]:
    for kind, indices in sweeps_among([one.configuration for one in scores.configurations]):
        if isinstance(kind, wanted) and site in (None, _site_of(scores, indices)):
            return kind, indices
    return None, ()


def _site_of(scores: Scores, indices: Sequence[int]) -> Site:
    configurations = (scores.configurations[index].configuration for index in indices)
    return next(clause.site for one in configurations for clause in one.clauses)


def _sites_of(scores: Scores, wanted: type) -> list[Site]:
    """Where there is such a sweep."""
    sweeps = sweeps_among([one.configuration for one in scores.configurations])
    return [_site_of(scores, indices) for kind, indices in sweeps if isinstance(kind, wanted)]


def plot_precision(scores: Scores, ax: Axes | None = None, *, site: Site | None = None) -> Axes:
    """AP, AP50 and AP75 over the number of heads off, with 95% intervals as bands, and which head goes next.

    It is the cumulative sweep of a site, by default the first one. Without one: AP of up to 60 configurations as points
    with bars, or, of more, in falling order.

    Returns:
        `ax`, or the axes of a new figure.
    """
    chosen = cumulative_in(scores, site)
    if not chosen:
        return _precision_by_name(scores, ax)
    ax = new_axes(7.2, 3.8) if ax is None else ax
    clean(ax, grid="y")
    places = np.arange(len(chosen))
    for metric, hue in LINES.items():
        values = [scores.configurations[index][metric] for index in chosen]
        low, high = np.array([scores.configurations[index].interval(metric) for index in chosen]).T
        ax.fill_between(places, low, high, color=hue, alpha=0.22, linewidth=0)
        ax.plot(places, values, marker="o", color=hue, markersize=4.5, linewidth=1.6)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("average precision")
    number_heads_off(ax, len(chosen) - 1)
    order = order_of([scores.configurations[index].configuration for index in chosen])
    if order != tuple(range(len(order))):
        ax.set_xlabel("number of heads off; below it the head that went off last", labelpad=15)
        name_heads_below(ax, "", order, INK, 15)
    handles = [Line2D([], [], color=hue, marker="o", label=metric) for metric, hue in LINES.items()]
    _legend(ax, [*handles, *_band(scores)], scores, entry=1.3)
    return ax


def _precision_by_name(scores: Scores, ax: Axes | None) -> Axes:
    named = len(scores) <= MOST_NAMED
    if ax is None:
        ax = new_axes(7.2, 1.5 + 0.17 * len(scores) if named else 3.8)
    clean(ax, grid="x" if named else "y")
    places = np.arange(len(scores))
    values = np.array([one["AP"] for one in scores.configurations])
    low, high = np.array([one.interval("AP") for one in scores.configurations]).T
    if named:
        ax.hlines(places, low, high, color=BLUE, alpha=0.4, linewidth=4)
        ax.plot(values, places, "o", color=BLUE, markersize=5, markeredgecolor="white")
        names = [shorten(one.configuration.name, 40) for one in scores.configurations]
        ax.set_yticks(places, names, fontsize=LABEL_POINTS)
        plain_text(ax.yaxis)
        ax.set_ylim(len(scores) - 0.4, -0.6)
        ax.set_xlim(0, 1.02)
        ax.set_xlabel("average precision (AP)")
    else:
        order = np.argsort(-values, kind="stable")
        ax.fill_between(places, low[order], high[order], color=BLUE, alpha=0.22, linewidth=0)
        ax.plot(places, values[order], color=BLUE, linewidth=1.6)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("average precision (AP)")
        ax.set_xlabel(f"{counted(len(scores), 'configuration')}, from the highest to the lowest AP")
    _legend(ax, [Line2D([], [], color=BLUE, marker="o", label="AP"), *_band(scores)], scores, entry=1.5)
    return ax


def plot_subset_precision(scores: Scores, ax: Axes | None = None, *, site: Site | None = None) -> Axes:
    """AP of every subset of heads, over the number of heads off; the best and the worst of each number are named.

    Raises:
        SettingError: the configurations do not have all subsets of heads.
    """
    kind, indices = _sweep_in(scores, SubsetSweep, site)
    if kind is None:
        raise SettingError("there is no sweep over all subsets of heads to draw: use --set subsets")
    count = len(kind.heads)
    ax = new_axes(max(6.4, 1.1 + 0.75 * (count + 1)), 4.2) if ax is None else ax
    clean(ax, grid="y")
    precision = np.array([scores.configurations[index]["AP"] for index in indices])
    sizes = np.array([len(off) for off in kind.off])
    names = []
    for size in range(count + 1):
        members = np.flatnonzero(sizes == size)
        members = members[np.argsort(precision[members], kind="stable")]
        # Points of one number of heads are spread in a fixed order, so that they do not hide each other.
        spread = (np.arange(len(members)) * 0.618 % 1 - 0.5) * 0.5 if len(members) > 1 else np.zeros(1)
        ax.scatter(size + spread, precision[members], s=14, color=MUTED, alpha=0.55, linewidth=0, zorder=2)
        middle = float(np.median(precision[members]))
        ax.plot([size - 0.36, size + 0.36], [middle, middle], color=INK, linewidth=1.8, zorder=3)
        for member, look, hue in (
            (members[-1], "^", OBJECT_COLOURS[4]),
            (members[0], "v", OBJECT_COLOURS[1]),
        ):
            ax.plot(size, precision[member], look, color=hue, markersize=6, markeredgecolor="white", zorder=4)
        best, worst = (_heads_text(kind.off[member]) for member in (members[-1], members[0]))
        names.append(f"{size}\n{best}\n{worst}" if 0 < size < count else f"{size}\n\n")
    ax.set_xticks(range(count + 1), names, fontsize=7)
    ax.set_ylim(-0.02, 1.02)
    ax.set_xlabel("number of heads off; below it the heads of the best and of the worst subset")
    ax.set_ylabel("average precision (AP)")
    handles = [
        Line2D([], [], ls="none", marker="o", color=MUTED, alpha=0.6, label="a subset of heads off"),
        Line2D([], [], color=INK, linewidth=1.8, label="median"),
        Line2D([], [], ls="none", marker="^", color=OBJECT_COLOURS[4], label="best"),
        Line2D([], [], ls="none", marker="v", color=OBJECT_COLOURS[1], label="worst"),
    ]
    _legend(ax, handles, scores, entry=1.4)
    return ax


def _heads_text(heads: Sequence[int]) -> str:
    """In lines of four heads."""
    rows = [heads[start : start + 4] for start in range(0, len(heads), 4)]
    return " ".join("".join(map(str, row)) if max(heads) < 10 else ",".join(map(str, row)) for row in rows)


def plot_class_losses(
    scores: Scores,
    ax: Axes | None = None,
    configurations: Sequence[int] | None = None,
    *,
    site: Site | None = None,
) -> Axes:
    """AP lost of each class (rows, the most lost first) under configurations (columns).

    Args:
        scores: of a data set.
        ax: axes to draw in; by default those of a new figure.
        configurations: their indices; by default those of the cumulative sweep, or up to 12 with the most AP lost.
        site: of the cumulative sweep, by default the first one.
    """
    chosen = list(cumulative_in(scores, site)[1:]) if configurations is None else list(configurations)
    numbered = configurations is None and bool(chosen)
    if not chosen:
        losses = [scores.loss(index)[0] for index in range(len(scores))]
        chosen = sorted(range(1, len(scores)), key=lambda index: -losses[index])[:MOST_COLUMNS]
    lost = np.stack([scores.baseline.by_class - scores.configurations[i].by_class for i in chosen], 1)
    shown = np.flatnonzero(~np.isnan(lost).any(1))
    shown = shown[np.argsort(-lost[shown].mean(1), kind="stable")]
    uncertain = np.stack(
        [
            ~((scores.configurations[i].class_loss_low > 0) | (scores.configurations[i].class_loss_high < 0))
            for i in chosen
        ],
        1,
    )[shown]
    values = lost[shown]
    names = [shorten(scores.truth.class_names[label], 24) for label in shown]
    if ax is None:
        width = 2.4 + 0.06 * max(map(len, names), default=0) + 0.55 * len(chosen)
        ax = new_axes(max(5.4, width), 1.7 + (0.3 if len(shown) <= 24 else 0.19) * max(len(shown), 2))
    clean(ax)
    limit = float(np.abs(values).max(initial=0)) or 1.0
    draw_scores(ax, values if len(values) else np.zeros((1, len(chosen))), limit, uncertain, decimals=2)
    ax.set_yticks(range(len(names)), names, fontsize=LABEL_POINTS if len(names) <= 24 else 6.5)
    plain_text(ax.yaxis)
    ax.set_ylabel("")
    if numbered:
        ax.set_xticks(range(len(chosen)), [str(k) for k in range(1, len(chosen) + 1)])
        ax.set_xlabel("number of heads off")
    else:
        titles = [shorten(scores.configurations[i].configuration.name, 20) for i in chosen]
        ax.set_xticks(range(len(chosen)), titles, rotation=90, fontsize=7)
        plain_text(ax.xaxis)
        ax.set_xlabel("")
    colour_bar(ax, limit, "AP lost")
    handles: list[Any] = hue_handles("AP rises", "AP falls")
    if uncertain.any():
        handles.append(
            Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0, label="interval spans 0")
        )
    legend_above(ax, handles, entry=1.5, title="AP lost of each class, most lost first")
    return ax


def plot_outcome_rates(
    scores: Scores, ax: Axes | None = None, *, reference: str = REFERENCES[0], site: Site | None = None
) -> Axes:
    """What becomes of objects: a stacked bar for each configuration of the cumulative sweep, else for up to 60.

    Unmatched detections, which belong to no object, are a line, in numbers for one object.

    Args:
        scores: of a data set.
        ax: axes to draw in; by default those of a new figure.
        reference: `none off`: objects are the detections with nothing off; `truth`: the true objects.
        site: of the cumulative sweep, by default the first one.

    Raises:
        SettingError: there is no such reference.
    """
    if reference not in REFERENCES:
        raise SettingError(
            f"objects cannot be those of {reference!r}: use {' or '.join(map(repr, REFERENCES))}"
        )
    cumulative = cumulative_in(scores, site)
    chosen = list(cumulative) or list(range(min(len(scores), MOST_NAMED)))
    numbered = bool(cumulative)
    ax = new_axes(7.2 if numbered else max(7.2, 1.5 + 0.17 * len(chosen)), 3.8) if ax is None else ax
    clean(ax, grid="y")
    rates = np.stack([scores.configurations[index].outcomes[reference].rates for index in chosen])
    places, bottom = np.arange(len(chosen)), np.zeros(len(chosen))
    for column, status in enumerate(STATUSES):
        ax.bar(
            places,
            rates[:, column],
            bottom=bottom,
            width=0.72,
            color=STATUS_STYLES[status].fill,
            edgecolor="white",
            linewidth=0.4,
            zorder=2,
        )
        for place, (value, under) in enumerate(zip(rates[:, column], bottom, strict=True)):
            if numbered and value >= 0.08:
                ax.text(
                    place, under + value / 2, f"{value:.0%}", ha="center", va="center", fontsize=7, zorder=4,
                    color=ink_on(STATUS_STYLES[status].fill),
                )  # fmt: skip
        bottom += np.nan_to_num(rates[:, column])
    unmatched = rates[:, len(STATUSES)]
    ax.plot(places, unmatched, color=INK, marker="D", markersize=4, linewidth=1.2, zorder=5)
    ax.set_ylim(0, max(1.02, 1.05 * float(np.nan_to_num(unmatched).max(initial=0))))
    if numbered:
        number_heads_off(ax, len(chosen) - 1)
    else:
        names = [shorten(scores.configurations[i].configuration.name, 28) for i in chosen]
        ax.set_xticks(places, names, rotation=90, fontsize=7)
        plain_text(ax.xaxis)
    ax.set_ylabel("share of objects")
    handles: list[Any] = [Patch(facecolor=STATUS_STYLES[s].fill, label=s.value) for s in STATUSES]
    handles.append(Line2D([], [], color=INK, marker="D", markersize=4, label="unmatched, for one object"))
    objects = scores.baseline.outcomes[reference].objects
    what = "detections with nothing off" if reference == REFERENCES[0] else "true objects"
    title = f"{counted(objects, 'object')}: the {what}; detections of a score above {scores.confidence:g}"
    legend_above(ax, handles, entry=0.85, title=title)
    return ax


def _band(scores: Scores) -> list[Patch]:
    return [Patch(color=MUTED, alpha=0.3, label=INTERVAL)] if scores.resamples > 1 else []


def _legend(ax: Axes, handles: Sequence[Any], scores: Scores, entry: float) -> None:
    objects = scores.baseline.outcomes["truth"].objects
    title = f"{counted(objects, 'true object')} in {counted(len(scores.images), 'image')}"
    legend_above(ax, handles, entry=entry, title=title)


def evaluation_figures(
    scores: Scores,
    relevance: SampleStatistics | None = None,
    faithfulness: SampleStatistics | None = None,
) -> Iterator[tuple[str, str, Figure]]:
    """All figures that the configurations allow, one at a time, each with the stem of its file and a caption."""
    # Of sweeps at several sites each has its own.
    sites: list[Site | None] = [*_sites_of(scores, CumulativeSweep)] or [None]
    for site in sites:
        stem, at = _naming(site, sites)
        yield (
            f"precision{stem}",
            f"Average precision with heads off{at}.",
            figure_of(plot_precision(scores, site=site)),
        )
    subsets: list[Site | None] = [*_sites_of(scores, SubsetSweep)]
    for site in subsets:
        stem, at = _naming(site, subsets)
        caption = f"AP of every subset of heads{at}, each in all layers."
        yield f"subsets{stem}", caption, figure_of(plot_subset_precision(scores, site=site))
    for found in head_scores(scores):
        caption = (
            "AP that is lost without a single head, paired by image."
            if found.layers
            else "The share of each head in the AP: its mean contribution over all subsets of the others."
        )
        stem = f"{found.measure}_{found.site}"
        yield stem, caption, figure_of(plot_heads_precision(found))
        if found.interactions is not None:
            caption = "What pairs of heads add to the AP beyond what each adds."
            yield f"interactions_{found.site}", caption, figure_of(plot_heads_interactions(found))
    for site in sites if len(scores) > 1 else []:
        stem, at = _naming(site, sites)
        for reference in REFERENCES:
            what = "the detections with nothing off" if reference == REFERENCES[0] else "the true objects"
            yield (
                f"outcomes_{reference.replace(' ', '_')}{stem}",
                f"What becomes of {what}{at}.",
                figure_of(plot_outcome_rates(scores, reference=reference, site=site)),
            )
        yield f"classes{stem}", f"AP lost of each class{at}.", figure_of(plot_class_losses(scores, site=site))
    if relevance is not None:
        caption = "Where relevance is, after the last layer."
        yield "relevance", caption, figure_of(plot_relevance_statistics(relevance))
    if faithfulness is not None:
        caption = "Whether relevance is faithful: insertion and deletion of image tokens."
        yield "faithfulness", caption, figure_of(plot_faithfulness_statistics(faithfulness))


def _naming(site: Site | None, sites: Sequence[Site | None]) -> tuple[str, str]:
    """What the names of figures and captions end in, where there are several sites."""
    return (f"_{site}", f" at {site}") if len(sites) > 1 else ("", "")
