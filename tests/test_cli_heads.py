"""`headoff heads` as a user meets it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_cli import SAMPLE, rejected, run

import headoff
from headoff.choices import ABLATION_KINDS, MEASURES, VALUES
from headoff.cli.heads import DEFAULT_MEASURES, DEFAULT_VALUES
from headoff.detector import Detector
from headoff.importance import heads as module
from headoff.scenes.samples import bundled_references

QUICK = ("--measure", "removal", "--value", "probability", "--ablate", "zero")
pytestmark = pytest.mark.usefixtures("blank_figures")


def test_a_report_and_a_summary(capsys, tmp_path):
    out = tmp_path / "out"
    arguments = (
        "heads",
        SAMPLE,
        "--measure",
        "removal",
        "--value",
        "probability,unmatched",
        "--out",
        str(out),
    )
    code, printed, _ = run(capsys, *arguments, "--ablate", "zero,uniform")
    assert code == 0 and str(out / "index.html") in printed
    lines = printed.splitlines()
    assert "4 objects, 48 heads of decoder_cross" in lines[0]
    assert max(map(len, lines[1:-1])) <= 80
    contents = json.loads((out / "heads.json").read_text())
    made_with = contents["provenance"]
    assert (made_with["measures"], made_with["ablation"]) == ("removal", "zero, uniform")
    assert [one["value"] for one in contents["scores"]] == ["probability", "unmatched"] * 2
    # The summary says what the files say: without L0H4, uniform attention loses the crescent.
    crescent = next(
        line
        for line in lines[lines.index("class probability at the object's query, uniform ablation:") :]
        if "crescent" in line
    )
    score = contents["scores"][2]["scores"][2][0][4]
    assert f"L0H4 +{score:.2f}" in crescent


def test_defaults_are_those_of_python():
    heads_module = __import__("headoff.importance.heads", fromlist=["DEFAULT_MEASURES"])
    assert tuple(DEFAULT_MEASURES.split(",")) == heads_module.DEFAULT_MEASURES
    assert tuple(DEFAULT_VALUES.split(",")) == heads_module.DEFAULT_VALUES
    assert callable(module)


@pytest.mark.parametrize("bundled", [True, False])
def test_the_second_ablation_kind_needs_references(capsys, tmp_path, bundled):
    model = "scenes"
    if not bundled:
        detector = headoff.load("scenes")
        with torch.no_grad():
            detector.decoder.norm.weight.mul_(1.25)
        model = str(tmp_path / "other.safetensors")
        headoff.save_native(detector, model)
    code, _, err = run(capsys, "heads", SAMPLE, "--model", model, *QUICK[:4], "--out", str(tmp_path / "out"))
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "heads.json").read_text())["provenance"]["ablation"]
    assert found == ("zero, mean" if bundled else "zero, uniform")
    if not bundled:
        sentence = rejected(
            capsys, "heads", SAMPLE, "--model", model, "--ablate", "mean", "--out", str(tmp_path / "no")
        )
        assert "needs a reference set for this model" in sentence and "headoff references" in sentence
        foreign = rejected(
            capsys,
            "heads",
            SAMPLE,
            "--model",
            model,
            "--references",
            str(bundled_references()),
            "--out",
            str(tmp_path / "no"),
        )
        assert "gathered with another model" in foreign and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (("--measure", "shaply"), "did you mean 'shapley'?"),
        (("--measure", ","), "has no name"),
        (("--value", "probabilty"), "did you mean 'probability'?"),
        (("--ablate", "zeros"), "did you mean 'zero'?"),
        (("--ablate", "zero,optimal", "--references", "missing.safetensors"), "missing.safetensors"),
        (("--measure", "gradient", "--value", "duplicates"), "needs a derivative"),
        (("--pairs", "4"), "--measure shapley"),
        (("--pairs", "1", "--measure", "shapley"), "at least 2"),
    ],
)
def test_what_cannot_be_scored(capsys, tmp_path, arguments, culprit):
    sentence = rejected(capsys, "heads", SAMPLE, "--out", str(tmp_path / "out"), *arguments)
    assert culprit in sentence and sentence.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_detected_is_no_error(capsys, tmp_path):
    code, printed, _ = run(capsys, "heads", SAMPLE, *QUICK, "--confidence", "1", "--out", str(tmp_path))
    assert code == 0 and "0 objects" in printed and "there is nothing to score" in printed
    assert json.loads((tmp_path / "heads.json").read_text())["scores"][0]["scores"] == []


def test_one_object(capsys, tmp_path):
    detections = headoff.detect(headoff.load("scenes"), SAMPLE)
    confidence = (detections[0].score + detections[1].score) / 2
    code, printed, _ = run(
        capsys, "heads", SAMPLE, *QUICK, "--confidence", f"{confidence:.9f}", "--out", str(tmp_path)
    )
    assert code == 0 and "1 object," in printed


def test_a_folder_is_resumed_and_has_means(capsys, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for index in range(2):
        Image.open(headoff.sample_image(index)).save(photos / f"{index}.png")
    (photos / "broken.jpg").write_bytes(b"not a picture")
    arguments = ("heads", str(photos), *QUICK, "--out", str(out))
    code, printed, error = run(capsys, *arguments)
    assert code == 2 and "2 reports" in printed and "broken.jpg" in error
    page = (out / "index.html").read_text()
    assert "9 objects in 2 images" in page and "broken.jpg" in page and 'href="1.png/index.html"' in page
    assert len((out / "heads.csv").read_text().splitlines()) == 1 + 48
    first, second = ((out / f"{index}.png" / "heads.json") for index in range(2))
    times = first.stat().st_mtime_ns
    second.unlink()  # as an interruption leaves it
    run(capsys, *arguments)
    assert first.stat().st_mtime_ns == times and second.exists()
    # Other measures are another report.
    run(capsys, "heads", str(photos), "--measure", "alone", *QUICK[2:], "--out", str(out))
    assert first.stat().st_mtime_ns != times
    # Pictures of reports are no images.
    assert not [path for path in out.rglob("heads.json") if "figures" in path.parts]


def test_help_explains_every_name(capsys):
    with pytest.raises(SystemExit):
        run(capsys, "heads", "--help")
    text = capsys.readouterr().out
    for name in (*MEASURES, *VALUES, *ABLATION_KINDS):
        assert name in text
    epilog = text[text.index("measures: a positive score") :]
    assert max(map(len, epilog.splitlines())) <= 80
    assert isinstance(Path(SAMPLE), Path) and Detector
