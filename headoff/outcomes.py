"""What becomes of each baseline detection when heads are switched off.

Counting detections does not answer that: with heads off, a detector often finds an object twice or with an inexact box
before it loses it, so counts go up as well as down. Here every detection of the baseline (an *object*) is followed: it
is found again, found elsewhere, found twice, found with another label, or not found.

Detections are assigned to objects in these steps. A detection belongs to at most one object.

1. **Same query.** An object gets the detection of its baseline query, if that has the same label and an IoU of at least
   `keep_iou`.
2. **Other query.** The remaining objects and detections of the same label with an IoU of at least `touch_iou` are
   paired one to one, greedily by falling IoU; of equal IoUs, that of the object's query comes first.
3. **Duplicates.** An unassigned detection that overlaps objects of its label by at least `touch_iou` is a duplicate
   of the one that it overlaps most, which has a detection by step 2.
4. **Other label.** The remaining objects and detections of different labels with an IoU of at least `keep_iou` are
   paired as in step 2.
5. The remaining detections are **unmatched**: the baseline has no object of that label there.

The categories are those of TIDE (Bolya et al., ECCV 2020: localisation, classification, duplicate and background
errors), with the baseline instead of the ground truth.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from headoff.boxes import pairwise_iou
from headoff.detections import Detections, check_output, class_probabilities
from headoff.errors import SettingError

KEEP_IOU = 0.5
"""Minimum IoU of two boxes in the same place, as in PASCAL VOC and COCO's AP50. Two boxes of equal size have it if they
are a third of their width apart."""

TOUCH_IOU = 0.3
"""Minimum IoU of two boxes of the same label that are taken for the same object. Two boxes of equal size have it if
they are half their width apart. Neighbouring objects in a row or a crowd have less, but often more than TIDE's
0.1."""


class Status(StrEnum):
    """What became of an object."""

    def __repr__(self) -> str:
        return self.value

    KEPT = "kept"
    """Found once: same label, IoU at least `keep_iou`."""
    MOVED = "moved"
    """Found once: same label, IoU at least `touch_iou` but below `keep_iou`."""
    DUPLICATED = "duplicated"
    """Found more than once with the same label."""
    RELABELLED = "relabelled"
    """Not found, but a detection with another label is in its place (IoU at least `keep_iou`)."""
    LOST = "lost"
    """Not found."""


@dataclass(frozen=True)
class Outcome:
    """What became of one object under one configuration."""

    object: int
    """Index of the object in the baseline."""
    query: int
    """The query that found the object in the baseline."""
    label: int
    """The object's label in the baseline."""
    status: Status
    detections: tuple[int, ...]
    """Indices of the detections that belong to the object, in the configuration's detections: first the one that it is
    paired with, then duplicates by falling IoU. Empty if lost."""
    iou: float
    """IoU of the object's box with that of the first of `detections`; 0 if lost."""
    score: float
    """Score of the first of `detections`; 0 if lost."""
    query_score: float
    """Probability of the object's label at the object's baseline query in this configuration, detected or not."""
    new_label: int | None = None
    """The label that was found instead, if relabelled."""

    def as_dict(self) -> dict[str, Any]:
        """As a dict of JSON types."""
        return {
            "object": self.object,
            "query": self.query,
            "label": self.label,
            "status": self.status.value,
            "detections": list(self.detections),
            "iou": self.iou,
            "score": self.score,
            "query_score": self.query_score,
            "new_label": self.new_label,
        }


@dataclass(frozen=True)
class ConfigurationOutcome:
    """What became of all objects under one configuration."""

    outcomes: tuple[Outcome, ...]
    """One per object, in the order of the baseline."""
    unmatched: tuple[int, ...]
    """Indices of the detections that belong to no object, in the configuration's detections."""

    @property
    def counts(self) -> dict[Status, int]:
        """Number of objects by status, all statuses present; their sum is the number of objects."""
        statuses = [outcome.status for outcome in self.outcomes]
        return {status: statuses.count(status) for status in Status}

    @property
    def duplicates(self) -> int:
        """Number of surplus detections: all but the first of each object that was found more than once."""
        return sum(max(len(outcome.detections) - 1, 0) for outcome in self.outcomes)

    def as_dict(self) -> dict[str, Any]:
        """As a dict of JSON types."""
        return {
            "counts": {status.value: count for status, count in self.counts.items()},
            "duplicates": self.duplicates,
            "unmatched": list(self.unmatched),
            "outcomes": [outcome.as_dict() for outcome in self.outcomes],
        }


def outcomes_of(
    baseline: Detections,
    detections: Detections,
    logits: torch.Tensor,
    keep_iou: float = KEEP_IOU,
    touch_iou: float = TOUCH_IOU,
) -> ConfigurationOutcome:
    """What became of the objects in `baseline` under a configuration; see this module's docstring for the rules.

    The baseline compared with itself is all kept. The order of detections affects indices only.

    Args:
        baseline: the objects.
        detections: the detections under the configuration.
        logits: (Q, columns), the detector's class logits under the configuration; any floating dtype and device.
        keep_iou, touch_iou: thresholds, 0 < `touch_iou` <= `keep_iou` <= 1.

    Raises:
        SettingError: baseline and detections are of different images or classes, `logits` have the wrong shape, or
            the thresholds are out of order.
        NonFiniteError: a logit is NaN or infinite.
    """
    if not 0 < touch_iou <= keep_iou <= 1:
        raise SettingError(
            f"thresholds must obey 0 < touch_iou <= keep_iou <= 1: {touch_iou} and {keep_iou} do not"
        )
    if baseline.image_size != detections.image_size or baseline.class_names != detections.class_names:
        raise SettingError(
            "baseline and detections are of different images or classes: compare runs on one image"
        )
    logits = logits.detach().cpu()
    check_output(logits, None, len(baseline.class_names), baseline.scoring)
    last_query = max(baseline.queries.tolist(), default=-1)
    if last_query >= len(logits):
        raise SettingError(
            f"logits of {len(logits)} queries do not fit a baseline with query {last_query}: "
            "give those of the same detector"
        )

    iou = _overlaps(baseline.boxes, detections.boxes)
    overlaps = iou.tolist()
    object_queries, object_labels = baseline.queries.tolist(), baseline.labels.tolist()
    queries, labels = detections.queries.tolist(), detections.labels.tolist()

    pairs = [(o, d) for o, d in (iou >= touch_iou).nonzero().tolist()]
    # Remaining ties are broken by queries, not by indices, so that results do not depend on the order of detections.
    pairs.sort(
        key=lambda pair: (
            -overlaps[pair[0]][pair[1]],
            object_queries[pair[0]] != queries[pair[1]],
            object_queries[pair[0]],
            queries[pair[1]],
        )
    )
    same_label = [(o, d) for o, d in pairs if object_labels[o] == labels[d]]
    same_query = [
        (o, d) for o, d in same_label if object_queries[o] == queries[d] and overlaps[o][d] >= keep_iou
    ]
    other_label = [(o, d) for o, d in pairs if object_labels[o] != labels[d] and overlaps[o][d] >= keep_iou]

    assigned: dict[int, list[int]] = {}
    free = set(range(len(detections)))
    _pair(same_query, assigned, free)
    _pair(same_label, assigned, free)
    for o, d in same_label:
        if d in free:
            assigned[o].append(d)
            free.remove(d)
    _pair(other_label, assigned, free)

    query_scores = class_probabilities(logits, baseline.scoring)[baseline.queries, baseline.labels].tolist()
    scores = detections.scores.tolist()
    outcomes = []
    for o, label in enumerate(object_labels):
        object_detections = assigned.get(o, [])
        first = object_detections[0] if object_detections else None
        if first is None:
            status = Status.LOST
        elif labels[first] != label:
            status = Status.RELABELLED
        elif len(object_detections) > 1:
            status = Status.DUPLICATED
        else:
            status = Status.KEPT if overlaps[o][first] >= keep_iou else Status.MOVED
        outcomes.append(
            Outcome(
                object=o,
                query=object_queries[o],
                label=label,
                status=status,
                detections=tuple(object_detections),
                iou=0.0 if first is None else overlaps[o][first],
                score=0.0 if first is None else scores[first],
                query_score=query_scores[o],
                new_label=labels[first] if status is Status.RELABELLED and first is not None else None,
            )
        )
    return ConfigurationOutcome(outcomes=tuple(outcomes), unmatched=tuple(sorted(free)))


def _pair(candidates: Iterable[tuple[int, int]], assigned: dict[int, list[int]], free: set[int]) -> None:
    """Assign to each object without a detection the first of its candidates that is free."""
    for o, d in candidates:
        if o not in assigned and d in free:
            assigned[o] = [d]
            free.remove(d)


def _overlaps(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU (n, m) in float64 of boxes (n, 4) and (m, 4)."""
    # In float64 the areas of float32 boxes are nearly exact, so that rounding decides no threshold and no tie.
    boxes, others = boxes.double(), others.double()
    overlaps = pairwise_iou(boxes, others)
    # The IoU of a box without area (at the image's edge) is 0/0, even with itself.
    overlaps = overlaps.nan_to_num(nan=0.0)
    return overlaps.masked_fill((boxes[:, None] == others[None]).all(dim=-1), 1.0)
