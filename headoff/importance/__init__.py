"""What each attention head contributes: measures of importance, per head and object."""

from headoff.importance.aggregate import ImportanceTotals, MeanScores, aggregate
from headoff.importance.cards import HeadCards
from headoff.importance.heads import heads
from headoff.importance.measures import (
    Measure,
    SampledShapley,
    Scores,
    resolve_measure,
)
from headoff.importance.result import HeadImportance

__all__ = [
    "HeadCards",
    "HeadImportance",
    "ImportanceTotals",
    "MeanScores",
    "Measure",
    "SampledShapley",
    "Scores",
    "aggregate",
    "heads",
    "resolve_measure",
]
