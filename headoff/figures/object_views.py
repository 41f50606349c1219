"""The objects of an explanation under one configuration, in words and boxes, for figures and for the page."""

from dataclasses import dataclass

from headoff.detections import Detections
from headoff.figures.captions import one_line
from headoff.figures.palette import object_colour
from headoff.relevance.explanations import Explanation

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as fractions of the image."""


@dataclass(frozen=True)
class ObjectView:
    """One object of an explanation under one configuration, in words and boxes."""

    name: str
    """`#2 star`; `star` alone where it is no object of the baseline."""
    colour: str
    query: int | None
    score: float | None
    first_score: float
    box: Box | None
    """None where the query detects nothing any more."""
    first_box: Box
    """With nothing off."""

    @property
    def heading(self) -> str:
        """`#2 star 0.93`."""
        return f"{self.name} {'not found' if self.score is None else f'{self.score:.2f}'}"

    @property
    def origin(self) -> str:
        """`query 8`, and what the score was if it has changed."""
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
        baseline: what is detected with nothing off, by which objects are numbered and coloured; the explained
            objects themselves by default.
        confidence: above which the explained class at the query counts as detected.
    """
    height, width = explanation.image_size
    numbered = explanation.objects if baseline is None else baseline
    numbers = {query: number for number, query in enumerate(numbered.queries.tolist())}
    scores = explanation.scores[configuration].tolist()
    views = []
    for index, each in enumerate(explanation.objects):
        query = int(explanation.queries[configuration, index])
        found = query >= 0
        label = int(explanation.labels[configuration, index]) if found else each.label
        number = numbers.get(each.query)
        cx, cy, w, h = explanation.boxes[configuration, query].tolist()
        box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
        left, top, right, bottom = each.box
        views.append(
            ObjectView(
                name=one_line(
                    f"{'' if number is None else f'#{number}'} {explanation.objects.class_names[label]}"
                ),
                colour=object_colour(len(numbers) + index if number is None else number),
                query=query if found else None,
                score=scores[index] if found else None,
                first_score=each.score,
                box=box if found and scores[index] > confidence else None,
                first_box=(left / width, top / height, right / width, bottom / height),
            )
        )
    return views
