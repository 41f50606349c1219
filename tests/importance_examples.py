"""Scores of heads without a detector, for tests of what is made of them."""

import torch

from headoff.detections import Detections
from headoff.importance import HeadImportance, Scores
from headoff.importance.result import Key, Totals

MEASURES = ("removal", "gradient", "shapley_columns", "shapley")
NAMES = ("dog", "a <b> & $c$", "cat")


def importance_of(
    objects=3,
    shape=(3, 4),
    *,
    values=("probability", "duplicates", "unmatched"),
    ablations=("zero", "uniform"),
    seed=0,
):
    """Random scores: `gradient` of the probability only, interactions of columns, errors of `shapley`."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64) / 4

    layers, heads = shape
    scores = {}
    for kind in ablations:
        for measure in MEASURES:
            for value in values:
                if measure == "gradient" and value != "probability":
                    continue
                rows = 1 if value == "unmatched" else objects
                found = random(rows, 1 if measure == "shapley_columns" else layers, heads)
                pairs = random(rows, 1, heads, heads) if measure == "shapley_columns" else None
                scores[Key(kind, measure, value)] = Scores(
                    found,
                    errors=random(*found.shape).abs() if measure == "shapley" else None,
                    interactions=None if pairs is None else pairs + pairs.mT,
                )
    corners = torch.tensor([[10.0, 8.0, 30.0, 28.0]]) + 12 * torch.arange(objects)[:, None]
    detections = Detections(
        torch.arange(objects) + 5,
        torch.arange(objects) % len(NAMES),
        torch.linspace(0.95, 0.7, objects),
        corners,
        (60, 80),
        NAMES,
    )
    totals = {
        (kind, value): Totals(
            random(1 if value == "unmatched" else objects), random(1 if value == "unmatched" else objects)
        )
        for kind in ablations
        for value in values
    }
    return HeadImportance(
        detections, "decoder_cross", shape, scores, totals, frozenset({"unmatched"} & set(values))
    )
