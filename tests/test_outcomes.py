import dataclasses
import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headoff.detections import Detections
from headoff.errors import NonFiniteError, SettingError
from headoff.outcomes import KEEP_IOU, TOUCH_IOU, Status, outcomes_of

NAMES = ("person", "horse", "dog")
QUERIES = 8
LOGITS = torch.randn(QUERIES, 4, generator=torch.Generator().manual_seed(0))


def scene(*rows, size=(100, 100)):
    """Detections of (query, label, box) or (query, label, box, score)."""
    scores = [row[3] if len(row) > 3 else 0.9 for row in rows]
    return Detections(
        queries=torch.tensor([row[0] for row in rows], dtype=torch.int64),
        labels=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        scores=torch.tensor(scores, dtype=torch.float32),
        boxes=torch.tensor([row[2] for row in rows], dtype=torch.float32).reshape(-1, 4),
        image_size=size,
        class_names=NAMES,
    )


def shuffled(detections, order):
    order = torch.tensor(order, dtype=torch.int64)
    return dataclasses.replace(
        detections,
        queries=detections.queries[order],
        labels=detections.labels[order],
        scores=detections.scores[order],
        boxes=detections.boxes[order],
    )


def counts(result):
    return {status.value: count for status, count in result.counts.items() if count}


PERSON = (0, 0, (10, 10, 50, 50))


def test_kept_by_its_own_query():
    found = outcomes_of(scene(PERSON), scene((0, 0, (12, 10, 50, 50), 0.7)), LOGITS)
    (outcome,) = found.outcomes
    assert (outcome.status, outcome.detections, outcome.new_label) == (Status.KEPT, (0,), None)
    assert outcome.iou == pytest.approx(38 / 40)
    assert outcome.score == pytest.approx(0.7)
    assert (outcome.object, outcome.query, outcome.label) == (0, 0, 0)


def test_kept_by_another_query_taking_over():
    found = outcomes_of(scene(PERSON), scene((3, 0, (10, 10, 50, 50))), LOGITS)
    assert counts(found) == {"kept": 1} and found.unmatched == ()


def test_moved():
    found = outcomes_of(scene(PERSON), scene((0, 0, (28, 10, 68, 50))), LOGITS)  # IoU 22/58
    assert counts(found) == {"moved": 1}
    assert found.outcomes[0].iou == pytest.approx(22 / 58)


def test_far_away_is_lost_and_unmatched():
    found = outcomes_of(scene(PERSON), scene((0, 0, (34, 10, 74, 50))), LOGITS)  # IoU 16/64
    assert counts(found) == {"lost": 1} and found.unmatched == (0,)
    (outcome,) = found.outcomes
    assert (outcome.iou, outcome.score, outcome.detections, outcome.new_label) == (0.0, 0.0, (), None)


def test_relabelled():
    found = outcomes_of(scene(PERSON), scene((0, 2, (10, 10, 50, 48))), LOGITS)
    (outcome,) = found.outcomes
    assert (outcome.status, outcome.new_label, outcome.detections) == (Status.RELABELLED, 2, (0,))
    assert found.unmatched == ()


def test_a_loose_box_with_another_label_is_not_the_object():
    found = outcomes_of(scene(PERSON), scene((0, 2, (28, 10, 68, 50))), LOGITS)
    assert counts(found) == {"lost": 1} and found.unmatched == (0,)


def test_duplicated_lists_the_paired_one_first_then_by_overlap():
    found = outcomes_of(
        scene(PERSON),
        scene(
            (4, 0, (20, 10, 60, 50)),
            (5, 0, (10, 10, 50, 49)),
            (0, 0, (15, 10, 55, 50)),
            (6, 1, (10, 10, 50, 50)),
        ),
        LOGITS,
    )
    assert counts(found) == {"duplicated": 1}
    assert found.outcomes[0].detections == (2, 1, 0)
    assert found.duplicates == 2
    assert found.unmatched == (3,)  # a horse where a person is: nothing of its label is there


def test_twice_moved_is_duplicated():
    found = outcomes_of(scene(PERSON), scene((0, 0, (28, 10, 68, 50)), (1, 0, (10, 28, 50, 68))), LOGITS)
    assert counts(found) == {"duplicated": 1}


def test_own_query_goes_before_a_better_box_of_another():
    # Two near-duplicates in the baseline: query 1 drifts towards the box of query 2, which falls silent.
    baseline = scene((1, 0, (10, 10, 50, 50)), (2, 0, (14, 10, 54, 50)))
    found = outcomes_of(baseline, scene((1, 0, (13, 10, 53, 50))), LOGITS)
    assert [outcome.status for outcome in found.outcomes] == [Status.KEPT, Status.LOST]


def test_a_second_find_is_a_duplicate_rather_than_another_label():
    # A rider and a horse; the rider is gone, the horse is found twice, once where the rider was.
    baseline = scene((0, 0, (10, 10, 50, 50)), (1, 1, (10, 20, 50, 60)))
    found = outcomes_of(baseline, scene((1, 1, (10, 20, 50, 60)), (0, 1, (10, 14, 50, 54))), LOGITS)
    assert [outcome.status for outcome in found.outcomes] == [Status.LOST, Status.DUPLICATED]


def test_of_equal_boxes_that_of_the_own_query_is_paired():
    left, right = (0, 0, (0, 10, 40, 50)), (1, 0, (36, 10, 76, 50))
    found = outcomes_of(scene((1, 0, (18, 10, 58, 50))), scene(left, right), LOGITS)
    assert found.outcomes[0].detections == (1, 0)


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_remaining_ties_go_by_query_whatever_the_order(order):
    twins = shuffled(scene((2, 0, (10, 10, 50, 50)), (3, 0, (10, 10, 50, 50))), order)
    third = scene((7, 0, (10, 10, 50, 50)))
    assert [twins[i].query for i in outcomes_of(third, twins, LOGITS).outcomes[0].detections] == [2, 3]
    kept = [outcome.query for outcome in outcomes_of(twins, third, LOGITS).outcomes if outcome.detections]
    assert kept == [2]


def test_swapped_objects_are_both_kept():
    baseline = scene((0, 0, (0, 0, 20, 20)), (1, 0, (60, 60, 90, 90)))
    found = outcomes_of(baseline, scene((1, 0, (0, 0, 20, 20)), (0, 0, (60, 60, 90, 90))), LOGITS)
    assert counts(found) == {"kept": 2}
    assert [outcome.detections for outcome in found.outcomes] == [(0,), (1,)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_query_score_is_the_probability_at_the_objects_query(dtype):
    logits = LOGITS.to(dtype)
    baseline = scene((5, 2, (0, 0, 9, 9)), (3, 1, (20, 20, 40, 40)))
    found = outcomes_of(baseline, scene(), logits)
    for outcome, (query, label) in zip(found.outcomes, ((5, 2), (3, 1)), strict=True):
        row = [math.exp(value) for value in logits[query].tolist()]
        assert outcome.query_score == pytest.approx(row[label] / sum(row), rel=1e-9)


def test_nothing_on_either_side():
    assert counts(outcomes_of(scene(), scene(), LOGITS)) == {}
    assert outcomes_of(scene(), scene(PERSON), LOGITS).unmatched == (0,)
    assert counts(outcomes_of(scene(PERSON), scene(), LOGITS)) == {"lost": 1}
    assert set(outcomes_of(scene(), scene(), LOGITS).counts) == set(Status)


def test_thresholds_are_inclusive_and_can_be_set():
    half = scene((0, 0, (10, 10, 50, 30)))  # IoU exactly 1/2
    assert counts(outcomes_of(scene(PERSON), half, LOGITS)) == {"kept": 1}
    assert counts(outcomes_of(scene(PERSON), half, LOGITS, keep_iou=0.6)) == {"moved": 1}
    assert counts(outcomes_of(scene(PERSON), half, LOGITS, keep_iou=0.6, touch_iou=0.5)) == {"moved": 1}
    assert counts(outcomes_of(scene(PERSON), half, LOGITS, keep_iou=0.6, touch_iou=0.55)) == {"lost": 1}


@pytest.mark.parametrize(
    ("keep", "touch"), [(0.3, 0.5), (1.1, 0.3), (0.5, 0.0), (math.nan, 0.3), (0.5, math.nan)]
)
def test_impossible_thresholds_are_rejected(keep, touch):
    with pytest.raises(SettingError, match="thresholds"):
        outcomes_of(scene(PERSON), scene(PERSON), LOGITS, keep_iou=keep, touch_iou=touch)


def test_what_does_not_belong_together_is_rejected():
    with pytest.raises(SettingError, match="different images"):
        outcomes_of(scene(PERSON), scene(PERSON, size=(99, 100)), LOGITS)
    with pytest.raises(SettingError, match="logits"):
        outcomes_of(scene(PERSON), scene(PERSON), LOGITS[:, :3])
    with pytest.raises(SettingError, match="query 7"):
        outcomes_of(scene((7, 0, (0, 0, 9, 9))), scene(), LOGITS[:7])
    broken = LOGITS.clone()
    broken[2, 0] = math.nan
    with pytest.raises(NonFiniteError, match="query 2"):
        outcomes_of(scene(PERSON), scene(PERSON), broken)


def test_dictionaries_survive_json():
    found = outcomes_of(scene(PERSON), scene((0, 2, (10, 10, 50, 48))), LOGITS)
    stored = json.loads(json.dumps(found.as_dict()))
    assert stored["counts"] == {"kept": 0, "moved": 0, "duplicated": 0, "relabelled": 1, "lost": 0}
    assert stored["outcomes"] == [found.outcomes[0].as_dict()]
    assert stored["outcomes"][0]["status"] == "relabelled"


# Boxes on a coarse grid, some without area: overlaps, ties and exact duplicates are frequent.
spans = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted)
boxes = st.tuples(spans, spans).map(lambda spans: (spans[0][0], spans[1][0], spans[0][1], spans[1][1]))


@st.composite
def scenes(draw):
    queries = draw(st.lists(st.integers(0, QUERIES - 1), unique=True, max_size=6))
    return scene(
        *((query, draw(st.integers(0, 1)), draw(boxes), draw(st.floats(0.5, 1))) for query in queries)
    )


def overlap(box, other):
    """IoU in exact arithmetic."""
    if box == other:
        return Fraction(1)
    (x0, y0, x1, y1), (u0, v0, u1, v1) = ([Fraction(value) for value in side] for side in (box, other))
    shared = max(min(x1, u1) - max(x0, u0), 0) * max(min(y1, v1) - max(y0, v0), 0)
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - shared
    return shared / union if union else Fraction(0)


fast = settings(max_examples=80, deadline=None)


@fast
@given(scenes())
def test_the_baseline_against_itself_is_all_kept(baseline):
    found = outcomes_of(baseline, baseline, LOGITS)
    assert [outcome.status for outcome in found.outcomes] == [Status.KEPT] * len(baseline)
    assert [outcome.detections for outcome in found.outcomes] == [(i,) for i in range(len(baseline))]
    assert all(outcome.iou == 1 for outcome in found.outcomes)
    assert found.unmatched == () and found.duplicates == 0


@fast
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(0, 1e-3)), max_size=QUERIES))
def test_near_duplicates_in_the_baseline_are_told_apart(corners):
    """Boxes that differ by less than rounding, or hardly have an area."""
    rows = [(query, 0, (x, y, x + size, y + size)) for query, (x, y, size) in enumerate(corners)]
    baseline = scene(*rows)
    found = outcomes_of(baseline, baseline, LOGITS)
    assert [outcome.detections for outcome in found.outcomes] == [(i,) for i in range(len(baseline))]


@fast
@given(scenes(), scenes())
def test_every_detection_belongs_to_one_object_or_to_nothing(baseline, detections):
    found = outcomes_of(baseline, detections, LOGITS)
    assert len(found.outcomes) == len(baseline) == sum(found.counts.values())
    belonging = [index for outcome in found.outcomes for index in outcome.detections]
    assert sorted([*belonging, *found.unmatched]) == list(range(len(detections)))


@fast
@given(scenes(), scenes())
def test_statuses_mean_what_they_say(baseline, detections):
    found = outcomes_of(baseline, detections, LOGITS)
    taken = {index for outcome in found.outcomes for index in outcome.detections}
    for outcome, item in zip(found.outcomes, baseline, strict=True):
        ious = [overlap(item.box, other.box) for other in detections]
        same = [other.label == item.label for other in detections]
        mine = outcome.detections
        own = next((i for i, other in enumerate(detections) if other.query == item.query), None)
        if own is not None and same[own] and ious[own] >= KEEP_IOU:
            assert mine[0] == own
        if outcome.status is Status.LOST:
            assert mine == () and outcome.iou == outcome.score == 0
            touching = [i for i in range(len(detections)) if same[i] and ious[i] >= TOUCH_IOU]
            in_place = [i for i in range(len(detections)) if not same[i] and ious[i] >= KEEP_IOU]
            assert taken.issuperset(touching) and taken.issuperset(in_place)
            continue
        assert outcome.iou == pytest.approx(float(ious[mine[0]]), rel=1e-12)
        assert outcome.score == detections[mine[0]].score
        if outcome.status is Status.RELABELLED:
            assert len(mine) == 1 and not same[mine[0]] and ious[mine[0]] >= KEEP_IOU
            assert outcome.new_label == detections[mine[0]].label
            continue
        assert outcome.new_label is None
        assert all(same[i] and ious[i] >= TOUCH_IOU for i in mine)
        assert (outcome.status is Status.DUPLICATED) == (len(mine) > 1)
        if outcome.status is not Status.DUPLICATED:
            assert (outcome.status is Status.KEPT) == (ious[mine[0]] >= KEEP_IOU)
        # Duplicates are of the object that they overlap most.
        for i in mine[1:]:
            others = [
                overlap(other.box, detections[i].box) for other in baseline if other.label == item.label
            ]
            assert ious[i] == max(others)
        assert [ious[i] for i in mine[1:]] == sorted((ious[i] for i in mine[1:]), reverse=True)
    for i in found.unmatched:
        touched = [
            overlap(item.box, detections[i].box) for item in baseline if item.label == detections[i].label
        ]
        assert all(iou < TOUCH_IOU for iou in touched)


@fast
@given(scenes(), scenes(), st.randoms(use_true_random=False))
def test_order_changes_nothing_but_indices(baseline, detections, random):
    def by_query(found, baseline, detections):
        queries = detections.queries.tolist()
        told = {}
        for outcome, query in zip(found.outcomes, baseline.queries.tolist(), strict=True):
            assert outcome.query == query
            members = tuple(queries[i] for i in outcome.detections)
            told[query] = dataclasses.replace(outcome, object=0, detections=members)
        return told, {queries[i] for i in found.unmatched}

    orders = list(range(len(baseline))), list(range(len(detections)))
    for order in orders:
        random.shuffle(order)
    other_baseline, other_detections = shuffled(baseline, orders[0]), shuffled(detections, orders[1])
    expected = by_query(outcomes_of(baseline, detections, LOGITS), baseline, detections)
    found = outcomes_of(other_baseline, other_detections, LOGITS)
    assert by_query(found, other_baseline, other_detections) == expected
