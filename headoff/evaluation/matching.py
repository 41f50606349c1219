"""Which detections match which true objects, by COCO's rules, for all images of one configuration at once.

The rules are those of pycocotools' `COCOeval.evaluateImg`, whose results these are to the last digit (tested):

- Detections of a class in an image match its true objects of that class in the order of their scores, of which the
  first 100 count. A detection takes the free object with the highest IoU; of equal ones the last.
- Crowds may match any number of detections, and the IoU with a crowd is the share of the detection within it.
- For a range of areas, crowds and objects outside the range are ignored: they are matched only by detections that match
  no other object, and neither these detections nor unmatched ones outside the range count.

pycocotools does this in Python loops over images, classes, area ranges and thresholds: minutes for one configuration of
5,000 images. Here only pairs of a detection and an object that overlap enough are looked at, as arrays: first those of
every image's and class's best detection, then of every second one, and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from headoff.evaluation.tables import DetectionTable, GroundTruth

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""T = 10 IoU thresholds."""
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
"""A = 4 ranges of areas in square pixels, ends included."""
MOST_DETECTIONS = 100
"""Detections that count of a class in an image."""

_LEAST = np.array(list(AREAS.values()))[:, 0]
_GREATEST = np.array(list(AREAS.values()))[:, 1]


@dataclass(frozen=True, eq=False)
class TrueObjects:
    """True objects of the evaluated images, sorted by image and class.

    Attributes:
        images: number of images, evaluated or not.
        classes: K.
        evaluated: (images,) bool.
        turn: (images,) int64, the order of images by their ids, which decides between equal scores.
        group: (m,) int64, image * K + class.
        boxes: (m, 4) float64, x, y, width, height.
        crowd: (m,) bool.
        ignored: (m, A) bool: crowds, and those outside a range of areas.
        places: (m,) int64, their indices in the `GroundTruth`.
    """

    images: int
    classes: int
    evaluated: np.ndarray
    turn: np.ndarray
    group: np.ndarray
    boxes: np.ndarray
    crowd: np.ndarray
    ignored: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, truth: GroundTruth, evaluated: np.ndarray | None = None) -> TrueObjects:
        """Of the images `evaluated` (bool (images,), or their indices); by default all."""
        images, classes = len(truth.image_ids), len(truth.class_names)
        chosen = np.ones(images, bool) if evaluated is None else np.zeros(images, bool)
        if evaluated is not None:
            chosen[evaluated] = True
        group = truth.image * classes + truth.labels
        places = np.flatnonzero(chosen[truth.image])
        places = places[np.argsort(group[places], kind="stable")]
        corners = truth.boxes[places].reshape(-1, 4)
        areas = truth.areas[places, None]
        crowd = truth.crowd[places]
        return cls(
            images,
            classes,
            chosen,
            np.argsort(np.argsort(truth.image_ids)),
            group[places],
            np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1),
            crowd,
            crowd[:, None] | (areas < _LEAST) | (areas > _GREATEST),
            places,
        )

    @cached_property
    def starts(self) -> np.ndarray:
        """(images * K + 1,) where each group begins."""
        return np.searchsorted(self.group, np.arange(self.images * self.classes + 1))

    @cached_property
    def counted(self) -> np.ndarray:
        """(A, images, K) int32: how many objects are not ignored."""
        cells = self.images * self.classes
        counts = [np.bincount(self.group[~self.ignored[:, a]], minlength=cells) for a in range(len(AREAS))]
        return np.stack(counts, dtype=np.int32, casting="unsafe").reshape(
            len(AREAS), self.images, self.classes
        )


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections of one configuration that count, matched, sorted by class and falling score.

    Attributes:
        labels, image: (n,) int64.
        rank: (n,) int64, place among those of its class in its image, from 0.
        in_range: (n, A) bool: whether the box is within the range of areas.
        places: (n,) int64, their indices in the `DetectionTable`.
        paired: (p,) int64, ascending: those that overlap some object of their class enough to match it.
        matched: (p, T, A) bool: whether they match an object.
        ignored: (p, T, A) bool: whether that object is ignored.
    """

    labels: np.ndarray
    image: np.ndarray
    rank: np.ndarray
    in_range: np.ndarray
    places: np.ndarray
    paired: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray


PairOverlaps = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""IoU (n,) of pairs, from indices in the `DetectionTable` (n,) and in the `GroundTruth` (n,)."""


def match(
    objects: TrueObjects,
    detections: DetectionTable,
    *,
    iou: PairOverlaps | None = None,
    areas: np.ndarray | None = None,
) -> Matches:
    """Match the detections of the evaluated images.

    Args:
        iou: of pairs; by default that of their boxes.
        areas: (n,) of the detections; by default those of their boxes.
    """
    classes = objects.classes
    chosen = np.flatnonzero(objects.evaluated[detections.image])
    scores, labels = detections.scores[chosen].astype(np.float64), detections.labels[chosen]
    image = detections.image[chosen]
    # Stable sorts: of equal scores the first comes first, as in pycocotools.
    by_score = np.lexsort((objects.turn[image], -scores))
    group = (image * classes + labels)[by_score]
    by_group = np.argsort(group, kind="stable")
    rank = np.empty(len(group), np.int64)
    rank[by_group] = ranks(group[by_group])
    counting = rank < MOST_DETECTIONS
    by_score, rank = by_score[counting], rank[counting]
    # From here on detections are sorted by class, then by falling score.
    by_class = np.argsort(labels[by_score], kind="stable")
    order, rank = by_score[by_class], rank[by_class]
    labels, image = labels[order], image[order]
    places = chosen[order]
    corners = detections.boxes[places].astype(np.float64).reshape(-1, 4)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1)
    size = (boxes[:, 2] * boxes[:, 3] if areas is None else areas[places])[:, None]
    in_range = (size >= _LEAST) & (size <= _GREATEST)

    group = image * classes + labels
    detection, target, overlap = _pairs(
        objects, group, boxes, None if iou is None else lambda rows, of: iou(places[rows], objects.places[of])
    )
    paired, of = np.unique(detection, return_inverse=True)
    matched, ignored = _assign(objects, of, target, overlap, group[paired], rank[paired])
    return Matches(labels, image, rank, in_range, places, paired, matched, ignored)


def ranks(sorted_keys: np.ndarray) -> np.ndarray:
    """The place of each element among those with the same key, from 0."""
    if not len(sorted_keys):
        return np.zeros(0, np.int64)
    begins = np.flatnonzero(np.r_[True, sorted_keys[1:] != sorted_keys[:-1]])
    lengths = np.diff(np.r_[begins, len(sorted_keys)])
    return np.arange(len(sorted_keys)) - np.repeat(begins, lengths)


def joined(starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of every i with `starts[i]`, ..., `starts[i] + counts[i] - 1`."""
    first = np.repeat(np.arange(len(counts)), counts)
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return first, np.repeat(starts, counts) + within


def overlaps(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray | None = None) -> np.ndarray:
    """IoU of boxes (n, 4) and others (n, 4), as x, y, width, height; of others that are a crowd, the share of the box
    that is within. 0 for two boxes without area.
    """
    # The order of operations is that of pycocotools, for the same rounding.
    width, height = (
        np.minimum(boxes[:, i] + boxes[:, i + 2], others[:, i] + others[:, i + 2])
        - np.maximum(boxes[:, i], others[:, i])
        for i in (0, 1)
    )
    overlap = np.maximum(width, 0) * np.maximum(height, 0)
    area = boxes[:, 2] * boxes[:, 3]
    union = area + others[:, 2] * others[:, 3] - overlap
    if crowd is not None:
        union = np.where(crowd, area, union)
    return np.divide(overlap, union, out=np.zeros_like(overlap), where=overlap > 0)


def _pairs(
    objects: TrueObjects, group: np.ndarray, boxes: np.ndarray, iou_of: PairOverlaps | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Detections and objects of the same image and class whose IoU suffices for the lowest threshold, and that IoU."""
    begins = objects.starts[group]
    detection, target = joined(begins, objects.starts[group + 1] - begins)
    if iou_of is None:
        iou = overlaps(boxes[detection], objects.boxes[target], objects.crowd[target])
    else:
        iou = iou_of(detection, target)
    enough = iou >= THRESHOLDS[0]
    return detection[enough], target[enough], iou[enough]


def _assign(
    objects: TrueObjects,
    detection: np.ndarray,
    target: np.ndarray,
    iou: np.ndarray,
    group: np.ndarray,
    rank: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """`matched` and `ignored` (p, T, A), from pairs of a detection (an index into `group` and `rank`) and an object."""
    shape = (len(THRESHOLDS), len(AREAS))
    found = len(group)
    matched, ignored = np.zeros((2, found, *shape), bool)
    # The turn of a detection: its place among those of its class in its image that have pairs.
    by_group = np.lexsort((rank, group))
    turn = np.empty(found, np.int64)
    turn[by_group] = ranks(group[by_group])
    # Of a detection's objects, the one that is preferred comes last.
    order = np.lexsort((target, iou, detection, turn[detection]))
    detection, target, iou = detection[order], target[order], iou[order]
    thresholds = np.minimum(THRESHOLDS, 1 - 1e-10)
    taken = np.zeros((len(objects.group), *shape), bool)
    bounds = np.searchsorted(turn[detection], np.arange(turn.max(initial=-1) + 2))
    for begin, end in zip(bounds[:-1], bounds[1:], strict=True):
        now, candidates = detection[begin:end], target[begin:end]
        firsts = np.flatnonzero(np.r_[True, now[1:] != now[:-1]])
        free = ~taken[candidates]
        free &= (iou[begin:end, None] >= thresholds)[:, :, None]
        # 0 for none, else the place among the candidates from 1, plus their number for those that are not ignored.
        count = end - begin
        place = np.arange(1, count + 1, dtype=np.int32)[:, None] + count * ~objects.ignored[candidates]
        best = np.maximum.reduceat(np.where(free, place[:, None, :], 0), firsts, axis=0)
        matched[now[firsts]] = best > 0
        ignored[now[firsts]] = (best > 0) & (best <= count)
        _, t, a = (best > 0).nonzero()
        winners = candidates[(best[best > 0] - 1) % count]
        single = ~objects.crowd[winners]
        taken[winners[single], t[single], a[single]] = True
    return matched, ignored
