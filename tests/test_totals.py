"""Totals over images: what is added up, intervals, tables and the chart."""

import csv
import json
import math

import numpy as np
import pytest
from sweep_examples import crowd, example

from headoff.errors import SettingError
from headoff.figures import plot_totals
from headoff.gates import all_subsets, cumulative, heads_off, none_off, single_heads
from headoff.outcomes import Status
from headoff.report import folder_index, has_results, write_report
from headoff.totals import total


def images(count=5, configurations=None):
    return [
        crowd(3 + 2 * seed, (60, 80), seed=seed, configurations=configurations)[1] for seed in range(count)
    ]


def test_objects_of_all_images_are_added_up():
    results = images()
    found = total(results)
    assert (found.images, found.objects) == (5, sum(len(one.baseline) for one in results))
    survival = np.concatenate([one.survival().numpy() for one in results])
    for c, one in enumerate(found.configurations):
        assert (one.name, one.text) == (cumulative()[c].name, cumulative()[c].text)
        assert one.survival == pytest.approx(survival[:, c].mean(), abs=1e-6)
        assert one.low <= one.survival <= one.high
        assert one.unmatched == sum(len(result.outcomes[c].unmatched) for result in results)
        for status in Status:
            assert one.counts[status] == sum(result.outcomes[c].counts[status] for result in results)
    assert total(one.as_dict() for one in results) == found


def test_intervals_are_of_a_bootstrap_over_images():
    results = images(8)
    survival = [one.survival().double().numpy() for one in results]
    generator = np.random.default_rng(1)
    means = [np.concatenate([survival[i] for i in generator.integers(0, 8, 8)]).mean(0) for _ in range(2000)]
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    found = total(results).configurations
    np.testing.assert_allclose([one.low for one in found], low, atol=0.02)
    np.testing.assert_allclose([one.high for one in found], high, atol=0.02)
    assert max(one.high - one.low for one in found) > 0.1
    same = total([results[3]] * 6).configurations  # images that do not differ
    assert all(one.high - one.low < 1e-9 for one in same)
    assert all(math.isnan(one.low) for one in total(results[:1]).configurations)


def test_images_without_objects_count_as_images_alone():
    empty = example([], [], (60, 80))
    some = images(3)
    without, found = total(some), total([*some, empty])
    assert (found.images, found.objects) == (4, without.objects)
    assert found.configurations == without.configurations
    nothing = total([empty, empty])
    assert math.isnan(nothing.configurations[0].survival) and nothing.objects == 0
    assert "No object" in "".join(text.get_text() for text in plot_totals(nothing).texts)


def test_what_cannot_be_added_up():
    with pytest.raises(SettingError, match="no sweeps to add up"):
        total([])
    with pytest.raises(SettingError, match="of different configurations"):
        total([*images(1), *images(1, [none_off(), heads_off(1)])])


def test_objects_may_have_other_queries_in_every_image():
    named = [heads_off(1).for_queries(query).named("object 0: H1 off") for query in (3, 4)]
    found = total(images(1, [none_off(), one])[0] for one in named)
    assert [(one.name, one.text) for one in found.configurations] == [
        ("none off", "none"),
        ("object 0: H1 off", ""),
    ]


@pytest.mark.parametrize(
    "configurations, axis",
    [
        (cumulative(), "number of heads off"),
        ([none_off(), heads_off(1, layers=[0]).named("edge $x$")], "mean probability of an object's class"),
        (single_heads(2, 8), "mean probability of an object's class"),
        (all_subsets(7), "128 configurations, from the greatest to the least mean"),
    ],
)
def test_the_chart_says_what_it_draws(configurations, axis):
    ax = plot_totals(total(images(3, configurations)))
    assert axis in ax.get_xlabel()
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["mean of 15 objects in 3 images", "95% interval (bootstrap over images)"]
    ax.figure.draw_without_rendering()


@pytest.mark.usefixtures("blank_figures")
def test_the_index_of_a_folder_has_totals(tmp_path):
    configurations = [none_off(), heads_off(1)]
    pairs = [crowd(3, (60, 80), seed=seed, configurations=configurations) for seed in range(3)]
    for seed, (picture, result) in enumerate(pairs):
        write_report(tmp_path / f"{seed}.png", picture, result, provenance={})
    reports = [tmp_path / f"{seed}.png" for seed in range(3)]
    page = folder_index(tmp_path, reports).read_text()
    assert 'src="totals.png"' in page and "3 images" in page and has_results(tmp_path)
    rows = list(csv.DictReader((tmp_path / "totals.csv").open()))
    for row, one in zip(rows, total(result for _, result in pairs).rows(), strict=True):
        assert row == {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in one.items()}
    # Reports of other configurations have an index, but no totals.
    write_report(tmp_path / "2.png", pairs[2][0], images(1)[0], provenance={})
    assert "totals" not in folder_index(tmp_path, reports).read_text()
    assert not (tmp_path / "totals.csv").exists() and not (tmp_path / "totals.png").exists()
    files = json.loads((tmp_path / "headoff-index.json").read_text())["files"]
    assert files == ["index.html"]
    # A report in the place of the index removes all of it.
    folder_index(tmp_path, reports[:2])
    write_report(tmp_path, *pairs[0], provenance={})
    assert not list(tmp_path.glob("totals*")) and not (tmp_path / "headoff-index.json").exists()
    assert (tmp_path / "0.png" / "sweep.json").exists()


def test_results_as_dataframes(monkeypatch):
    pandas = pytest.importorskip("pandas")
    (result,) = images(1)
    frame = result.to_dataframe()
    assert len(frame) == len(result) * len(result.baseline)
    lost = frame[frame.status == "lost"].groupby("configuration").size()
    for configuration, outcome in zip(result.configurations, result.outcomes, strict=True):
        assert lost.get(configuration.name, 0) == outcome.counts[Status.LOST]
    assert total([result]).to_dataframe().survival.iloc[0] == pytest.approx(
        frame[frame.configuration == "none off"].query_score.mean()
    )
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(SettingError, match="needs pandas: `pip install pandas`"):
        result.to_dataframe()
    assert pandas
