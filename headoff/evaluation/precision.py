"""Average precision by COCO's definition, with bootstrap intervals over images and what each image contributes.

Precision and recall change at true positives and at a few other detections only (those that are ignored because of
what they match). So a curve is kept as these *steps*, and all else as counts between them: a bootstrap weights images,
sums the weights along the steps and has the AP of a resample without matching or sorting again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from headoff.evaluation.matching import AREAS, MOST_DETECTIONS, THRESHOLDS, Matches, TrueObjects

if TYPE_CHECKING:
    from scipy.sparse import csr_array

RECALLS = np.linspace(0.0, 1.0, 101)
"""R = 101 recalls at which precision is sampled."""
DETECTIONS = (1, 10, 100)
"""Most detections of a class in an image for average recall."""
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""In the order of COCO's summary."""
LEVEL = 0.95

_EPS = np.spacing(1)
_ALL = list(AREAS).index("all")
_T50, _T75 = 0, 5
_AT_ONCE = 2**20
"""Most numbers of an array of resamples."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The steps of the precision-recall curves of all classes, for one IoU threshold and range of areas.

    Attributes:
        at: (s,) int64, indices in `Matches.paired`.
        labels, image: (s,) int64.
        hit: (s,) bool: true positives.
        change: (s,) int8: whether the detection counts, minus whether its box is within the range.
    """

    at: np.ndarray
    labels: np.ndarray
    image: np.ndarray
    hit: np.ndarray
    change: np.ndarray

    def starts(self, classes: int) -> np.ndarray:
        """(K + 1,) where the steps of each class begin."""
        return np.searchsorted(self.labels, np.arange(classes + 1))


def curve(matches: Matches, threshold: int, area: int) -> Curve:
    """The steps of one threshold and range of areas, by their indices."""
    within = matches.in_range[matches.paired, area]
    matched, ignored = matches.matched[:, threshold, area], matches.ignored[:, threshold, area]
    hit = matched & ~ignored
    change = (hit | (~matched & within)).astype(np.int8) - within
    at = np.flatnonzero(hit | (change != 0))
    where = matches.paired[at]
    return Curve(at, matches.labels[where], matches.image[where], hit[at], change[at])


def curves(matches: Matches) -> Iterator[tuple[int, int, Curve]]:
    """All T x A curves with the indices of their threshold and range of areas."""
    for area in range(len(AREAS)):
        for threshold in range(len(THRESHOLDS)):
            yield threshold, area, curve(matches, threshold, area)


@dataclass(frozen=True, eq=False)
class PrecisionTable:
    """What `COCOeval.accumulate` finds; NaN where a class has no objects.

    Attributes:
        precision: (T, R, K, A), of up to 100 detections.
        recall: (T, K, A, 3), of up to 1, 10 and 100 detections.
    """

    precision: np.ndarray
    recall: np.ndarray

    def metrics(self) -> dict[str, float]:
        """`METRICS`; NaN where no class has objects."""
        p, r = self.precision, self.recall
        parts = [p[..., _ALL], p[_T50, ..., _ALL], p[_T75, ..., _ALL], p[..., 1], p[..., 2], p[..., 3]]
        parts += [r[..., _ALL, m] for m in range(3)] + [r[..., a, 2] for a in (1, 2, 3)]
        return dict(zip(METRICS, map(_mean, parts), strict=True))

    def by_class(self) -> np.ndarray:
        """(K,) AP of each class."""
        return self.precision[..., _ALL].mean((0, 1))


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.mean(known)) if len(known) else float("nan")


def accumulate(objects: TrueObjects, matches: Matches) -> PrecisionTable:
    """Precision and recall of the evaluated images, equal to pycocotools' to the last digit."""
    counted = objects.counted[:, objects.evaluated].sum(1)
    rank = matches.rank[matches.paired]
    running = [_boxes_before(objects, matches, a) for a in range(len(AREAS))]
    shape = (len(THRESHOLDS), len(RECALLS), objects.classes, len(AREAS))
    precision = np.zeros(shape)
    recall = np.zeros((len(THRESHOLDS), objects.classes, len(AREAS), len(DETECTIONS)))
    for t, a, steps in curves(matches):
        begins = steps.starts(objects.classes)
        hits = _running(steps.hit, begins)
        counting = running[a][steps.at] + _running(steps.change, begins)
        for label in np.unique(steps.labels[steps.hit]):
            if not counted[a, label]:
                continue
            part = slice(begins[label], begins[label + 1])
            tp = hits[part].astype(float)
            pr = tp / (counting[part] + _EPS)
            pr = np.maximum.accumulate(pr[::-1])[::-1]
            places = np.searchsorted(tp / counted[a, label], RECALLS, side="left")
            reached = places < len(pr)
            precision[t, reached, label, a] = pr[places[reached]]
            recall[t, label, a] = [
                np.count_nonzero(steps.hit[part] & (rank[steps.at[part]] < most)) / counted[a, label]
                for most in DETECTIONS
            ]
    absent = counted.T == 0
    precision[:, :, absent] = np.nan
    recall[:, absent] = np.nan
    return PrecisionTable(precision, recall)


def _running(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Running sums (s, ...) over the steps of each class, float where `values` are, else int64."""
    sums = np.empty(values.shape, values.dtype if values.dtype.kind == "f" else np.int64)
    for begin, end in _parts(begins):
        np.cumsum(values[begin:end], axis=0, out=sums[begin:end])
    return sums


def _parts(begins: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of the classes that have steps."""
    for begin, end in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
        if end > begin:
            yield begin, end


def _boxes_between(
    objects: TrueObjects, matches: Matches, area: int, blocks: _Blocks | None = None
) -> csr_array:
    """(p, images): how many boxes of each image within the range of areas are after one of `Matches.paired` of their
    class, up to and including the next; or (P, images), with `blocks` of `Matches.paired`.
    """
    from scipy.sparse import csr_array

    paired, within = matches.paired, matches.in_range[:, area]
    following = np.searchsorted(paired, np.arange(len(within)))
    # Those after the last pair of a class are no step's.
    within = within & (matches.labels == np.r_[matches.labels[paired], -1][following])
    columns, following = matches.image[within], following[within]
    rows = len(paired)
    if blocks is not None:
        following, rows = blocks.places[following], len(blocks.rows)
    ends = np.searchsorted(following, np.arange(rows + 1))
    return csr_array((np.ones(len(columns), np.float32), columns, ends), shape=(rows, objects.images))


def _boxes_before(objects: TrueObjects, matches: Matches, area: int) -> np.ndarray:
    """(p,) int64: detections of the class within the range of areas, up to and including each of `Matches.paired`."""
    between = _boxes_between(objects, matches, area)
    begins = np.searchsorted(matches.labels[matches.paired], np.arange(objects.classes + 1))
    return _running(np.diff(between.indptr), begins)


@dataclass(frozen=True, eq=False)
class Resamples:
    """Samples of a bootstrap over the evaluated images: the same for all configurations, so differences are paired.

    Attributes:
        weights: (images, B) float32 or float64: how often each image is drawn; rows of images that were not evaluated
            are 0.
        counted: (A, K, B) float64: objects that are not ignored.
    """

    weights: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, objects: TrueObjects, count: int, seed: int = 0) -> Resamples:
        """`count` samples, each of as many images as there are. The same image ids have the same samples."""
        evaluated = np.flatnonzero(objects.evaluated)
        evaluated = evaluated[np.argsort(objects.turn[evaluated])]
        weights = np.zeros((objects.images, count), np.int64)
        if len(evaluated):
            generator = np.random.default_rng(seed)
            drawn = generator.multinomial(
                len(evaluated), np.full(len(evaluated), 1 / len(evaluated)), size=count
            )
            weights[evaluated] = drawn.T
        return cls.weighted(objects, weights)

    @classmethod
    def weighted(cls, objects: TrueObjects, weights: np.ndarray) -> Resamples:
        """With `weights` (images, B)."""
        drawn = weights.astype(float)
        counted = np.stack([one.T.astype(float) @ drawn for one in objects.counted])
        # Sums are exact in float32 up to 2^24.
        most = weights.sum(0).max(initial=0) * MOST_DETECTIONS
        return cls(weights.astype(np.float32 if most < 2**24 else np.float64), counted)

    def __len__(self) -> int:
        return self.weights.shape[1]


@dataclass(frozen=True, eq=False)
class Replicates:
    """What the samples of a bootstrap have for one configuration; NaN without objects.

    Attributes:
        metrics: (M, B) float64, in the order of `METRICS`.
        by_class: (K, B) float64, AP.
    """

    metrics: np.ndarray
    by_class: np.ndarray


def resample(objects: TrueObjects, matches: Matches, samples: Resamples) -> Replicates:
    """AP and AR in the samples of a bootstrap. With all weights 1 they are those of `accumulate`, up to rounding."""
    classes, count = objects.classes, len(samples)
    steps_of = {(t, a): steps for t, a, steps in curves(matches)}
    pairs = _Blocks.of(matches.labels[matches.paired], classes)
    blocks_of = {which: _Blocks.of(steps.labels, classes) for which, steps in steps_of.items()}
    between = [_boxes_between(objects, matches, a, pairs) for a in range(len(AREAS))]
    precision = np.empty((len(THRESHOLDS), len(AREAS), classes, count))
    longest = max(len(blocks.rows) for blocks in blocks_of.values())
    at_once = min(max(_AT_ONCE // max(longest, 1), 32), 64)
    for begin in range(0, count, at_once):
        chunk = slice(begin, begin + at_once)
        weights = samples.weights[:, chunk]
        weights = np.concatenate(
            [weights, np.zeros_like(weights[:1])]
        )  # of no image, for rows that fill up blocks
        for a in range(len(AREAS)):
            before = pairs.running(between[a] @ weights[:-1])
            for t in range(len(THRESHOLDS)):
                precision[t, a, :, chunk] = _weighted_precision(
                    steps_of[t, a],
                    blocks_of[t, a],
                    weights,
                    before,
                    pairs.places,
                    samples.counted[a, :, chunk],
                )
    recall = _weighted_hits(objects, matches, steps_of) @ samples.weights
    recall = recall.reshape(len(AREAS), len(DETECTIONS), classes, count) / len(THRESHOLDS)
    with np.errstate(divide="ignore", invalid="ignore"):
        recall /= np.where(samples.counted > 0, samples.counted, np.nan)[:, None]
    over = [precision[:, _ALL].mean(0), precision[_T50, _ALL], precision[_T75, _ALL]]
    over += [precision[:, a].mean(0) for a in (1, 2, 3)]
    over += [recall[_ALL, m] for m in range(3)] + [recall[a, 2] for a in (1, 2, 3)]
    return Replicates(np.stack([_mean_over_classes(values) for values in over]), over[0])


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Rows that are sorted by class, in blocks of `SIZE` rows of one class each; its last row fills the last block.

    A running sum is one of few long operations within all blocks at once, and one over the sums of blocks: numpy's own
    takes its elements one by one, which is several times slower.

    Attributes:
        rows: (P,) int64, the row in each place.
        filling: (P,) bool: whether it is there for the second time.
        places: (n,) int64, the place of each row.
        parts: of each class that has rows: its label, and where its blocks begin and end.
    """

    SIZE: ClassVar[int] = 16

    rows: np.ndarray
    filling: np.ndarray
    places: np.ndarray
    parts: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, labels: np.ndarray, classes: int) -> _Blocks:
        begins = np.searchsorted(labels, np.arange(classes + 1))
        counts = np.diff(begins)
        blocks = -(-counts // cls.SIZE)
        ends = np.cumsum(blocks)
        within = np.arange(cls.SIZE * blocks.sum()) - np.repeat(cls.SIZE * (ends - blocks), cls.SIZE * blocks)
        of_class = np.repeat(np.arange(classes), cls.SIZE * blocks)
        rows = begins[of_class] + np.minimum(within, counts[of_class] - 1)
        filling = within >= counts[of_class]
        present = np.flatnonzero(counts)
        parts = [(int(k), int(ends[k] - blocks[k]), int(ends[k])) for k in present]
        return cls(rows, filling, np.flatnonzero(~filling), tuple(parts))

    def running(self, values: np.ndarray) -> np.ndarray:
        """Running sums of `values` (P, B) within each class, in place."""
        x = values.reshape(-1, self.SIZE, values.shape[1])
        for row in range(1, self.SIZE):
            np.add(x[:, row], x[:, row - 1], out=x[:, row])
        sums = x[:, -1].copy()
        for _, begin, end in self.parts:
            if end - begin > 1:
                np.cumsum(sums[begin:end], axis=0, out=sums[begin:end])
                x[begin + 1 : end] += sums[begin : end - 1, None]
        return values

    def greatest_from(self, values: np.ndarray) -> np.ndarray:
        """The greatest of `values` (P, B) of each class from each place on, in place."""
        x = values.reshape(-1, self.SIZE, values.shape[1])
        for row in range(self.SIZE - 2, -1, -1):
            np.maximum(x[:, row], x[:, row + 1], out=x[:, row])
        most = x[:, 0].copy()
        for _, begin, end in self.parts:
            if end - begin > 1:
                part = most[begin:end][::-1]
                np.maximum.accumulate(part, axis=0, out=part)
                np.maximum(x[begin : end - 1], most[begin + 1 : end, None], out=x[begin : end - 1])
        return values


def _weighted_precision(
    steps: Curve,
    blocks: _Blocks,
    weights: np.ndarray,
    before: np.ndarray,
    places: np.ndarray,
    counted: np.ndarray,
) -> np.ndarray:
    """(K, B): AP of one threshold and range of areas, with `weights` (images + 1, B).

    Args:
        before: (P, B), the weight of all detections of a class whose boxes are within the range of areas, up to and
            including each of `Matches.paired`, which are in `places`.
        counted: (K, B), objects that are not ignored, with these weights.
    """
    rows = blocks.rows
    labels = steps.labels[rows]
    drawn = weights[np.where(blocks.filling, len(weights) - 1, steps.image[rows])]
    tp = blocks.running(drawn * steps.hit[rows, None])
    counting = before[places[steps.at[rows]]]
    if steps.change.any():
        drawn *= steps.change[rows, None]
        counting += blocks.running(drawn)
    envelope = blocks.greatest_from(tp / np.maximum(counting, 1, out=counting))
    shares = (100 / np.maximum(counted, 1)).astype(weights.dtype)
    tp *= shares[labels]
    reached = _recalls_reached(tp)
    gained = reached.copy()
    gained[1:] -= reached[:-1]
    precision = np.zeros(counted.shape)
    for label, begin, end in blocks.parts:
        part = slice(begin * blocks.SIZE, end * blocks.SIZE)
        gained[part.start] = reached[part.start]
        precision[label] = np.einsum("sb,sb->b", envelope[part], gained[part])
    return np.where(counted > 0, precision / len(RECALLS), np.nan)


def _weighted_hits(
    objects: TrueObjects, matches: Matches, steps_of: Mapping[tuple[int, int], Curve]
) -> csr_array:
    """(A * 3 * K, images): true positives over all thresholds, of up to 1, 10 and 100 detections."""
    from scipy.sparse import csr_array

    rank = matches.rank[matches.paired]
    rows, columns = [], []
    for (_, a), steps in steps_of.items():
        for m, most in enumerate(DETECTIONS):
            hit = steps.hit & (rank[steps.at] < most)
            rows.append((a * len(DETECTIONS) + m) * objects.classes + steps.labels[hit])
            columns.append(steps.image[hit])
    row, column = np.concatenate(rows), np.concatenate(columns)
    shape = (len(AREAS) * len(DETECTIONS) * objects.classes, objects.images)
    return csr_array((np.ones(len(row), np.float32), (row, column)), shape=shape)


def _mean_over_classes(values: np.ndarray) -> np.ndarray:
    """(B,) of (K, B), where NaN are absent classes."""
    present = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.where(present, values, 0).sum(0) / present.sum(0)


_ROUNDING = 1e-4
_AT_EQUALITY = np.r_[RECALLS <= np.arange(101) / 100, True]
"""Whether a recall of exactly j / 100 reaches recall j, which is rounded."""


def _recalls_reached(percent: np.ndarray) -> np.ndarray:
    """How many of `RECALLS` are no larger than the recalls, given in per cent; as floats."""
    whole = np.floor(percent + _ROUNDING)
    equal = percent - whole < _ROUNDING
    whole += 1
    places = np.flatnonzero(equal)
    flat = whole.reshape(-1)
    flat[places] -= ~_AT_EQUALITY[flat[places].astype(np.int64) - 1]
    return whole


def influence(objects: TrueObjects, matches: Matches) -> np.ndarray:
    """(images,) float64: how AP would change with the weight of each image (the influence function); their sum is 0.

    An image's true positives and what they do to the precision at higher recalls count for it, its false positives and
    its objects against it. It is the derivative of the area under the interpolated curve, which AP samples at 101
    recalls. AP / images + influence is what an image contributes to AP: these sum to AP.
    """
    counted = objects.counted[_ALL]
    total = counted.sum(0)
    present = np.flatnonzero(total)
    if not len(present):
        return np.zeros(objects.images)
    of_detections = np.zeros(len(matches.labels))
    area = np.zeros(objects.classes)
    before = _boxes_before(objects, matches, _ALL)
    for t in range(len(THRESHOLDS)):
        steps = curve(matches, t, _ALL)
        begins = steps.starts(objects.classes)
        tp = _running(steps.hit, begins)
        counting = np.maximum(before[steps.at] + _running(steps.change, begins), 1)
        raw = tp / counting
        envelope, share = raw.copy(), np.zeros(len(raw))
        for begin, end in _parts(begins):
            part = envelope[begin:end][::-1]
            np.maximum.accumulate(part, out=part)
            # The step whose precision each step has: the last one that is as high.
            own = np.where(raw[begin:end] == envelope[begin:end], np.arange(begin, end), end)
            source = np.minimum.accumulate(own[::-1])[::-1]
            np.add.at(share, source[steps.hit[begin:end]], 1.0)
        # Sums over this step and later ones of its class.
        spread = np.stack([share / counting, share * raw / counting], 1)
        for begin, end in _parts(begins):
            spread[begin:end] = np.cumsum(spread[begin:end][::-1], axis=0)[::-1]
            label = steps.labels[begin]
            area[label] += envelope[begin:end][steps.hit[begin:end]].sum() / max(total[label], 1)
        # Every detection that counts lowers the precision of all steps from its own on.
        at = matches.paired[steps.at]
        following = np.searchsorted(at, np.arange(len(matches.labels)))
        same = matches.labels == np.r_[steps.labels, -1][following]
        lowered = np.where(same, np.r_[spread[:, 1], 0][following], 0)
        lowered[at] *= 1 + steps.change
        lowered[at] -= steps.hit * (envelope + spread[:, 0])
        of_detections -= lowered
    weight = np.where(total > 0, 1 / np.maximum(total, 1), 0) / (len(present) * len(THRESHOLDS))
    gained = np.bincount(matches.image, of_detections * weight[matches.labels], minlength=objects.images)
    return gained - counted @ (area * weight)
