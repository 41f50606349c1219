"""Relevance on a sample of images of a data set."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import headoff
from headoff.cli import main
from headoff.errors import SettingError
from headoff.evaluation import relevance
from headoff.evaluation.relevance import (
    QUANTITIES,
    explained,
    faithfulness_statistics,
    relevance_statistics,
)
from headoff.evaluation.sources import Scenes
from headoff.faithfulness import ExplainedImage
from headoff.figures.evaluation_samples import plot_faithfulness_statistics, plot_relevance_statistics
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
    assert found.images.tolist() == [3] * 3 and found.objects.tolist() == [shares.shape[1]] * 3
    np.testing.assert_allclose(found.mean[:2, 0], shares[:2].mean(1), rtol=1e-6)
    np.testing.assert_allclose(found.mean[:, 1], masses.mean(1), rtol=1e-6)
    # Without heads there is no relevance, whose share would be anywhere.
    assert np.isnan(found.mean[2, 0]) and found.mean[2, 1] == 0 and found.mean[0, 1] == 1
    assert (found.low[:2] <= found.mean[:2]).all() and (found.mean[:2] <= found.high[:2]).all()
    rows = list(found.rows())
    assert [row["quantity"] for row in rows] == [*QUANTITIES] * 3
    assert plot_relevance_statistics(found).lines


def test_an_interrupted_sample_goes_on(detector, tmp_path, monkeypatch):
    """With as many configurations as wanted, which are explained some at a time."""
    chosen = [none_off(), *single_heads(6, 8)[:4]]
    arguments = detector, Scenes(0, 192), range(4), chosen, 2
    whole = relevance_statistics(*arguments)
    sums, calls = relevance._sums, []

    def interrupted(*given):
        calls.append(len(given[3]))
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sums(*given)

    monkeypatch.setattr(relevance, "MOST_CONFIGURATIONS", 3)
    with monkeypatch.context() as patched:
        patched.setattr(relevance, "_sums", interrupted)
        with pytest.raises(KeyboardInterrupt):
            relevance_statistics(*arguments, store=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 and calls == [2, 2, 1, 2, 2]
    found = relevance_statistics(*arguments, store=tmp_path)
    np.testing.assert_allclose(found.mean, whole.mean, rtol=1e-6)

    def fail(*_):
        raise AssertionError("explained again")

    monkeypatch.setattr(relevance, "_sums", fail)
    again = relevance_statistics(*arguments, store=tmp_path)
    np.testing.assert_array_equal(again.mean, found.mean)
    np.testing.assert_array_equal(again.low, found.low)
    with pytest.raises(AssertionError):
        relevance_statistics(*arguments, store=tmp_path, about={"weights": "others"})
    for path in tmp_path.iterdir():
        path.write_text("{")
    with pytest.raises(AssertionError):
        relevance_statistics(*arguments, store=tmp_path)


def test_faithfulness_is_that_of_the_package_under_each_configuration(tmp_path, monkeypatch):
    detector = headoff.load("scenes", short_side=96)
    pictures, chosen = Scenes(0, 96), [none_off(), parse_configuration("first 2"), parse_configuration("all")]
    progress = []
    arguments = detector, pictures, range(4), chosen, 2
    found = faithfulness_statistics(*arguments, store=tmp_path, progress=lambda *now: progress.append(now))
    assert progress[-1] == (6, 6) and len(progress) == 6
    drawn = sorted(np.random.default_rng(0).permutation(4)[:2].tolist())
    images = [pictures.load(index)[0] for index in drawn]
    assert [one["method"] for one in found.columns] == ["chefer"] * 4 + ["random"] * 4
    for row, off in enumerate(("none", "first 2")):
        whole = headoff.faithfulness(detector, images, ("chefer", "random"), "tokens_removed", off=off)
        assert found.objects[row] == whole.objects > 0
        for place, column in enumerate(found.columns):
            one = whole.estimate(column["method"], "tokens_removed", column["quantity"])
            np.testing.assert_allclose(
                (found.mean[row, place], found.low[row, place], found.high[row, place]),
                (one.value, one.low, one.high),
                rtol=1e-6,
            )
    # Maps of the detector are better than random ones, and nothing is detected with all heads off.
    assert found.mean[0, 0] < found.mean[0, 4] and found.mean[0, 1] > found.mean[0, 5]
    assert found.objects[2] == 0 and np.isnan(found.mean[2]).all()
    assert len(plot_faithfulness_statistics(found).lines) == 4

    def fail(*_, **__):
        raise AssertionError("measured again")

    monkeypatch.setattr(ExplainedImage, "of", fail)
    again = faithfulness_statistics(*arguments, store=tmp_path)
    np.testing.assert_array_equal(again.mean, found.mean)


def test_the_summary_has_relevance_and_faithfulness(tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="detections are stored by pyarrow: pip install 'headoff[evaluate]'")
    command = ["evaluate", "scenes:3", "--short-side", "96", "--threads", "1", "--workers", "0"]
    command += [
        "--off",
        "H6",
        "--off",
        "H7",
        "--resamples",
        "0",
        "--relevance-method",
        "raw",
        "--figures",
        "none",
    ]
    assert main([*command, "--out", str(tmp_path / "no")]) == 2
    assert "give --relevance N or --faithfulness N" in capsys.readouterr().err
    command += ["--relevance", "2", "--faithfulness", "1"]
    for options, message in (
        (["--relevance-configurations", "single"], "no single sweep"),
        (["--relevance-configurations", "many"], "of 'many'"),
        (["--relevance-method", "rwa"], "no relevance method 'rwa'"),
    ):
        assert main([*command, "--out", str(tmp_path / "no"), *options]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "no").exists()
    command += ["--out", str(tmp_path), "--relevance-configurations", "2"]
    assert main([*command, "--ablate", "uniform"]) == 0
    contents = json.loads((tmp_path / "summary.json").read_text())
    assert {row["text"] for row in contents["relevance"]} == {"none", "H6"}
    # What replaces a head is not known to curves.
    assert {row["text"] for row in contents["faithfulness"]} == {"none"}
    assert {row["method"] for row in contents["faithfulness"]} == {"raw", "random"}
    with (tmp_path / "faithfulness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["quantity"] for row in rows[:2]] == ["deletion", "insertion"]
    assert float(rows[0]["mean"]) == pytest.approx(contents["faithfulness"][0]["mean"], rel=1e-5)


def test_what_is_explained():
    assert explained(cumulative(8)) == list(cumulative(8))
    many = (none_off(), *single_heads(6, 8), *all_subsets(8)[1:])
    assert explained(many) == list(cumulative(8))
    assert explained((none_off(), *single_heads(6, 8))) == [none_off(), *single_heads(6, 8)[:15]]
    assert explained(many, "all") == list(many) and explained(many, "3") == list(many[:3])
    assert explained(many, "single") == [none_off(), *single_heads(6, 8)]
    assert len(explained(many, "subsets")) == 256


def test_settings(detector):
    with pytest.raises(SettingError, match="a sample of 0"):
        relevance_statistics(detector, Scenes(0, 192), range(4), cumulative(8), 0)
