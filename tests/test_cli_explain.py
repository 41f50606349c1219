"""`headoff explain` and `headoff sweep --relevance` as a user meets them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import headoff
from headoff.cli import main, parser
from headoff.figures import relevance_sheets, sheets

SAMPLE = str(headoff.sample_image(2))
QUICK = ("--layers", "last")


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    output = capsys.readouterr()
    return code, output.out, output.err


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "relevance.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def objects():
    return headoff.detect(headoff.load("scenes"), SAMPLE)


def test_explain_writes_maps_pictures_and_numbers(capsys, tmp_path, objects):
    out = tmp_path / "report"
    code, printed, error = run(capsys, "explain", SAMPLE, "--heads", "--figures", "all", "--out", str(out))
    assert code == 0, error
    assert str(out / "index.html") in printed and "after decoder layer 5" in printed
    explanation = headoff.load_explanation(out / "maps.npz")
    assert explanation.axes["configuration"] == ("none off",) and explanation.axes["layer"] == (*range(6),)
    assert explanation.objects.queries.tolist() == objects.queries.tolist()
    assert explanation.heads is not None
    assert len(rows_of(out)) == 6 * len(objects)
    for detection in objects:
        assert f"{detection.query}" in printed and detection.class_name in printed
        assert (out / f"figures/heads-00-none-off-query-{detection.query}.png").is_file()
    assert (out / "figures/relevance-00-none-off.png").stat().st_size > 10_000
    assert "attention, head 7" in (out / "index.html").read_text()
    # What lay in between is gone.
    assert not [path for path in out.rglob("*") if ".part" in path.name]


def test_several_methods_in_one_report(capsys, tmp_path, objects):
    out = tmp_path / "report"
    arguments = ("--method", "raw,chefer", "--object", "1", *QUICK, "--layers", "0,5")
    code, printed, error = run(capsys, "explain", SAMPLE, *arguments, "--out", str(out))
    assert code == 0, error
    assert "relevance (raw)" in printed
    for name, method in (("maps", "raw"), ("maps-chefer", "chefer")):
        found = headoff.load_explanation(out / f"{name}.npz")
        expected = headoff.explain(headoff.load("scenes"), SAMPLE, "none", [objects[1].query], method, [0, 5])
        assert found.method == method
        torch.testing.assert_close(found.maps, expected.maps)
    assert [row["method"] for row in rows_of(out)] == ["raw"] * 2 + ["chefer"] * 2
    page = (out / "index.html").read_text()
    assert '<option value="1">chefer</option>' in page and "Image relevance (raw, chefer)" in page


@pytest.mark.usefixtures("blank_figures")
def test_a_sweep_with_relevance(capsys, tmp_path, objects, monkeypatch):
    """The maps are of the sweep's own configurations and objects, and those of the library."""
    # Drawing all nine takes most of the time and shows nothing more.
    for module in (sheets, relevance_sheets):
        monkeypatch.setattr(module, "MOST_PICTURES", 2)
    arguments = ("--relevance", "--figures", "all", "--out", str(tmp_path))
    code, printed, error = run(capsys, "sweep", SAMPLE, *arguments)
    assert code == 0, error
    assert "first 8 off" in printed and "lost" in printed
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["name"] for entry in written["configurations"]] == [c.name for c in headoff.cumulative()]
    assert written["relevance"]["configurations"][8]["name"] == "first 8 off"
    explanation = headoff.load_explanation(tmp_path / "maps.npz")
    assert explanation.maps.shape[:3] == (9, len(objects), 6)
    assert not explanation.maps[8].any() and explanation.maps[:8].flatten(2).any(-1).all()
    assert set(explanation.statuses[8][0]) == {"no image evidence"}
    expected = headoff.explain(headoff.load("scenes"), SAMPLE)
    torch.testing.assert_close(explanation.maps, expected.maps)
    page = (tmp_path / "index.html").read_text()
    assert "No image evidence at all: first 8 off." in page and "maps-data" in page
    assert len(list((tmp_path / "figures").glob("relevance-*.png"))) == 2


def test_what_is_explained_and_how(capsys, tmp_path, objects):
    arguments = ("--off", "L5H0-3", "--target", "w", "--method", "raw", "--pick", "class", *QUICK)
    look = ("--scale", "object", "--overlay", "--cmap", "magma", "--maps", "safetensors")
    code, printed, error = run(
        capsys, "explain", SAMPLE, "--object", "1", *arguments, *look, "--out", str(tmp_path)
    )
    assert code == 0, error
    explanation = headoff.load_explanation(tmp_path / "maps.safetensors")
    assert explanation.queries.tolist() == [[objects[1].query]] * 2
    assert (explanation.method, explanation.target, explanation.pick) == ("raw", ("w",), "class")
    assert explanation.layers == (5,) and [c.name for c in explanation.configurations] == [
        "none off",
        "L5H0-3 off",
    ]
    provenance = json.loads((tmp_path / "sweep.json").read_text())["provenance"]
    assert "raw, of w, after the last layer" in provenance["relevance"] and "magma" in provenance["maps"]
    # The one object keeps its number.
    assert f'"name":"#1 {objects[1].class_name}"' in (tmp_path / "index.html").read_text()


@pytest.mark.usefixtures("blank_figures")
def test_queries_whatever_they_detect(capsys, tmp_path, objects):
    idle = next(query for query in range(20) if query not in objects.queries.tolist())
    code, printed, _ = run(capsys, "explain", SAMPLE, "--query", str(idle), *QUICK, "--out", str(tmp_path))
    assert code == 0 and "1 object explained" in printed
    assert {row["query"] for row in rows_of(tmp_path)} == {str(idle)}


@pytest.mark.usefixtures("blank_figures")
def test_nothing_detected_is_said_plainly(capsys, tmp_path):
    for command in (("explain",), ("sweep", "--relevance", "--off", "first 8")):
        out = tmp_path / command[0]
        code, printed, _ = run(capsys, *command, SAMPLE, "--confidence", "1", "--out", str(out))
        assert code == 0 and "no object" in printed.lower() or "0 objects" in printed
        assert "nothing to explain" in (out / "index.html").read_text()
        assert headoff.load_explanation(out / "maps.npz").maps.shape[1] == 0
        assert not (out / "figures").exists() and rows_of(out) == []


@pytest.mark.usefixtures("blank_figures")
def test_folders_resume(capsys, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index in range(2):
        Image.open(headoff.sample_image(index)).save(photos / f"{index}.png")
    (photos / "broken.jpg").write_bytes(b"not a picture")
    arguments = ("explain", str(photos), *QUICK, "--out", str(out))
    code, printed, error = run(capsys, *arguments)
    assert code == 2 and "broken.jpg" in error and "2 reports" in printed
    assert "explained" in (out / "index.html").read_text()
    first = (out / "0.png" / "sweep.json").stat().st_mtime_ns
    (out / "1.png" / "sweep.json").unlink()  # as an interruption leaves it
    run(capsys, *arguments)
    assert (out / "0.png" / "sweep.json").stat().st_mtime_ns == first
    assert (out / "1.png" / "sweep.json").exists()
    # Another way of drawing is another report.
    (photos / "1.png").unlink()
    run(capsys, *arguments, "--overlay", "--confidence", "1")
    assert (out / "0.png" / "sweep.json").stat().st_mtime_ns != first


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--method", "cheffer"), "'chefer'"),
        (("--target", "clas"), "'class'"),
        (("--cmap", "Bluesr"), "'Blues_r'"),
        (("--query", "20"), "no query 20"),
        (("--object", "77"), "object 77"),
        (("--method", "raw,raw"), "twice"),
        (("--layers", "6"), "no decoder layer 6"),
        (("--layers", "first"), "'first'"),
        (("--layers", "1,1"), "twice"),
        (("--off", "L4H9"), "9"),
        (("--order", "reverse"), "--set cumulative"),
        (("--site", "decoder_self"), "--set"),
        (("--model", "detr-resnet-5"), "detr-resnet-50"),
    ],
)
def test_what_cannot_be_asked(capsys, tmp_path, arguments, named):
    out = tmp_path / "out"
    code, _, error = run(capsys, "explain", SAMPLE, "--out", str(out), *arguments)
    assert code == 2 and not out.exists()
    assert error.splitlines()[-1].startswith("headoff: error: ") or arguments[0] == "--off"
    assert named in error and "Traceback" not in error


def test_weights_with_nan(capsys, tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = tmp_path / "nan.safetensors"
    headoff.save_native(headoff.load("scenes"), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors["decoder.norm.weight"][0] = torch.nan
    save_file(tensors, path, metadata)
    code, _, error = run(capsys, "explain", SAMPLE, "--model", str(path), "--out", str(tmp_path / "out"))
    assert code == 2 and "nan" in error.lower() and error.count("headoff: error:") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [("--object", "0", "--query", "1"), ("--overlay", "--plain"), ("--scale", "maps")]
)
def test_options_that_exclude_each_other(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["explain", *arguments])
    assert stop.value.code == 2 and arguments[0] in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["explain", "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(
        word in printed for word in ("--overlay", "--heads", "chefer_no_normalisation", "only L5H2 on")
    )
