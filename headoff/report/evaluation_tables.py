"""Rows of the tables of an evaluation, and their columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from headoff.evaluation.importance import head_scores
from headoff.evaluation.outcomes import COUNTED, SIZES
from headoff.evaluation.precision import METRICS
from headoff.evaluation.relevance import SampleStatistics
from headoff.evaluation.scores import REFERENCES, Scores
from headoff.report.tables import HEAD_TOTAL_COLUMNS

CONFIGURATION_COLUMNS = (
    *("configuration", "text", "images", "detections", *METRICS),
    *(f"AP_{name}" for name in ("low", "high", "lost", "lost_low", "lost_high")),
)
METRIC_COLUMNS = ("configuration", "text", "metric", "value", "low", "high", "lost", "lost_low", "lost_high")
CLASS_COLUMNS = (
    *("configuration", "text", "class", "objects"),
    *("AP", "low", "high", "lost", "lost_low", "lost_high"),
)
OUTCOME_COLUMNS = ("configuration", "text", "objects_are", "class", "size", "objects", *COUNTED)
RELEVANCE_COLUMNS = (
    *("configuration", "text", "images", "objects", "method", "quantity"),
    *("mean", "low", "high"),
)
FAITHFULNESS_COLUMNS = (
    *("configuration", "text", "images", "objects", "method", "measure", "quantity"),
    *("mean", "low", "high"),
)
RATE_COLUMNS = ("configuration", "text", "objects_are", "outcome", "rate", "low", "high")


Table = tuple[tuple[str, ...], Iterator[dict[str, Any]]]
"""Columns and rows."""


def tables_of(
    scores: Scores,
    ablation: str,
    relevance: SampleStatistics | None = None,
    faithfulness: SampleStatistics | None = None,
) -> dict[str, Table]:
    """All tables, by the names of their files; for the arguments see `headoff.report.evaluation.write_summary`."""
    tables: dict[str, Table] = {
        "configurations.csv": (CONFIGURATION_COLUMNS, configuration_rows(scores)),
        "metrics.csv": (METRIC_COLUMNS, metric_rows(scores)),
        "classes.csv": (CLASS_COLUMNS, class_rows(scores)),
        "outcomes.csv": (OUTCOME_COLUMNS, outcome_rows(scores)),
        "rates.csv": (RATE_COLUMNS, rate_rows(scores)),
        "heads.csv": (HEAD_TOTAL_COLUMNS, head_rows(scores, ablation)),
    }
    if relevance is not None:
        tables["relevance.csv"] = (RELEVANCE_COLUMNS, relevance.rows())
    if faithfulness is not None:
        tables["faithfulness.csv"] = (FAITHFULNESS_COLUMNS, faithfulness.rows())
    return tables


def configuration_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row for each configuration: all metrics, and the interval and loss of AP."""
    for index, one in enumerate(scores.configurations):
        low, high = one.interval("AP")
        lost, lost_low, lost_high = scores.loss(index)
        yield {
            **named(scores, index),
            "images": len(scores.images),
            "detections": one.detections,
            **dict(zip(METRICS, map(float, one.metrics), strict=True)),
            "AP_low": low,
            "AP_high": high,
            "AP_lost": lost,
            "AP_lost_low": lost_low,
            "AP_lost_high": lost_high,
        }


def metric_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row for each configuration and metric, with its interval and what is lost."""
    for index, one in enumerate(scores.configurations):
        for metric in METRICS:
            low, high = one.interval(metric)
            lost, lost_low, lost_high = scores.loss(index, metric)
            yield {
                **named(scores, index),
                **{"metric": metric, "value": one[metric], "low": low, "high": high},
                **{"lost": lost, "lost_low": lost_low, "lost_high": lost_high},
            }


def class_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """One row for each configuration and class that has objects."""
    objects = scores.baseline.outcomes["truth"].objects_by_class.sum(1)
    for index, one in enumerate(scores.configurations):
        for label in np.flatnonzero(~np.isnan(one.by_class)):
            yield {
                **named(scores, index),
                "class": scores.truth.class_names[label],
                "objects": int(objects[label]),
                "AP": float(one.by_class[label]),
                "low": float(one.class_low[label]),
                "high": float(one.class_high[label]),
                "lost": float(scores.baseline.by_class[label] - one.by_class[label]),
                "lost_low": float(one.class_loss_low[label]),
                "lost_high": float(one.class_loss_high[label]),
            }


def outcome_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """Counts of outcomes for each configuration: of all objects, of each size, of each class that occurs."""
    for index, one in enumerate(scores.configurations):
        for reference in REFERENCES:
            counts = one.outcomes[reference]
            parts = [("all", "all", counts.objects_by_class.sum(), counts.by_class.sum((0, 1)))]
            parts += [
                ("all", size, counts.objects_by_class[:, s].sum(), counts.by_class[:, s].sum(0))
                for s, size in enumerate(SIZES)
            ]
            parts += [
                (name, "all", counts.objects_by_class[k].sum(), counts.by_class[k].sum(0))
                for k, name in enumerate(scores.truth.class_names)
                if counts.objects_by_class[k].any() or counts.by_class[k].any()
            ]
            for name, size, objects, numbers in parts:
                yield {
                    **named(scores, index),
                    **{"objects_are": reference, "class": name, "size": size, "objects": int(objects)},
                    **dict(zip(COUNTED, map(int, numbers), strict=True)),
                }


def rate_rows(scores: Scores) -> Iterator[dict[str, Any]]:
    """Outcomes for one object, with intervals."""
    for index, one in enumerate(scores.configurations):
        for reference in REFERENCES:
            found = one.outcomes[reference]
            for place, outcome in enumerate(COUNTED):
                yield {
                    **named(scores, index),
                    **{"objects_are": reference, "outcome": outcome, "rate": float(found.rates[place])},
                    **{"low": float(found.low[place]), "high": float(found.high[place])},
                }


def head_rows(scores: Scores, ablation: str) -> Iterator[dict[str, Any]]:
    """What heads contribute to AP, with the columns of heads.csv of a folder of `headoff heads`."""
    for found in head_scores(scores):
        for row in found.rows():
            yield {"images": len(scores.images), "of": "data set", "ablation": ablation, **row}


def named(scores: Scores, index: int) -> dict[str, str]:
    """The columns that say which configuration a row is of."""
    configuration = scores.configurations[index].configuration
    return {"configuration": configuration.name, "text": configuration.text}
