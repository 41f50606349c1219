"""The table of outcomes: what became of each object under each configuration."""

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from headoff.figures.captions import object_name
from headoff.figures.chart_axes import (
    LABEL_POINTS,
    LONGEST_NAME,
    clean,
    draw_cells,
    empty,
    name_configurations,
    new_axes,
    number_heads_off,
    object_names,
    plain_text,
    without_frame,
    write_in_cell,
)
from headoff.figures.palette import INK, STATUS_STYLES, object_colour
from headoff.gates import CumulativeSweep, kind_of
from headoff.sweeps import SweepResult


def plot_outcomes(result: SweepResult, ax: Axes | None = None) -> Axes:
    """The status of each object (rows) under each configuration (columns), as letters and colours.

    Two rows below count surplus detections: duplicates and unmatched ones.
    """
    configurations, objects = len(result), len(result.baseline)
    cell = 0.3 if configurations <= 60 else 0.085
    if ax is None:
        longest = max((len(object_name(result.baseline, o)) for o in range(objects)), default=0)
        width = max(4.8, 1.6 + 0.075 * min(longest, LONGEST_NAME) + cell * configurations)
        ax = new_axes(width, 1.7 + 0.3 * (objects + 2))
    clean(ax)
    if configurations == 0:
        return empty(ax, "There is no configuration to compare.")
    letters = cell >= 0.2
    cells: list[tuple[float, float, str, str]] = []
    for column, one in enumerate(result.outcomes):
        for outcome in one.outcomes:
            look = STATUS_STYLES[outcome.status]
            cells.append((column, outcome.object, look.fill, look.letter))
        for row, count in ((objects + 0.35, one.duplicates), (objects + 1.35, len(one.unmatched))):
            # Four shades of grey; larger numbers have the same shade.
            cells.append((column, row, f"{1 - 0.09 * min(count, 4):.2f}", str(count) if count else "·"))
    draw_cells(ax, [cell[:3] for cell in cells])
    for x, y, _, letter in cells if letters else ():
        write_in_cell(ax, x, y + 0.02, letter, LABEL_POINTS, INK)
    ax.set_yticks(
        [*range(objects), objects + 0.35, objects + 1.35],
        [*object_names(result), "duplicates", "unmatched detections"],
    )
    plain_text(ax.yaxis)
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
    without_frame(ax)
    ax.set_ylim(objects + 1.9, -0.55)
    ax.set_xlim(-0.52, configurations - 0.48)
    kind = kind_of(result.configurations)
    if isinstance(kind, CumulativeSweep):
        number_heads_off(ax, kind.heads)
    else:
        name_configurations(ax, result.configurations)
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
