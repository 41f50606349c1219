"""What heads contribute as compact data for the page, whose script draws the matrix, bars and cards of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headoff.figures.captions import shorten
from headoff.figures.chart_axes import LONGEST_NAME
from headoff.figures.importance import INTERVAL, measure_title, spans_zero, value_title
from headoff.figures.importance_comparisons import rank_correlations
from headoff.figures.importance_sheets import most_important
from headoff.figures.matrix import colour
from headoff.figures.palette import OBJECT_COLOURS, ink_on, object_colour
from headoff.importance.aggregate import ImportanceTotals
from headoff.importance.cards import HeadCards
from headoff.importance.result import HeadImportance
from headoff.report.maps import MOST_BYTES, packed, rounded
from headoff.report.story import sentences
from headoff.report.tables import object_assignments
from headoff.sweeps import SweepResult
from headoff.wording import counted

ABLATION_WORDS = {
    "zero": "a head that is off contributes nothing",
    "mean": "a head that is off contributes its mean over the reference set",
    "resample": "a head that is off contributes what it does in other images",
    "uniform": "a head that is off attends to everything alike",
    "optimal": "a head that is off contributes the constant that changes least",
}


def heads_data(importance: HeadImportance, cards: HeadCards | None) -> dict[str, Any]:
    """The data of an image. The last row of every table of scores of objects is the mean over objects."""
    whose = [shorten(name, LONGEST_NAME) for name in importance.object_names]
    scores = []
    for key, found in importance.scores.items():
        of_image = key.value in importance.image_values
        rows, pairs = found.scores, found.interactions
        unclear = spans_zero(found)
        if not of_image and len(rows):
            rows = torch.cat((rows, rows.mean(0, keepdim=True)))
            if pairs is not None:
                pairs = torch.cat((pairs, pairs.mean(0, keepdim=True)))
            if found.errors is not None and unclear is not None:
                # Permutations are the same for all objects, so their errors do not average out.
                last = rows[-1].abs() <= INTERVAL * found.errors.mean(0)
                unclear = torch.cat((unclear, last[None]))
        scores.append(
            {
                "ablation": key.ablation,
                "measure": key.measure,
                "value": key.value,
                "image": of_image,
                "rows": rounded(rows.tolist()),
                "unclear": None if unclear is None else unclear.int().tolist(),
                "pairs": None if pairs is None else rounded(pairs.tolist()),
            }
        )
    correlations = {
        f"{kind}/{value}": {"measures": names, "rows": [[_or_none(x) for x in row] for row in found]}
        for kind in importance.ablations
        for value in importance.values
        if len(importance.objects)
        for names, found in [rank_correlations(importance, value, kind)]
    }
    layer, head = most_important(importance)[0]
    return {
        **_common(importance, [score["measure"] for score in scores]),
        "objects": [
            {"name": name, "colour": object_colour(index), "score": f"{found.score:.2f}"}
            for index, (name, found) in enumerate(zip(whose, importance.objects, strict=True))
        ],
        "mean": f"mean of {counted(len(whose), 'object')}",
        "scores": scores,
        "correlations": correlations,
        "start": {"layer": layer, "head": head},
        "cards": None if cards is None else _cards(cards),
        "attention": None if cards is None else _attention(cards),
    }


def totals_data(totals: ImportanceTotals) -> dict[str, Any]:
    """The data of many images: one row, the mean over images, in every table."""
    scores = [
        {
            "ablation": key.ablation,
            "measure": key.measure,
            "value": key.value,
            "image": True,
            "rows": rounded([found.scores.tolist()]),
            "unclear": [found.spans_zero.astype(int).tolist()],
            "low": [_finite(found.low)],
            "high": [_finite(found.high)],
            "pairs": None if found.interactions is None else rounded([found.interactions.tolist()]),
        }
        for key, found in totals.scores.items()
    ]
    first = next(iter(totals.scores.values()), None)
    start = 0 if first is None else int(np.abs(first.scores).argmax())
    heads = totals.shape[1]
    columns = first is None or (len(first.scores) == 1 and totals.shape[0] > 1)
    return {
        **_common(totals, [score["measure"] for score in scores]),
        "objects": [],
        "mean": f"mean of {counted(totals.images, 'image')}",
        "scores": scores,
        "correlations": {},
        "start": {"layer": None if columns else start // heads, "head": start % heads},
        "cards": None,
        "attention": None,
    }


def _common(importance: HeadImportance | ImportanceTotals, measures: Sequence[str]) -> dict[str, Any]:
    shades = [colour(index / 50 - 1, 1.0) for index in range(101)]
    keys = importance.scores
    return {
        "site": importance.site,
        "layers": importance.shape[0],
        "heads": importance.shape[1],
        "measures": {name: measure_title(name) for name in dict.fromkeys(measures)},
        "values": {name: value_title(name) for name in dict.fromkeys(key.value for key in keys)},
        "ablations": {
            kind: ABLATION_WORDS.get(kind, kind) for kind in dict.fromkeys(key.ablation for key in keys)
        },
        "shades": shades,
        "inks": [ink_on(shade) for shade in shades],
        "over": {shade: ink_on(shade) for shade in OBJECT_COLOURS},
    }


def _cards(cards: HeadCards) -> dict[str, Any]:
    """For each ablation kind the boxes and sentences of none off, then of every configuration of the cards."""
    return {
        kind: {
            "baseline": [
                {
                    "object": index,
                    "name": found.class_name,
                    "score": f"{found.score:.2f}",
                    "box": _box(found.box, result),
                }
                for index, found in enumerate(result.baseline)
            ],
            "without": [_without(result, index) for index in range(len(result))],
        }
        for kind, result in cards.sweeps.items()
    }


def _without(result: SweepResult, index: int) -> dict[str, Any]:
    detections, outcome = result.detections[index], result.outcomes[index]
    assignments = object_assignments(outcome)
    boxes = []
    for place, found in enumerate(detections):
        number, status = assignments.get(place, (None, "unmatched"))
        boxes.append(
            {
                "object": number,
                "name": found.class_name,
                "score": f"{found.score:.2f}",
                "status": status,
                "box": _box(found.box, result),
            }
        )
    return {
        "told": sentences(result.baseline, detections, outcome),
        "boxes": boxes,
        "statuses": [one.status.value for one in outcome.outcomes],
        "probabilities": rounded([one.query_score for one in outcome.outcomes]),
    }


def _box(box: tuple[float, float, float, float], result: SweepResult) -> list[float]:
    """Left, top, width and height in per cent of the image."""
    height, width = result.image_size
    left, top, right, bottom = box
    return [
        round(100 * side, 2)
        for side in (left / width, top / height, (right - left) / width, (bottom - top) / height)
    ]


def _attention(cards: HeadCards) -> dict[str, Any] | None:
    """The attention maps of as many of the first objects as the page has room for."""
    if cards.attention is None or cards.attention.heads is None:
        return None
    maps = cards.attention.heads[0]  # (O, L, H, h, w)
    objects = max(1, min(len(maps), MOST_BYTES // max(maps[0].numel(), 1)))
    rows, columns = cards.attention.grid
    height, width = cards.attention.resized
    stride = cards.attention.stride
    return {
        "rows": rows,
        "columns": columns,
        "span": [columns * stride / width, rows * stride / height],
        "objects": objects,
        **packed(maps[:objects]),
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 4)


def _finite(values: np.ndarray) -> Any:
    return rounded(values.tolist())
