"""The figures of an explanation, drawn one at a time, on request."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from headoff.detections import Detections
from headoff.figures.canvas import figure_of
from headoff.figures.captions import slug
from headoff.figures.colouring import MapStyle
from headoff.figures.pictures import small_picture
from headoff.figures.relevance import plot_head_attention, plot_relevance_grid
from headoff.figures.sampling_points import plot_sampling_points
from headoff.figures.sheets import MOST_PICTURES, SweepFigure
from headoff.images import ImageSource
from headoff.relevance.explanations import Explanation

MOST_OBJECTS = 24
"""Most objects whose maps are drawn, the best detections: a hundred under nine configurations would be 153 figures, and
take minutes. The page and the tables have all of them."""
OBJECTS_PER_FIGURE = 6
"""Most objects in a figure; further objects are in further figures."""


def relevance_figures(
    image: ImageSource,
    explanation: Explanation,
    *,
    style: MapStyle,
    baseline: Detections | None = None,
    confidence: float = 0.5,
) -> Iterator[SweepFigure]:
    """A grid of objects and layers for every configuration, and, if there are weights, one of heads for every object.

    Only the first `MOST_PICTURES` configurations and `MOST_OBJECTS` objects are drawn; tables have all of them.
    """
    picture = small_picture(image)
    objects = min(len(explanation.objects), MOST_OBJECTS)
    digits = max(2, len(str(len(explanation) - 1)))
    for number, configuration in enumerate(explanation.configurations[:MOST_PICTURES]):
        title = configuration.name
        stem = f"relevance-{number:0{digits}}-{slug(configuration.name)}"
        for start in range(0, max(objects, 1), OBJECTS_PER_FIGURE):
            indices = range(start, min(start + OBJECTS_PER_FIGURE, objects))

            def grid(number: int = number, indices: range = indices) -> Figure:
                return figure_of(
                    plot_relevance_grid(
                        explanation,
                        number,
                        image=picture,
                        style=style,
                        baseline=baseline,
                        confidence=confidence,
                        objects=indices,
                    )
                )

            part = f"-objects-{indices[0]}-{indices[-1]}" if objects > OBJECTS_PER_FIGURE else ""
            yield SweepFigure(stem + part, f"Relevance, {title}", grid)
        for index in range(objects if explanation.heads is not None else 0):

            def heads(number: int = number, index: int = index) -> Figure:
                return figure_of(
                    plot_head_attention(
                        explanation,
                        number,
                        index,
                        image=picture,
                        style=style,
                        baseline=baseline,
                        confidence=confidence,
                    )
                )

            def points(number: int = number, index: int = index) -> Figure:
                return figure_of(
                    plot_sampling_points(
                        explanation, number, index, image=picture, baseline=baseline, confidence=confidence
                    )
                )

            query = explanation.objects[index].query
            name = f"heads-{number:0{digits}}-{slug(configuration.name)}-query-{query}"
            yield SweepFigure(name, f"Attention of the heads, {title}", heads)
            if explanation.points is not None:
                name = f"points-{number:0{digits}}-{slug(configuration.name)}-query-{query}"
                yield SweepFigure(name, f"Sampling points, {title}", points)
