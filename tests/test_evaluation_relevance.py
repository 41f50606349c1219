"""Relevance on a sample of images of a data set."""

from __future__ import annotations

import numpy as np
import pytest

import headoff
from headoff.errors import SettingError
from headoff.evaluation.relevance import QUANTITIES, explained, relevance_statistics
from headoff.evaluation.sources import Scenes
from headoff.figures.evaluation import plot_relevance_statistics
from headoff.gates import all_subsets, cumulative, none_off, parse_configuration, single_heads


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes")


def test_statistics_are_means_over_the_objects_of_explanations(detector):
    chosen = [none_off(), parse_configuration("H6"), parse_configuration("H0-7")]
    pictures = Scenes(0, 192)
    found = relevance_statistics(detector, pictures, range(4), chosen, 3)
    drawn = sorted(np.random.default_rng(0).permutation(4)[:3].tolist())
    shares, masses = [], []
    for index in drawn:
        one = headoff.explain(detector, pictures.load(index)[0], chosen, layers="last")
        shares.append(one.box_shares[..., -1].numpy())
        masses.append((one.masses / one.masses[0])[..., -1].numpy())
    shares, masses = np.concatenate(shares, 1), np.concatenate(masses, 1)
    assert found.images == 3 and found.objects == shares.shape[1]
    np.testing.assert_allclose(found.mean[:2, 0], shares[:2].mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.mean[:, 1], masses.mean(1), rtol=1e-6)
    # Without heads there is no relevance, whose share would be anywhere.
    assert np.isnan(found.mean[2, 0]) and found.mean[2, 1] == 0 and found.mean[0, 1] == 1
    assert (found.low[:2] <= found.mean[:2]).all() and (found.mean[:2] <= found.high[:2]).all()
    rows = list(found.rows())
    assert [row["quantity"] for row in rows] == [*QUANTITIES] * 3
    assert plot_relevance_statistics(found).lines


def test_what_is_explained():
    assert explained(cumulative(8)) == list(cumulative(8))
    many = (none_off(), *single_heads(6, 8), *all_subsets(8)[1:])
    assert explained(many) == list(cumulative(8))
    assert explained((none_off(), *single_heads(6, 8))) == [none_off(), *single_heads(6, 8)[:15]]


def test_settings(detector):
    for arguments, words in (
        ((cumulative(8), 0), "a sample of 0"),
        ((all_subsets(8), 1), "would take very long"),
    ):
        with pytest.raises(SettingError, match=words):
            relevance_statistics(detector, Scenes(0, 192), range(4), *arguments)
