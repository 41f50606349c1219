"""Where the heads of deformable cross-attention look: sampling points on the image."""

from matplotlib.axes import Axes

from headoff.detections import Detections
from headoff.errors import SettingError
from headoff.figures.canvas import fitted
from headoff.figures.object_views import object_views
from headoff.figures.palette import MUTED, object_colour
from headoff.figures.pictures import small_picture
from headoff.figures.relevance import check_shown
from headoff.figures.tiles import EDGE, LINE, SMALL, Place, Sheet, pixels_of, wrapped
from headoff.images import ImageSource
from headoff.relevance.explanations import Explanation
from headoff.wording import counted

_COLUMNS = 3
_GAP = 0.12
_LARGEST = 110.0
"""Area of a point of weight 1, in square points."""
_LEGEND_ENTRY = 0.62


def plot_sampling_points(
    explanation: Explanation,
    configuration: int = 0,
    object: int = 0,
    ax: Axes | None = None,
    *,
    image: ImageSource,
    baseline: Detections | None = None,
    confidence: float = 0.5,
) -> Axes:
    """The sampling points of one query in deformable cross-attention, a picture for each decoder layer.

    A point's area is its attention weight after the gate, and its colour says the head. Points of heads that are off
    have no weight, and are not drawn; nor are points outside the image, which are counted.

    Args:
        explanation: made with `explain(..., heads=True)` by a detector with deformable cross-attention.
        configuration, object: their indices.
        ax: axes to draw on; a new figure by default.
        image: the explained image.
        baseline, confidence: see `plot_relevance_grid`.

    Raises:
        SettingError: there is no such configuration or object, or the explanation has no sampling points.
        ImageError: the image cannot be read.
    """
    check_shown(explanation, configuration, object)
    if explanation.points is None:
        raise SettingError(
            "this explanation has no sampling points: make it with explain(..., heads=True), and a detector with "
            "deformable cross-attention"
        )
    points = explanation.points[configuration, object]  # (M, H, K, 3)
    layers, heads = points.shape[:2]
    columns = min(_COLUMNS, layers)
    width, height = fitted(explanation.image_size, area=5.0, longest=3.2)
    total = 2 * EDGE + columns * (width + _GAP) - _GAP
    view = object_views(explanation, configuration, baseline=baseline, confidence=confidence)[object]
    words = wrapped(
        f"{view.heading}, {view.origin}: sampling points of its query in the cross-attention of each decoder layer. "
        "Area: attention weight after the gate, summing to 1 over a head that is on. Dotted: the box with none off.",
        total,
    )
    top = EDGE + 0.26 + (len(words) + 1.0) * LINE
    row = height + 0.3
    rows = -(-layers // columns)
    per_line = max(1, int((total - 2 * EDGE) / _LEGEND_ENTRY))
    legend = -(-heads // per_line)
    sheet = Sheet(total, top + rows * row + legend * LINE + EDGE, ax)
    sheet.head(explanation.configurations[configuration].name, words)
    pixels = pixels_of(small_picture(image), Place(0, 0, width, height), under_map=True)
    for at, layer in enumerate(explanation.layers):
        place = Place(EDGE + at % columns * (width + _GAP), top + at // columns * row, width, height)
        sheet.paint(pixels, place)
        sheet.frame(place)
        sheet.boxes(place, view, 1.0)
        outside = 0
        for head in range(heads):
            x, y, weight = points[at, head].double().unbind(-1)
            within = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
            shown = within & (weight > 0)
            outside += int((~within & (weight > 0)).sum())
            sheet.ax.scatter(
                place.left + x[shown] * place.width,
                place.top + y[shown] * place.height,
                s=weight[shown] * _LARGEST,
                color=object_colour(head),
                edgecolors="white",
                linewidths=0.3,
                zorder=4,
            )
        note = f"layer {layer}" + (f", {counted(outside, 'point')} outside the image" if outside else "")
        sheet.write(place.left, place.top + height + 0.13, note, SMALL, colour=MUTED, room=width)
    below = top + rows * row + 0.1
    for head in range(heads):
        left, line = EDGE + head % per_line * _LEGEND_ENTRY, below + head // per_line * LINE
        sheet.ax.scatter([left + 0.05], [line - 0.03], s=16, color=object_colour(head), zorder=4)
        off = not bool((points[:, head, :, 2] > 0).any())
        sheet.write(left + 0.12, line, f"head {head}", SMALL, colour=MUTED if off else object_colour(head))
        if off:
            sheet.ax.plot([left, left + 0.5], [line - 0.035] * 2, color=MUTED, linewidth=0.6, zorder=5)
    return sheet.ax
