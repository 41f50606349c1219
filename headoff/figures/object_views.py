"""The objects of an explanation under one configuration: texts and boxes for figures and for the page."""

from dataclasses import dataclass

from headoff.detections import Detections
from headoff.figures.captions import one_line
from headoff.figures.palette import object_colour
from headoff.relevance.explanations import Explanation

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the image."""


@dataclass(frozen=True)
class ObjectView:
    """Texts and boxes of one object of an explanation under one configuration."""

    name: str
    """`#2 star`; `star` alone if it is not an object of the baseline."""
    colour: str
    query: int | None
    score: float | None
    first_score: float
    box: Box | None
    """None if the query detects nothing under the configuration."""
    first_box: Box
    """The baseline's box."""

    @property
    def heading(self) -> str:
        """`#2 star 0.93`."""
        return f"{self.name} {'not found' if self.score is None else f'{self.score:.2f}'}"

    @property
    def origin(self) -> str:
        """`query 8`, and the baseline's score if that differs."""
        was = f"was {self.first_score:.2f}"
        if self.query is None:
            return was
        changed = self.score is None or f"{self.score:.2f}" != f"{self.first_score:.2f}"
        return f"query {self.query}, {was}" if changed else f"query {self.query}"


def object_views(
    explanation: Explanation,
    configuration: int,
    *,
    baseline: Detections | None = None,
    confidence: float = 0.5,
) -> list[ObjectView]:
    """The objects of `explanation` under one configuration.

    Args:
        explanation: the explanation.
        configuration: the configuration's index.
        baseline: the baseline's detections, by which objects are numbered and coloured; by default the explained
            objects.
        confidence: the probability of the explained class above which the query's prediction is a detection.
    """
    height, width = explanation.image_size
    numbered = explanation.objects if baseline is None else baseline
    numbers = {(found.query, found.label): number for number, found in enumerate(numbered)}
    scores = explanation.scores[configuration].tolist()
    views = []
    for index, detection in enumerate(explanation.objects):
        query = int(explanation.queries[configuration, index])
        found = query >= 0
        label = int(explanation.labels[configuration, index]) if found else detection.label
        number = numbers.get((detection.query, detection.label))
        cx, cy, w, h = explanation.boxes[configuration, query].tolist()
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        left, top, right, bottom = detection.box
        views.append(
            ObjectView(
                name=one_line(
                    f"{'' if number is None else f'#{number}'} {explanation.objects.class_names[label]}"
                ),
                colour=object_colour(len(numbers) + index if number is None else number),
                query=query if found else None,
                score=scores[index] if found else None,
                first_score=detection.score,
                box=box if found and scores[index] > confidence else None,
                first_box=(left / width, top / height, right / width, bottom / height),
            )
        )
    return views
