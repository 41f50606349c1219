"""Pictures of how faithful relevance maps are: curves with bands, methods by measures, and the maps of an image."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from headoff.choices import CONTROLS
from headoff.errors import SettingError
from headoff.faithfulness.explained import ExplainedImage
from headoff.faithfulness.measures import Measure, Quantity
from headoff.faithfulness.result import Faithfulness
from headoff.figures.canvas import DPI, TITLE_POINTS, fitted
from headoff.figures.captions import slug
from headoff.figures.chart_axes import LABEL_POINTS, clean
from headoff.figures.colouring import MapStyle, coloured
from headoff.figures.object_views import ObjectView
from headoff.figures.palette import BLUE, INK, MUTED, OBJECT_COLOURS, object_colour
from headoff.figures.tiles import EDGE, LINE, POINTS, SMALL, Place, Sheet, pixels_of, wrapped
from headoff.wording import counted

_DASHES = {"random": (0, (1, 1.5)), "box": (0, (4, 1.5)), "edges": (0, (4, 1.5, 1, 1.5))}
_POINT = "#9AA3AF"
_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1)
_ACROSS = 4
"""Most panels in a row."""
_MAP = 1.15
"""Area of a map of the sheet in square inches."""
Number = tuple[str, float | None]
_NEGATIVE = MapStyle(cmap="winter_r")
"""The colours of evidence against an object."""


def faithfulness_figures(found: Faithfulness) -> Iterator[tuple[str, Figure]]:
    """All figures of numbers, with the stems of their files; one at a time."""
    for measure in found.measures:
        if measure.points is not None and any(found.of(method, measure.name) for method in found.methods):
            yield f"curves-{slug(measure.name)}", plot_faithfulness_curves(found, measure.name)
    for measure in found.measures:
        yield f"methods-{slug(measure.name)}", plot_faithfulness(found, [measure.name])


def plot_faithfulness_curves(found: Faithfulness, measure: str) -> Figure:
    """The curves of a measure, a panel for each quantity and a line for each method, with 95% bands.

    Lines of the legend are in the order of the first panel, the best first; controls are grey.

    Raises:
        SettingError: there is no such measure, or it has no curves.
    """
    chosen = found.measure(measure)
    if chosen.points is None:
        raise SettingError(f"the measure {measure} has no curves: name one of those with curves")
    methods = [method for method in found.methods if found.of(method, measure)]
    quantities, points = chosen.quantities, chosen.points.tolist()
    down = math.ceil(len(quantities) / 2)
    figure = Figure(figsize=(9.6, 0.9 + 3.1 * down), dpi=DPI, facecolor="white", layout="constrained")
    panels = figure.subplots(down, min(2, len(quantities)), squeeze=False).flatten()
    for ax, quantity in zip(panels, quantities, strict=False):
        clean(ax, grid="y")
        for method in methods:
            look = _line(found.methods, method)
            curve = found.curve(method, measure, quantity.name)
            ax.fill_between(curve.points, curve.low, curve.high, color=look["color"], alpha=0.09, linewidth=0)
            ax.plot(curve.points, curve.mean, **look)
        if points[1] < 0.5 * points[-1] / len(points):
            # Points are denser at the beginning, where curves fall.
            ax.set_xscale("function", functions=(_root, np.square))
            ax.set_xticks(_TICKS, [f"{share:.0%}" for share in _TICKS])
        ax.set(xlim=(points[0], points[-1]), ylim=(min(0, ax.dataLim.y0), 1.02), ylabel=quantity.unit)
        ax.set_title(_heading(quantity), loc="left", fontsize=8.5, color=INK)
    for ax in panels[len(quantities) :]:
        ax.set_visible(False)
    figure.supxlabel(chosen.axis, fontsize=9, color=INK)
    first = quantities[0]
    order = found.ranking(measure, first.name) if first.direction != "neither" else ()
    order += tuple(method for method in methods if method not in order)
    handles = [
        Line2D(
            [],
            [],
            label=f"{method} {found.estimate(method, measure, first.name).value:.3f}",
            **_line(found.methods, method),
        )
        for method in order
    ]
    legend = figure.legend(
        handles=handles,
        title=f"{first.name.replace('_', ' ')}, {'area' if points[-1] == 1 else 'mean'}",
        title_fontsize=8,
        alignment="left",
        loc="outside right upper",
        frameon=False,
        fontsize=7,
        labelcolor=INK,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    what = f"{_sentence(chosen.summary)}: mean over {_extent(found, chosen)}, with 95% bands"
    _title(figure, what, margin=2.2)
    return figure


def plot_faithfulness(found: Faithfulness, measures: Sequence[str] | None = None) -> Figure:
    """All methods (rows) by the quantities of some measures (panels), with 95% intervals.

    Filled points are the best, and those that do not differ from it significantly.

    Args:
        found: the numbers.
        measures: their names; by default all.

    Raises:
        SettingError: there is no such measure.
    """
    names = [measure.name for measure in found.measures] if measures is None else list(measures)
    chosen = [
        (measure, quantity)
        for name in names
        for measure in [found.measure(name)]
        for quantity in measure.quantities
    ]
    down = math.ceil(len(chosen) / _ACROSS)
    across = math.ceil(len(chosen) / down)
    height = 1.0 + 0.19 * len(found.methods)
    figure = Figure(
        figsize=(1.6 + across * 2.35, 0.75 + down * height), dpi=DPI, facecolor="white", layout="constrained"
    )
    panels = figure.subplots(down, across, squeeze=False, sharey=True).flatten()
    places = np.arange(len(found.methods))
    for ax, (measure, quantity) in zip(panels, chosen, strict=False):
        clean(ax, grid="x")
        best = found.best(measure.name, quantity.name) if quantity.direction != "neither" else ()
        for place, method in zip(places, found.methods, strict=True):
            estimate = found.estimate(method, measure.name, quantity.name)
            if math.isnan(estimate.value):
                continue
            colour = BLUE if method in best else _POINT
            ax.hlines(place, estimate.low, estimate.high, color=colour, alpha=0.5, linewidth=3)
            face = colour if method in best else "white"
            ax.plot(estimate.value, place, "o", color=colour, markersize=4.6, markerfacecolor=face, zorder=3)
        controls = sum(method in CONTROLS for method in found.methods)
        if 0 < controls < len(places):
            ax.axhline(len(places) - controls - 0.5, color=MUTED, linewidth=0.7)
        ax.set_ylim(len(places) - 0.4, -0.6)
        ax.set_yticks(places, found.methods, fontsize=LABEL_POINTS - 0.5)
        title = _heading(quantity) if len(names) == 1 else f"{measure.name}:\n{_heading(quantity)}"
        ax.set_title(title, loc="left", fontsize=8, color=INK)
        ax.set_xlabel(quantity.unit, fontsize=8)
    for ax in panels[len(chosen) :]:
        ax.set_visible(False)
    if len(names) == 1:
        what = f"{_sentence(chosen[0][0].summary)}: {_extent(found, chosen[0][0])}"
    else:
        what = f"Relevance methods by measures of faithfulness: up to {counted(len(found.records), 'image')}"
    _title(
        figure, f"{what}, 95% intervals. Filled: the best, and those that do not differ from it significantly"
    )
    return figure


def plot_methods(
    image: ExplainedImage,
    methods: Sequence[str],
    numbers: Mapping[str, Sequence[Sequence[Number]]] | None = None,
    ax: Axes | None = None,
    *,
    most: int = 5,
    style: MapStyle | None = None,
    caption: str = "",
) -> Axes:
    """Methods as rows and the objects of an image as columns: a map each, with numbers beside it.

    Maps are scaled from 0 to their maximum; evidence against the object, in methods that have it, is blue.

    Args:
        image: the image.
        methods: relevance methods and controls.
        numbers: for each method and object, names and values to write beside the map; a name alone is a heading.
        ax: axes to draw in; by default those of a new figure.
        most: draw at most so many objects, the first ones.
        style: how maps are drawn.
        caption: what the numbers are.

    Raises:
        SettingError: nothing is detected in the image.
    """
    count = min(len(image), most)
    if not count:
        raise SettingError("nothing is detected in the image: give another one, or a lower confidence")
    style = style or MapStyle(scale="map")
    width, height = fitted((image.picture.height, image.picture.width), area=_MAP, longest=2.2)
    beside = 0.0
    if numbers:
        longest = max(len(_number(*one)) for rows in numbers.values() for row in rows for one in row)
        beside = longest * SMALL * 0.52 / 72 + 0.08
    left = EDGE + max(len(method) for method in methods) * POINTS * 0.6 / 72 + 0.1
    column = width + beside + 0.14
    total = max(left + count * column + EDGE, 4.2)
    negative = any(bool((image.maps(method) < 0).any()) for method in methods)
    against = "Blue and green: evidence against the object. " if negative else ""
    words = wrapped(
        f"Relevance after the last decoder layer, {image.configuration.name}. Maps are from 0 to their maximum. "
        f"{against}{caption}",
        total,
    )
    top = EDGE + 0.3 + (len(words) + 1.6) * LINE
    row = height + 0.09
    sheet = Sheet(total, top + len(methods) * row + EDGE, ax)
    sheet.head("Methods and objects", words)
    under = pixels_of(image.picture, Place(0, 0, width, height), under_map=True) if style.overlay else None
    views = [_view(image, number) for number in range(count)]
    for number, view in enumerate(views):
        sheet.write(left + number * column, top - 0.07, view.heading, POINTS, room=column, bold=True)
    grid = image.grid
    span = grid.shape[1] * grid.stride / grid.resized[1], grid.shape[0] * grid.stride / grid.resized[0]
    for line, method in enumerate(methods):
        above = top + line * row
        sheet.write(EDGE, above + height / 2, method, POINTS)
        maps = image.maps(method)
        for number in range(count):
            place = Place(left + number * column, above, width, height)
            values = maps[number]
            greatest = float(values.abs().max())
            if greatest == 0:
                sheet.message(place, "no evidence")
            else:
                if under is not None:
                    sheet.paint(under, place)
                sheet.paint(coloured((values / greatest).clamp(min=0), style), place, span)
                if bool((values < 0).any()):
                    sheet.paint(coloured((-values / greatest).clamp(min=0), _NEGATIVE), place, span)
                sheet.frame(place)
                sheet.boxes(place, views[number], 0.8)
            for index, one in enumerate(numbers[method][number] if numbers and method in numbers else ()):
                ink, below = (MUTED if one[1] is None else INK), above + 0.1 + index * 0.125
                sheet.write(place.left + width + 0.05, below, _number(*one), SMALL, colour=ink)
    return sheet.ax


def numbers_of(
    found: Faithfulness, record: int, columns: Sequence[tuple[Measure, Quantity]]
) -> dict[str, list[list[Number]]]:
    """What `plot_methods` writes beside the maps of a record's image: some quantities, below the measure's name."""
    numbers: dict[str, list[list[Number]]] = {}
    known = found.records[record]
    for method in found.methods:
        rows: list[list[Number]] = [[] for _ in known.objects]
        before = None
        for measure, quantity in columns:
            scores = known.scores.get((method, measure.name))
            if scores is None:
                continue
            values = scores.values[:, measure.quantities.index(quantity)].tolist()
            for row, value in zip(rows, values, strict=True):
                if measure is not before:
                    row.append((measure.name, None))
                one = quantity.of_object or quantity.name.replace("_", " "), value
                if not quantity.of_object or one not in row:
                    row.append(one)
            before = measure
        numbers[method] = rows
    return numbers


def _number(name: str, value: float | None) -> str:
    return name if value is None else f"{name} {'-' if math.isnan(value) else f'{value:.2f}'}"


def _view(image: ExplainedImage, number: int) -> ObjectView:
    detection = image.objects.detections[number]
    height, width = image.picture.height, image.picture.width
    left, top, right, bottom = detection.box
    box = (left / width, top / height, right / width, bottom / height)
    return ObjectView(
        f"#{number} {detection.class_name}",
        object_colour(number),
        detection.query,
        detection.score,
        detection.score,
        box,
        box,
    )


def _line(methods: Sequence[str], method: str) -> dict:
    if method in CONTROLS:
        return {"color": MUTED, "linestyle": _DASHES[method], "linewidth": 1.3}
    return {"color": OBJECT_COLOURS[methods.index(method) % len(OBJECT_COLOURS)], "linewidth": 1.4}


def _root(x: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(x, 0))


def _heading(quantity: Quantity) -> str:
    better = {"higher": " (higher is better)", "lower": " (lower is better)", "neither": ""}[
        quantity.direction
    ]
    return f"{quantity.name.replace('_', ' ')}{better}"


def _extent(found: Faithfulness, measure: Measure) -> str:
    """`120 images, 311 objects`; where methods had different numbers of images, the range."""
    counts = [found.of(method, measure.name) for method in found.methods]
    images = sorted({len(of) for of in counts if of})
    if not images:
        return "no images"
    text = counted(images[-1], "image") if len(images) == 1 else f"{images[0]:,} to {images[-1]:,} images"
    objects = max(sum(len(one.values) for one in of.values()) for of in counts)
    return f"{text}, {counted(objects, 'object')}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _title(figure: Figure, text: str, margin: float = 0.0) -> None:
    lines = textwrap.wrap(text, int((figure.get_figwidth() - margin) * 12.5))
    figure.suptitle(
        "\n".join(lines), color=INK, fontsize=TITLE_POINTS - 1, x=0.01, ha="left", parse_math=False
    )
