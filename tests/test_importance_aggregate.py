"""Means over images with their intervals."""

import json

import numpy as np
import pytest
from importance_examples import importance_of

from headoff.errors import SettingError
from headoff.importance import aggregate
from headoff.importance.result import Key

KEY = Key("zero", "removal", "probability")


def images(count, **options):
    return [importance_of(1 + index % 4, seed=index, **options) for index in range(count)]


def test_an_image_counts_once():
    found = images(5)
    totals = aggregate(found)
    per_image = np.stack([one.mean_scores("removal", "probability", "zero").numpy() for one in found])
    assert np.allclose(totals.scores[KEY].scores, per_image.mean(0), atol=1e-14)
    assert (totals.images, totals.objects) == (5, 1 + 2 + 3 + 4 + 1)
    pairs = np.stack([one.get("shapley_columns").interactions.mean(0).numpy() for one in found])
    assert np.allclose(
        totals.scores[Key("zero", "shapley_columns", "probability")].interactions, pairs.mean(0)
    )


def test_intervals_are_those_of_a_bootstrap_over_images():
    found = images(30)
    totals = aggregate(found)
    per_image = np.stack([one.mean_scores("removal", "probability", "zero").numpy() for one in found])
    generator = np.random.default_rng(5)
    samples = per_image[generator.integers(0, 30, (20_000, 30))].mean(1)
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    width = high - low
    assert (np.abs(totals.scores[KEY].low - low) < 0.1 * width).all()
    assert (np.abs(totals.scores[KEY].high - high) < 0.1 * width).all()
    unclear = totals.scores[KEY].spans_zero
    assert ((totals.scores[KEY].low <= 0) & (totals.scores[KEY].high >= 0) == unclear).all() and unclear.any()
    again = aggregate(images(30)).scores[KEY]
    assert np.array_equal(again.low, totals.scores[KEY].low)  # the same images have the same interval


def test_the_files_of_reports_give_the_same():
    found = images(4)
    read = [json.loads(json.dumps(one.as_dict())) for one in found]
    direct, from_files = aggregate(found), aggregate(iter(read))
    for key, scores in direct.scores.items():
        assert np.array_equal(scores.scores, from_files.scores[key].scores)
        assert np.array_equal(scores.low, from_files.scores[key].low)


def test_images_without_objects_count_for_values_of_the_image_only():
    found = [importance_of(2, seed=1), importance_of(0, seed=2), importance_of(3, seed=3)]
    totals = aggregate(found)
    assert totals.scores[KEY].images == 2 and totals.images == 3
    assert totals.scores[Key("zero", "removal", "unmatched")].images == 3
    nothing = aggregate([importance_of(0, values=("probability",))])
    assert nothing.scores == {} and list(nothing.rows()) == []


def test_one_image_has_no_interval():
    scores = aggregate(images(1)).scores[KEY]
    assert np.isnan(scores.low).all() and np.isnan(scores.high).all() and scores.spans_zero.all()


def test_rows_are_in_words():
    rows = list(aggregate(images(3)).rows())
    row = next(r for r in rows if r["measure"] == "shapley_columns" and r["value"] == "unmatched")
    assert row["layer"] == "all" and row["of"] == "image" and row["images"] == 3
    assert row["low"] <= row["score"] <= row["high"]


def test_images_that_were_scored_otherwise_are_not_added_up():
    with pytest.raises(SettingError, match="scored at different sites, or by different measures"):
        aggregate([importance_of(), importance_of(ablations=("zero",))])
    with pytest.raises(SettingError, match="give at least one"):
        aggregate([])
