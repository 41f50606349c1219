"""What charts of a sweep have in common: their axes, legends, markers and names."""

from collections.abc import Sequence
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from headoff.figures.canvas import DPI, width_of
from headoff.figures.captions import object_name, shorten
from headoff.figures.palette import GRID, INK, MUTED, STATUS_STYLES, StatusStyle
from headoff.gates import Configuration
from headoff.outcomes import Status
from headoff.sweeps import SweepResult

INTERVAL = "95% interval (bootstrap over images)"
"""What legends say of a band."""
LABEL_POINTS = 8.0
CONFIDENCE_DASHES = (0, (1.5, 2))
LONGEST_NAME = 26
"""Most characters of an object's name."""


def new_axes(width: float, height: float) -> Axes:
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout="constrained")
    return figure.add_subplot()


def clean(ax: Axes, *, grid: str = "") -> None:
    """Plain axes in the colours of pages, with grid lines across the axis `grid` ("x", "y", or none)."""
    ax.set_facecolor("none")
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(colors=MUTED, labelcolor=INK, labelsize=LABEL_POINTS, length=3)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set(color=INK, fontsize=9)
    if grid:
        ax.grid(axis=grid, color=GRID, linewidth=0.6)  # type: ignore[arg-type]
        ax.set_axisbelow(True)


def without_frame(ax: Axes) -> None:
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)


def empty(ax: Axes, message: str) -> Axes:
    without_frame(ax)
    ax.set(xticks=[], yticks=[])
    text = ax.text(0.5, 0.5, message, ha="center", va="center", color=MUTED, fontsize=10)
    text.set_transform(ax.transAxes)
    return ax


def marker(look: StatusStyle, colour: str, size: float) -> dict[str, Any]:
    """The properties of a line that draws a status."""
    face = "white" if look.hollow else colour
    return {
        "marker": look.marker,
        "markersize": size,
        "markerfacecolor": face,
        "markeredgecolor": colour if look.hollow else "white",
        "markeredgewidth": 1.4 if look.hollow else 0.5,
    }


def status_handles(statuses: set[Status]) -> list[Artist]:
    """Legend entries of the statuses that occur."""
    return [
        Line2D([], [], linestyle="none", label=status.value, **marker(look, MUTED, 5.2))
        for status, look in STATUS_STYLES.items()
        if status in statuses
    ]


def confidence_handle(confidence: float) -> Artist:
    return Line2D([], [], color=MUTED, lw=0.9, ls=CONFIDENCE_DASHES, label=f"confidence {confidence:g}")


def legend_above(
    owner: Axes | Figure, handles: Sequence[Artist], *, entry: float = 0.9, title: str | None = None
) -> None:
    """A legend above the axes, or above all axes of a figure, in rows of entries that are `entry` inches wide.

    `title` is above the legend, whatever number of rows that has.
    """
    width = owner.get_figwidth() if isinstance(owner, Figure) else width_of(owner)
    place: dict[str, Any] = (
        {"loc": "outside upper left"}
        if isinstance(owner, Figure)
        else {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0)}
    )
    legend = owner.legend(
        handles=handles,
        title=title,
        title_fontsize=9.5,
        alignment="left",
        ncols=max(1, min(len(handles), int(width / entry))),
        frameon=False,
        fontsize=8,
        labelcolor=INK,
        handlelength=1.6,
        handletextpad=0.4,
        columnspacing=1.3,
        **place,
    )
    for text in (legend.get_title(), *legend.get_texts()):
        text.set(parse_math=False, color=INK)


def object_names(result: SweepResult) -> list[str]:
    """`#0 dog`, ...: the objects as charts name them."""
    return [
        shorten(object_name(result.baseline, index), LONGEST_NAME) for index in range(len(result.baseline))
    ]


def plain_text(axis: Axis) -> None:
    """Dollars in the tick labels of names are no formulas."""
    for tick in axis.get_ticklabels():
        tick.set_parse_math(False)


def name_configurations(ax: Axes, configurations: Sequence[Configuration]) -> None:
    """Vertical names of configurations on the x axis; if there are too many to read, only every nth."""
    every = max(1, len(configurations) // 60)
    names = [shorten(configuration.name, 28) for configuration in configurations]
    shown = range(0, len(names), every)
    ax.set_xticks(shown, [names[index] for index in shown], rotation=90, fontsize=7)
    plain_text(ax.xaxis)
    if every > 1:
        ax.set_xlabel(f"configurations (one in {every} is named)")


def number_heads_off(ax: Axes, heads: int) -> None:
    """0, 1, 2, ... on the x axis of a cumulative sweep."""
    ax.set_xticks(range(heads + 1))
    ax.set_xlabel("number of heads off")


def name_heads_below(ax: Axes, label: str, order: Sequence[int], colour: str, below: float) -> None:
    """A row below the axis: the head that goes off with each step."""
    entries = [(0.0, label, colour), *((step, f"H{head}", INK) for step, head in enumerate(order, start=1))]
    for step, text, ink in entries:
        ax.annotate(
            text,
            xy=(step, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -below),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=7.5,
            color=ink,
            fontweight="bold" if step == 0 else "normal",
        )


def draw_cells(ax: Axes, cells: Sequence[tuple[float, float, Any]]) -> None:
    """Cells of a table, given as (column, row, colour)."""
    # One collection, because hundreds of separate patches would take seconds.
    shapes = [Rectangle((column - 0.47, row - 0.44), 0.94, 0.88) for column, row, _ in cells]
    ax.add_collection(PatchCollection(shapes, facecolors=[fill for *_, fill in cells], edgecolors="none"))


def write_in_cell(ax: Axes, column: float, row: float, text: str, points: float, colour: str) -> None:
    """Text in the middle of a cell of a table."""
    written = ax.text(column, row, text, ha="center", va="center", fontsize=points, color=colour)
    # It is within the axes, and measuring hundreds of texts for the layout takes as long as drawing them.
    written.set_in_layout(False)
