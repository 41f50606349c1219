"""The report on what heads contribute: its files, and what its page embeds."""

import csv
import json
import re

import numpy as np
import pytest
from importance_examples import importance_of
from PIL import Image
from safetensors import safe_open
from test_report import PROVENANCE, Reader

import headoff
from headoff.errors import OutputError
from headoff.figures.importance_comparisons import rank_correlations
from headoff.importance import HeadCards, aggregate
from headoff.importance.result import Key
from headoff.report import HEADS_SCHEMA_VERSION, heads_index, is_finished, write_heads_report


@pytest.fixture(scope="module")
def scene():
    detector, image = headoff.load("scenes"), headoff.sample_image(0)
    importance = headoff.heads(
        detector,
        image,
        measures=("removal", "gradient"),
        values=("probability", "unmatched"),
        ablations="uniform",
    )
    return image, importance, HeadCards.of(detector, image, importance)


def embedded(page):
    (data,) = re.findall(r'<script type="application/json" id="heads-data">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def written(folder, importance, **options):
    image = Image.new("RGB", (80, 60), "teal")
    write_heads_report(folder, image, importance, provenance=PROVENANCE, **options)
    return folder


def table(data, measure, value, ablation="zero"):
    (found,) = [
        one
        for one in data["scores"]
        if (one["measure"], one["value"], one["ablation"]) == (measure, value, ablation)
    ]
    return found


def test_the_page_embeds_the_result(tmp_path):
    importance = importance_of()
    written(tmp_path, importance)
    page = (tmp_path / "index.html").read_text()
    data = embedded(page)
    for key, found in importance.scores.items():
        one = table(data, key.measure, key.value, key.ablation)
        rows = np.array(one["rows"])
        count = len(found.scores)
        assert np.allclose(rows[:count], found.scores, rtol=1e-4)
        if key.value == "unmatched":
            assert one["image"] and len(rows) == 1
        else:
            assert np.allclose(rows[count], found.scores.mean(0), rtol=1e-4) and len(rows) == count + 1
        if found.interactions is not None:
            assert np.allclose(np.array(one["pairs"])[:count], found.interactions, rtol=1e-4)
        if found.errors is None:
            assert one["unclear"] is None
        else:
            assert np.array_equal(one["unclear"][:count], (found.scores.abs() <= 1.96 * found.errors).int())
    names, correlations = rank_correlations(importance)
    assert data["correlations"]["zero/probability"]["measures"] == list(names)
    assert np.allclose(data["correlations"]["zero/probability"]["rows"], correlations, atol=1e-4)
    assert [one["name"] for one in data["objects"]] == list(importance.object_names)


def test_the_page_is_one_valid_file(tmp_path):
    written(tmp_path, importance_of())
    page = (tmp_path / "index.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.open == [] and reader.images_without_alt == 0
    assert len(set(reader.ids)) == len(reader.ids)
    assert all(reference.startswith("data:") for reference in reader.references)
    assert "a &lt;b&gt; &amp; $c$" in page and "a <b>" not in page


def test_the_page_has_what_becomes_of_objects_without_each_head(scene, tmp_path):
    image, importance, cards = scene
    write_heads_report(tmp_path, image, importance, provenance=PROVENANCE, cards=cards)
    data = embedded((tmp_path / "index.html").read_text())
    result = cards.sweeps["uniform"]
    without = data["cards"]["uniform"]["without"]
    assert len(without) == 6 * 8 + 8
    for index, (one, outcome) in enumerate(zip(without, result.outcomes, strict=True)):
        assert one["statuses"] == [found.status.value for found in outcome.outcomes]
        assert len(one["boxes"]) == len(result.detections[index])
    assert any("lost" in one["statuses"] for one in without)
    box = data["cards"]["uniform"]["baseline"][0]["box"]
    left, top, right, bottom = result.baseline[0].box
    assert np.allclose(box, [100 * side / 192 for side in (left, top, right - left, bottom - top)], atol=0.01)
    attention = data["attention"]
    maps = cards.attention.heads[0]
    assert (attention["rows"], attention["columns"]) == tuple(maps.shape[-2:]) and attention[
        "objects"
    ] == len(maps)
    assert np.allclose(attention["greatest"], maps.flatten(3).amax(-1).flatten(), rtol=1e-4)


def test_files_of_a_report(tmp_path):
    importance = importance_of()
    written(tmp_path / "out", importance)
    out = tmp_path / "out"
    contents = json.loads((out / "heads.json").read_text())
    assert contents["schema"] == "headoff.heads" and contents["schema_version"] == HEADS_SCHEMA_VERSION
    assert sorted(contents["files"]) == ["heads.csv", "heads.safetensors", "index.html", "thumbnail.webp"]
    assert {path.name for path in out.iterdir()} == {*contents["files"], "heads.json"}
    rows = list(csv.DictReader((out / "heads.csv").open()))
    assert len(rows) == sum(found.scores.numel() for found in importance.scores.values())
    row = next(r for r in rows if r["measure"] == "shapley" and r["object"] == "1")
    found = importance.get("shapley")
    assert float(row["score"]) == pytest.approx(float(found.scores[1, 0, 0]), rel=1e-5)
    assert float(row["standard_error"]) == pytest.approx(float(found.errors[1, 0, 0]), rel=1e-5)
    with safe_open(out / "heads.safetensors", "pt") as file:
        stored = file.get_tensor("zero/shapley/probability/scores")
    assert (stored == found.scores).all()
    assert is_finished(out)


def test_reports_of_heads_and_of_a_sweep_replace_each_other(tmp_path):
    importance = importance_of()
    written(tmp_path, importance)
    result = headoff.sweep(headoff.load("scenes"), headoff.sample_image(0), "H1")
    headoff.write_report(tmp_path, headoff.sample_image(0), result, provenance=PROVENANCE)
    assert (tmp_path / "sweep.json").exists()
    assert not (tmp_path / "heads.json").exists() and not (tmp_path / "heads.csv").exists()
    written(tmp_path, importance)
    assert not (tmp_path / "sweep.json").exists() and not (tmp_path / "detections.csv").exists()


def test_an_error_leaves_the_earlier_report(tmp_path, monkeypatch):
    written(tmp_path, importance_of())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def fails(*_, **__):
        raise RuntimeError

    monkeypatch.setattr("headoff.report.heads.render_heads_page", fails)
    with pytest.raises(RuntimeError):
        written(tmp_path, importance_of(seed=1))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("objects", [0, 1])
def test_few_objects(tmp_path, objects):
    written(tmp_path, importance_of(objects, values=("probability",)))
    page = (tmp_path / "index.html").read_text()
    assert ("Nothing is detected" in page) == (objects == 0)
    assert ('id="matrix"' in page) == (objects == 1)
    contents = json.loads((tmp_path / "heads.json").read_text())
    assert ("to 1 object:" in contents["verdict"]) == (objects == 1)


def test_the_index_of_several_images(tmp_path):
    found = [importance_of(1 + seed, seed=seed) for seed in range(3)]
    for seed, importance in enumerate(found):
        written(tmp_path / f"{seed}.png", importance)
    heads_index(
        tmp_path, [tmp_path / f"{seed}.png" for seed in range(3)], failures={"x.png": "it is <broken>"}
    )
    page = (tmp_path / "index.html").read_text()
    data = embedded(page)
    totals = aggregate(found)
    one = table(data, "removal", "probability")
    scores = totals.scores[Key("zero", "removal", "probability")]
    for name in ("low", "high"):
        assert np.allclose(one[name][0], getattr(scores, name), rtol=1e-4)
    assert np.allclose(one["rows"][0], scores.scores, rtol=1e-4)
    assert np.array_equal(one["unclear"][0], scores.spans_zero)
    assert 'href="1.png/index.html"' in page and "it is &lt;broken&gt;" in page
    assert "6 objects in 3 images" in page
    rows = list(csv.DictReader((tmp_path / "heads.csv").open()))
    assert len(rows) == len(list(totals.rows())) and float(rows[0]["score"]) == pytest.approx(
        float(scores.scores[0, 0]), rel=1e-5
    )
    # Only this page's files are replaced by the next one.
    heads_index(tmp_path, [tmp_path / "0.png"])
    assert (
        "6 objects" not in (tmp_path / "index.html").read_text() and (tmp_path / "2.png/heads.json").exists()
    )
    (tmp_path / "0.png/heads.json").write_text("{}")
    with pytest.raises(OutputError, match=r"0\.png.* holds no finished results"):
        heads_index(tmp_path, [tmp_path / "0.png"])


@pytest.mark.usefixtures("blank_figures")
def test_figures_are_files_where_they_are_asked_for(tmp_path):
    importance = importance_of(1, values=("probability",), ablations=("zero",))
    done = []
    written(tmp_path, importance, figures="all", format="svg", progress=lambda *of: done.append(of))
    files = json.loads((tmp_path / "heads.json").read_text())["files"]
    drawn = [file for file in files if file.startswith("figures/")]
    assert drawn == [
        f"figures/zero-{name}.svg"
        for name in ("removal", "gradient", "shapley-columns", "interactions", "shapley", "measures")
    ]
    assert done[0] == (0, 7) and done[-1] == (7, 7)
    written(tmp_path, importance, figures="none")
    assert {path.name for path in tmp_path.rglob("*.*")} == {"heads.csv", "heads.json", "heads.safetensors"}
