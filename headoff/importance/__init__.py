"""What each attention head contributes: measures of importance, per head and object."""

from headoff.importance.heads import heads
from headoff.importance.measures import (
    Measure,
    SampledShapley,
    Scores,
    resolve_measure,
)
from headoff.importance.result import HeadImportance

__all__ = ["HeadImportance", "Measure", "SampledShapley", "Scores", "heads", "resolve_measure"]
