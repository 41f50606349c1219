"""The figures of a sweep, drawn one at a time, on request."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from textwrap import wrap

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from headoff.figures.canvas import CAPTION, DPI, caption_width, figure_of, image_figure, legend_height
from headoff.figures.captions import NONE_OFF, View, slug, views
from headoff.figures.changes import head_changes_by_object
from headoff.figures.marks import MOST_LABELLED, labels_of
from headoff.figures.outcome_table import plot_outcomes
from headoff.figures.palette import MUTED, OBJECT_COLOURS
from headoff.figures.pictures import explain_lines, marks_of, plot_detections, small_picture, summary
from headoff.figures.survival import plot_survival, shows_objects_apart
from headoff.gates import CumulativeSweep, kind_of
from headoff.images import ImageSource
from headoff.sweeps import SweepResult

PANELS = 4
"""Pictures in a grid."""
_CAPTION_POINTS = 8.5

MOST_PICTURES = 64
"""Most configurations that get a figure; DETR has 48 single heads. Tables, charts and the page have all of them."""


@dataclass(frozen=True)
class SweepFigure:
    """A figure that `draw` draws; `stem` is the name of its file without suffix."""

    stem: str
    title: str
    draw: Callable[[], Figure]


def sweep_figures(image: ImageSource, result: SweepResult, *, dpi: int = DPI) -> Iterator[SweepFigure]:
    """One figure per configuration, grids of four, the survival chart and the table of outcomes.

    Single heads also have the survival chart of each object, if there are few objects.

    A cumulative sweep has the grids `none off`, `first 1-4 off`, `first 5-8 off`; others have a grid for
    every four configurations. At most `MOST_PICTURES` configurations are drawn. Images are
    as sharp as files of `dpi` need.
    """
    picture = small_picture(image)
    shown = views(result)[:MOST_PICTURES]
    for view in shown:
        yield SweepFigure(view.stem, view.title, lambda view=view: _sheet(picture, result, [view], dpi))  # type: ignore[misc]
    for title, members in grids(result, shown):
        yield SweepFigure(
            f"grid-{slug(title)}",
            title,
            lambda members=members: _sheet(picture, result, members, dpi),  # type: ignore[misc]
        )
    yield SweepFigure("survival", "Survival", lambda: figure_of(plot_survival(result)))
    if shows_objects_apart(result):
        yield SweepFigure("survival-by-object", "Survival by object", lambda: head_changes_by_object(result))
    yield SweepFigure("outcomes", "What became of each object", lambda: figure_of(plot_outcomes(result)))


def grids(result: SweepResult, shown: Sequence[View]) -> Iterator[tuple[str, Sequence[View]]]:
    """Titles and members of the grids."""
    if not isinstance(kind_of(result.configurations), CumulativeSweep):
        if len(shown) > 1:
            for start in range(0, len(shown), PANELS):
                members = shown[start : start + PANELS]
                yield f"pictures {start + 1}-{start + len(members)}", members
        return
    yield NONE_OFF, shown[:1]
    for start in range(1, len(shown), PANELS):
        members = shown[start : start + PANELS]
        last = start + len(members) - 1
        yield f"first {start}-{last} off" if last > start else members[0].title, members


def _sheet(picture: Image.Image, result: SweepResult, members: Sequence[View], dpi: int) -> Figure:
    alone = len(members) == 1
    room = caption_width(result.image_size, len(members))
    captions = [wrap(_told(result, view), int(room * 72 / (_CAPTION_POINTS * 0.56))) for view in members]
    caption = CAPTION + (max(map(len, captions)) - 1) * 0.15
    below = caption + (legend_height(result.image_size) if alone else 0.0)
    figure, axes = image_figure(result.image_size, len(members), below=below)
    # Reduced to the displayed size, because matplotlib's resampling takes as long as everything else.
    pixels = axes[0].get_window_extent()
    sharper = dpi / DPI
    picture = picture.copy()
    picture.thumbnail((ceil(pixels.width * sharper), ceil(pixels.height * sharper)), Image.Resampling.LANCZOS)
    for ax, view, lines in zip(axes, members, captions, strict=True):
        plot_detections(
            picture, view.detections, ax, outcome=view.outcome, baseline=result.baseline, title=view.title
        )
        _caption(ax, "\n".join(lines))
        if alone:
            explain_lines(ax, drop=5 + 72 * caption)
    return figure


def _told(result: SweepResult, view: View) -> str:
    """What became of the objects, and how many boxes have a label, where not all have one."""
    labels = labels_of([*marks_of(view.detections, view.outcome, result.baseline, OBJECT_COLOURS)])
    told = summary(view.outcome)
    return f"{told}; {MOST_LABELLED} of {labels} boxes labelled" if labels > MOST_LABELLED else told


def _caption(ax: Axes, text: str) -> None:
    ax.annotate(
        text,
        xy=(0, 0),
        xycoords="axes fraction",
        xytext=(0, -5),
        textcoords="offset points",
        va="top",
        fontsize=_CAPTION_POINTS,
        color=MUTED,
    )
