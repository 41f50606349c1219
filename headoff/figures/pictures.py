"""Detections drawn on their image."""

from collections.abc import Iterator

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from headoff.detections import Detections
from headoff.figures.canvas import (
    ABOVE,
    LEAST_TITLE,
    MARGIN,
    TITLE_POINTS,
    figure_of,
    image_figure,
    legend_columns,
    legend_height,
    width_of,
)
from headoff.figures.captions import one_line, shorten
from headoff.figures.marks import Line, Mark, Marks
from headoff.figures.palette import GRID, INK, MUTED, OBJECT_COLOURS, UNMATCHED_COLOUR
from headoff.images import ImageSource, load_image
from headoff.outcomes import ConfigurationOutcome, Status
from headoff.wording import counted

LONGEST_SIDE = 1600
"""Longest side of an image in a figure, in pixels; figures do not show more."""


def plot_detections(
    image: ImageSource | None,
    detections: Detections,
    ax: Axes | None = None,
    *,
    outcome: ConfigurationOutcome | None = None,
    baseline: Detections | None = None,
    title: str | None = None,
    legend: bool = False,
    colours: tuple[str, ...] = OBJECT_COLOURS,
    font_size: float | None = None,
) -> Axes:
    """Boxes with class and score on an image.

    With `outcome`, colours are those of the baseline's objects, and labels begin with the object's number. Without it,
    every detection has a different colour.

    - Solid boxes are found objects, dashed boxes are duplicates, white boxes are unmatched detections.
    - Dotted boxes (with `baseline`) are the baseline's boxes of objects that moved or are lost.
    - An object that is found with another class has the label `old → new`.

    Args:
        image: an argument of `headoff.images.load_image`; None draws only the boxes.
        detections: what is drawn.
        ax: axes to draw in; by default those of a new figure with the image's shape.
        outcome: of the configuration that gave `detections`.
        baseline: the detections with none off.
        title: above the image.
        legend: whether to explain lines below the image.
        colours: "#RRGGBB" by object; they repeat if there are more objects.
        font_size: of labels, in points; by default it depends on the size of the axes.
    """
    height, width = detections.image_size
    if ax is None:
        above = ABOVE if title is not None else MARGIN
        below = legend_height(detections.image_size) if legend else 0.0
        _, (ax,) = image_figure(detections.image_size, above=above, below=below)
    if image is not None:
        ax.imshow(small_picture(image), extent=(0, width, height, 0), interpolation_stage="rgba")
    ax.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(color=GRID, linewidth=0.6, visible=image is not None)
    marks = [*marks_of(detections, outcome, baseline, colours)]
    ax.add_artist(Marks(marks, width, height, font_size))
    if title is not None:
        set_title(ax, title)
    if legend:
        explain_lines(ax)
    return ax


def set_title(ax: Axes, title: str) -> None:
    """A title at the left, cut to the width of the axes (or to a minimum width, if they are narrow)."""
    room = max(width_of(ax), LEAST_TITLE)
    letters = int(room * 72 / (TITLE_POINTS * 0.6))
    text = shorten(one_line(title), letters)
    ax.set_title(text, loc="left", color=INK, fontsize=TITLE_POINTS, parse_math=False)


def small_picture(image: ImageSource) -> Image.Image:
    """The image as RGB, with no side longer than `LONGEST_SIDE`."""
    picture = load_image(image)
    if max(picture.size) > LONGEST_SIDE:
        picture = picture.copy()
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def summary(outcome: ConfigurationOutcome) -> str:
    """`3 kept, 1 lost, 2 unmatched detections`, without counts of zero."""
    parts = [f"{count} {status.value}" for status, count in outcome.counts.items() if count]
    if outcome.unmatched:
        parts.append(counted(len(outcome.unmatched), "unmatched detection"))
    return ", ".join(parts) or "nothing found"


def explain_lines(ax: Axes, drop: float = 5.0) -> None:
    """A legend of the lines that occur in the picture, `drop` points below it."""
    marks = [mark for artist in ax.artists if isinstance(artist, Marks) for mark in artist.marks]
    entries = (
        ("found", Line.FOUND, MUTED, lambda mark: mark.line is Line.FOUND and mark.object is not None),
        ("found again", Line.DUPLICATE, MUTED, lambda mark: mark.line is Line.DUPLICATE),
        ("where it was", Line.WAS, MUTED, lambda mark: mark.line is Line.WAS),
        ("unmatched", Line.FOUND, UNMATCHED_COLOUR, lambda mark: mark.colour == UNMATCHED_COLOUR),
    )
    handles = []
    for label, line, colour, occurs in entries:
        if any(occurs(mark) for mark in marks):
            handle = Line2D([], [], color=colour, linewidth=line.width, label=label)
            handle.set_linestyle("-" if line.dashes is None else (0, line.dashes))
            if colour == UNMATCHED_COLOUR:
                handle.set_path_effects([withStroke(linewidth=line.width + 1.4, foreground=MUTED)])
            handles.append(handle)
    if handles:
        ax.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(0, 0),
            bbox_transform=ax.transAxes + ScaledTranslation(0, -drop / 72, figure_of(ax).dpi_scale_trans),
            borderaxespad=0,
            borderpad=0,
            frameon=False,
            ncols=legend_columns(width_of(ax)),
            fontsize=8,
            labelcolor=MUTED,
            handlelength=2.6,
            columnspacing=1.4,
        )


def marks_of(
    detections: Detections,
    outcome: ConfigurationOutcome | None,
    baseline: Detections | None,
    colours: tuple[str, ...],
) -> Iterator[Mark]:
    """Boxes and labels: detections by falling score, so that the best is on top; then baseline boxes."""
    if outcome is None:
        for index, detection in enumerate(detections):
            colour = colours[index % len(colours)]
            yield Mark(detection.box, colour, name=detection.class_name, note=f"{detection.score:.2f}")
        return
    owners = {d: (found, rank) for found in outcome.outcomes for rank, d in enumerate(found.detections)}
    for index, detection in enumerate(detections):
        note = f"{detection.score:.2f}"
        if index not in owners:
            yield Mark(detection.box, UNMATCHED_COLOUR, name=detection.class_name, note=note)
            continue
        found, rank = owners[index]
        name = f"#{found.object} {detection.class_name}"
        if found.status is Status.RELABELLED:
            name = f"#{found.object} {detections.class_names[found.label]} → {detection.class_name}"
        line = Line.DUPLICATE if rank else Line.FOUND
        yield Mark(detection.box, colours[found.object % len(colours)], line, name, note, found.object)
    for found in outcome.outcomes if baseline is not None else ():
        assert baseline is not None
        was = baseline[found.object]
        colour = colours[found.object % len(colours)]
        if found.status is Status.LOST:
            yield Mark(was.box, colour, Line.WAS, f"#{found.object} {was.class_name}", "lost", found.object)
        elif found.status is Status.MOVED:
            yield Mark(was.box, colour, Line.WAS, object=found.object)
