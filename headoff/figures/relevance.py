"""Pictures of an `Explanation`: one map, the objects and layers of a configuration, the heads' attention.

Tokens are drawn as squares, unless the style is smooth. A map without evidence is replaced by a text. Every picture is
drawn in one axes (`headoff.figures.tiles`).
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
_LEAST_COLUMN, _LEAST_WIDTH, _WIDEST = 1.78, 3.6, 9.5
"""Widths in inches: at least that of the text above a map and above a grid; about at most that of a grid."""


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
        style: by default one scale for each object.
        title: by default class, score, query and layer.

    Raises:
        SettingError: there is no such map.
    """
    check_shown(explanation, configuration, object)
    at = len(explanation.layers) - 1 if layer is None else _layer(explanation, layer)
    style = _style(style, image)
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
    """The maps of all objects: for each a large one, after the last layer, and below it small ones of every layer.

    The solid box is that of the query under this configuration, if it detects the object; the dotted box is the
    baseline's. Below a large map are its mass and the share of the mass within the baseline's box.

    Args:
        explanation: the maps.
        configuration: index in `explanation`.
        ax: axes to draw in; by default those of a new figure.
        image: the maps are drawn on it, unless `style` says otherwise; None draws the maps alone.
        style: by default one scale for each object.
        baseline, confidence: see `headoff.figures.object_views`.
        objects: indices of the objects to draw; all by default.

    Raises:
        SettingError: there is no such configuration or object.
    """
    chosen = range(len(explanation.objects)) if objects is None else objects
    check_shown(explanation, configuration, *chosen)
    style = _style(style, image)
    layers = len(explanation.layers)
    cell_width, cell_height = fitted(explanation.image_size, area=8.4, longest=4.0)
    room = max(cell_width, _LEAST_COLUMN)
    # Small maps are as wide as fits below the large one, in rows if they would be tiny.
    across = min(layers, 6) if cell_width >= 2.4 else min(layers, 3)
    small_width = min((room - (across - 1) * _HEAD_GAP) / across, cell_width)
    small_height = small_width * cell_height / cell_width
    rows = -(-layers // across) if layers > 1 else 0
    large, small = (
        _under(image, style, Place(0, 0, width, height))
        for width, height in ((cell_width, cell_height), (small_width, small_height))
    )
    columns = min(max(len(chosen), 1), max(1, round(_WIDEST / room)))
    columns = 2 if columns == 3 and len(chosen) == 4 else columns
    width = max(2 * EDGE + columns * (room + _GAP) - _GAP, _LEAST_WIDTH)
    words = _explained(explanation, configuration, width)
    top = EDGE + 0.3 + (len(words) + 0.6) * LINE
    block = 1.7 * LINE + cell_height + 1.6 * LINE + rows * (small_height + 1.3 * LINE) + 0.16
    if not len(chosen):
        block = cell_height + 3 * LINE
    sheet = Sheet(width, top + -(-max(len(chosen), 1) // columns) * block + 0.3, ax)
    sheet.head(explanation.configurations[configuration].name, words)
    if not len(chosen):
        place = Place(EDGE, top - LINE, cell_width, cell_height)
        if image is not None:
            sheet.paint(pixels_of(small_picture(image), place), place)
        for number, line in enumerate(wrapped(NOTHING_TO_EXPLAIN, width)):
            sheet.write(EDGE, place.top + cell_height + (number + 1.3) * LINE, line)
        return sheet.ax
    scaled, span = explanation.scaled(style.scale)[configuration], grid_span(explanation)
    views = object_views(explanation, configuration, baseline=baseline, confidence=confidence)
    shares, masses = explanation.box_shares[configuration], explanation.masses[configuration]
    statuses = explanation.statuses[configuration]

    def draw(place: Place, index: int, at: int, under: np.ndarray | None, line: float) -> None:
        if statuses[index][at] is ExplanationStatus.OK:
            _draw(sheet, place, scaled[index, at], style, under, span)
            sheet.boxes(place, views[index], line)
        else:
            sheet.message(place, statuses[index][at].value)

    for number, index in enumerate(chosen):
        view = views[index]
        left, above = EDGE + number % columns * (room + _GAP), top + number // columns * block
        sheet.write(left, above + 0.9 * LINE, f"{view.heading}, {view.origin}", 8.5, room=room, bold=True)
        place = Place(left, above + 1.4 * LINE, cell_width, cell_height)
        draw(place, index, layers - 1, large, 1.6)
        below = place.top + cell_height + 1.1 * LINE
        note = f"layer {explanation.layers[-1]}"
        if statuses[index][-1] is ExplanationStatus.OK:
            mass, share = float(masses[index, -1]), float(shares[index, -1])
            note += f": mass {mass:.3g}, {share:.0%} of it in the box"
        sheet.write(left, below, note, colour=MUTED, room=room)
        for at, layer in enumerate(explanation.layers if rows else ()):
            row, column = divmod(at, across)
            place = Place(
                left + column * (small_width + _HEAD_GAP),
                below + 0.7 * LINE + row * (small_height + 1.3 * LINE),
                small_width,
                small_height,
            )
            draw(place, index, at, small, 0.6)
            sheet.write(
                place.left, place.top + small_height + 0.85 * LINE, f"layer {layer}", SMALL, colour=MUTED
            )
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
    check_shown(explanation, configuration, object)
    if explanation.heads is None:
        raise SettingError(
            "this explanation has no attention weights per head: make it with explain(..., heads=True)"
        )
    style = _style(style, image)
    weights = explanation.heads[configuration, object]
    heads = weights.shape[1]
    cell_width, cell_height = fitted(explanation.image_size, area=1.5, longest=2.0)
    under = _under(image, style, Place(0, 0, cell_width, cell_height))
    pitch, row = cell_width + _HEAD_GAP, cell_height + _HEAD_GAP
    left = EDGE + 0.55
    width = max(left + heads * pitch - _HEAD_GAP + EDGE, _LEAST_WIDTH)
    view = object_views(explanation, configuration, baseline=baseline, confidence=confidence)[object]
    words = wrapped(
        f"{view.heading}, {view.origin}: raw cross-attention of its query, per head and layer, after the gate; "
        "the weights of a head sum to 1 over the image",
        width,
    )
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


def _style(style: MapStyle | None, image: ImageSource | None) -> MapStyle:
    """The style, without what needs an image where there is none."""
    style = style or MapStyle()
    return replace(style, overlay=False) if image is None else style


def _under(image: ImageSource | None, style: MapStyle, place: Place) -> np.ndarray | None:
    """The subdued image under the maps of an overlay; None for plain maps."""
    return (
        pixels_of(small_picture(image), place, under_map=True)
        if style.overlay and image is not None
        else None
    )


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
    words = (
        f"Image relevance ({explanation.method}) for {target_words(explanation)}, after each decoder layer. "
        "Mass: the sum of a map; it has no unit and is no share."
    )
    if explanation.is_signed:
        words += " Drawn is positive relevance; this method has negative relevance, too."
    if not explanation.through_encoder:
        words += " Relevance ends at the memory, as the encoder is not attention between its tokens."
    if explanation.configurations[configuration].clauses:
        words += " Dotted: the box with none off."
    return wrapped(words, width)


def _layer(explanation: Explanation, layer: int) -> int:
    if layer not in explanation.layers:
        layers = listed(map(str, explanation.layers))
        raise SettingError(f"there is no map after decoder layer {layer}: use one of {layers}")
    return explanation.layers.index(layer)


def check_shown(explanation: Explanation, configuration: int, *objects: int) -> None:
    """Raise SettingError unless there are such a configuration and objects."""
    asked = [("configuration", configuration, len(explanation))]
    asked += [("object", index, len(explanation.objects)) for index in objects]
    for what, index, count in asked:
        if not -count <= index < count:
            raise SettingError(f"there is no {what} {index} to draw: there are {count}, counted from 0")
