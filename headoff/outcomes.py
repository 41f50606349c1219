"""What becomes of each baseline detection when heads are switched off.

Counting detections does not answer that: with heads off a detector first finds things twice and draws loose
boxes before it finds nothing, so that counts go up as well as down. Here every detection of the baseline (an
*object*) is followed: found again, found elsewhere, found twice, found as something else, or not found.

How detections are handed out, each to one object or to nothing:

1. **Own query.** An object that its own query still finds (same label, IoU at least `keep_iou`) gets that
   detection: it is never said to be lost, or found by another query, while its own query has it.
2. **Takeover.** The other objects and detections of the same label, IoU at least `touch_iou`, are paired one
   to one, greedily by falling IoU; of equal IoUs the object's own query goes first.
3. **Duplicates.** A detection still free that overlaps objects of its label by at least `touch_iou` is a
   duplicate of the one it overlaps most. (Step 2 saw to it that this one is found already.)
4. **Other label.** Objects still without, and detections still free, of different label, IoU at least
   `keep_iou`, are paired as in step 2. This comes last: whatever the object's own label explains is not a
   change of label.
5. What is left is a detection **of nothing**: where it is, the baseline has nothing of that label.

The classes are those of TIDE (Bolya et al., ECCV 2020: localisation, classification, duplicate and background
errors), with the baseline in the place of the ground truth.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torchvision.ops import box_iou

from headoff.detections import Detections, check_output, class_probabilities
from headoff.errors import SettingError

KEEP_IOU = 0.5
"""IoU from which two boxes are in the same place: what PASCAL VOC and COCO's AP50 mean by found. Two boxes of
equal size have it when they are a third of their width apart."""

TOUCH_IOU = 0.3
"""IoU from which two boxes of the same label mean the same object, loosely. Two boxes of equal size have it
when they are half their width apart; neighbours in a row or a crowd stay below it, which TIDE's 0.1 does not
ensure."""


class Status(StrEnum):
    """What became of an object."""

    KEPT = "kept"
    """Found once: same label, IoU at least `keep_iou`."""
    MOVED = "moved"
    """Found once: same label, IoU at least `touch_iou` but below `keep_iou`."""
    DUPLICATED = "duplicated"
    """Found more than once with the same label (be its best box kept or moved)."""
    RELABELLED = "relabelled"
    """Not found, but a detection with another label is in its place (IoU at least `keep_iou`)."""
    LOST = "lost"
    """None of these."""


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
    """Indices, in the configuration's detections, of those that belong to the object: the one it is paired
    with first, then duplicates by falling IoU. Empty when lost."""
    iou: float
    """IoU of the object's box with that of the first of `detections`; 0 when lost."""
    score: float
    """Score of the first of `detections`; 0 when lost."""
    query_score: float
    """Probability of the object's label at the object's own query in this configuration, detected or not."""
    new_label: int | None = None
    """The label found instead, when relabelled."""

    def as_dict(self) -> dict[str, Any]:
        """The same, of types that JSON knows."""
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
    of_nothing: tuple[int, ...]
    """Indices, in the configuration's detections, of those that belong to no object."""

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
        """The same, of types that JSON knows."""
        return {
            "counts": {status.value: count for status, count in self.counts.items()},
            "duplicates": self.duplicates,
            "of_nothing": list(self.of_nothing),
            "outcomes": [outcome.as_dict() for outcome in self.outcomes],
        }


def outcomes_of(
    baseline: Detections,
    detections: Detections,
    logits: torch.Tensor,
    keep_iou: float = KEEP_IOU,
    touch_iou: float = TOUCH_IOU,
) -> ConfigurationOutcome:
    """What became of the objects in `baseline` under the configuration that gave `detections` and `logits`.

    `logits` (Q, K+1), any floating point dtype, any device, are the detector's under that configuration. The
    rules are at the head of this module; 0 < `touch_iou` <= `keep_iou` <= 1. The baseline against itself is
    all kept, whatever in it overlaps; the order of either side changes nothing but indices.

    Raises `SettingError` when the two are not of the same image and classes, when `logits` do not fit them,
    or for thresholds out of order; `NonFiniteError` for NaN or infinity in `logits`.
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
    check_output(logits, None, len(baseline.class_names))
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
    # Queries, not indices, break what ties are left: they do not depend on the order of either side.
    pairs.sort(
        key=lambda pair: (
            -overlaps[pair[0]][pair[1]],
            object_queries[pair[0]] != queries[pair[1]],
            object_queries[pair[0]],
            queries[pair[1]],
        )
    )
    same_label = [(o, d) for o, d in pairs if object_labels[o] == labels[d]]
    kept_by_own_query = [
        (o, d) for o, d in same_label if object_queries[o] == queries[d] and overlaps[o][d] >= keep_iou
    ]
    other_label = [(o, d) for o, d in pairs if object_labels[o] != labels[d] and overlaps[o][d] >= keep_iou]

    belonging: dict[int, list[int]] = {}
    free = set(range(len(detections)))
    _pair(kept_by_own_query, belonging, free)
    _pair(same_label, belonging, free)
    for o, d in same_label:
        if d in free:
            belonging[o].append(d)
            free.remove(d)
    _pair(other_label, belonging, free)

    query_scores = class_probabilities(logits)[baseline.queries, baseline.labels].tolist()
    scores = detections.scores.tolist()
    outcomes = []
    for o, label in enumerate(object_labels):
        mine = belonging.get(o, [])
        first = mine[0] if mine else None
        if first is None:
            status = Status.LOST
        elif labels[first] != label:
            status = Status.RELABELLED
        elif len(mine) > 1:
            status = Status.DUPLICATED
        else:
            status = Status.KEPT if overlaps[o][first] >= keep_iou else Status.MOVED
        outcomes.append(
            Outcome(
                object=o,
                query=object_queries[o],
                label=label,
                status=status,
                detections=tuple(mine),
                iou=0.0 if first is None else overlaps[o][first],
                score=0.0 if first is None else scores[first],
                query_score=query_scores[o],
                new_label=labels[first] if status is Status.RELABELLED and first is not None else None,
            )
        )
    return ConfigurationOutcome(outcomes=tuple(outcomes), of_nothing=tuple(sorted(free)))


def _pair(candidates: Iterable[tuple[int, int]], belonging: dict[int, list[int]], free: set[int]) -> None:
    """Give each object that has none the first of its candidates that is still free."""
    for o, d in candidates:
        if o not in belonging and d in free:
            belonging[o] = [d]
            free.remove(d)


def _overlaps(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU (n, m) in float64 of boxes (n, 4) and (m, 4)."""
    # In float64 the areas of float32 boxes are as good as exact: rounding decides no threshold and no tie.
    boxes, others = boxes.double(), others.double()
    overlaps = box_iou(boxes, others)
    # A box without area, at the image's edge, has 0/0 even with itself.
    overlaps = overlaps.nan_to_num(nan=0.0)
    return overlaps.masked_fill((boxes[:, None] == others[None]).all(dim=-1), 1.0)
