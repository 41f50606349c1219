"""What heads contribute, as pictures: matrices of layers x heads, bars of columns, interactions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from headoff.choices import MEASURES, VALUES, AblationKind
from headoff.errors import SettingError
from headoff.figures.canvas import DPI, width_of
from headoff.figures.captions import one_line, shorten
from headoff.figures.chart_axes import LABEL_POINTS, LONGEST_NAME, clean, empty, legend_above, new_axes
from headoff.figures.matrix import colour, colour_bar, draw_matrix, hue_handles, signed, text_handle
from headoff.figures.palette import GRID, INK, MUTED, ink_on, object_colour
from headoff.importance.measures import Scores, resolve_measure
from headoff.importance.result import HeadImportance
from headoff.values import resolve_value
from headoff.wording import counted

NOTHING_TO_SCORE = "No object is detected with none off: there is nothing to score."
MOST_MATRICES = 11
"""Objects that have a matrix in a figure of several."""
INTERVAL = 1.96
"""Standard errors on either side of a score in its 95% interval."""
_LEAST_POINTS = 4.5
"""The smallest text of a cell."""
_NOTHING = 1e-12


def measure_title(name: str) -> str:
    """What a measure is, in words."""
    return resolve_measure(name).title if name in MEASURES else name


def value_title(name: str) -> str:
    """What a value is, in words."""
    return resolve_value(name).title if name in VALUES else name


def score_limit(scores: Tensor) -> float:
    """The end of the colour scale of scores: one scale for all objects."""
    greatest = float(scores.abs().max()) if scores.numel() else 0.0
    return greatest if greatest > _NOTHING else 1.0


def decimals_of(limit: float) -> int:
    """Decimals with which scores up to `limit` are written: two digits of the largest, one to three decimals."""
    return min(max(1 - math.floor(math.log10(limit)), 1), 3)


def score_text(value: float, decimals: int) -> str:
    """`+0.31`; `0` for what would be rounded to zero."""
    return "0" if abs(value) < 0.5 * 10**-decimals else signed(value, decimals)


def spans_zero(scores: Scores) -> Tensor | None:
    """Where the 95% interval of a sampled score has both signs; None if nothing was sampled."""
    return None if scores.errors is None else scores.scores.abs() <= INTERVAL * scores.errors


def plot_importance(
    importance: HeadImportance,
    object: int | None = None,
    ax: Axes | None = None,
    *,
    measure: str | None = None,
    value: str | None = None,
    ablation: AblationKind | None = None,
) -> Axes:
    """The scores of all heads as a matrix of layers x heads; one row for a measure of heads in all layers.

    Blue heads add to the value, red ones take from it. The scale is that of the object with the largest score. Scores
    whose 95% interval has both signs are hatched.

    Args:
        importance: the scores.
        object: its index; None is the mean over objects. Values of the image need none.
        ax: axes to draw in; by default those of a new figure.
        measure, value, ablation: which scores; by default the first of each.

    Raises:
        SettingError: there are no such scores, or no such object.
    """
    found, names = _which(importance, measure, value, ablation)
    values, uncertain = _of_object(importance, found, names["value"], object)
    rows, columns = values.shape
    if ax is None:
        ax = new_axes(max(5.4, 1.9 + 0.62 * min(columns, 32)), 1.55 + max(0.42 * min(rows, 32), 0.8))
    clean(ax)
    if not len(found.scores):
        return empty(ax, NOTHING_TO_SCORE)
    limit = score_limit(found.scores)
    draw_scores(ax, values, limit, uncertain)
    colour_bar(ax, limit, _wrapped(value_title(names["value"])))
    handles = score_handles(uncertain is not None)
    legend_above(ax, handles, entry=1.6, title=_title(importance, names, object))
    return ax


def importance_by_object(
    importance: HeadImportance,
    *,
    measure: str | None = None,
    value: str | None = None,
    ablation: AblationKind | None = None,
) -> Figure:
    """A matrix of layers x heads for the mean over objects and for each object, on one scale."""
    found, names = _which(importance, measure, value, ablation)
    objects = [] if names["value"] in importance.image_values else [*range(len(found.scores))]
    shown: list[int | None] = [None, *objects[:MOST_MATRICES]]
    rows, columns = found.scores.shape[1:]
    across = min(len(shown), 2 if columns > 12 else 3)
    down = -(-len(shown) // across)
    figure = Figure(
        figsize=(1.3 + across * max(0.46 * columns, 2.2), max(1.0 + down * (0.7 + 0.3 * rows), 2.6)),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(down, across, squeeze=False)
    limit = score_limit(found.scores)
    for index, ax in enumerate(axes.flat):
        if index >= len(shown):
            ax.set_visible(False)
            continue
        clean(ax)
        if not len(found.scores):
            empty(ax, NOTHING_TO_SCORE)
            continue
        values, uncertain = _of_object(importance, found, names["value"], shown[index])
        draw_scores(ax, values, limit, uncertain)
        title = ax.set_title(_object_title(importance, names["value"], shown[index]), loc="left", fontsize=9)
        title.set(parse_math=False, color=INK)
        ax.set_xlabel("head" if index + across >= len(shown) else "", fontsize=8)
        ax.set_ylabel("layer" if index % across == 0 and rows > 1 else "", fontsize=8)
    colour_bar(axes, limit, _wrapped(value_title(names["value"])))
    handles = score_handles(found.errors is not None)
    legend_above(figure, handles, entry=1.6, title=_title(importance, names, None, objects=False))
    return figure


def draw_scores(
    ax: Axes,
    values: np.ndarray,
    limit: float,
    uncertain: np.ndarray | None = None,
    *,
    decimals: int | None = None,
) -> None:
    """Cells with scores (rows, columns) in them where there is room, hatched where `uncertain`."""
    rows, columns = values.shape
    draw_matrix(ax, values, limit, rows=range(rows) if rows > 1 else ["all"], columns=range(columns))
    ax.set_xlabel("head")
    ax.set_ylabel("layer" if rows > 1 else "layers")
    decimals = decimals_of(limit) if decimals is None else decimals
    texts = [[score_text(float(value), decimals) for value in row] for row in values]
    longest = max(len(text) for row in texts for text in row)
    # Points of a cell that text can take, of characters that are 0.6 of its size wide.
    points = min(LABEL_POINTS, 72 * width_of(ax) / (columns + 1.5) / (0.62 * longest))
    for row, column in np.ndindex(rows, columns):
        if uncertain is not None and uncertain[row, column]:
            hatched = Rectangle(
                (column - 0.47, row - 0.44),
                0.94,
                0.88,
                fill=False,
                hatch="////",
                edgecolor=MUTED,
                linewidth=0,
            )
            ax.add_artist(hatched).set_in_layout(False)
        if points >= _LEAST_POINTS:
            ink = ink_on(colour(float(values[row, column]), limit))
            written = ax.text(
                column,
                row,
                texts[row][column],
                ha="center",
                va="center",
                fontsize=points,
                color=ink,
                zorder=4,
            )
            # What is within a cell needs no room, and measuring hundreds of texts would take seconds.
            written.set_in_layout(False)


def score_handles(uncertain: bool) -> list[Patch | Line2D]:
    """Legend entries of a matrix of scores."""
    handles = hue_handles("takes from it", "adds to it")
    if uncertain:
        handles.append(
            Patch(facecolor="none", edgecolor=MUTED, hatch="////", linewidth=0, label="interval spans 0")
        )
    return handles


def plot_columns(
    importance: HeadImportance,
    ax: Axes | None = None,
    *,
    measure: str = "shapley_columns",
    value: str | None = None,
    ablation: AblationKind | None = None,
) -> Axes:
    """The score of every head in all layers: a bar for each object, and the mean over objects as a line across.

    Raises:
        SettingError: there are no such scores, or they are of single layers.
    """
    found, names = _which(importance, measure, value, ablation)
    if found.scores.shape[1] != 1 and importance.shape[0] != 1:
        raise SettingError(
            f"the measure {names['measure']!r} scores the heads of each layer: draw one of heads in all "
            "layers, such as 'shapley_columns'"
        )
    scores = found.scores[:, 0].numpy()
    objects, heads = scores.shape
    of_image = names["value"] in importance.image_values
    if ax is None:
        ax = new_axes(min(max(6.0, 1.4 + heads * (0.34 + 0.13 * min(objects, 12))), 20), 3.3)
    clean(ax, grid="y")
    if not objects:
        return empty(ax, NOTHING_TO_SCORE)
    ax.axhline(0, color=MUTED, linewidth=0.8)
    width = 0.8 / objects
    for index in range(objects):
        places = np.arange(heads) + (index - (objects - 1) / 2) * width
        ax.bar(
            places,
            scores[index],
            width=0.92 * width,
            color=MUTED if of_image else object_colour(index),
            zorder=2,
        )
    handles: list[Any] = []
    if not of_image:
        names_of = [shorten(one_line(name), LONGEST_NAME) for name in importance.object_names]
        handles = [Patch(facecolor=object_colour(i), label=names_of[i]) for i in range(min(objects, 8))]
        handles += [text_handle(f"and {objects - 8} more")] if objects > 8 else []
        means = scores.mean(0)
        ax.hlines(means, np.arange(heads) - 0.44, np.arange(heads) + 0.44, color=INK, linewidth=1.6, zorder=3)
        handles.append(Line2D([], [], color=INK, linewidth=1.6, label="mean over objects"))
    ax.set_xticks(range(heads))
    ax.set_xlabel("head, in all layers")
    ax.set_ylabel(_wrapped(value_title(names["value"])))
    legend_above(ax, handles, entry=1.35, title=_title(importance, names, None, objects=False))
    return ax


def plot_interactions(
    importance: HeadImportance,
    object: int | None = None,
    ax: Axes | None = None,
    *,
    layer: int | None = None,
    measure: str = "shapley_columns",
    value: str | None = None,
    ablation: AblationKind | None = None,
) -> Axes:
    """The Shapley interactions of all pairs of heads: of columns, or of the heads of `layer`.

    Negative (red): either head can stand in for the other, they are redundant. Positive (blue): they need each other.

    Raises:
        SettingError: the measure has no interactions, or there is no such object or layer.
    """
    found, names = _which(importance, measure, value, ablation)
    if found.interactions is None:
        raise SettingError(
            f"the measure {names['measure']!r} has no interactions: draw those of 'shapley_columns' or 'shapley_layers'"
        )
    layers = found.interactions.shape[1]
    if not 0 <= (layer or 0) < layers or (layers > 1 and layer is None):
        raise SettingError(f"layer {layer} has no interactions: use one from 0 to {layers - 1}")
    pairs = found.interactions[:, layer or 0]
    heads = pairs.shape[-1]
    if ax is None:
        ax = new_axes(max(4.8, 1.9 + 0.5 * heads), max(4.1, 1.6 + 0.42 * heads))
    clean(ax)
    if not len(pairs):
        return empty(ax, NOTHING_TO_SCORE)
    _check_object(importance, names["value"], object)
    chosen = (pairs.mean(0) if object is None else pairs[object]).numpy()
    limit = score_limit(pairs)
    draw_scores(ax, chosen, limit)
    for head in range(heads):
        ax.add_patch(Rectangle((head - 0.47, head - 0.44), 0.94, 0.88, facecolor=GRID, zorder=5))
    ax.set_xlabel("head")
    ax.set_ylabel("head")
    ax.set_yticks(range(heads), [str(head) for head in range(heads)])
    where = "" if layers == 1 else f", layer {layer}"
    whose = _object_title(importance, names["value"], object)
    colour_bar(ax, limit, _wrapped(value_title(names["value"])))
    legend_above(
        ax,
        hue_handles("negative: redundant", "positive: need each other"),
        entry=1.8,
        title=f"interactions of heads{where}, {whose}, {names['ablation']} ablation",
    )
    return ax


def _which(
    importance: HeadImportance, measure: str | None, value: str | None, ablation: AblationKind | None
) -> tuple[Scores, dict[str, str]]:
    found = importance.get(measure, value, ablation)
    return found, {
        "measure": measure or importance.measures[0],
        "value": value or importance.values[0],
        "ablation": ablation or importance.ablations[0],
    }


def _of_object(
    importance: HeadImportance, found: Scores, value: str, object: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Scores (rows, columns) of an object, or of the mean over objects, and where their interval spans 0."""
    _check_object(importance, value, object)
    if object is not None:
        uncertain = spans_zero(found)
        return found.scores[object].numpy(), None if uncertain is None else uncertain[object].numpy()
    if not len(found.scores):
        return found.scores.new_zeros(found.scores.shape[1:]).numpy(), None
    mean = found.scores.mean(0)
    if found.errors is None:
        return mean.numpy(), None
    # Permutations are the same for all objects, so their errors do not average out.
    return mean.numpy(), (mean.abs() <= INTERVAL * found.errors.mean(0)).numpy()


def _check_object(importance: HeadImportance, value: str, object: int | None) -> None:
    count = 1 if value in importance.image_values else len(importance.objects)
    if object is not None and not 0 <= object < count:
        raise SettingError(f"there is no object {object} to draw: there are {count}, counted from 0")


def _object_title(importance: HeadImportance, value: str, object: int | None) -> str:
    if value in importance.image_values:
        return "the image"
    if object is not None:
        return shorten(one_line(importance.object_names[object]), LONGEST_NAME)
    return f"mean of {counted(len(importance.objects), 'object')}"


def _title(
    importance: HeadImportance, names: dict[str, str], object: int | None, *, objects: bool = True
) -> str:
    whose = f", {_object_title(importance, names['value'], object)}" if objects else ""
    return f"{measure_title(names['measure'])}{whose}, {names['ablation']} ablation"


def _wrapped(text: str) -> str:
    """In two lines, as labels of axes are long."""
    words = text.split()
    half = -(-len(words) // 2)
    return f"{' '.join(words[:half])}\n{' '.join(words[half:])}" if len(text) > 24 else text
