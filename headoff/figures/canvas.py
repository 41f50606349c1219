"""Figures whose axes have exactly the shape of an image, with room for titles and captions.

Created without pyplot: no window and no global state, so that threads can draw at the same time.
"""

from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 150
TITLE_POINTS = 10.5
LEAST_TITLE = 2.2
"""Minimum width of a title in inches."""
MARGIN, ABOVE, CAPTION = 0.12, 0.32, 0.24
"""Inches around images, above them for a title, and below for a caption."""
LEGEND_ENTRY, LEGEND_ROW = (1.25, 0.18)
"""Width and height in inches of an entry of the legend of lines, which has up to four entries."""


def fitted(image_size: tuple[int, int], area: float = 36.0, longest: float = 10.0) -> tuple[float, float]:
    """(width, height) in inches with an image's shape: `area` square inches, no side longer than `longest`."""
    height, width = image_size
    scale = min((area / (width * height)) ** 0.5, longest / max(width, height))
    return width * scale, height * scale


def figure_of(ax: Axes) -> Figure:
    """The figure of the axes; that of the whole figure, if they are in a subfigure."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def width_of(ax: Axes) -> float:
    """The width of the axes in inches."""
    return float(ax.get_window_extent().width / figure_of(ax).dpi)


def legend_columns(width: float) -> int:
    """Columns of the legend of lines below an image of `width` inches."""
    return min(max(1, int(max(width, LEAST_TITLE) / LEGEND_ENTRY)), 4)


def legend_height(image_size: tuple[int, int]) -> float:
    """Height in inches of the legend of lines below a single image."""
    return ceil(4 / legend_columns(fitted(image_size)[0])) * LEGEND_ROW


def image_figure(
    image_size: tuple[int, int], panels: int = 1, *, above: float = ABOVE, below: float = CAPTION
) -> tuple[Figure, list[Axes]]:
    """A figure with axes for 1 to 4 images of one size: in a row if they are tall, in a column if they are wide."""
    image_width, image_height = _panel_size(image_size, panels)
    columns = _columns(image_size, panels)
    rows = ceil(panels / columns)
    cell_width = caption_width(image_size, panels) + MARGIN
    cell_height = image_height + above + below
    total = (columns * cell_width + MARGIN, rows * cell_height + MARGIN)
    figure = Figure(figsize=total, dpi=DPI, facecolor="white")
    axes = []
    for panel in range(panels):
        row, column = divmod(panel, columns)
        left = MARGIN + column * cell_width
        lower = total[1] - (row + 1) * cell_height + below
        place = (left / total[0], lower / total[1], image_width / total[0], image_height / total[1])
        axes.append(figure.add_axes(place))
    return figure, axes


def caption_width(image_size: tuple[int, int], panels: int) -> float:
    """Width in inches of the text above and below each panel of `image_figure`."""
    return max(_panel_size(image_size, panels)[0], LEAST_TITLE)


def _panel_size(image_size: tuple[int, int], panels: int) -> tuple[float, float]:
    return fitted(image_size, area=36.0 if panels == 1 else 17.0)


def _columns(image_size: tuple[int, int], panels: int) -> int:
    height, width = image_size
    if width > 2.2 * height:
        return 1
    return panels if height > 1.8 * width else ceil(panels**0.5)
