"""The figures of what heads contribute, drawn one at a time, on request."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure

from headoff.figures.canvas import figure_of
from headoff.figures.captions import slug
from headoff.figures.head_card import head_card, head_name
from headoff.figures.importance import importance_by_object, measure_title, plot_columns, plot_interactions
from headoff.figures.importance_comparisons import compare_measures, plot_ablations
from headoff.figures.pictures import small_picture
from headoff.figures.sheets import SweepFigure
from headoff.images import ImageSource
from headoff.importance.cards import HeadCards
from headoff.importance.result import HeadImportance, Key

MOST_CARDS = 3
"""Heads that have a card: those of the largest scores, whatever their sign."""


def importance_figures(
    image: ImageSource, importance: HeadImportance, cards: HeadCards | None = None
) -> Iterator[SweepFigure]:
    """The figures of the first value: for each ablation kind and measure a matrix for each object; columns and their
    interactions; measures and ablation kinds compared; the cards of the heads that matter most.
    """
    picture = small_picture(image)
    value = importance.values[0]
    for kind in importance.ablations:
        for measure in importance.measures:
            if Key(kind, measure, value) not in importance.scores:
                continue
            found = importance.get(measure, value, kind)
            if not len(found.scores):
                return  # nothing is detected
            columns = found.scores.shape[1] == 1

            def by_object(measure: str = measure, kind=kind) -> Figure:
                return importance_by_object(importance, measure=measure, value=value, ablation=kind)

            def bars(measure: str = measure, kind=kind) -> Figure:
                return figure_of(plot_columns(importance, measure=measure, value=value, ablation=kind))

            def pairs(measure: str = measure, kind=kind) -> Figure:
                return figure_of(plot_interactions(importance, measure=measure, value=value, ablation=kind))

            title = f"{measure_title(measure)}, {kind} ablation"
            yield SweepFigure(f"{kind}-{slug(measure)}", title, bars if columns else by_object)
            if columns and found.interactions is not None:
                yield SweepFigure(f"{kind}-interactions", f"Interactions of heads, {kind} ablation", pairs)

        def measures(kind=kind) -> Figure:
            return compare_measures(importance, value=value, ablation=kind)

        if len(importance.measures) > 1:
            yield SweepFigure(f"{kind}-measures", f"Measures compared, {kind} ablation", measures)
    for other in importance.ablations[1:]:
        for measure in importance.measures:
            kinds = (importance.ablations[0], other)
            if all(Key(kind, measure, value) in importance.scores for kind in kinds):

                def scatter(measure: str = measure, kinds=kinds) -> Figure:
                    return figure_of(plot_ablations(importance, kinds=kinds, measure=measure, value=value))

                yield SweepFigure(
                    f"{kinds[0]}-{other}-{slug(measure)}", f"{kinds[0]} and {other} ablation", scatter
                )
    if cards is not None and len(importance.objects):
        for layer, head in most_important(importance)[:MOST_CARDS]:

            def card(layer: int | None = layer, head: int = head) -> Figure:
                return head_card(picture, importance, cards, head, layer)

            name = f"all-h{head}" if layer is None else f"l{layer}h{head}"
            yield SweepFigure(f"head-{name}", head_name(head, layer).capitalize(), card)


def most_important(importance: HeadImportance) -> list[tuple[int | None, int]]:
    """(layer, head) by falling size of the mean of the first scores; layer None for a score in all layers."""
    scores = importance.mean_scores()
    layers, heads = scores.shape
    order = scores.abs().flatten().argsort(descending=True, stable=True).tolist()
    single = layers == 1 and importance.shape[0] > 1
    return [(None if single else index // heads, index % heads) for index in order]
