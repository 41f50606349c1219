"""The summary of a results folder: tables, JSON, figures and the page."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from evaluation_examples import HEADS, LAYERS, FakeResults
from PIL import Image

from headoff.errors import ImageError, SettingError
from headoff.evaluation.scores import score
from headoff.evaluation.sources import Files, Scenes
from headoff.figures.evaluation import (
    evaluation_figures,
    plot_class_losses,
    plot_outcome_rates,
    plot_precision,
    plot_subset_precision,
)
from headoff.gates import cumulative, heads_off, none_off
from headoff.report.drawing import Drawing
from headoff.report.evaluation import write_summary
from headoff.report.worst_images import opened_with, sweep_command, worst_images


class Pictures:
    def load(self, index):
        if index % 2:
            raise ImageError("broken")
        return Image.new("RGB", (200, 200), "grey"), ""


@pytest.fixture(scope="module")
def scores():
    return score(FakeResults(), resamples=40, confidence=0.3)


@pytest.fixture(scope="module")
def folder(scores, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    (folder / "manifest.json").write_text("{}")
    page = write_summary(
        folder,
        FakeResults(),
        scores,
        provenance={"model": "fake", "annotations": "<data> & set"},
        skipped={3: "3.png cannot be read"},
        pictures=Pictures(),
        command=lambda image, _: f"headoff sweep {image}.png",
    )
    assert page == folder / "index.html"
    return folder


def rows_of(folder, name):
    with (folder / name).open() as file:
        return list(csv.DictReader(file))


def test_tables_have_the_scores(folder, scores):
    rows = rows_of(folder, "configurations.csv")
    assert [row["configuration"] for row in rows] == [one.configuration.name for one in scores.configurations]
    assert float(rows[2]["AP"]) == pytest.approx(scores.configurations[2]["AP"], rel=1e-5)
    assert float(rows[2]["AP_lost"]) == pytest.approx(scores.loss(2)[0], rel=1e-4)
    for row in rows_of(folder, "outcomes.csv"):
        counts = [int(row[name]) for name in ("kept", "moved", "duplicated", "relabelled", "lost")]
        assert sum(counts) == int(row["objects"])
    heads = rows_of(folder, "heads.csv")
    assert [row["measure"] for row in heads] == ["removal"] * LAYERS * HEADS + ["shapley_columns"] * HEADS
    assert {row["value"] for row in heads} == {"AP"}
    metrics = rows_of(folder, "metrics.csv")
    assert len(metrics) == 12 * len(scores)
    assert len(rows_of(folder, "classes.csv")) == 3 * len(scores)


def test_contributions_add_up_to_ap(folder, scores):
    table = pytest.importorskip("pyarrow.parquet").read_table(folder / "contributions.parquet")
    assert table.num_rows == 40
    for one in scores.configurations:
        total = np.sum(table[one.configuration.text].to_numpy(), dtype=float)
        assert total == pytest.approx(one["AP"], abs=1e-5)


def test_summary_lists_its_files(folder, scores):
    contents = json.loads((folder / "summary.json").read_text())
    assert contents["schema"] == "headoff.evaluation"
    assert contents["skipped"] == {"3.png": "3.png cannot be read"}
    assert all((folder / name).is_file() for name in contents["files"])
    assert len(contents["configurations"]) == len(scores)
    worst = contents["worst_images"][0]["images"]
    assert [one["ap_lost"] for one in worst] == sorted((one["ap_lost"] for one in worst), reverse=True)


def test_page_is_self_contained(folder, scores):
    page = (folder / "index.html").read_text()
    assert "&lt;data&gt; &amp; set" in page and "<data>" not in page
    assert page.count("<svg") == len(list(evaluation_figures(scores)))
    assert 'src="http' not in page and "data:image/webp" in page
    assert "3.png cannot be read" in page
    assert "headoff sweep" in page


def test_another_summary_replaces_it_and_leaves_the_rest(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    source = FakeResults((none_off(),))
    scores = score(source, resamples=10)
    write_summary(tmp_path, source, scores, provenance={}, drawing=Drawing("all"))
    assert (tmp_path / "figures" / "precision.png").is_file() and (tmp_path / "index.html").is_file()
    write_summary(tmp_path, source, scores, provenance={}, drawing=Drawing("none"))
    assert not (tmp_path / "index.html").exists() and not list(tmp_path.rglob("*.png"))
    assert (tmp_path / "manifest.json").is_file() and (tmp_path / "summary.json").is_file()


def test_worst_images_are_those_that_lose_most(scores):
    found = worst_images(FakeResults(), scores, 3)
    losses = scores.image_losses(3)
    assert found.losses == sorted(losses, reverse=True)[: len(found.losses)]
    truth = scores.truth
    for image, counts in zip(found.images, found.counts, strict=True):
        assert sum(counts) == ((truth.image == image) & ~truth.crowd).sum()


def test_thumbnails_open_the_sweeps(tmp_path):
    opened = []
    source = FakeResults((none_off(), heads_off(1)))
    scores = score(source, resamples=0)

    def open_sweep(image, configuration):
        opened.append((image, configuration))
        return tmp_path / "sweeps" / f"{image} a" / "index.html"

    write_summary(tmp_path, source, scores, provenance={}, pictures=Pictures(), open_sweep=open_sweep)
    page = (tmp_path / "index.html").read_text()
    assert opened and all(f'href="sweeps/{image}%20a/index.html"' in page for image, _ in opened)
    configurations = FakeResults().configurations
    assert opened_with(configurations, 2) == [0, 1, 2, 3]
    single = next(i for i, one in enumerate(configurations) if one.text == "L1H1")
    assert opened_with(configurations, single) == [0, single]


def test_few_configurations_without_samples(tmp_path):
    scores = score(FakeResults((none_off(), heads_off(1))), resamples=0)
    write_summary(tmp_path, FakeResults((none_off(), heads_off(1))), scores, provenance={})
    row = rows_of(tmp_path, "configurations.csv")[1]
    assert row["AP_low"] == row["AP_lost_high"] == ""
    with pytest.raises(SettingError, match="--set subsets"):
        plot_subset_precision(scores)


def test_only_the_baseline(tmp_path):
    source = FakeResults((none_off(),))
    scores = score(source, resamples=10)
    assert [stem for stem, *_ in evaluation_figures(scores)] == ["precision"]
    write_summary(tmp_path, source, scores, provenance={})


def test_sweeps_at_several_sites_have_figures_each():
    found = (*cumulative(HEADS, (2, 0, 1)), *cumulative(HEADS, site="decoder_self")[1:])
    scores = score(FakeResults(found), resamples=0)
    stems = [stem for stem, *_ in evaluation_figures(scores)]
    for name in ("precision", "outcomes_truth", "outcomes_none_off", "classes"):
        assert {f"{name}_decoder_self", f"{name}_decoder_cross"} <= set(stems)
    assert len(stems) == len(set(stems)) == 8
    by_site = [plot_precision(scores, site=site) for site in ("decoder_cross", "decoder_self")]
    for ax, site in zip(by_site, ("decoder_cross", "decoder_self"), strict=True):
        (line,) = [one for one in ax.lines if one.get_color() == "#1B6CA8"]
        assert line.get_ydata().tolist() == [
            one["AP"]
            for one in scores.configurations
            if not one.configuration.clauses or one.configuration.clauses[0].site == site
        ]
    # An order that is not that of the numbers is named.
    assert [text.get_text() for text in by_site[0].texts][1:] == ["H2", "H0", "H1"] and not by_site[1].texts


def test_figures_take_axes(scores):
    import matplotlib.figure

    for plot in (plot_precision, plot_outcome_rates, plot_class_losses, plot_subset_precision):
        ax = matplotlib.figure.Figure().add_subplot()
        assert plot(scores, ax) is ax
    with pytest.raises(SettingError, match="'none off' or 'truth'"):
        plot_outcome_rates(scores, reference="baseline")
    (line,) = [one for one in plot_precision(scores).lines if one.get_color() == "#1B6CA8"]
    assert line.get_ydata()[0] == scores.baseline["AP"]


def test_commands_open_the_sweep(tmp_path):
    scenes = sweep_command(Scenes(5, 192), 2, "2.png", "scenes", "H0-1")
    assert scenes.startswith("headoff scenes draw --count 1 --first-seed 7 --size 192 --out scene-7 && ")
    assert scenes.endswith("headoff sweep scene-7/scene-000.png --model scenes --off H0-1")
    (tmp_path / "a b.jpg").touch()
    files = Files(tmp_path, ("a b.jpg",), np.array([[1, 1]]))
    assert sweep_command(files, 0, "a b.jpg", "", "none") == f"headoff sweep '{tmp_path}/a b.jpg'"
