"""Scores of configurations, and what heads contribute to AP."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from evaluation_examples import HEADS, LAYERS, FakeResults

from headoff.errors import SettingError
from headoff.evaluation.importance import head_scores
from headoff.evaluation.matching import TrueObjects, match
from headoff.evaluation.outcomes import COUNTED
from headoff.evaluation.precision import accumulate
from headoff.evaluation.scores import interval, score
from headoff.gates import heads_off, none_off


@pytest.fixture(scope="module")
def scores():
    return score(FakeResults(), resamples=60, confidence=0.3)


def test_scores_are_those_of_each_configuration(scores):
    source = FakeResults()
    objects = TrueObjects.of(source.truth)
    for index in (0, 3, 7):
        found = accumulate(objects, match(objects, source.detections(index)))
        one = scores.configurations[index]
        np.testing.assert_array_equal(one.metrics, [*found.metrics().values()])
        np.testing.assert_array_equal(one.by_class, found.by_class())
        low, high = one.interval("AP")
        assert 0 <= low < one["AP"] < high <= 1
        assert (one.class_low < one.by_class).all() and (one.by_class < one.class_high).all()
        table = source.detections(index)
        assert one.detections == pytest.approx((table.scores > 0.3).sum() / 40)


def test_losses_are_paired(scores):
    lost, low, high = scores.loss(0)
    assert (lost, low, high) == (0, 0, 0)
    index = next(i for i, one in enumerate(scores.configurations) if one.configuration == heads_off(0))
    lost, low, high = scores.loss(index)
    alone = scores.configurations[index].interval("AP")
    assert lost == scores.baseline["AP"] - scores.configurations[index]["AP"]
    assert low < lost < high and high - low < alone[1] - alone[0]
    one = scores.configurations[index]
    assert ((one.class_loss_high - one.class_loss_low) < (one.class_high - one.class_low)).all()


def test_losses_of_images_add_up(scores):
    for index in (1, 5):
        losses = scores.image_losses(index)
        assert losses.sum() == pytest.approx(scores.loss(index)[0])
        assert losses.std() > 0
    part = score(FakeResults(), images=np.arange(20), resamples=0)
    assert np.isnan(part.image_losses(1)[20:]).all()
    assert part.image_losses(1)[:20].sum() == pytest.approx(part.loss(1)[0])
    assert np.isnan(part.loss(1)[1])


def test_outcomes_add_up_to_the_objects(scores):
    for one in scores.configurations:
        for outcomes in one.outcomes.values():
            assert outcomes.rates[:-1].sum() == pytest.approx(1)
            counts = outcomes
            assert (counts.by_class[..., :-1].sum(-1) == counts.objects_by_class).all()
            assert (outcomes.low <= outcomes.rates + 1e-12).all()
            assert (outcomes.rates <= outcomes.high + 1e-12).all()
    same = scores.baseline.outcomes["none off"]
    assert dict(zip(COUNTED, same.rates, strict=True)) == {**dict.fromkeys(COUNTED, 0), "kept": 1}


def test_processes_find_the_same(scores):
    source = FakeResults()
    chosen = [0, 2, 4]
    found = score(source, configurations=chosen, resamples=60, confidence=0.3, processes=2)
    for place, index in enumerate(chosen):
        np.testing.assert_array_equal(
            found.configurations[place].samples, scores.configurations[index].samples
        )
        np.testing.assert_array_equal(
            found.configurations[place].class_loss_low, scores.configurations[index].class_loss_low
        )


def test_shapley_values_of_ap(scores):
    removal, shapley = head_scores(scores)
    assert shapley.measure == "shapley_columns" and shapley.heads == (0, 1, 2) and shapley.layers == ()
    # Efficiency: the values add up to what all heads together are worth.
    ap = {one.configuration.text: one["AP"] for one in scores.configurations}
    everything = heads_off(*range(HEADS)).text
    assert shapley.scores.sum() == pytest.approx(ap["none"] - ap[everything], abs=1e-12)
    assert (shapley.on, shapley.off) == (ap["none"], ap[everything])
    # The definition: marginal contributions in all orders of the heads.
    expected = np.zeros(HEADS)
    for order in permutations(range(HEADS)):
        for place, head in enumerate(order):
            before, after = (
                heads_off(*off).text if off else "none"
                for off in (set(range(HEADS)) - {*order[:place]}, set(range(HEADS)) - {*order[: place + 1]})
            )
            expected[head] += ap[after] - ap[before]
    np.testing.assert_allclose(shapley.scores[0], expected / 6)
    assert shapley.scores[0].argmax() == 1
    assert (shapley.low < shapley.scores).all() and (shapley.scores < shapley.high).all()
    assert [row["layer"] for row in shapley.rows()] == ["all"] * HEADS


def test_single_heads_lose_ap(scores):
    removal, _ = head_scores(scores)
    assert removal.measure == "removal" and removal.scores.shape == (LAYERS, HEADS)
    ap = {one.configuration.text: one["AP"] for one in scores.configurations}
    for row in removal.rows():
        text = heads_off(row["head"], layers=[row["layer"]]).text
        assert row["score"] == ap["none"] - ap[text]
        assert row["low"] < row["score"] < row["high"]


def test_intervals_are_around_the_estimate():
    samples = np.array([[1.0, 2, 3, 4, 5], [np.nan] * 5])
    low, high = interval(samples, np.array([10.0, 3]))
    assert low[0] == pytest.approx(8.1) and high[0] == pytest.approx(11.9)
    assert np.isnan([low[1], high[1]]).all()
    assert np.isnan(interval(np.zeros((2, 0)), np.zeros(2))).all()


def test_settings_are_checked():
    for arguments, words in (
        ({"images": []}, "no image has been evaluated"),
        ({"resamples": -1}, "-1 samples"),
        ({"confidence": 1.5}, "1.5 is not a probability"),
    ):
        with pytest.raises(SettingError, match=words):
            score(FakeResults((none_off(),)), **arguments)
