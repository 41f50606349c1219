"""Charts of a sweep: survival of objects, and outcomes."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from headoff.figures.canvas import DPI, figure_of, width_of
from headoff.figures.captions import heads_off_counts, object_name, shorten
from headoff.figures.palette import GRID, INK, MUTED, STATUS_STYLES, StatusStyle, object_colour
from headoff.sweeps import SweepResult

_LABEL_POINTS = 8.0
_LINE_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)))
"""Line styles distinguish objects with the same colour; there are eight colours."""


def plot_survival(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The probability of each object's class at the object's query, over the configurations.

    Lines have the objects' colours, and numbers and classes at their right end. Markers show the object's status. The
    dotted line is the confidence above which a prediction is a detection. The x axis of a cumulative sweep is the
    number of heads off; that of other sweeps are the names of configurations.
    """
    configurations, objects = len(result), len(result.baseline)
    counts = heads_off_counts(result.configurations)
    if ax is None:
        width = min(max(7.2, 2.6 + 0.2 * configurations), 22.0)
        ax = _new_axes(width, max(4.0, 1.2 + objects * 0.155))
    _clean(ax)
    if objects == 0 or configurations == 0:
        return _empty(ax, "No object is detected with none off.")

    survival = result.survival().tolist()
    ordered = counts is not None
    dense = configurations > 60
    ax.axhline(result.confidence, color=MUTED, linewidth=0.9, linestyle=(0, (1.5, 2)), zorder=1)
    for index, scores in enumerate(survival):
        colour = object_colour(index)
        style = _LINE_STYLES[index // 8 % len(_LINE_STYLES)]
        # The line between configurations without an order has no meaning, and is drawn faintly.
        alpha = 1.0 if ordered else 0.3 if not dense else 0.15
        ax.plot(scores, color=colour, linestyle=style, linewidth=1.7, alpha=alpha, zorder=2)
        for status, look in STATUS_STYLES.items():
            at = [c for c, one in enumerate(result.outcomes) if one.outcomes[index].status is status]
            if at:
                ax.plot(
                    at,
                    [scores[c] for c in at],
                    linestyle="none",
                    zorder=3,
                    **_marker(look, colour, 3.2 if dense else 5.2),
                )

    ax.set_ylim(-0.03, 1.03)
    ax.set_xlim(-0.35, configurations - 0.65 if configurations > 1 else 0.35)
    ax.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    ax.set_ylabel("probability of the object's class\nat its own query")
    _name_configurations(ax, result)
    ends = [row[-1] for row in survival]
    names = [shorten(object_name(result.baseline, index), 26) for index in range(objects)]
    _label_ends(ax, names, ends)
    seen = {outcome.status for one in result.outcomes for outcome in one.outcomes}
    handles = [
        Line2D([], [], linestyle="none", label=status.value, **_marker(look, MUTED, 5.2))
        for status, look in STATUS_STYLES.items()
        if status in seen
    ]
    handles.append(
        Line2D([], [], color=MUTED, lw=0.9, ls=(0, (1.5, 2)), label=f"confidence {result.confidence:g}")
    )
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        # An entry is 0.9 inches wide.
        ncols=max(1, min(len(handles), int(width_of(ax) / 0.9))),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.6,
        handletextpad=0.4,
        columnspacing=1.3,
    )
    return ax


def plot_outcomes(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The status of each object (rows) under each configuration (columns), as letters and colours.

    Two rows below count surplus detections: duplicates and unmatched ones.
    """
    configurations, objects = len(result), len(result.baseline)
    cell = 0.3 if configurations <= 60 else 0.085
    if ax is None:
        longest = max((len(object_name(result.baseline, o)) for o in range(objects)), default=0)
        width = max(4.8, 1.6 + 0.075 * min(longest, 26) + cell * configurations)
        ax = _new_axes(width, 1.7 + 0.3 * (objects + 2))
    _clean(ax, grid=False)
    if configurations == 0:
        return _empty(ax, "There is no configuration to compare.")
    letters = cell >= 0.2
    cells: list[tuple[float, float, str, str]] = []
    for column, one in enumerate(result.outcomes):
        for outcome in one.outcomes:
            look = STATUS_STYLES[outcome.status]
            cells.append((column, outcome.object, look.fill, look.letter))
        for row, count in ((objects + 0.35, one.duplicates), (objects + 1.35, len(one.unmatched))):
            # Four shades of grey; larger numbers have the same shade.
            cells.append((column, row, f"{1 - 0.09 * min(count, 4):.2f}", str(count) if count else "·"))
    _draw_cells(ax, cells, letters)
    names = [shorten(object_name(result.baseline, index), 26) for index in range(objects)]
    ax.set_yticks(
        [*range(objects), objects + 0.35, objects + 1.35], [*names, "duplicates", "unmatched detections"]
    )
    for tick in ax.get_yticklabels():
        tick.set_parse_math(False)
    for index in range(objects):
        ax.plot(
            [-0.5 - 0.084 / cell],
            [index],
            marker="s",
            markersize=5,
            color=object_colour(index),
            clip_on=False,
        )
    ax.tick_params(axis="y", pad=14)
    ax.tick_params(length=0)
    ax.set_ylim(objects + 1.9, -0.55)
    ax.set_xlim(-0.52, configurations - 0.48)
    for spine in ax.spines.values():
        spine.set_visible(False)
    _name_configurations(ax, result)
    handles = [
        Patch(facecolor=look.fill, label=f"{look.letter}  {status.value}" if letters else status.value)
        for status, look in STATUS_STYLES.items()
    ]
    ax.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=5 if configurations * cell > 4 else 3,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=1.1,
        columnspacing=1.2,
    )
    return ax


def _new_axes(width: float, height: float) -> Axes:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    return figure.add_subplot()


def _clean(ax: Axes, grid: bool = True) -> None:
    ax.set_facecolor("none")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=_LABEL_POINTS, length=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=INK, fontsize=9)
    if grid:
        ax.grid(axis="y", color=GRID, linewidth=0.6)
        ax.set_axisbelow(True)


def _empty(ax: Axes, message: str) -> Axes:
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.text(0.5, 0.5, message, transform=ax.transAxes, ha="center", va="center", color=MUTED, fontsize=10)
    return ax


def _marker(look: StatusStyle, colour: str, size: float) -> dict[str, Any]:
    face = "white" if look.hollow else colour
    return {
        "marker": look.marker,
        "markersize": size,
        "markerfacecolor": face,
        "markeredgecolor": colour if look.hollow else "white",
        "markeredgewidth": 1.4 if look.hollow else 0.5,
    }


def _draw_cells(ax: Axes, cells: Sequence[tuple[float, float, str, str]], letters: bool) -> None:
    """Draw cells of a table, given as (column, row, colour, letter)."""
    # One collection, because hundreds of separate patches would take seconds.
    shapes = [Rectangle((column - 0.47, row - 0.44), 0.94, 0.88) for column, row, _, _ in cells]
    fills = [fill for _, _, fill, _ in cells]
    ax.add_collection(PatchCollection(shapes, facecolors=fills, edgecolors="none"))
    for column, row, _, letter in cells if letters else ():
        ax.text(column, row + 0.02, letter, ha="center", va="center", fontsize=_LABEL_POINTS, color=INK)


def _name_configurations(ax: Axes, result: SweepResult) -> None:
    counts = heads_off_counts(result.configurations)
    if counts is not None:
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_xlabel("number of heads off")
        return
    # Names are vertical; if there are too many to read, only every nth is shown.
    every = max(1, len(result) // 60)
    names = [shorten(configuration.name, 28) for configuration in result.configurations]
    shown = range(0, len(names), every)
    ax.set_xticks(shown, [names[index] for index in shown], rotation=90)
    for tick in ax.get_xticklabels():
        tick.set_parse_math(False)
        tick.set_fontsize(7)
    if every > 1:
        ax.set_xlabel(f"configurations (every {every}th is named)")


def _label_ends(ax: Axes, names: Sequence[str], ends: Sequence[float]) -> None:
    """Names at the right of the lines, moved apart to be readable, and connected to the ends of the lines."""
    points = ax.get_window_extent().height / figure_of(ax).dpi * 72
    low, high = ax.get_ylim()
    size = min(_LABEL_POINTS, points / len(names) / 1.15)
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
