"""Pictures of an `Explanation`: one map, the grid of objects and layers of a configuration, the heads' attention.

Tokens are drawn as squares, without interpolation. A map without evidence is replaced by a text. Every picture is drawn
in one axes (`headoff.figures.tiles`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from headoff.detections import Detections
from headoff.errors import SettingError
from headoff.figures.canvas import TITLE_POINTS, fitted
from headoff.figures.captions import listed
from headoff.figures.colouring import MapStyle, coloured
from headoff.figures.object_views import object_views
from headoff.figures.palette import MUTED
from headoff.figures.pictures import small_picture
from headoff.figures.tiles import EDGE, LINE, SMALL, Place, Sheet, pixels_of, wrapped
from headoff.images import ImageSource
from headoff.relevance.explanations import Explanation, ExplanationStatus

NOTHING_TO_EXPLAIN = "No object is detected with none off: there is nothing to explain."

_GAP, _HEAD_GAP = 0.16, 0.06
"""Inches between columns of maps, and between heads."""
_LEAST_COLUMN, _LEAST_WIDTH = 1.78, 3.6
"""Minimum widths in inches of the text above a map, and above a grid."""


def plot_map(
    explanation: Explanation,
    configuration: int = 0,
    object: int = 0,
    layer: int | None = None,
    ax: Axes | None = None,
    *,
    image: ImageSource | None = None,
    style: MapStyle | None = None,
    title: str | None = None,
) -> Axes:
    """One relevance map with the object's box.

    Args:
        explanation: the maps.
        configuration, object: indices in `explanation`.
        layer: the map after this decoder layer; by default after the last one that has a map.
        ax: axes to draw in; by default those of a new figure.
        image: the map is drawn over it, unless `style` says otherwise; None draws the map alone.
        style: by default one scale for the whole sweep.
        title: by default class, score, query and layer.

    Raises:
        SettingError: there is no such map.
    """
    _check(explanation, configuration, object)
    at = len(explanation.layers) - 1 if layer is None else _layer(explanation, layer)
    style = style or MapStyle(overlay=image is not None)
    width, height = fitted(explanation.image_size, area=16.0)
    above = 0.3
    place = Place(0, above, width, height)
    sheet = Sheet(width, height + above, ax)
    view = object_views(explanation, configuration)[object]
    if title is None:
        title = f"{view.heading}, query {view.query}, layer {explanation.layers[at]}"
    sheet.write(0, above - 0.09, title, TITLE_POINTS, room=width)
    if explanation.statuses[configuration][object][at] is ExplanationStatus.OK:
        values = explanation.scaled(style.scale)[configuration, object, at]
        _draw(sheet, place, values, style, _under(image, style, place), grid_span(explanation))
        sheet.boxes(place, view, 1.6)
    else:
        sheet.message(place, explanation.statuses[configuration][object][at].value)
    return sheet.ax


def plot_relevance_grid(
    explanation: Explanation,
    configuration: int = 0,
    ax: Axes | None = None,
    *,
    image: ImageSource | None = None,
    style: MapStyle | None = None,
    baseline: Detections | None = None,
    confidence: float = 0.5,
    objects: Sequence[int] | None = None,
) -> Axes:
    """The maps of all objects: a column for each object, with its box at the top and a row for every decoder layer.

    The solid box is that of the query under this configuration, if it detects the object; the dotted box is the
    baseline's. Above a map are its mass and the share of the mass within the baseline's box.

    Args:
        explanation: the maps.
        configuration: index in `explanation`.
        ax: axes to draw in; by default those of a new figure.
        image: shown at the top, and under the maps of an overlay.
        style: by default one scale for the whole sweep.
        baseline, confidence: see `headoff.figures.object_views`.
        objects: indices of the objects to draw; all by default.

    Raises:
        SettingError: there is no such configuration or object.
    """
    chosen = range(len(explanation.objects)) if objects is None else objects
    _check(explanation, configuration, *chosen)
    style = style or MapStyle()
    cell_width, cell_height = fitted(explanation.image_size, area=3.2, longest=2.4)
    cell = Place(0, 0, cell_width, cell_height)
    picture = None if image is None else pixels_of(small_picture(image), cell)
    under = _under(image, style, cell)
    room = max(cell_width, _LEAST_COLUMN)
    width = max(2 * EDGE + len(chosen) * (room + _GAP) - _GAP, _LEAST_WIDTH)
    words = _explained(explanation, configuration, width)
    top = EDGE + 0.3 + (len(words) + 2.4) * LINE
    row = cell_height + 1.4 * LINE
    rows = len(explanation.layers) if len(chosen) else 0
    sheet = Sheet(width, top + cell_height + rows * row + (0.36 if rows else 0.5), ax)
    sheet.head(explanation.configurations[configuration].name, words)
    if not len(chosen):
        place = Place(EDGE, top - LINE, cell_width, cell_height)
        if picture is not None:
            sheet.paint(picture, place)
        for number, line in enumerate(wrapped(NOTHING_TO_EXPLAIN, width)):
            sheet.write(EDGE, place.top + cell_height + (number + 1.3) * LINE, line)
        return sheet.ax
    scaled, span = explanation.scaled(style.scale)[configuration], grid_span(explanation)
    views = object_views(explanation, configuration, baseline=baseline, confidence=confidence)
    shares, masses = explanation.box_shares[configuration], explanation.masses[configuration]
    statuses = explanation.statuses[configuration]
    for column, index in enumerate(chosen):
        view, left = views[index], EDGE + column * (room + _GAP)
        sheet.write(left, top - 1.45 * LINE, view.heading, 8.5, room=room, bold=True)
        sheet.write(left, top - 0.4 * LINE, view.origin, colour=MUTED, room=room)
        place = Place(left, top, cell_width, cell_height)
        if picture is not None:
            sheet.paint(picture, place)
        sheet.frame(place)
        sheet.boxes(place, view, 1.6)
        for at, layer in enumerate(explanation.layers):
            place = Place(left, top + cell_height + at * row + 1.4 * LINE, cell_width, cell_height)
            above = place.top - 0.35 * LINE
            sheet.write(left, above, f"layer {layer}")
            if statuses[index][at] is not ExplanationStatus.OK:
                sheet.message(place, statuses[index][at].value)
                continue
            note = f"mass {float(masses[index, at]):.3g}, {float(shares[index, at]):.0%} in box"
            sheet.write(left + room, above, note, SMALL, colour=MUTED, right=True)
            _draw(sheet, place, scaled[index, at], style, under, span)
            sheet.boxes(place, view, 0.8)
    sheet.scale(style, "relevance", float(explanation.maps.max()))
    return sheet.ax


def plot_head_attention(
    explanation: Explanation,
    configuration: int = 0,
    object: int = 0,
    ax: Axes | None = None,
    *,
    image: ImageSource | None = None,
    style: MapStyle | None = None,
    baseline: Detections | None = None,
    confidence: float = 0.5,
) -> Axes:
    """Cross-attention weights of one query, for every head (columns) and decoder layer (rows).

    Weights are after the gate; heads that are off are marked as `off`. See `plot_relevance_grid` for the arguments.

    Raises:
        SettingError: there is no such configuration or object, or `explain` was called without `heads=True`.
    """
    _check(explanation, configuration, object)
    if explanation.heads is None:
        raise SettingError(
            "this explanation has no attention weights per head: make it with explain(..., heads=True)"
        )
    style = style or MapStyle()
    weights = explanation.heads[configuration, object]
    heads = weights.shape[1]
    cell_width, cell_height = fitted(explanation.image_size, area=0.9, longest=1.5)
    under = _under(image, style, Place(0, 0, cell_width, cell_height))
    pitch, row = cell_width + _HEAD_GAP, cell_height + _HEAD_GAP
    left = EDGE + 0.55
    width = max(left + heads * pitch - _HEAD_GAP + EDGE, _LEAST_WIDTH)
    view = object_views(explanation, configuration, baseline=baseline, confidence=confidence)[object]
    words = wrapped(f"{view.heading}, {view.origin}: cross-attention of its query, per head", width)
    top = EDGE + 0.26 + (len(words) + 1.3) * LINE
    sheet = Sheet(width, top + len(explanation.layers) * row + 0.34, ax)
    sheet.head(explanation.configurations[configuration].name, words)
    scaled, span = head_maps(explanation, style)[configuration, object], grid_span(explanation)
    for head in range(heads):
        sheet.write(left + head * pitch, top - 0.05, f"head {head}", SMALL, colour=MUTED)
    for at, layer in enumerate(explanation.layers):
        sheet.write(EDGE, top + at * row + cell_height / 2, f"layer {layer}", SMALL, colour=MUTED)
        for head in range(heads):
            place = Place(left + head * pitch, top + at * row, cell_width, cell_height)
            if view.query is None or not weights[at, head].any():
                sheet.message(place, "not found" if view.query is None else "off")
                continue
            _draw(sheet, place, scaled[at, head], style, under, span)
            sheet.boxes(place, view, 0.5)
    sheet.scale(style, "attention", float(explanation.heads.max()))
    return sheet.ax


def head_maps(explanation: Explanation, style: MapStyle) -> Tensor:
    """`explanation.heads` (C, O, M, H, h, w) in 0..1, scaled like relevance maps."""
    assert explanation.heads is not None
    flat = replace(explanation, maps=explanation.heads.flatten(2, 3), heads=None)
    return flat.scaled(style.scale).unflatten(2, explanation.heads.shape[2:4])


def grid_span(explanation: Explanation) -> tuple[float, float]:
    """(width, height) of the grid of tokens, divided by those of the image; the last row and column may exceed it."""
    rows, columns = explanation.grid
    height, width = explanation.resized
    return columns * explanation.stride / width, rows * explanation.stride / height


def target_words(explanation: Explanation) -> str:
    """The explained targets in words: `class logits`, `cx`."""
    return listed("class logits" if name == "class" else name for name in dict.fromkeys(explanation.target))


def _under(image: ImageSource | None, style: MapStyle, place: Place) -> np.ndarray | None:
    """The grey image under the maps of an overlay; None for plain maps."""
    return pixels_of(small_picture(image), place, grey=True) if style.overlay and image is not None else None


def _draw(
    sheet: Sheet,
    place: Place,
    values: Tensor,
    style: MapStyle,
    under: np.ndarray | None,
    span: tuple[float, float],
) -> None:
    if under is not None:
        sheet.paint(under, place)
    sheet.paint(coloured(values, style), place, span)
    sheet.frame(place)


def _explained(explanation: Explanation, configuration: int, width: float) -> list[str]:
    if not explanation.target:
        return []
    words = f"Image relevance ({explanation.method}) for {target_words(explanation)}."
    if explanation.configurations[configuration].clauses:
        words += " Dotted: the box with none off."
    return wrapped(words, width)


def _layer(explanation: Explanation, layer: int) -> int:
    if layer not in explanation.layers:
        layers = listed(map(str, explanation.layers))
        raise SettingError(f"there is no map after decoder layer {layer}: use one of {layers}")
    return explanation.layers.index(layer)


def _check(explanation: Explanation, configuration: int, *objects: int) -> None:
    asked = [("configuration", configuration, len(explanation))]
    asked += [("object", index, len(explanation.objects)) for index in objects]
    for what, index, count in asked:
        if not -count <= index < count:
            raise SettingError(f"there is no {what} {index} to draw: there are {count}, counted from 0")
