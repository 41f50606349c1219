"""Matrices of changes: how much a configuration changes the probability of an object's class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from headoff.figures.canvas import DPI, width_of
from headoff.figures.chart_axes import (
    LABEL_POINTS,
    clean,
    legend_above,
    name_configurations,
    new_axes,
    object_names,
    plain_text,
    write_in_cell,
)
from headoff.figures.matrix import (
    colour,
    colour_bar,
    draw_matrix,
    draw_values,
    hue_handles,
    signed,
    text_handle,
)
from headoff.figures.palette import INK, STATUS_STYLES, ink_on
from headoff.gates import SingleHeadSweep, kind_of
from headoff.outcomes import Status
from headoff.sweeps import SweepResult

MOST_SMALL_MATRICES = 6
"""With more objects than this, single heads have no matrix for each object."""

_LEAST_LIMIT = 0.1
"""The colours end at the largest change, but not below this: rounding errors must not look like changes."""
_NO_CHANGE = 0.005
"""Smaller changes are written as 0."""
_LEAST_POINTS = 4.5
"""The smallest text of a cell."""
_MOST_NAMED = 8
"""Most objects that are named below a matrix of heads."""
_MOST_LETTERED = 40
"""Most objects whose cells have letters; of more, only frames are drawn."""


@dataclass(frozen=True)
class HeadChanges:
    """Changes by single heads, as arrays (layers, heads).

    Attributes:
        values: the largest change of an object's probability, with its sign.
        objects: whose probability that is.
        statuses: what became of the objects that are not kept, as letters: `3M`; empty where all are kept.
    """

    values: np.ndarray
    objects: np.ndarray
    statuses: np.ndarray


def changes(result: SweepResult) -> np.ndarray:
    """(objects, C): how much the probability of each object's class at its query differs from none off."""
    before = np.array([found.score for found in result.baseline], dtype=np.float64)
    return result.survival().double().numpy() - before[:, None]


def head_changes(result: SweepResult, sweep: SingleHeadSweep) -> HeadChanges:
    """The largest change that each head makes when it is off alone. There must be an object."""
    by_head = changes(result)[:, np.array(sweep.configurations)]
    objects = np.abs(by_head).argmax(axis=0)
    statuses = np.array([_status_counts(one.counts) for one in result.outcomes])
    return HeadChanges(
        np.take_along_axis(by_head, objects[None], axis=0)[0],
        objects,
        statuses[np.array(sweep.configurations)],
    )


def plot_head_changes(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The largest change that each head makes when it is off alone, as a matrix of layers x heads.

    Each cell has the change and the number of the object that it is of. Heads without which an object is not kept
    have a frame, and say what becomes of how many objects. A fall is red, a rise blue.
    """
    sweep = _single_heads(result)
    found = head_changes(result, sweep)
    rows, columns = found.values.shape
    if ax is None:
        ax = new_axes(max(5.2, 1.9 + 0.62 * min(columns, 32)), 1.6 + max(0.5 * min(rows, 32), 1.0))
    clean(ax)
    limit = _limit(found.values)
    draw_matrix(ax, found.values, limit, rows=sweep.layers, columns=sweep.heads)
    # A value has six characters. Where there is no room for what became of many objects, the frame alone says it.
    cell = 72 * width_of(ax) / (columns + 1.5)
    longest = max(len(text) for text in found.statuses.flat)
    letters = cell >= _LEAST_POINTS * 0.62 * longest
    points = min(LABEL_POINTS, cell / (0.62 * max(6, longest if letters else 0)))
    written = points >= _LEAST_POINTS
    for row, column in np.ndindex(rows, columns) if written else ():
        value = float(found.values[row, column])
        changed = f"{signed(value)}\n#{found.objects[row, column]}" if abs(value) >= _NO_CHANGE else "0"
        status = found.statuses[row, column] if letters else ""
        ax.text(
            column,
            row,
            f"{changed}\n{status}" if status else changed,
            ha="center",
            va="center",
            fontsize=points,
            linespacing=1.05,
            color=ink_on(colour(value, limit)),
        )
    _frames(ax, found.statuses != "")
    named = sorted({int(n) for n in found.objects[np.abs(found.values) >= _NO_CHANGE]})
    ax.set_xlabel(_key(result, named, width_of(ax)), linespacing=1.4)
    ax.xaxis.label.set_parse_math(False)
    ax.set_ylabel("layer")
    colour_bar(ax, limit, "largest change of an object's probability")
    handles = hue_handles("fall", "rise")
    if written:
        handles += [text_handle(f"0: below {_NO_CHANGE:g}"), text_handle("#2: the object's number")]
    handles += _frame_handles(result, "2", letters=written and letters)
    legend_above(ax, handles, entry=1.25)
    return ax


def head_changes_by_object(result: SweepResult, width: float | None = None) -> Figure:
    """A small matrix of layers x heads for each object: how much each head, off alone, changes its probability.

    Heads without which the object is not kept have a frame, and a letter for what becomes of it.
    With a `width` in inches, that of a narrow screen, matrices are one below the other.
    """
    sweep = _single_heads(result)
    grid = np.array(sweep.configurations)
    rows, columns = grid.shape
    values = changes(result)[:, grid]
    count = len(result.baseline)
    across = min(count, 3) if width is None else 1
    down = -(-count // across)
    figure = Figure(
        figsize=(
            width or 1.2 + across * max(0.24 * columns, 1.9),
            max(0.9 + down * (0.75 + 0.2 * rows), 2.6),
        ),
        dpi=DPI,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(down, across, squeeze=False)
    limit, names = _limit(values), object_names(result)
    for index, ax in enumerate(axes.flat):
        if index >= count:
            ax.set_visible(False)
            continue
        clean(ax)
        draw_matrix(ax, values[index], limit, rows=sweep.layers, columns=sweep.heads)
        statuses = np.array([one.outcomes[index].status for one in result.outcomes])[grid]
        _frames(ax, statuses != Status.KEPT)
        _letters(ax, statuses, values[index], limit)
        title = ax.set_title(names[index], loc="left", fontsize=9)
        title.set(parse_math=False, color=INK)
        ax.set_xlabel("head" if index + across >= count else "", fontsize=8)
        ax.set_ylabel("layer" if index % across == 0 else "", fontsize=8)
    colour_bar(axes, limit, "change of probability")
    handles = [*hue_handles("fall", "rise"), *_frame_handles(result)]
    legend_above(figure, handles, entry=1.25)
    return figure


def plot_changes(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The change of each object's probability (rows) by each configuration (columns).

    Where an object is not kept its cell has a frame, and a letter if there is room. A fall is red, a rise blue.
    """
    values = changes(result)
    objects, configurations = values.shape
    cell = 0.3 if configurations <= 60 else 0.085
    if ax is None:
        ax = new_axes(min(max(5.2, 3.2 + cell * configurations), 40.0), 2.9 + 0.22 * objects)
    clean(ax)
    limit = _limit(values)
    draw_values(ax, values, limit)
    statuses = np.array([[found.status for found in one.outcomes] for one in result.outcomes]).T
    _frames(ax, statuses != Status.KEPT)
    letters = cell >= 0.2 and objects <= _MOST_LETTERED
    if letters:
        _letters(ax, statuses, values, limit)
    ax.set_yticks(range(objects), object_names(result))
    plain_text(ax.yaxis)
    name_configurations(ax, result.configurations)
    colour_bar(ax, limit, "change of the object's probability")
    legend_above(ax, [*hue_handles("fall", "rise"), *_frame_handles(result, letters=letters)], entry=1.25)
    return ax


def _single_heads(result: SweepResult) -> SingleHeadSweep:
    kind = kind_of(result.configurations)
    assert isinstance(kind, SingleHeadSweep)
    return kind


def _limit(values: np.ndarray) -> float:
    """The end of the colour scale."""
    return max(float(np.abs(values).max()), _LEAST_LIMIT)


def _frames(ax: Axes, where: np.ndarray) -> None:
    frames = [Rectangle((column - 0.46, row - 0.43), 0.92, 0.86) for row, column in np.argwhere(where)]
    ax.add_collection(
        PatchCollection(frames, facecolors="none", edgecolors=INK, linewidths=1.3, zorder=3), autolim=False
    )


def _letters(ax: Axes, statuses: np.ndarray, values: np.ndarray, limit: float) -> None:
    """The letters of statuses other than kept."""
    for row, column in np.argwhere(statuses != Status.KEPT):
        ink = ink_on(colour(float(values[row, column]), limit))
        write_in_cell(ax, column, row, STATUS_STYLES[statuses[row, column]].letter, 7, ink)


def _status_counts(counts: Mapping[Status, int]) -> str:
    """`3M 1L`: how many objects are not kept, by the letters of their statuses."""
    return " ".join(
        f"{counts[status]}{look.letter}"
        for status, look in STATUS_STYLES.items()
        if counts[status] and status is not Status.KEPT
    )


def _frame_handles(result: SweepResult, number: str = "", *, letters: bool = True) -> list[Patch | Line2D]:
    """Legend entries of the frame, and of the letters that occur, after `number`."""
    seen = {found.status for one in result.outcomes for found in one.outcomes} - {Status.KEPT}
    if not seen:
        return []
    frame = Patch(facecolor="none", edgecolor=INK, linewidth=1.3, label="not kept")
    shown = [status for status in STATUS_STYLES if status in seen] if letters else []
    return [
        frame,
        *(
            text_handle(f"{number}{STATUS_STYLES[one].letter}: {number} {one.value}".replace(":  ", ": "))
            for one in shown
        ),
    ]


def _key(result: SweepResult, objects: Sequence[int], width: float) -> str:
    """`head`, and below it the names of objects, in lines that fit in `width` inches."""
    known = object_names(result)
    names = [known[index] for index in objects[:_MOST_NAMED]]
    if len(objects) > _MOST_NAMED:
        names.append(f"and {len(objects) - _MOST_NAMED} more")
    lines = ["head"]
    room = int(width * 72 / 4.8)
    for name in names:
        longer = f"{lines[-1]}   {name}"
        if len(lines) > 1 and len(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(name)
    return "\n".join(lines)
