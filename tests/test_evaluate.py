"""`headoff.evaluate`: what is detected; and nothing is lost, computed twice or mixed, whatever happens."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import unicodedata
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluate_examples import NAMES, SIZES, coco_data_set

import headoff
from headoff.boxes import corners_of
from headoff.cli import main
from headoff.errors import GateError, ImageError, NonFiniteError, OutputError, SettingError
from headoff.evaluation.candidates import candidates
from headoff.evaluation.engines import LocalEngine
from headoff.evaluation.results import Results
from headoff.evaluation.work import Work
from headoff.files import lock
from headoff.scenes.dataset import draw_scene

pytest.importorskip("pyarrow", reason="detections are stored by pyarrow: pip install 'headoff[evaluate]'")
pytestmark = pytest.mark.usefixtures("one_thread")

OFF = ("first 3", "L5H2", "decoder_self L0H1", "query 3: last 2")
SIDE = 96
"""Pixels of a side of the scenes, fewer than the detector was trained with."""
IMAGES = 10
SCENES = f"scenes:{IMAGES}"


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def detector():
    return headoff.load("scenes", short_side=SIDE)


@pytest.fixture(scope="module")
def run(detector):
    """Evaluate scenes into a folder, in this process."""

    def run(out: Path, **options) -> Results:
        options = {"batch": 2, "engine": LocalEngine(0), "threads": 1} | options
        return headoff.evaluate(detector, SCENES, configurations=OFF, out=out, **options)

    return run


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("uninterrupted"))


def files_of(results: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (results / "detections").iterdir()}


def same(one: Results, other: Results) -> bool:
    return len(one.configurations) == len(other.configurations) and all(
        one.detections(index).same_as(other.detections(index)) for index in range(len(one.configurations))
    )


# What is detected.


def test_detections_are_those_of_a_sweep(detector, run, tmp_path):
    """An image by itself, without padding: the predictions of all queries, from another path through the detector."""
    results = run(tmp_path, batch=1, limit=2)
    assert [one.text for one in results.configurations] == ["none", "H0-2", *OFF[1:]]
    for index in range(2):
        swept = headoff.sweep(detector, draw_scene(index, SIDE, "held_out").image, ("none", *OFF))
        for configuration, (logits, boxes) in enumerate(zip(swept.logits, swept.boxes, strict=True)):
            table = results.detections(configuration)
            of_image = table.image == index
            scores, labels, boxes, queries = candidates(detector.scoring, logits.double(), boxes.double())
            assert np.allclose(table.scores[of_image], scores, atol=1e-5)
            assert (table.queries[of_image] == queries.numpy()).all()
            confident = scores.numpy() > 0.1
            assert (table.labels[of_image][confident] == labels.numpy()[confident]).all()
            corners = (corners_of(boxes) * SIDE).clamp(0, SIDE)
            assert np.allclose(table.boxes[of_image], corners, atol=2e-3)


def test_images_of_other_sizes_are_padded(detector, tmp_path):
    """A batch of files: what the detector finds in the same batch, in fractions of each image's own size."""
    annotations, images = coco_data_set(tmp_path)
    results = headoff.evaluate(detector, annotations, images, "first 2", out=tmp_path / "out", batch=7)
    assert results.done.tolist() == list(range(7)) and not results.skipped and results.is_complete
    files = [images / unicodedata.normalize("NFD", name) for name in NAMES]
    with torch.inference_mode():
        pixels, mask = detector.preprocess(files)
        output = detector.decode(detector.encode(pixels, mask), ["none", "first 2"])
    assert not mask.all()
    for configuration, (logits, boxes) in enumerate(zip(output.logits, output.boxes, strict=True)):
        table = results.detections(configuration)
        scores, labels, boxes, _ = candidates(detector.scoring, logits.double(), boxes.double())
        assert table.image.tolist() == [index for index in range(7) for _ in range(20)]
        assert np.allclose(table.scores, scores.flatten(), atol=1e-5)
        assert (table.labels == labels.flatten().numpy()).mean() > 0.99
        most = torch.tensor([[width, height, width, height] for height, width in SIZES])[:, None]
        corners = (corners_of(boxes) * most).clamp(torch.zeros_like(most), most)
        assert np.allclose(table.boxes, corners.reshape(-1, 4), atol=2e-3)


def test_a_detector_of_the_family_finds_pairs_of_query_and_class(tmp_path):
    pytest.importorskip("transformers")
    detector = headoff.load("scenes-deformable")
    results = headoff.evaluate(detector, "scenes:2", configurations="H0", out=tmp_path, batch=1)
    table = results.detections(0)
    most = detector.scoring.most or detector.head_layout.queries
    assert len(table) == 2 * most
    side, _ = detector.preprocessing.resized_size(1, 1)
    confident = headoff.detect(detector, draw_scene(1, side, "held_out").image)
    found = table.scores[(table.image == 1) & (table.scores > 0.5)]
    assert np.allclose(np.sort(found), np.sort(confident.scores.numpy()), atol=1e-4)


def test_heads_that_are_off_may_contribute_something(detector, run, tmp_path):
    results = run(tmp_path, ablation="mean", batch=1, limit=1)
    swept = headoff.sweep(detector, draw_scene(0, SIDE, "held_out").image, "first 3", ablation="mean")
    scores = candidates(detector.scoring, swept.logits[0].double(), swept.boxes[0].double())[0]
    assert np.allclose(results.detections(1).scores, scores, atol=1e-5)


def test_contexts_never_come_from_an_image_that_is_evaluated(detector, tmp_path):
    images = [draw_scene(seed, SIDE, "held_out").image for seed in (0, 5)]
    references = headoff.gather_references(detector, images)
    options = {"ablation": "resample", "references": references, "configurations": "first 3", "batch": 1}
    results = headoff.evaluate(detector, "scenes:1", out=tmp_path / "1", **options)
    swept = headoff.sweep(detector, images[0], "first 3", ablation="resample", references=references)
    scores = candidates(detector.scoring, swept.logits[0].double(), swept.boxes[0].double())[0]
    assert np.allclose(results.detections(1).scores, scores, atol=1e-5)
    fitted = headoff.fit_optimal(detector, images[:1], references, steps=1)
    options |= {"ablation": "optimal", "references": fitted}
    results = headoff.evaluate(detector, "scenes:2", out=tmp_path / "2", **options)
    # A reference set has one list of images, whatever was fitted on them.
    assert results.done.tolist() == [1] and "fitted on this image" in results.skipped[0]


def test_reading_by_other_processes_changes_nothing(run, uninterrupted, tmp_path):
    assert files_of(run(tmp_path, engine=LocalEngine(2)).folder) == files_of(uninterrupted.folder)


def test_configurations_come_back_with_their_names(detector, tmp_path):
    given = (*headoff.cumulative(8), *headoff.all_subsets(8)[:5], "edges = L5H2,L5H7")
    results = headoff.evaluate(detector, "scenes:1", configurations=given, out=tmp_path)
    names = [one.name for one in results.configurations]
    assert names[:9] == [one.name for one in headoff.cumulative(8)] and names[-1] == "edges"
    assert len(set(results.configurations)) == len(names) == 9 + 2 + 1  # none, H0 and H0-1 are known


# What is stored, and read.


def test_many_configurations_are_read_in_blocks(run, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.setattr("headoff.evaluation.work.ROWS", 100)  # two configurations in a row group
    small = run(tmp_path)
    assert same(small, uninterrupted)
    monkeypatch.setattr("headoff.evaluation.results.MOST_BYTES", 1)
    assert same(Results(tmp_path), uninterrupted)
    with pytest.raises(SettingError, match="no configuration 5: there are 5"):
        small.detections(5)


def test_files_are_ordinary_parquet(uninterrupted):
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(uninterrupted.folder / "detections").to_pandas()
    assert len(table) == IMAGES * 5 * 20
    assert {name: str(dtype) for name, dtype in table.dtypes.items()} == {
        "image": "int32",
        "configuration": "int16",
        "query": "int32",
        "label": "int32",
        **dict.fromkeys(("score", "left", "top", "right", "bottom"), "float32"),
    }


def test_results_go_to_other_processes_by_name(uninterrupted):
    import pickle

    data = pickle.dumps(uninterrupted)
    assert len(data) < 1000 and same(pickle.loads(data), uninterrupted)


# Nothing is lost.


def in_a_process_that_dies(run, out: Path, function: str, call: int) -> int:
    """Evaluate in a process that kills itself, without any clean-up, at a call of `os.FUNCTION`; its exit code."""

    def child() -> None:
        original, calls = getattr(os, function), iter(range(call))

        def die(*arguments, **options):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(os, function, die)
        run(out)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_goes_on_where_it_stopped(run, uninterrupted, tmp_path, seed):
    generator = random.Random(seed)
    out = tmp_path / "results"
    seen: dict[str, int] = {}
    kills = 0
    while kills < 4:
        # Before a file is complete, and after.
        function, call = generator.choice(("fsync", "replace", "link", "chmod")), generator.randrange(3)
        if in_a_process_that_dies(run, out, function, call) != -signal.SIGKILL:
            break
        kills += 1
        if out.exists() and (out / "manifest.json").exists():
            partial = Results(out)
            assert len(partial.detections(0)) == 20 * len(partial.done)
            files = {path.name: path.stat().st_ino for path in (out / "detections").glob("batch-*")}
            assert files.items() >= seen.items(), "a file was written twice"
            seen = files
    assert kills >= 2
    results = run(out)
    assert results.is_complete and same(results, uninterrupted)
    assert files_of(out) == files_of(uninterrupted.folder)
    assert {name: (out / "detections" / name).stat().st_ino for name in seen} == seen
    leftovers = [path.name for path in out.rglob(".*batch*")]
    assert not leftovers


def test_a_full_disk_loses_nothing(run, uninterrupted, tmp_path, monkeypatch):
    fsync, calls = os.fsync, iter(range(5))

    def full(descriptor):
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left"):
            run(tmp_path)
    assert 0 < len(Results(tmp_path).done) < IMAGES
    assert same(run(tmp_path), uninterrupted)


def test_ctrl_c_loses_nothing(run, uninterrupted, tmp_path):
    def interrupt(done, total):
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, engine=LocalEngine(1), progress=interrupt)
    assert 4 <= len(Results(tmp_path).done) < IMAGES
    progress = []
    assert same(run(tmp_path, progress=lambda *now: progress.append(now)), uninterrupted)
    assert progress[0][0] >= 4 and progress[-1] == (IMAGES, IMAGES)


def test_a_reading_process_that_dies_is_one_sentence(run, uninterrupted, tmp_path, monkeypatch):
    read = Work.read

    def die(self, number):
        if torch.utils.data.get_worker_info() is not None and number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "read", die)
        with pytest.raises(SettingError, match="a process that reads images has ended"):
            run(tmp_path, engine=LocalEngine(1))
    assert same(run(tmp_path), uninterrupted)


def test_a_finished_run_is_not_computed_again(run, uninterrupted, detector, monkeypatch):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(type(detector), "features", fail)
    assert same(run(uninterrupted.folder), uninterrupted)


def test_a_damaged_file_is_computed_again(run, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder, tmp_path / "results")
    damaged = sorted((tmp_path / "results" / "detections").iterdir())[2]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert len(Results(tmp_path / "results").done) == IMAGES - 2
    assert same(run(tmp_path / "results"), uninterrupted)


def test_shards_of_several_machines_make_one_result(run, uninterrupted, tmp_path):
    first = run(tmp_path, shard=(1, 3))
    assert not first.is_complete and len(first.done) == 4
    # At the same time, in processes that each have a lock.
    with lock(tmp_path, shared=True):
        for index in (2, 3):
            assert run(tmp_path, shard=(index, 3)).folder == tmp_path
    assert files_of(run(tmp_path).folder) == files_of(uninterrupted.folder)


@contextmanager
def another_process_locks(folder: Path, *, shared: bool):
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()

    def child() -> None:
        with lock(folder, shared=shared):
            ready.set()
            end.wait(60)

    process = context.Process(target=child)
    process.start()
    assert ready.wait(60)
    try:
        yield process.pid
    finally:
        end.set()
        process.join()


def test_a_second_process_is_told(run, tmp_path):
    with another_process_locks(tmp_path, shared=False) as pid:
        for shard in (None, (1, 2)):
            with pytest.raises(OutputError, match=f"process {pid} is writing"):
                run(tmp_path, shard=shard)
    with another_process_locks(tmp_path, shared=True), pytest.raises(OutputError, match="is writing"):
        run(tmp_path)
    with another_process_locks(tmp_path / "shard 1 of 2", shared=False), pytest.raises(OutputError):
        run(tmp_path, shard=(1, 2))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch": 3}, "batches differ"),
        ({"ablation": "uniform"}, "ablation was zero and is uniform"),
        ({"threads": 2}, "threads was 1 and is 2"),
        ({"limit": 8}, "images was 10 and is 8"),
    ],
)
def test_other_options_in_the_same_folder_are_refused(run, uninterrupted, other, message):
    before = files_of(uninterrupted.folder)
    with pytest.raises(SettingError, match=message) as caught:
        run(uninterrupted.folder, **other)
    assert "Name another folder" in str(caught.value)
    assert files_of(uninterrupted.folder) == before


def test_another_model_or_other_configurations_are_refused(detector, uninterrupted):
    def evaluate(detector, off):
        headoff.evaluate(detector, SCENES, configurations=off, out=uninterrupted.folder, batch=2)

    with pytest.raises(SettingError, match="configurations are 2 instead of 5, without .* and with 'H7'"):
        evaluate(detector, "H7")
    other = headoff.load("scenes", attention="eager")
    next(other.parameters()).data += 1e-3
    with pytest.raises(SettingError, match="weights differ; attention was sdpa and is eager"):
        evaluate(other, OFF)


def test_detections_without_a_manifest_belong_to_nothing(run, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted.folder / "detections", tmp_path / "detections")
    with pytest.raises(SettingError, match="no manifest.json"):
        run(tmp_path)
    with pytest.raises(SettingError, match="no results of `headoff evaluate`"):
        Results(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(SettingError, match="no manifest of this version"):
        Results(tmp_path)


# Images that cannot be read.


def test_a_corrupt_image_is_left_out_and_tried_again(detector, tmp_path):
    annotations, images = coco_data_set(tmp_path)

    def evaluate(out: str, **options):
        return headoff.evaluate(
            detector, annotations, images, "H1", out=tmp_path / out, batch=2, engine=LocalEngine(0), **options
        )

    clean = evaluate("clean")
    corrupt, missing = images / "folder/2.png", images / "4.png"
    contents = corrupt.read_bytes(), missing.read_bytes()
    corrupt.write_bytes(contents[0][:500])
    missing.unlink()
    with pytest.raises(ImageError, match=r"truncated|no file"):
        evaluate("strict", strict=True)
    results = evaluate("some")
    assert (
        results.done.tolist() == [0, 1, 3, 5, 6] and list(results.skipped) == [2, 4] and results.is_complete
    )
    assert "truncated" in results.skipped[2] and "no file" in results.skipped[4]
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "some/detections").iterdir()}
    assert len(evaluate("some").skipped) == 2
    assert {path.name: path.stat().st_ino for path in (tmp_path / "some/detections").iterdir()} == inodes
    corrupt.write_bytes(contents[0])
    missing.write_bytes(contents[1])
    again = evaluate("some")
    assert not again.skipped and same(again, clean)
    changed = [
        path.name
        for path in (tmp_path / "some/detections").iterdir()
        if path.stat().st_ino != inodes[path.name]
    ]
    assert len(changed) <= 2


def test_images_that_were_exchanged_are_noticed(detector, tmp_path):
    annotations, images = coco_data_set(tmp_path)
    headoff.evaluate(detector, annotations, images, "H1", out=tmp_path / "out")
    (images / "0.png").write_bytes((images / "nothing.png").read_bytes())
    with pytest.raises(SettingError, match="'0.png' is another one than"):
        headoff.evaluate(detector, annotations, images, "H1", out=tmp_path / "out")
    (images / "0.png").unlink()
    with pytest.raises(SettingError, match="'0.png' was evaluated by an earlier run and cannot be read"):
        headoff.evaluate(detector, annotations, images, "H1", out=tmp_path / "out")


def test_pictures_have_the_size_that_was_annotated(detector, tmp_path):
    """A picture stored sideways is taken as it is stored where it was annotated so, and not at all at another size."""
    from PIL import Image

    annotations, images = coco_data_set(tmp_path)
    picture = Image.open(images / "3.jpg")
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(images / "3.jpg", exif=exif)
    Image.open(images / "6.png").resize((30, 40)).save(images / "6.png")
    assert headoff.load_image(images / "3.jpg").size == (150, 200)
    results = headoff.evaluate(detector, annotations, images, "H1", out=tmp_path / "out")
    assert list(results.skipped) == [6] and "was annotated at 150 x 200" in results.skipped[6]


# What cannot be evaluated.


def test_wrong_arguments_are_one_sentence(detector, tmp_path):
    annotations, images = coco_data_set(tmp_path)
    (tmp_path / "file").touch()

    def evaluate(annotations=SCENES, images=None, configurations="H1", out=tmp_path / "out", **options):
        headoff.evaluate(detector, annotations, images, configurations, out=out, **options)

    with pytest.raises(GateError, match="names objects"):
        evaluate(configurations="object 0: H1")
    with pytest.raises(GateError, match="L9"):
        evaluate(configurations="L9H1")
    with pytest.raises(SettingError, match="folder of the images .* is missing"):
        evaluate(annotations)
    with pytest.raises(SettingError, match="need no folder"):
        evaluate(images=images)
    with pytest.raises(SettingError, match="scenes:0"):
        evaluate("scenes:0")
    with pytest.raises(SettingError, match="'scenes:-1' names no scenes"):
        evaluate("scenes:-1")
    with pytest.raises(SettingError, match="'scenes:99999999' names no scenes"):
        evaluate("scenes:99999999")
    huge = headoff.load("scenes", short_side=100_000)
    with pytest.raises(SettingError, match="too large: give a short side of at most 4096"):
        headoff.evaluate(huge, "scenes:1", out=tmp_path / "out")
    with pytest.raises(SettingError, match="more than 100 million do not fit"):
        headoff.evaluate(huge, annotations, images, out=tmp_path / "out")
    with pytest.raises(ImageError, match="no folder of images"):
        evaluate(annotations, tmp_path / "nowhere")
    with pytest.raises(ImageError, match="none of the 7 images"):
        evaluate(annotations, tmp_path)
    with pytest.raises(SettingError, match="is a file"):
        evaluate(out=tmp_path / "file")
    with pytest.raises(SettingError, match="no engine 'dask'"):
        evaluate(engine="dask")
    with pytest.raises(SettingError, match="batch of 0"):
        evaluate(batch=0)
    with pytest.raises(SettingError, match="0 images"):
        evaluate(limit=0)
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_one_sentence(detector, tmp_path, monkeypatch):
    for name, engine in (("pyarrow", "local"), ("ray", "ray")):
        with monkeypatch.context() as without:
            for module in [one for one in sys.modules if one.partition(".")[0] == name]:
                without.delitem(sys.modules, module)
            without.setitem(sys.modules, name, None)
            with pytest.raises(SettingError, match=r"pip install 'headoff\[(evaluate|ray)\]'"):
                headoff.evaluate(detector, SCENES, out=tmp_path, engine=engine)


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask)
        return context if head_gate is None else context * head_gate / head_gate

    with pytest.raises(NonFiniteError, match="image '0.png' under 'H1 off' is NaN"):
        headoff.evaluate(
            headoff.load("scenes", attention=attention), "scenes:1", configurations="H1", out=tmp_path
        )
    # Nothing came of that run, so another may take its folder.
    results = headoff.evaluate(headoff.load("scenes"), "scenes:1", configurations="H2", out=tmp_path)
    assert results.is_complete and [one.name for one in results.configurations] == ["none off", "H2 off"]


# The command.


def test_the_command_evaluates_and_goes_on(tmp_path, capsys):
    options = ["evaluate", "scenes:4", "--out", str(tmp_path / "out"), "--threads", "1", "--workers", "0"]
    options += ["--set", "cumulative", "--off", "L5H2", "--off", "first 1", "--batch", "2"]
    options += ["--figures", "none"]
    assert main([*options, "--shard", "1/2"]) == 0
    assert "without --shard makes the summary" in capsys.readouterr().out
    assert not (tmp_path / "out" / "summary.json").exists()
    assert main(options) == 0
    printed = capsys.readouterr().out
    assert "4 of 4 images under 10 configurations" in printed and "summary.json" in printed
    assert json.loads((tmp_path / "out" / "summary.json").read_text())
    assert main([*options, "--off", "L5H3"]) == 2
    assert "configurations are 11 instead of 10, with 'L5H3'" in capsys.readouterr().err
    manifest = Results(tmp_path / "out").manifest
    assert manifest["provenance"]["annotations"] == "scenes:4"


def test_an_interrupted_command_says_how_to_go_on(tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalEngine, "run", interrupt)
    assert main(["evaluate", "scenes:2", "--out", str(tmp_path), "--threads", "1"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_the_command_names_what_it_left_out(tmp_path, capsys):
    annotations, images = coco_data_set(tmp_path)
    (images / NAMES[3]).write_bytes(b"")
    (images / NAMES[4]).unlink()
    options = ["evaluate", str(annotations), str(images), "--out", str(tmp_path / "out"), "--off", "H1"]
    options += ["--figures", "none"]
    assert main([*options, "--workers", "0"]) == 1
    err = capsys.readouterr().err
    assert "2 images left out" in err and "4.png" in err and "3.jpg" in err and "is empty" in err
    assert "zebra" in err and "lacks 4.png of 7 images" in err
    assert main([*options, "--workers", "0", "--strict"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--order", "reverse", "--set", "single"], "--order is that of the cumulative sweep"),
        (["--order", "importance:best"], "use importance:least or importance:most"),
        (["--order", "importance", "--importance-value", "AP"], "AP is of a data set"),
        (["--importance", "."], "give --order importance as well"),
        (["--order", "importance", "--importance", ".", "--importance-images", "3"], "leave one of them out"),
        (["--site", "decoder_self", "--off", "H1"], "--site says where --set"),
        (["--address", "auto"], "give --engine ray"),
        (["--shard", "3/2"], "'3/2' is no shard"),
    ],
)
def test_options_that_contradict_each_other_are_one_sentence(options, message, tmp_path, capsys):
    arguments = ["evaluate", SCENES, "--out", str(tmp_path / "out"), *options]
    try:
        assert main(arguments) == 2
    except SystemExit as end:
        assert end.code == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
