"""Two results folders side by side."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from evaluation_examples import FakeResults, several_sweeps

from headoff import cli
from headoff.errors import SettingError
from headoff.evaluation import comparison as module
from headoff.evaluation.comparison import compare
from headoff.evaluation.outcomes import COUNTED
from headoff.evaluation.scores import score
from headoff.figures.evaluation_comparison import plot_comparison, plot_differences
from headoff.gates import all_subsets, cumulative, heads_off, none_off
from headoff.report.comparison import comparison_headline, write_comparison

FEW = (none_off(), heads_off(0), heads_off(1))


@dataclass(frozen=True)
class Changed(FakeResults):
    """Other results on the same data set: `keep` of its images, in another order."""

    order: tuple[int, ...] = field(default=tuple(range(40)))
    replaced: dict = field(default_factory=dict)

    @property
    def truth(self):
        truth = super().truth
        rows = np.concatenate([np.flatnonzero(truth.image == image) for image in self.order])
        place = np.full(self.images, -1)
        place[list(self.order)] = np.arange(len(self.order))
        changed = replace(
            truth,
            image_ids=truth.image_ids[list(self.order)],
            names=tuple(truth.names[image] for image in self.order),
            sizes=truth.sizes[list(self.order)],
            image=place[truth.image[rows]],
            **{
                name: getattr(truth, name)[rows]
                for name in ("boxes", "labels", "areas", "crowd", "annotation_ids")
            },
        )
        return replace(changed, **{name: make(changed) for name, make in self.replaced.items()})

    @property
    def done(self):
        return np.arange(len(self.order))

    def detections(self, configuration):
        table = super().detections(configuration)
        rows = [np.flatnonzero(table.image == image) for image in self.order]
        chosen = np.concatenate(rows)
        image = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        return replace(
            table,
            image=image,
            **{name: getattr(table, name)[chosen] for name in ("scores", "labels", "boxes", "queries")},
        )


def test_the_same_results_are_equal():
    a, b = FakeResults(FEW), Changed(FEW, order=tuple(range(39, -1, -1)))
    found = compare(a, b, resamples=30)
    for index in range(3):
        # The order of images in the files does not matter.
        assert found.difference(index) == (0, 0, 0)
        assert not np.nan_to_num(np.stack(found.class_differences(index))).any()
    assert found.drops(0) == []
    assert comparison_headline(found) == "With nothing off, B's AP is that of A."


def test_differences_are_paired_by_image():
    found = compare(FakeResults(FEW), FakeResults(FEW, shift=0.15), resamples=60)
    for index in range(3):
        difference, low, high = found.difference(index)
        first, second = found.a.configurations[index], found.b.configurations[index]
        assert difference == second["AP"] - first["AP"]
        assert low < difference < high < 0
        alone = np.diff(first.interval("AP")) + np.diff(second.interval("AP"))
        assert high - low < alone
    assert found.drops(0) == [0, 1, 2]
    drop = -found.difference(1)[0]
    assert 1 in found.drops(drop - 1e-6) and 1 not in found.drops(drop)
    assert [row["difference"] for row in found.rows()][0] == found.difference(0)[0]
    rates = [row for row in found.outcome_rows() if row["text"] == "none"]
    assert [row["outcome"] for row in rates] == list(COUNTED)
    assert rates[0]["a"] > rates[0]["b"]


def test_only_common_images_and_configurations_are_compared():
    chosen = tuple(range(3, 30, 2))
    other = Changed((none_off(), heads_off(1), heads_off(2)), order=chosen)
    found = compare(FakeResults(FEW), other, resamples=10)
    assert found.image_ids.tolist() == FakeResults().truth.image_ids[list(chosen)].tolist()
    assert [one.configuration.text for one in found.a.configurations] == ["none", "H1"]
    assert (found.only_a, found.only_b) == (("H0",), ("H2",))
    assert found.difference(1)[0] == 0
    alone = score(FakeResults(FEW), images=np.array(chosen), resamples=0, configurations=[0, 2])
    assert [one["AP"] for one in alone.configurations] == [one["AP"] for one in found.a.configurations]


@pytest.mark.parametrize(
    "other, words",
    [
        (FakeResults(FEW, classes=4), "other classes"),
        (FakeResults(FEW, seed=1), "no evaluated images in common|other annotations"),
        (Changed(FEW, replaced={"image_ids": lambda truth: truth.image_ids + 1000}), "no evaluated images"),
        (Changed(FEW, replaced={"boxes": lambda truth: truth.boxes + 1}), "other annotations"),
        (FakeResults((none_off(), heads_off(2))), "only the baseline in common"),
    ],
)
def test_what_cannot_be_compared(other, words):
    with pytest.raises(SettingError, match=words):
        compare(FakeResults(FEW), other, resamples=0)


def test_report(tmp_path):
    found = compare(FakeResults(FEW), FakeResults(FEW, shift=0.1), resamples=20, names=("<a>", "b|c"))
    page = write_comparison(tmp_path, found).read_text()
    assert "&lt;a&gt;" in page and page.count("<svg") == 2 and 'src="http' not in page
    contents = json.loads((tmp_path / "comparison.json").read_text())
    assert all((tmp_path / name).is_file() for name in contents["files"])
    assert contents["configurations"][0]["difference"] == found.difference(0)[0]
    with (tmp_path / "classes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 9
    assert (tmp_path / "comparison.md").read_text().count("\n") == 5


@pytest.mark.parametrize("configurations", [cumulative(3), FEW, all_subsets(3), several_sweeps()])
def test_figures(configurations):
    found = compare(FakeResults(configurations), FakeResults(configurations, shift=0.1), resamples=10)
    for plot in (plot_comparison, plot_differences):
        ax = plot(found)
        ax.figure.canvas.draw()
        assert ax.get_legend() is not None


def test_command(monkeypatch, capsys, tmp_path):
    folders = {
        "good": FakeResults(FEW),
        "worse": FakeResults(FEW, shift=0.1),
        "fewer": FakeResults(FEW[:2]),
        "other": FakeResults(FEW, classes=4),
    }
    monkeypatch.setattr(module, "Results", lambda folder: folders[str(folder)])

    def run(*words):
        code = cli.main(["compare", *words, "--resamples", "10"])
        return code, capsys.readouterr()

    code, printed = run("good", "worse")
    assert code == 0 and "| none off" in printed.out and "lower by" in printed.out
    code, printed = run("good", "worse", "--max-drop", "0.002", "--out", str(tmp_path))
    assert code == 1 and "AP is lower by more than 0.002 under 3 configurations" in printed.out
    assert (tmp_path / "index.html").is_file()
    code, printed = run("worse", "good", "--max-drop", "0.002")
    assert code == 0 and "No AP is lower" in printed.out
    code, printed = run("good", "fewer", "--max-drop", "0.002")
    assert code == 2 and "lacks 1 configuration" in printed.err
    code, printed = run("good", "fewer")
    assert code == 0 and "Only A has 1 other configuration" in printed.out
    code, printed = run("good", "other")
    assert code == 2 and "other classes" in printed.err
