"""Sentences on a data set under heads that are off."""

from __future__ import annotations

import numpy as np

from headoff.evaluation.importance import HeadScores, head_scores
from headoff.evaluation.scores import Scores
from headoff.figures.evaluation import cumulative_in
from headoff.gates import order_of


def evaluation_headline(scores: Scores) -> str:
    """The verdict of the page, in one or two sentences."""
    low, high = scores.baseline.interval("AP")
    text = f"AP {scores.baseline['AP']:.3f}{_span(low, high)} with nothing off"
    cumulative = cumulative_in(scores)
    if cumulative:
        half = len(cumulative) // 2
        lost = scores.loss(cumulative[half])
        order = order_of([scores.configurations[index].configuration for index in cumulative])[:half]
        if order == tuple(range(len(order))):
            text += f"; the first {half} of {len(cumulative) - 1} heads off cost {_lost(lost)}"
        else:
            text += f"; {', '.join(f'H{head}' for head in order)} off cost {_lost(lost)}"
    text += "."
    single = [found for found in head_scores(scores) if found.layers]
    if single:
        found, layer, head = costliest(single)
        row, column = found.layers.index(layer), found.heads.index(head)
        cost = float(found.scores[row, column]), float(found.low[row, column]), float(found.high[row, column])
        text += f" The single head that costs most is L{layer}H{head}: {_lost(cost)}."
    elif not cumulative and len(scores) > 1:
        worst = max(range(1, len(scores)), key=lambda index: scores.loss(index)[0])
        name = scores.configurations[worst].configuration.name
        text += f" Most is lost with {name}: {_lost(scores.loss(worst))}."
    return text


def _lost(loss: tuple[float, float, float]) -> str:
    return f"{number_text(loss[0])}{_span(*loss[1:])}"


def _span(low: float, high: float) -> str:
    return "" if np.isnan(low) else f" ({number_text(low)} to {number_text(high)})"


def number_text(value: float) -> str:
    """Three decimals; empty for NaN."""
    return "" if np.isnan(value) else f"{value:.3f}".replace("-", "−")


def costliest(single: list[HeadScores]) -> tuple[HeadScores, int, int]:
    """The head whose removal from its layer costs most: its scores, its layer and its number in the layer."""
    found = max(single, key=lambda one: one.scores.max())
    row, column = np.unravel_index(int(found.scores.argmax()), found.scores.shape)
    return found, found.layers[row], found.heads[column]
