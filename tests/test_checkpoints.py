"""Checkpoint files: what is read from shapes, what is rejected and how, and headoff's layout.

Parity with other implementations is in test_parity.py, downloads are in test_downloads.py.
"""

import argparse
import importlib.resources
import json
import os
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from headoff.detr import BackboneConfig, Detr, DetrConfig
from headoff.detr.checkpoints import COCO_CLASSES, ORIGINALS, load, save_native
from headoff.detr.checkpoints.layouts import HUGGING_FACE, ORIGINAL
from headoff.errors import CheckpointError, OutputError, SettingError
from headoff.images import Preprocessing

BASIC = BackboneConfig("basic", depths=(1, 2, 1), widths=(4, 8, 8), stem=4)
BOTTLENECK = BackboneConfig("bottleneck", depths=(2, 1), widths=(2, 4), stem=6)


def config(**changes):
    values = dict(
        backbone=BASIC, width=16, heads=8, encoder_layers=2, decoder_layers=3, feedforward=20, queries=5
    )
    return DetrConfig(**(values | {"classes": 4} | changes))


def detector(class_names=None, norm=None, **changes):
    torch.manual_seed(0)
    model = Detr(config(**changes), class_names, **({} if norm is None else {"norm": norm}))
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            value.normal_()
    return model.eval().requires_grad_(False)


def original_names(tensors):
    """headoff's names back to those of the original code, projections joined."""
    joined = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*_attention)\.(query|key|value)\.(weight|bias)", name)
        joined.setdefault(f"{part[1]}.in_proj_{part[3]}" if part else name, []).append(tensor)
    rules = (
        (r"^backbone\.", "backbone.0.body."),
        (r"^input_projection", "input_proj"),
        (r"^(encoder|decoder)\.", r"transformer.\1."),
        (r"self_attention", "self_attn"),
        (r"cross_attention", "multihead_attn"),
        (r"\.output\.", ".out_proj."),
        (r"feedforward\.expand", "linear1"),
        (r"feedforward\.contract", "linear2"),
        (r"self_residual\.norm", "norm1"),
        (r"cross_residual\.norm", "norm2"),
        (r"(encoder.*)feedforward_residual\.norm", r"\1norm2"),
        (r"feedforward_residual\.norm", "norm3"),
        (r"^query_embedding", "query_embed"),
        (r"^class_head", "class_embed"),
        (r"^box_head\.(\d)", lambda m: f"bbox_embed.layers.{int(m[1]) // 2}"),
    )
    renamed = {}
    for name, parts in joined.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    return renamed


def original(**changes):
    return original_names(detector(**changes).state_dict())


def assert_same_weights(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)


def message_of(source, **how):
    """The message of the CheckpointError that loading raises: one sentence, one line, the culprit in it."""
    with pytest.raises(CheckpointError) as caught:
        load(source, **how)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


# --- sizes from shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"backbone": BOTTLENECK},
        {"backbone": replace(BOTTLENECK, dilate_last=True)},
        {"pre_norm": True},
        {"classes": 1, "queries": 1, "encoder_layers": 1, "decoder_layers": 1, "feedforward": 3},
        {"classes": 250, "queries": 30, "width": 24, "encoder_layers": 0},
    ],
    ids=str,
)
def test_sizes_are_read_from_the_shapes(changes, tmp_path):
    model = detector(**changes)
    torch.save({"model": original_names(model.state_dict())}, tmp_path / "any.pth")
    loaded = load(tmp_path / "any.pth", dilated=model.config.backbone.dilate_last)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded(torch.randn(1, 3, 64, 64)).logits.isfinite().all()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"model": tensors},
        lambda tensors: {"state_dict": tensors, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}},
        lambda tensors: {"model": {f"module.{name}": tensor for name, tensor in tensors.items()}},
        lambda tensors: {
            "model": {f"detr.{n}": t for n, t in tensors.items()} | {"mask_head.w": torch.ones(1)}
        },
        lambda tensors: {"model": tensors | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(7)}},
        lambda tensors: {"model": {name: nn.Parameter(tensor) for name, tensor in tensors.items()}},
    ],
    ids=["bare", "model", "training", "module", "segmentation", "counters", "parameters"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "pickle"])
def test_containers(wrap, zipped, tmp_path):
    """Also torch.save's older format, in which the published files are."""
    model = detector()
    content = wrap(original_names(model.state_dict()))
    torch.save(content, tmp_path / "any.pth", _use_new_zipfile_serialization=zipped)
    assert_same_weights(load(tmp_path / "any.pth"), model)


def test_heads_and_dilation_from_training_settings(tmp_path):
    settings = argparse.Namespace(nheads=2, dilation=True, lr=1e-4, output_dir="", dataset_file="coco")
    torch.save({"model": original(backbone=BOTTLENECK), "args": settings}, tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth")
    assert loaded.config.heads == 2 and loaded.config.backbone.dilate_last
    loaded = load(tmp_path / "a.pth", heads=4, dilated=False)
    assert loaded.config.heads == 4 and not loaded.config.backbone.dilate_last


@pytest.mark.parametrize(
    ("name", "dilated"),
    [
        ("detr-r50-dc5-f0fb7ef5.pth", True),
        ("DC5.pth", True),
        ("detr-r50-e632da11.pth", False),
        ("abdc55.pth", False),
    ],
)
def test_dilation_from_file_names(name, dilated, tmp_path):
    torch.save({"model": original(backbone=BOTTLENECK)}, tmp_path / name)
    assert load(tmp_path / name).config.backbone.dilate_last == dilated


def test_heads_that_do_not_divide_the_width(tmp_path):
    torch.save(original(width=20, heads=4), tmp_path / "a.pth")
    assert "8 heads" in message_of(tmp_path / "a.pth")
    assert load(tmp_path / "a.pth", heads=4).config.heads == 4
    assert "3 heads" in message_of(tmp_path / "a.pth", heads=3)


def test_class_names_of_coco(tmp_path):
    assert len(COCO_CLASSES) == 91 and COCO_CLASSES.count("N/A") == 11
    assert (COCO_CLASSES[1], COCO_CLASSES[17], COCO_CLASSES[90]) == ("person", "cat", "toothbrush")
    torch.save(original(classes=91), tmp_path / "coco.pth")
    torch.save(original(classes=90), tmp_path / "other.pth")
    assert load(tmp_path / "coco.pth").class_names == COCO_CLASSES
    assert load(tmp_path / "other.pth").class_names[:2] == ("class 0", "class 1")


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_weights_are_promoted(stored, dtype, tmp_path):
    model = detector().to(stored)
    torch.save(original_names(model.state_dict()), tmp_path / "a.pth")
    loaded = load(tmp_path / "a.pth", dtype=dtype)
    assert loaded.dtype == dtype
    assert_same_weights(loaded, model.to(dtype))


def test_a_dtype_that_is_not_floating_point_is_rejected():
    with pytest.raises(SettingError, match="int8"):
        load("scenes", dtype=torch.int8)


def test_weights_are_not_the_files(tmp_path):
    """Overwriting the file must not reach a detector that was read from it."""
    path, model = tmp_path / "a.safetensors", detector()
    save_native(model, path, torch.float32)
    loaded = load(path)
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert_same_weights(loaded, model)


def test_an_attention_file_is_imported_as_usual(tmp_path):
    """Detectors are built on the meta device; tensors that a kernel file makes when imported are not."""
    save_native(detector(), tmp_path / "a.safetensors")
    kernel = tmp_path / "kernel.py"
    kernel.write_text(
        "import torch\nONE = torch.ones(1)\n"
        "def attention(query, key, value, attn_mask=None, *, head_gate=None):\n"
        "    return query * ONE.item()\n"
    )
    loaded = load(tmp_path / "a.safetensors", attention=f"{kernel}:attention")
    assert loaded(torch.randn(1, 3, 64, 64)).logits.isfinite().all()


# --- headoff's layout -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_native_round_trip(dtype, tmp_path):
    path = tmp_path / "new" / "folder" / "a.safetensors"
    model = detector(
        ["a", "b b", "ü", '"'],
        heads=4,
        pre_norm=True,
        backbone=replace(BOTTLENECK, dilate_last=True),
        preprocessing=Preprocessing(96, 128, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
    )
    model.backbone.bn1.running_var[0] = 1e6  # more than float16 holds
    save_native(model, path, dtype)
    loaded = load(path)
    assert loaded.config == model.config and loaded.class_names == model.class_names
    expected = {
        name: value if "running" in name else value.to(dtype).float()
        for name, value in model.state_dict().items()
    }
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in expected.items())
    assert os.listdir(path.parent) == [path.name]
    assert load(path, heads=2, dilated=False).config.heads == 2


def test_native_metadata_and_bytes(tmp_path):
    """Any safetensors reader can read it, and the same weights are the same bytes."""
    contents = []
    for index in range(3):
        save_native(detector(), tmp_path / f"{index}")
        contents.append((tmp_path / f"{index}").read_bytes())
    assert contents[0] == contents[1] == contents[2]
    with safe_open(tmp_path / "0", framework="pt") as file:
        metadata = file.metadata()
        assert file.get_tensor("backbone.bn1.running_var").dtype == torch.float32
        assert file.get_tensor("class_head.weight").dtype == torch.float16
    assert (metadata["format"], metadata["version"]) == ("headoff", "1")
    assert json.loads(metadata["config"])["width"] == 16
    assert json.loads(metadata["class_names"]) == [f"class {index}" for index in range(4)]


def test_native_of_a_detector_in_training(tmp_path):
    """Backbones trained from scratch have nn.BatchNorm2d, with counters that inference has no use for."""
    model = detector(norm=nn.BatchNorm2d)
    save_native(model, tmp_path / "a.safetensors", torch.float32)
    loaded = load(tmp_path / "a.safetensors")
    pixels = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)], ids=["nan", "big"]
)
def test_weights_that_could_not_be_read_again_are_not_saved(value, dtype, tmp_path):
    model = detector()
    model.class_head.bias[0] = value
    with pytest.raises(CheckpointError, match=r"class_head\.bias"):
        save_native(model, tmp_path / "a.safetensors", dtype)
    assert not os.listdir(tmp_path)


def test_saving_to_a_path_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_native(detector(), tmp_path / "file" / "a.safetensors")
    with pytest.raises(OutputError):
        save_native(detector(), tmp_path)
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(SettingError):
        save_native(detector(), tmp_path / "a", torch.int8)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_native(detector(), path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        save_native(detector(pre_norm=True), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": "2"}, "newer headoff"),
        ({"version": "x"}, "version"),
        ({"config": "{"}, "metadata"),
        ({"config": "[]"}, "metadata"),
        ({"config": "{}"}, "configuration"),
        ({"class_names": "3"}, "metadata"),
        ({"class_names": "[1, 2, 3, 4]"}, "metadata"),
        ({"class_names": '["one"]'}, "class names"),
        ({"class_names": None}, "metadata"),
    ],
    ids=str,
)
def test_native_metadata_that_is_invalid(changes, expected, tmp_path):
    path = tmp_path / "a.safetensors"
    save_native(detector(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() | changes
    metadata = {name: value for name, value in metadata.items() if value is not None}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    assert expected in message_of(path)


@pytest.mark.parametrize(
    "change", [{"decoder_layers": 10**9}, {"queries": 7}, {"heads": 5}, {"width": "16"}], ids=str
)
def test_native_configuration_is_checked_against_the_tensors(change, tmp_path):
    """A configuration of other sizes is rejected before a detector is built from it."""
    path = tmp_path / "a.safetensors"
    save_native(detector(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["config"] = json.dumps(json.loads(metadata["config"]) | change)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata)
    message_of(path)


# --- files that are no checkpoints --------------------------------------------------------------------------


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("where", ["top", "inside", "plain pickle", "legacy"])
def test_pickles_are_never_executed(where, tmp_path):
    victim, path = tmp_path / "executed", tmp_path / "a.pth"
    content = Malicious(victim) if where == "top" else {"model": original(), "args": Malicious(victim)}
    if where == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "legacy")
    message = message_of(path)
    assert not victim.exists()
    if where != "plain pickle":
        assert "rejected" in message and "mkdir" in message


def test_a_pickled_model_is_rejected(tmp_path):
    torch.save(detector(), tmp_path / "a.pth")
    assert "state dict" in message_of(tmp_path / "a.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.99])
def test_cut_off_files(kind, keep, tmp_path):
    path = tmp_path / "a.pth"
    if kind == "safetensors":
        save_native(detector(), path)
    else:
        torch.save(original(), path, _use_new_zipfile_serialization=kind == "zip")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    message = message_of(path)
    assert str(path) in message and "again" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 166618694\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "web page"),
        (b"\n <?xml version='1.0'?>", "web page"),
        (b"some notes\n", "text file"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "unpack"),
        (bytes(range(256)), "not a checkpoint"),
        (b"\x10\0\0\0\0\0\0\0{broken json   }", "damaged"),
        (b"\x80\x04nonsense", "damaged"),
        (b"PK\x03\x04 not really a zip", "damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_files_of_another_kind(content, expected, tmp_path):
    for name in ("a.pth", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        message = message_of(path)
        assert expected in message and str(path) in message


def test_a_zip_that_is_no_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("photo.txt", "hello")
    message_of(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "content", [[1, 2], {"epoch": 3}, {"model": {}}, torch.ones(3), {1: torch.ones(1)}], ids=str
)
def test_files_without_named_tensors(content, tmp_path):
    torch.save(content, tmp_path / "a.pth")
    assert "no named tensors" in message_of(tmp_path / "a.pth")


def test_paths_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(original(), tmp_path / "my-detector.pth")
    assert "my-detector.pth" in message_of(tmp_path / "my-detektor.pth")
    assert "my-detector.pth" in message_of("my_detector.pth")
    message = message_of("detr-resnet50")
    assert "did you mean" in message and all(name in message for name in ["scenes", *ORIGINALS])
    assert "URL" in message_of("https://example.org/detr.pth")
    message_of("no/such/folder/x.pth")
    message_of("owner/name.pth")  # a path, for its suffix, and not a repository
    message_of("")
    message_of("x" * 5000)
    message_of("nul\0")


def test_folders(tmp_path):
    assert "model.safetensors" in message_of(tmp_path)
    torch.save(original(), tmp_path / "epoch3.pth")
    assert "epoch3.pth" in message_of(tmp_path)
    torch.save(original(), tmp_path / "pytorch_model.bin")
    assert_same_weights(load(tmp_path), detector())
    save_native(detector(pre_norm=True), tmp_path / "model.safetensors", torch.float32)
    assert_same_weights(load(str(tmp_path)), detector(pre_norm=True))


def hugging_face(**changes):
    """A detector's tensors under Hugging Face's names, and its configuration."""
    tensors = detector(**changes).state_dict()
    return {HUGGING_FACE.name_of(name, ()): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_a_checkpoint_of_several_files_is_read_by_its_index(kind, tmp_path):
    tensors = hugging_face()
    stem, suffix = kind.split(".")
    shards = [f"{stem}-{number:05}-of-00002.{suffix}" for number in (1, 2)]
    places = {name: shards[number % 2] for number, name in enumerate(tensors)}
    write = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    for shard in shards:
        write({name: tensors[name] for name, place in places.items() if place == shard}, tmp_path / shard)
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / f"{kind}.index.json"

    def indexed(changes):
        index.write_text(json.dumps({"metadata": {}, "weight_map": places | changes}))

    indexed({})
    for source in (tmp_path, index):
        assert_same_weights(load(source), detector())
    assert f"one of 2 files of a checkpoint; give their folder, or {kind}.index.json" in message_of(
        tmp_path / shards[0]
    )
    first = next(iter(places))
    for elsewhere in ("../secret.bin", "/etc/passwd", "..", "a\\b.bin"):
        indexed({first: elsewhere})
        message = message_of(tmp_path)
        assert "outside its folder" in message and repr(elsewhere) in message
    indexed({first: "gone.bin"})
    assert "names 'gone.bin', which is missing" in message_of(tmp_path)
    indexed({first: places[list(places)[1]]})
    assert f"lacks {first}, which {kind}.index.json says it has" in message_of(tmp_path)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'):
        index.write_text(content)
        assert "has no weight_map" in message_of(tmp_path)
    index.write_text("[")
    assert "cannot be read as JSON" in message_of(tmp_path)


def test_names_of_both_layouts_and_back():
    names = [*detector().state_dict(), *detector(pre_norm=True, backbone=BOTTLENECK).state_dict()]
    assert {ORIGINAL.name_of(name, ()) for name in detector().state_dict()} == original().keys()
    newer = ("x.o_proj.weight", "x.mlp.fc1.weight", "model.backbone.model.x")
    for known in ((), ("x.out_proj.weight", "x.fc1.weight"), newer):
        for name in names:
            assert HUGGING_FACE.rename(HUGGING_FACE.name_of(name, known)) == name
    output = "encoder.layers.0.self_attention.output.weight"
    assert HUGGING_FACE.name_of(output, newer) == "model.encoder.layers.0.self_attn.o_proj.weight"
    expand = "decoder.layers.1.feedforward.expand.bias"
    assert HUGGING_FACE.name_of(expand, newer) == "model.decoder.layers.1.mlp.fc1.bias"
    assert HUGGING_FACE.name_of("backbone.conv1.weight", newer) == "model.backbone.model.conv1.weight"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes in its file system")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "regular file" in message_of(tmp_path / "pipe")


def test_names_come_before_files(tmp_path, monkeypatch):
    """A folder of results called `scenes` must not hide the bundled model."""
    monkeypatch.chdir(tmp_path)
    Path("scenes").mkdir()
    bundled = importlib.resources.files("headoff.scenes") / "weights" / "scenes.safetensors"
    if bundled.is_file():
        assert load("scenes").config.queries
    else:
        assert "bundled" in message_of("scenes")
    assert "folder" in message_of("./scenes")
    assert "folder" in message_of(Path("scenes"))


# --- tensors that do not fit --------------------------------------------------------------------------------


def saved_with(tmp_path, **changed):
    tensors = original()
    for name, tensor in changed.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    torch.save({"model": tensors}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"class_embed.weight": None}, "lacks class_embed.weight"),
        (
            {
                f"transformer.decoder.layers.1.multihead_attn.in_proj_{part}": None
                for part in ("weight", "bias")
            },
            "2 tensors are missing (transformer.decoder.layers.1.multihead_attn.in_proj_weight, "
            "transformer.decoder.layers.1.multihead_attn.in_proj_bias)",
        ),
        ({"bbox_embed.layers.2.bias": None}, "1 tensor is missing (bbox_embed.layers.2.bias)"),
        ({"class_embed.bias": None, "bbox_embed.layers.1.bias": None}, "2 tensors are missing"),
        ({"query_embed.weight": None}, "no DETR"),
        ({"backbone.0.body.layer2.0.conv1.weight": None}, "layer2.0.conv1"),
        ({"extra.weight": torch.ones(1)}, "1 tensor is unexpected (extra.weight)"),
        ({f"extra{i}": torch.ones(1) for i in range(9)}, "9 tensors are unexpected"),
        ({"class_embed.bias": torch.ones(7)}, "class_embed.bias has shape (7,) where (5,)"),
        ({"query_embed.weight": torch.ones(5)}, "dimensions"),
        ({"query_embed.weight": torch.ones(0, 16)}, "dimensions"),
        ({"class_embed.weight": torch.ones(0, 16)}, "dimensions"),
        (
            {"transformer.encoder.layers.0.self_attn.in_proj_weight": torch.ones(47, 16)},
            "query, key and value",
        ),
        ({"transformer.encoder.layers.0.self_attn.in_proj_bias": torch.tensor(1.0)}, "query, key and value"),
        (
            {"transformer.encoder.layers.0.self_attn.in_proj_bias": torch.ones(24)},
            "self_attn.in_proj_bias has shape",
        ),
        ({"input_projection.weight": torch.ones(1)}, "mixes layouts"),
        ({"class_embed.bias": torch.ones(5, dtype=torch.int8)}, "quantised"),
        ({"class_embed.bias": torch.full((5,), float("nan"))}, "class_embed.bias holds NaN"),
        (
            {"bbox_embed.layers.0.bias": torch.full((16,), float("-inf"))},
            "bbox_embed.layers.0.bias holds infinity",
        ),
        ({"backbone.0.body.layer1.0.conv1.weight": torch.ones(4, 2, 3, 3)}, "has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_tensors_that_do_not_fit(changed, expected, tmp_path):
    path = saved_with(tmp_path, **changed)
    message = message_of(path)
    assert expected in message and str(path) in message


def test_too_large_for_half_precision(tmp_path):
    path = saved_with(tmp_path, **{"class_embed.bias": torch.full((5,), 1e6)})
    assert "too large for torch.float16" in message_of(path, dtype=torch.float16)
    assert load(path).class_head.bias[0] == 1e6


@pytest.mark.parametrize(
    ("names", "architecture"),
    [
        (["transformer.encoder.layers.0.sampling_offsets.weight", "query_embed.weight"], "Deformable DETR"),
        (["transformer.decoder.layers.0.ca_qcontent_proj.weight", "query_embed.weight"], "Conditional DETR"),
        (["model.encoder.layers.0.self_attn.sampling_offsets.bias", "model.query_position_embeddings.weight"],
         "Deformable DETR"),
        (["conv1.weight", "layer1.0.conv1.weight", "fc.weight"], "ResNet classifier"),
        (["backbone.body.conv1.weight", "roi_heads.box_head.fc6.weight"], "Mask R-CNN"),
        (["backbone.1.row_embed.weight", "query_embed.weight"], "learned position embeddings"),
        (["query_position_embeddings.weight", "encoder.layers.0.fc1.weight"], "without its detection heads"),
        (["embeddings.word.weight"], "no DETR that headoff knows"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_other_architectures_are_named(names, architecture, tmp_path):
    safetensors.torch.save_file({name: torch.ones(1) for name in names}, tmp_path / "a.safetensors")
    message = message_of(tmp_path / "a.safetensors")
    assert architecture in message and names[0] in message


# --- configurations next to the weights ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config_json", "expected"),
    [
        ('{"model_type": "conditional_detr"}', "conditional_detr"),
        ('{"position_embedding_type": "learned"}', "learned"),
        ('{"activation_function": "gelu"}', "gelu"),
        ('{"encoder_attention_heads": 8, "decoder_attention_heads": 4}', "decoder_attention_heads"),
        ('{"encoder_attention_heads": "8", "decoder_attention_heads": "8"}', "not a whole number"),
        ('{"backbone_config": {"downsample_in_bottleneck": true}}', "downsample_in_bottleneck"),
        ("[1]", "JSON list"),
        ("{", "JSON"),
        ("", "JSON"),
    ],
)
def test_configurations_of_hugging_face_that_headoff_does_not_support(config_json, expected, tmp_path):
    safetensors.torch.save_file(
        {"model.query_position_embeddings.weight": torch.ones(5, 16)}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text(config_json)
    assert expected in message_of(tmp_path)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"size": 800, "max_size": 1333}, Preprocessing()),
        ({"size": {"shortest_edge": 480, "longest_edge": 640}}, Preprocessing(480, 640)),
        (
            {"image_mean": [0.5, 0.5, 0.5], "image_std": [1, 1, 1]},
            Preprocessing(mean=(0.5,) * 3, std=(1.0,) * 3),
        ),
        ({}, Preprocessing()),
        ({"size": {"height": 10, "width": 20}}, Preprocessing(size=(10, 20))),
        ({"size": {"longest_edge": 800}}, Preprocessing(800, 800)),
        ({"do_normalize": False}, Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3)),
        ({"do_rescale": False, "do_normalize": False}, Preprocessing(mean=(0.0,) * 3, std=(1 / 255,) * 3)),
        ({"resample": 3}, Preprocessing(resample="bicubic")),
        ({"resample": 9}, None),
        ({"do_resize": False}, None),
        ({"pad_size": {"height": 9, "width": 9}}, None),
        ({"size": {"height": 0, "width": 2}}, None),
        ({"size": "big"}, None),
        ({"image_std": [0, 1, 1]}, None),
        ({"image_mean": 3}, None),
    ],
    ids=str,
)
def test_preprocessor_configurations(values, expected):
    from headoff.detr.checkpoints.huggingface import preprocessing_from_config

    if expected is None:
        with pytest.raises(CheckpointError, match="preprocessor_config"):
            preprocessing_from_config(values)
    else:
        assert preprocessing_from_config(values) == expected


HEADS_ASSUMED = "8 heads assumed, for the file does not say how many: give heads= (--heads-per-layer)"
NOT_DILATED = (
    "a backbone not dilated (DC5) assumed, for the file does not say: give dilated= (--dc5 or --no-dc5)"
)


def test_what_the_file_does_not_say_is_said_to_be_assumed(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"model": original(heads=4)}, path)
    with pytest.warns(UserWarning) as warned:
        assert load(path).assumptions == (HEADS_ASSUMED, NOT_DILATED)
    assert [str(warning.message) for warning in warned] == [
        f"weights.pth: {assumption}" for assumption in (HEADS_ASSUMED, NOT_DILATED)
    ]
    assert load(path, heads=4, dilated=False).assumptions == ()


def test_what_the_file_says_is_not_assumed(tmp_path):
    torch.save(
        {"model": original(heads=4), "args": argparse.Namespace(nheads=4, dilation=False)}, tmp_path / "a.pth"
    )
    save_native(detector(heads=4), tmp_path / "native.safetensors")
    for path in (tmp_path / "a.pth", tmp_path / "native.safetensors"):
        found = load(path)
        assert found.assumptions == () and found.config.heads == 4


def test_published_sizes_and_names_need_no_assumption(tmp_path):
    sizes = dict(width=256, encoder_layers=6, decoder_layers=6, feedforward=2048)
    for name, expected in (("mine.pth", (NOT_DILATED,)), (ORIGINALS["detr-resnet-50"], ())):
        torch.save({"model": original(**sizes)}, tmp_path / name)
        assert load(tmp_path / name).assumptions == expected


def test_a_width_that_eight_heads_do_not_divide_asks_for_their_number(tmp_path):
    torch.save({"model": original(width=12, heads=3)}, tmp_path / "weights.pth")
    assert "give heads= (--heads-per-layer)" in message_of(tmp_path / "weights.pth")
    assert load(tmp_path / "weights.pth", heads=3).config.heads == 3


def test_class_names_and_size_of_images_can_be_given(tmp_path):
    torch.save({"model": original()}, tmp_path / "weights.pth")
    found = load(tmp_path / "weights.pth", class_names=["a", "b", "c", "d"], short_side=400)
    assert found.class_names == ("a", "b", "c", "d")
    assert (found.preprocessing.short_side, found.preprocessing.long_side) == (400, 666)
    assert "3 class names were given for a detector of 4" in message_of(
        tmp_path / "weights.pth", class_names=["a", "b", "c"]
    )


@pytest.mark.parametrize(
    "given, error, said",
    [
        ({"dtype": "float46"}, SettingError, "dtype 'float46' is not known"),
        ({"device": "meta"}, SettingError, "device 'meta' cannot be used here"),
        ({"source": None}, CheckpointError, "cannot be loaded from a NoneType"),
    ],
)
def test_arguments_that_cannot_be(given, error, said):
    with pytest.raises(error, match=said) as raised:
        load(**{"source": "scenes", **given})
    assert "\n" not in str(raised.value)


def test_a_dtype_by_name():
    assert load("scenes", dtype="float64").dtype == torch.float64
