"""The figures of an explanation, one after the other: nothing is drawn before it is asked for."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from headoff.detections import Detections
from headoff.figures.canvas import figure_of
from headoff.figures.captions import slug, title_of
from headoff.figures.colouring import MapStyle
from headoff.figures.pictures import small_picture
from headoff.figures.relevance import plot_head_attention, plot_relevance_grid
from headoff.figures.sheets import MOST_PICTURES, SweepFigure
from headoff.images import ImageSource
from headoff.relevance.explanations import Explanation

ABREAST = 6
"""Objects side by side in a figure; more of them go on in the next one."""


def relevance_figures(
    image: ImageSource,
    explanation: Explanation,
    *,
    style: MapStyle,
    baseline: Detections | None = None,
    confidence: float = 0.5,
) -> Iterator[SweepFigure]:
    """One grid of objects and layers per configuration, and one of the heads per object where there is their attention.

    As with sweeps, the first `MOST_PICTURES` configurations are drawn; the numbers are in the tables of all of them.
    """
    picture = small_picture(image)
    objects = len(explanation.objects)
    digits = max(2, len(str(len(explanation) - 1)))
    for number, configuration in enumerate(explanation.configurations[:MOST_PICTURES]):
        title = title_of(configuration)
        stem = f"relevance-{number:0{digits}}-{slug(configuration.name)}"
        for start in range(0, max(objects, 1), ABREAST):
            some = range(start, min(start + ABREAST, objects))

            def grid(number: int = number, some: range = some) -> Figure:
                return figure_of(
                    plot_relevance_grid(
                        explanation,
                        number,
                        image=picture,
                        style=style,
                        baseline=baseline,
                        confidence=confidence,
                        objects=some,
                    )
                )

            part = f"-objects-{some[0]}-{some[-1]}" if objects > ABREAST else ""
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

            query = explanation.objects[index].query
            name = f"heads-{number:0{digits}}-{slug(configuration.name)}-query-{query}"
            yield SweepFigure(name, f"Attention of the heads, {title}", heads)
