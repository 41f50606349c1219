"""The command line as a user meets it: what it prints, writes and rejects."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_checkpoints import original_names

import headoff
from headoff.choices import METHODS
from headoff.cli import main, parser
from headoff.relevance import method_names

SAMPLE = str(headoff.sample_image(0))


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    output = capsys.readouterr()
    return code, output.out, output.err


def rejected(capsys, *arguments: str) -> str:
    """The one sentence that a refusal consists of."""
    code, _, error = run(capsys, *arguments)
    assert code == 2, error
    assert error.startswith("headoff: error: ") and "Traceback" not in error
    return error


def test_sweep_writes_a_report(capsys, tmp_path):
    out = tmp_path / "report"
    code, printed, error = run(capsys, "sweep", SAMPLE, "--out", str(out))
    assert code == 0 and "drawing" in error, error
    assert "none off" in printed and "first 8 off" in printed and str(out / "index.html") in printed
    written = json.loads((out / "sweep.json").read_text())
    assert [entry["name"] for entry in written["configurations"]] == [c.name for c in headoff.cumulative()]
    assert written["provenance"]["model"] == "scenes"
    assert (out / "index.html").stat().st_size > 10_000
    assert {path.name for path in out.iterdir()} == {
        "index.html",
        "thumbnail.webp",
        "sweep.json",
        "detections.csv",
        "objects.csv",
    }


@pytest.mark.usefixtures("blank_figures")
def test_figures_and_their_format(capsys, tmp_path):
    arguments = ("sweep", SAMPLE, "--off", "first 3", "--out", str(tmp_path))
    _, printed, _ = run(capsys, *arguments, "--figures", "none")
    assert str(tmp_path / "sweep.json") in printed and not (tmp_path / "index.html").exists()
    run(capsys, *arguments, "--format", "svg")
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".svg"}
    code, _, error = run(capsys, *arguments, "--figures", "page", "--dpi", "300")
    assert code == 2 and "--figures all" in error
    code, _, error = run(capsys, *arguments, "--dpi", "3000")
    assert code == 2 and "1 to 1200" in error


@pytest.mark.usefixtures("blank_figures")
def test_chosen_configurations(capsys, tmp_path):
    code, printed, _ = run(
        capsys, "sweep", SAMPLE, "--off", "L4H2,L5H0-3", "--off", "only L5H2 on", "--out", str(tmp_path)
    )
    assert code == 0
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["configuration"] for entry in written["configurations"]] == [
        "none",
        "L4H2,L5H0-3",
        "only L5H2 on",
    ]


@pytest.mark.usefixtures("blank_figures")
def test_one_object_alone(capsys, tmp_path):
    assert run(capsys, "sweep", SAMPLE, "--object", "1", "--out", str(tmp_path))[0] == 0
    written = json.loads((tmp_path / "sweep.json").read_text())
    query = written["baseline"]["detections"][1]["query"]
    assert all(
        entry["configuration"].startswith(f"query {query}:") for entry in written["configurations"][1:]
    )


@pytest.mark.usefixtures("blank_figures")
def test_orders(capsys, tmp_path):
    assert run(capsys, "sweep", SAMPLE, "--order", "reverse", "--out", str(tmp_path))[0] == 0
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["configurations"][2]["configuration"] == "H6-7"


@pytest.mark.usefixtures("blank_figures")
def test_folders_resume_and_survive_a_bad_image(capsys, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index in range(2):
        Image.open(headoff.sample_image(index)).save(photos / f"{index}.png")
    (photos / "broken.jpg").write_bytes(b"not a picture")
    out = tmp_path / "out"
    arguments = ("sweep", str(photos), "--off", "first 2", "--out", str(out))
    code, printed, error = run(capsys, *arguments)
    assert code == 2 and "broken.jpg" in error and "1 image left out" in error
    assert "2 reports" in printed and "broken.jpg" in (out / "index.html").read_text()
    first = (out / "0.png" / "sweep.json").stat().st_mtime_ns
    (out / "1.png" / "sweep.json").unlink()  # as an interruption leaves it
    run(capsys, *arguments)
    assert (out / "0.png" / "sweep.json").stat().st_mtime_ns == first
    assert (out / "1.png" / "sweep.json").exists()
    # Other options are another sweep: nothing of the earlier one is taken for it.
    run(capsys, "sweep", str(photos), "--off", "first 3", "--out", str(out))
    assert (
        json.loads((out / "0.png" / "sweep.json").read_text())["provenance"]["configurations"] == "'first 3'"
    )


@pytest.mark.usefixtures("blank_figures")
def test_several_images_and_folders_on_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for index, place in enumerate(("a.png", "days/1/front.png", "days/2/front.png", "days/note.txt")):
        path = Path(place)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(headoff.sample_image(index).read_bytes())
    Path("days/2/broken.jpg").write_bytes(b"not a picture")
    arguments = ("sweep", "a.png", "days", "days/1/front.png", "--off", "H0-6", "--out", "days/results")
    code, printed, error = run(capsys, *arguments)
    assert code == 2 and "3 reports in days/results" in printed and "broken.jpg" in error
    reports = {
        str(path.parent.relative_to("days/results")) for path in Path("days/results").rglob("sweep.json")
    }
    assert reports == {"a.png", "days/1/front.png", "days/2/front.png"}
    index = Path("days/results/index.html").read_text()
    assert 'href="days/1/front.png/index.html"' in index and ">days/2/front.png<" in index
    written = {path: path.stat().st_mtime_ns for path in Path("days/results").rglob("sweep.json")}
    Path("days/results/a.png/sweep.json").unlink()
    run(capsys, *arguments)
    redone = {path for path, time in written.items() if path.stat().st_mtime_ns != time}
    assert redone == {Path("days/results/a.png/sweep.json")}
    # The pictures of these reports are no images to detect, in whatever folder they are.
    code, printed, _ = run(capsys, "detect", "days", "a.png", "--confidence", "1")
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        "days/1/front.png",
        "days/2/front.png",
        "a.png",
    ]
    Path("empty").mkdir()
    assert "'empty' holds no image" in rejected(capsys, "sweep", "a.png", "empty")
    assert "no image or folder missing.png" in rejected(capsys, "detect", "a.png", "missing.png")


def test_detect_lists_what_there_is(capsys):
    code, printed, _ = run(capsys, "detect", SAMPLE)
    assert code == 0 and "#0" in printed
    code, printed, _ = run(capsys, "detect", SAMPLE, "--json", "--confidence", "1")
    assert code == 0 and json.loads(printed)["detections"] == []


@pytest.mark.usefixtures("blank_figures")
def test_nothing_detected_is_no_error(capsys, tmp_path):
    code, printed, _ = run(capsys, "sweep", SAMPLE, "--confidence", "1", "--out", str(tmp_path))
    assert code == 0 and "0 objects with none off" in printed and (tmp_path / "sweep.json").exists()


def test_scenes_are_drawn(capsys, tmp_path):
    code, printed, _ = run(
        capsys, "scenes", "draw", "--count", "2", "--first-seed", "1000", "--out", str(tmp_path)
    )
    assert code == 0
    for index in range(2):
        drawn, bundled = tmp_path / f"scene-{index:03}.png", headoff.sample_image(index)
        assert Image.open(drawn).tobytes() == Image.open(bundled).tobytes()
    assert len(json.loads((tmp_path / "annotations.json").read_text())["images"]) == 2


def test_the_length_of_a_training_is_checked(capsys, tmp_path):
    out = tmp_path / "run"
    code, _, message = run(capsys, "scenes", "train", "--hours", "1", "--out", str(out))
    assert code == 2 and "give --steps instead of --hours" in message
    for arguments, sentence in (
        (["--hours", "0"], "0 is not a number of hours above 0"),
        (["--hours", "1", "--steps", "2"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit) as stop:
            parser().parse_args(["scenes", "train", "--model", "deformable", *arguments])
        assert stop.value.code == 2 and sentence in capsys.readouterr().err
    assert not out.exists()


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {Path(__file__).parent / 'owned'}",)


def checkpoint(folder: Path, what: str) -> str:
    path = folder / f"{what}.pth"
    if what == "missing":
        return str(path)
    if what == "empty":
        path.touch()
    elif what == "garbage":
        path.write_bytes(b"\x00\x01garbage" * 50)
    elif what == "malicious":
        path.write_bytes(pickle.dumps(Malicious()))
    elif what == "truncated":
        torch.save({"model": {"a": torch.zeros(10_000)}}, path)
        path.write_bytes(path.read_bytes()[:20_000])
    elif what == "classifier":
        torch.save({"fc.weight": torch.zeros(10, 10), "conv1.weight": torch.zeros(64, 3, 7, 7)}, path)
    elif what == "nan":
        detector = headoff.load("scenes")
        state = {name: value.clone() for name, value in detector.state_dict().items()}
        state["decoder.norm.weight"][0] = torch.nan
        from safetensors.torch import load_file, save_file

        path = folder / "nan.safetensors"
        headoff.save_native(detector, path)
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        tensors["decoder.norm.weight"][0] = torch.nan
        save_file(tensors, path, metadata)
    return str(path)


@pytest.mark.parametrize(
    "what", ["missing", "empty", "garbage", "malicious", "truncated", "classifier", "nan"]
)
def test_checkpoints_that_are_invalid(capsys, tmp_path, what):
    path = checkpoint(tmp_path, what)
    sentence = rejected(capsys, "sweep", SAMPLE, "--model", path, "--out", str(tmp_path / "out"))
    assert what in sentence  # the file is named for what it is
    assert not (Path(__file__).parent / "owned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (("--off", "L4H9"), "9"),
        (("--off", "L9H0"), "9"),
        (("--off", "first 9"), "9"),
        (("--off", "L5Hx"), "^"),
        (("--off", "query 20: H0"), "20"),
        (("--off", "0,1,0"), "3"),
        (("--order", "0,1,1"), "1"),
        (("--object", "77"), "77"),
        (("--attention", "nowhere.py:f"), "nowhere.py"),
        (("--attention", "sdqa"), "sdpa"),
        (("--device", "toaster"), "toaster"),
        (("--model", "detr-resnet-5"), "detr-resnet-50"),
        (("--order", "reverse", "--off", "H0"), "--order"),
        (("--site", "decoder_self", "--off", "H0"), "--site"),
        (("--references", SAMPLE), "--references has no effect"),
        (("--short-side", "1000000"), "--short-side"),
    ],
)
def test_what_cannot_be_asked(capsys, tmp_path, arguments, culprit):
    sentence = rejected(capsys, "sweep", SAMPLE, "--out", str(tmp_path / "out"), *arguments)
    assert culprit in sentence
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("contents", [None, b"", b"text", b"\x89PNG\r\n\x1a\n cut off"])
def test_images_that_are_invalid(capsys, tmp_path, contents):
    path = tmp_path / "photo.png"
    if contents is not None:
        path.write_bytes(contents)
    assert "photo.png" in rejected(capsys, "sweep", str(path), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_image_of_one_pixel(capsys, tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.png")
    code, _, error = run(capsys, "sweep", str(tmp_path / "dot.png"), "--out", str(tmp_path / "out"))
    assert code == 0, error


def test_an_output_that_is_a_file(capsys, tmp_path):
    (tmp_path / "out").touch()
    assert "out" in rejected(capsys, "sweep", SAMPLE, "--out", str(tmp_path / "out"))


COMMANDS = [
    [],
    ["sweep"],
    ["explain"],
    ["heads"],
    ["live"],
    ["detect"],
    ["verify"],
    ["bench"],
    ["scenes"],
    ["scenes", "train"],
    ["scenes", "evaluate"],
    ["scenes", "draw"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_is_there_for_every_command(capsys, command):
    with pytest.raises(SystemExit) as stop:
        parser().parse_args([*command, "--help"])
    assert stop.value.code == 0 and len(capsys.readouterr().out) > 200


@pytest.mark.parametrize(
    "arguments", [("sweep", "--figures", "some"), ("explain", "--off"), ("nonsense",), ()]
)
def test_options_that_are_wrong_are_told_in_one_line(capsys, arguments):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("headoff: error: ") and error.count("\n") == 1
    assert f"see headoff{' ' + arguments[0] if len(arguments) > 1 else ''} --help" in error


def test_help_of_every_command_does_without_slow_imports():
    program = f"""
import contextlib, io, sys
import headoff.cli
for command in {COMMANDS!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        headoff.cli.main([*command, "--help"])
print({{"torch", "numpy", "matplotlib", "PIL", "pytest", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_detection_does_without_imports_as_slow_as_torch():
    program = """
import sys
import headoff
headoff.detect(headoff.load("scenes"), headoff.sample_image(0))
print({"torch._dynamo", "torchvision", "sympy", "matplotlib", "transformers"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_sweep_with_its_page_imports_nothing_slow_besides_matplotlib(tmp_path):
    """Half a sweep's time is torch's import: another package of its kind would be the rest."""
    program = f"""
import sys
import headoff.cli
headoff.cli.main(["sweep", "--out", {str(tmp_path / "out")!r}])
slow = {{"torch._dynamo", "torchvision", "sympy", "transformers", "timm", "pandas", "scipy", "ray", "pytest"}}
print(slow & set(sys.modules))
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == ["set()", "False"]


def test_help_names_every_relevance_method():
    assert method_names()[: len(METHODS)] == METHODS


def test_the_installed_script_runs_and_can_be_interrupted(tmp_path):
    """The console script: version, and Ctrl-C as a shell sends it."""
    script = [sys.executable, "-c", "import sys, headoff.cli; sys.exit(headoff.cli.main())"]
    done = subprocess.run([*script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"headoff {headoff.__version__}"


def test_a_guess_is_said(capsys, tmp_path):
    weights, classes = tmp_path / "weights.pth", tmp_path / "classes.txt"
    detector = headoff.load("scenes")
    torch.save({"model": original_names(detector.state_dict())}, weights)
    classes.write_text("\n".join(f"thing {n}" for n in range(len(detector.class_names))))
    guessed, given = tmp_path / "guessed", tmp_path / "given"
    options = ("sweep", SAMPLE, "--model", str(weights), "--off", "H1", "--short-side", "192")
    code, _, err = run(capsys, *options, "--out", str(guessed))
    assert code == 0
    notes = [line for line in err.splitlines() if line.startswith(f"headoff: note: {weights}: ")]
    assert len(notes) == 2 and "8 heads assumed" in notes[0] and "--heads-per-layer" in notes[0]
    provenance = json.loads((guessed / "sweep.json").read_text())["provenance"]
    assert provenance["heads"] == "8 in each layer" and "8 heads assumed" in provenance["assumed"]
    told = ("--heads-per-layer", "4", "--no-dc5", "--classes", str(classes))
    code, _, err = run(capsys, *options, *told, "--out", str(given))
    assert code == 0 and "assumed" not in err
    said = json.loads((given / "sweep.json").read_text())
    assert said["provenance"]["heads"] == "4 in each layer" and "assumed" not in said["provenance"]
    assert "thing" in json.dumps(said)


def test_a_folder_with_a_bad_image_is_detected_on(capsys, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes(Path(SAMPLE).read_bytes())
    code, out, err = run(capsys, "detect", str(tmp_path))
    assert code == 2 and "b.png: " in out and "a.png" in err and "1 image left out" in err


def test_configurations_given_twice_count_once(capsys, tmp_path):
    code, out, _ = run(
        capsys, "sweep", "--off", "none", "--off", "first 3", "--off", "first 3", "--out", str(tmp_path)
    )
    names = [line.split("  ")[0] for line in out.splitlines()]
    assert code == 0 and names.count("first 3 off") == 1 and names.count("none off") == 1


def test_a_report_of_another_image_is_announced_before_it_is_replaced(capsys, tmp_path):
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    assert run(capsys, "scenes", "draw", "--count", "2", "--out", str(scenes))[0] == 0
    first, second = sorted(scenes.rglob("*.png"))[:2]
    options = ("--off", "H1", "--out", str(out))
    assert "replaced" not in run(capsys, "sweep", str(first), *options)[2]
    assert "replaced" not in run(capsys, "sweep", str(first), *options)[2]
    assert f"the report of {first} in {out} is replaced" in run(capsys, "sweep", str(second), *options)[2]
    run(capsys, "sweep", str(first.parent), *options)
    assert not (out / "sweep.json").exists() and (out / "index.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full_is_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "headoff", "detect"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2
    assert done.stderr == "headoff: error: the output cannot be written (no space left there); free some\n"


def test_python_m_headoff():
    done = subprocess.run(
        [sys.executable, "-m", "headoff", "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout.startswith("headoff ")


def test_tables_fit_a_terminal(capsys, tmp_path):
    matrix = "/".join(["0,1,0.25,1,0,0,0,0"] * len(headoff.load("scenes").decoder.layers))
    code, out, _ = run(capsys, "sweep", SAMPLE, "--off", matrix, "--off", "H2", "--out", str(tmp_path))
    lines = [line for line in out.splitlines() if str(tmp_path) not in line and SAMPLE not in line]
    assert code == 0 and all(len(line) <= 80 for line in lines)
    assert any(line.startswith("0,1,0.25,1") and "…" in line for line in lines)
    assert lines[-1].endswith("of 3 configurations lose an object")


def test_sweep_by_importance_keeps_objects_longer_than_the_opposite_order(tmp_path, capsys):
    """In Shapley's order objects survive longer than in the opposite one."""
    kept = {}
    for order in ("importance", "importance:most"):
        arguments = ["sweep", "--order", order, "--out", str(tmp_path / "out"), "--figures", "none"]
        assert main(arguments) == 0
        out = capsys.readouterr().out
        kept[order] = [int(line.split()[4]) for line in out.splitlines() if line.startswith("first ")]
        heads = out.split("important first: ")[1].split("\n")[0].split(", ")
        assert sorted(heads) == list("01234567")
    assert sum(kept["importance"]) > sum(kept["importance:most"]) + 5


def test_the_page_of_an_order_by_importance_compares_it_with_others(tmp_path, blank_figures):
    assert main(["sweep", "--order", "importance", "--out", str(tmp_path), "--figures", "all"]) == 0
    _, *rest = (tmp_path / "index.html").read_text().split("How many heads can go")
    assert len(rest) == 1 and rest[0].count("<svg") >= 2
    assert (tmp_path / "figures" / "removal-curves.png").is_file()


def test_ablation_kinds_are_options_and_part_of_the_provenance(tmp_path, capsys):
    arguments = ["sweep", "--ablate", "mean", "--off", "first 3", "--out", str(tmp_path)]
    assert main([*arguments, "--figures", "none"]) == 0
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["provenance"]["ablation"] == "mean"
    assert report["ablation"] == "mean"
    capsys.readouterr()
    missing = ["sweep", "--ablate", "mean", "--references", str(tmp_path / "none"), "--out", str(tmp_path)]
    assert main(missing) == 2
    assert "there is no reference set" in capsys.readouterr().err


def test_references_are_gathered_and_used(tmp_path, capsys):
    folder = headoff.sample_image(0).parent
    path = tmp_path / "references.safetensors"
    gather = ["references", str(folder / "scene-000.png"), str(folder / "scene-001.png"), "--out", str(path)]
    assert main([*gather, "--optimal", "--steps", "2"]) == 0
    assert "the reference set of 2 images" in capsys.readouterr().out
    sweep = ["sweep", "--references", str(path), "--out", str(tmp_path / "out"), "--off", "L5"]
    sweep += ["--figures", "none"]
    assert main([*sweep, str(folder / "scene-002.png"), "--ablate", "optimal"]) == 0
    capsys.readouterr()
    assert main([*sweep, str(folder / "scene-000.png"), "--ablate", "optimal"]) == 2
    assert "were fitted on the image that is judged" in capsys.readouterr().err


SIGNATURE = "def attention(query, key, value, attn_mask=None, *, head_gate=None):\n"


@pytest.mark.parametrize(
    ("body", "culprit"),
    [
        ("    raise RuntimeError('no such\\nkernel')\n", "raised RuntimeError: no such kernel (line 2)"),
        ("    import sys; sys.exit(0)\n", "ended the program (line 2"),
        ("    return None\n", "returned None"),
        ("    return query[..., :2]\n", "returned a context of shape"),
    ],
)
def test_an_attention_that_fails_is_one_sentence(capsys, tmp_path, body, culprit):
    """Success, or a traceback through headoff, would say that the fault is elsewhere."""
    (tmp_path / "patch.py").write_text(SIGNATURE + body)
    error = rejected(capsys, "detect", SAMPLE, "--attention", f"{tmp_path / 'patch.py'}:attention")
    assert culprit in error and error.count("\n") == 1


def test_faults_of_headoff_keep_their_traceback(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a fault of headoff")

    monkeypatch.setattr("headoff.cli.detectors.load_detector", broken)
    with pytest.raises(RuntimeError, match="a fault of headoff"):
        main(["detect", SAMPLE])


def test_a_reference_set_replaces_nothing_else(capsys, tmp_path):
    """`headoff references photo.png --out photo.png` would cost a photo."""
    photo = tmp_path / "photo.png"
    photo.write_bytes(Path(SAMPLE).read_bytes())
    before = photo.read_bytes()
    assert "is not replaced" in rejected(capsys, "references", str(photo), "--out", str(photo))
    assert photo.read_bytes() == before
    assert "is a folder" in rejected(capsys, "references", str(photo), "--out", str(tmp_path))


def test_a_reference_set_of_nan_is_not_written(capsys, tmp_path):
    (tmp_path / "patch.py").write_text(SIGNATURE + "    return query * float('nan')\n")
    out = tmp_path / "references.safetensors"
    patch = f"{tmp_path / 'patch.py'}:attention"
    code, _, error = run(capsys, "references", SAMPLE, "--attention", patch, "--out", str(out))
    assert code == 2 and "not finite" in error and "Traceback" not in error
    assert not out.exists()


def test_an_output_that_nobody_reads_is_no_error(tmp_path):
    """`headoff detect ... | true`"""
    command = f"{sys.executable} -m headoff detect {SAMPLE} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_terminal_without_the_letters_of_a_name(tmp_path):
    photo = tmp_path / "péché 猫.png"
    photo.write_bytes(Path(SAMPLE).read_bytes())
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "headoff", "detect", str(photo)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "p\\xe9ch\\xe9 \\u732b.png" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("faithfulness", "scenes:99999999999999999999"), "names no scenes"),
        (("faithfulness", "scenes:1", "--short-side", "100000"), "too large"),
        (("faithfulness", SAMPLE, "--annotations", "{boxes}"), "cannot be read as annotations"),
        (("faithfulness", SAMPLE, "--annotations", "{deep}"), "cannot be read as annotations"),
        (("live", "--no-browser", "--references", "{text}"), "is no reference set"),
        (("scenes", "draw", "--out", "{text}"), "cannot be written"),
        (("scenes", "train", "--out", "{text}/below"), "cannot be written"),
        (("roles", SAMPLE, "--references", SAMPLE), "--references has no effect"),
    ],
)
def test_what_cannot_be_asked_of_other_commands(capsys, tmp_path, arguments, culprit):
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, float("nan"), 3]}
    names = [{"id": 1, "name": "star"}]
    files = {
        "boxes": json.dumps({"images": [], "annotations": [box], "categories": names}),
        "deep": "[" * 100_000,
        "text": "text",
    }
    for name, contents in files.items():
        (tmp_path / name).write_text(contents)
    out = () if arguments[0] in ("scenes", "live") else ("--out", str(tmp_path / "out"))
    given = [word.format(**{name: tmp_path / name for name in files}) for word in arguments]
    assert culprit in rejected(capsys, *given, *out)
    assert not (tmp_path / "out").exists() and (tmp_path / "text").read_text() == "text"


@pytest.mark.parametrize("name", ["", " ", "a\0b", "x" * 300])
def test_names_that_no_file_can_have(capsys, name):
    for arguments in (("sweep", SAMPLE, "--out", name), ("faithfulness", name)):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.startswith("headoff: error: ") and error.count("\n") == 1
