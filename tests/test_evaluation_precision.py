"""AP, its bootstrap and outcomes over data sets, against other implementations."""

from __future__ import annotations

from dataclasses import replace

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pytest
import torch
from coco_oracle import coco_results, evaluated, synthetic
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.cocoeval import COCOeval

from headoff.detections import Detections
from headoff.evaluation.matching import TrueObjects, match
from headoff.evaluation.outcomes import COUNTED, STATUSES, Objects, assign, count_outcomes, within_crowds
from headoff.evaluation.precision import METRICS, Resamples, accumulate, influence, resample
from headoff.evaluation.tables import DetectionTable, GroundTruth
from headoff.outcomes import outcomes_of

DATA = st.builds(
    synthetic,
    st.integers(0, 2**31),
    images=st.integers(1, 12),
    classes=st.integers(1, 4),
    objects=st.sampled_from([0, 1, 5]),
    detections=st.sampled_from([0, 8, 60, 300]),
    crowds=st.sampled_from([0, 0.3, 1]),
    ties=st.booleans(),
    quality=st.sampled_from([0, 0.6, 1]),
)


def without_sentinels(values: np.ndarray) -> np.ndarray:
    """NaN where COCOeval has -1."""
    return np.where(values == -1, np.nan, values)


@settings(max_examples=40, deadline=None)
@given(DATA)
def test_precision_is_that_of_pycocotools_to_the_last_digit(data):
    truth, table = data
    if not len(table):
        return  # pycocotools cannot load no detections
    judge = evaluated(pycocotools.coco, COCOeval, truth, coco_results(truth, table))
    objects = TrueObjects.of(truth)
    found = accumulate(objects, match(objects, table))
    np.testing.assert_array_equal(found.precision, without_sentinels(judge.eval["precision"][..., 2]))
    np.testing.assert_array_equal(found.recall, without_sentinels(judge.eval["recall"]))
    assert [*found.metrics()] == [*METRICS]
    np.testing.assert_array_equal([*found.metrics().values()], without_sentinels(judge.stats[:12]))


@pytest.mark.parametrize("seed", range(4))
def test_precision_is_that_of_faster_coco_eval(seed):
    truth, table = synthetic(seed, images=40, ties=seed % 2 == 1, detections=(30, 400)[seed // 2])
    judge = evaluated(faster_coco_eval, faster_coco_eval.COCOeval_faster, truth, coco_results(truth, table))
    objects = TrueObjects.of(truth)
    found = accumulate(objects, match(objects, table))
    # Its sums are in another order.
    np.testing.assert_allclose([*found.metrics().values()], without_sentinels(judge.stats[:12]), rtol=1e-14)


@settings(max_examples=25, deadline=None)
@given(DATA, st.integers(0, 5))
def test_a_resample_is_the_data_set_with_its_images_repeated(data, seed):
    truth, table = data
    # Equal scores would be in another order where images are repeated.
    ranks = np.argsort(np.lexsort((np.arange(len(table)), table.scores)))
    table = replace(table, scores=((ranks + 1) / (len(table) + 1)).astype(np.float32))
    objects = TrueObjects.of(truth)
    weights = np.random.default_rng(seed).integers(0, 3, len(truth))
    samples = Resamples.weighted(objects, np.stack([weights, np.ones_like(weights)], 1))
    found = resample(objects, match(objects, table), samples)
    for column, drawn in enumerate((np.repeat(np.arange(len(truth)), weights), np.arange(len(truth)))):
        repeated = TrueObjects.of(repeat_truth(truth, drawn))
        expected = accumulate(repeated, match(repeated, repeat_table(table, drawn)))
        np.testing.assert_allclose(found.metrics[:, column], [*expected.metrics().values()], atol=1e-6)
        np.testing.assert_allclose(found.by_class[:, column], expected.by_class(), atol=1e-6)


def repeat_truth(truth: GroundTruth, drawn: np.ndarray) -> GroundTruth:
    rows = [np.flatnonzero(truth.image == image) for image in drawn]
    chosen = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return GroundTruth(
        truth.class_names,
        np.arange(len(drawn)),
        tuple(map(str, range(len(drawn)))),
        truth.sizes[drawn],
        np.repeat(np.arange(len(drawn)), [len(one) for one in rows]),
        truth.boxes[chosen],
        truth.labels[chosen],
        truth.areas[chosen],
        truth.crowd[chosen],
        np.arange(len(chosen)),
    )


def repeat_table(table: DetectionTable, drawn: np.ndarray) -> DetectionTable:
    rows = [np.flatnonzero(table.image == image) for image in drawn]
    chosen = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    image = np.repeat(np.arange(len(drawn)), [len(one) for one in rows])
    return DetectionTable(
        image, table.scores[chosen], table.labels[chosen], table.boxes[chosen], table.queries[chosen]
    )


def test_images_that_were_not_evaluated_count_for_nothing():
    truth, table = synthetic(5, images=20)
    chosen = np.arange(0, 20, 2)
    some = TrueObjects.of(truth, chosen)
    found = accumulate(some, match(some, table)).metrics()
    alone = TrueObjects.of(repeat_truth(truth, chosen))
    # The order of images decides between equal scores only.
    assert found == pytest.approx(
        accumulate(alone, match(alone, repeat_table(table, chosen))).metrics(), nan_ok=True
    )
    assert not Resamples.of(some, 3).weights[1::2].any()
    assert (Resamples.of(some, 3).weights.sum(0) == 10).all()


def test_influences_are_derivatives_and_agree_with_the_bootstrap():
    truth, table = synthetic(3, images=300, classes=3, quality=0.9, detections=40)
    objects = TrueObjects.of(truth)
    matches = match(objects, table)
    found = influence(objects, matches)
    assert found.sum() == pytest.approx(0, abs=1e-12)
    # AP samples recall in steps, so the weight of an image has to change by much.
    weights = np.full((300, 31), 10**6)
    weights[np.arange(30), np.arange(30)] *= 2
    samples = Resamples.weighted(objects, weights)
    ap = resample(objects, matches, samples).metrics[0]
    assert np.corrcoef(ap[:30] - ap[30], found[:30])[0, 1] > 0.9
    spread = resample(objects, matches, Resamples.of(objects, 400)).metrics[0].std()
    assert np.sqrt((found**2).sum()) == pytest.approx(spread, rel=0.1)


def as_detections(table: DetectionTable, image: int, names: tuple[str, ...]) -> Detections:
    rows = np.flatnonzero(table.image == image)
    return Detections(
        scores=torch.from_numpy(table.scores[rows]),
        labels=torch.from_numpy(table.labels[rows]),
        boxes=torch.from_numpy(table.boxes[rows]),
        queries=torch.from_numpy(table.queries[rows]),
        image_size=(200, 200),
        class_names=names,
    )


@pytest.mark.parametrize("ties", [False, True])
def test_outcomes_of_a_data_set_are_those_of_its_images(ties):
    images, classes = 60, 3
    truth, baseline = synthetic(7, images=images, classes=classes, objects=4, detections=12, ties=ties)
    _, table = synthetic(7, images=images, classes=classes, objects=4, detections=16, ties=ties, quality=0.9)
    another = np.random.default_rng(0).uniform(size=len(table)) < 0.3
    table = replace(table, labels=np.where(another, (table.labels + 1) % classes, table.labels))
    objects, found = Objects.detected(baseline, 0.0), Objects.detected(table, 0.0)
    assigned = assign(objects, found)
    counts = count_outcomes(objects, found, images, classes)
    scores = (baseline.scores > 0), (table.scores > 0)
    baseline, table = (
        DetectionTable(t.image[s], t.scores[s], t.labels[s], t.boxes[s], t.queries[s])
        for t, s in zip((baseline, table), scores, strict=True)
    )
    for image in range(images):
        expected = outcomes_of(
            as_detections(baseline, image, truth.class_names),
            as_detections(table, image, truth.class_names),
            torch.zeros(300, classes + 1),
        )
        mine = [STATUSES[s] for s in assigned.status[objects.image == image]]
        assert mine == [outcome.status for outcome in expected.outcomes]
        unmatched = np.flatnonzero(assigned.owner[found.image == image] < 0)
        assert tuple(unmatched) == expected.unmatched
        assert counts.by_image[image].tolist() == [*expected.counts.values(), len(unmatched)]
    assert (counts.by_class.sum((0, 1)) == counts.by_image.sum(0)).all()
    assert counts.objects_by_class.sum() == counts.objects.sum() == len(objects)
    assert all(counts.by_image.sum(0) > 0), dict(zip(COUNTED, counts.by_image.sum(0), strict=True))


def test_detections_within_a_crowd_are_no_false_alarms():
    truth = GroundTruth(
        ("a", "b"),
        np.array([4]),
        ("4.png",),
        np.array([[100, 100]]),
        np.array([0, 0]),
        np.array([[0.0, 0, 50, 50], [60, 60, 90, 90]]),
        np.array([0, 1]),
        np.array([2500.0, 900]),
        np.array([True, False]),
        np.array([1, 2]),
    )
    boxes = np.array([[5, 5, 15, 15], [45, 45, 70, 70], [5, 5, 15, 15], [60, 60, 90, 90]], np.float32)
    table = DetectionTable(
        np.zeros(4, np.int64),
        np.full(4, 0.9, np.float32),
        np.array([0, 0, 1, 1]),
        boxes,
        np.arange(4),
    )
    crowds, found = TrueObjects.of(truth), Objects.detected(table)
    ignored = within_crowds(crowds, found)
    assert ignored.tolist() == [True, False, False, False]
    counts = count_outcomes(Objects.true(truth, np.array([0])), found, 1, 2, ignored)
    assert dict(zip(COUNTED, counts.by_image[0], strict=True)) == {
        **dict.fromkeys(COUNTED, 0),
        "kept": 1,
        "unmatched": 2,
    }
