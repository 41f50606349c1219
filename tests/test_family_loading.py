"""Loading detectors of transformers: what is read, and what is rejected and how."""

import json
import pickle
import shutil
import socket
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from family_examples import CLASSES, KINDS, QUERIES, batch, folder_of, loaded
from PIL import Image

import headoff
from headoff.cli import main
from headoff.detr.checkpoints.huggingface import preprocessing_from_config
from headoff.errors import CheckpointError, SettingError
from headoff.family import FamilyDetector
from headoff.family.loading import OLDEST
from headoff.images import Preprocessing, preprocess

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*assumed")


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a saved model's folder, with changes to its config.json and its tensors."""

    def make(kind="rt_detr", config=(), tensors=None):
        folder = tmp_path / "copy"
        shutil.copytree(folder_of(kind), folder, dirs_exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(config)))
        if tensors is not None:
            weights = folder / "model.safetensors"
            changed = tensors(safetensors.torch.load_file(weights))
            safetensors.torch.save_file(changed, weights)
        return folder

    return make


def message_of(folder, error=CheckpointError, **how):
    with pytest.raises(error) as raised:
        headoff.load(folder, **how)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 700
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind):
    detector = loaded(kind, torch.float32)
    assert isinstance(detector, FamilyDetector)
    layout = detector.head_layout
    is_vit = kind in ("lw_detr", "rf_detr")
    assert (layout.decoder_layers, layout.queries) == (3, QUERIES)
    assert layout.encoder_layers == (0 if is_vit else 2)
    assert (layout.heads, layout.heads_at("decoder_self")) == ((8, 4) if is_vit else (4, 4))
    assert detector.class_names == tuple(f"LABEL_{index}" for index in range(CLASSES))
    assert not detector.training and not any(p.requires_grad for p in detector.parameters())


def test_a_usual_table_transformer_is_headoffs_own_detr(copy_of):
    folder = copy_of("table-transformer", {"activation_function": "relu"})
    own = headoff.load(folder)
    assert isinstance(own, headoff.Detr)
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder).eval()
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        theirs, ours = model(pixels), own(pixels)
    torch.testing.assert_close(ours.logits[0], theirs.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.boxes[0], theirs.pred_boxes, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_device_dtype_and_options(attention):
    detector = headoff.load(
        folder_of("rt_detr"),
        attention=attention,
        dtype="float64",
        class_names=list("abcde"),
        short_side=320,
    )
    assert detector.dtype == torch.float64 and detector.class_names == tuple("abcde")
    assert detector.preprocessing.size == (320, 320) and detector.preprocessing.short_side == 320


def test_nothing_is_downloaded_and_nothing_printed(copy_of, monkeypatch, capfd):
    def connect(*args, **kwargs):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    elsewhere = {"_attn_implementation": "someone/kernels", "auto_map": {"AutoModel": "someone/code--m.C"}}
    headoff.load(copy_of(config=elsewhere))
    assert capfd.readouterr() == ("", "")
    assert before == (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())


def test_backbones_of_timm(tmp_path, monkeypatch):
    """As in older config.json of published checkpoints: the backbone by name, with and without arguments."""
    pytest.importorskip("timm")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("the network was used"))
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 4, "num_labels": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 8}
    config = transformers.ConditionalDetrConfig(backbone="resnet18", **sizes, **heads, decoder_ffn_dim=8)
    model = transformers.ConditionalDetrForObjectDetection(config).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["backbone_config"]
    named = {"backbone": "resnet18", "use_timm_backbone": True, "use_pretrained_backbone": True}
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(pixels).logits
        for how in (None, {"out_indices": [1, 2, 3, 4], "in_chans": 3}):
            path.write_text(json.dumps({**values, **named, "backbone_kwargs": how}))
            found = headoff.load(tmp_path)(pixels).logits[0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    path.write_text(json.dumps({**values, **named, "use_timm_backbone": False, "backbone": "someone/resnet"}))
    assert "'someone/resnet' of another repository" in message_of(tmp_path)


# --- files of older versions --------------------------------------------------------------------------------------

OLD_NAMES = {
    "conditional_detr": (
        "backbone.conv_encoder.",
        "decoder.layers.0.sa_qcontent_proj.",
        "encoder_attn.out_proj.",
    ),
    "dab-detr": ("backbone.conv_encoder.", "cross_attn.cross_attn_query_pos_sine_proj."),
    "table-transformer": ("backbone.conv_encoder.", "self_attn.out_proj.", "layers.0.fc1."),
    "deformable_detr": ("backbone.conv_encoder.", "self_attn.out_proj.", "layers.0.fc1."),
    "rt_detr": ("encoder.encoder.0.layers.0.fc1.", "decoder.layers.0.fc1.", "self_attn.out_proj."),
    "rt_detr_v2": ("encoder.encoder.0.layers.0.fc1.", "decoder.layers.0.fc1.", "self_attn.out_proj."),
    "d_fine": ("encoder.encoder.0.layers.0.fc1.", "decoder.layers.0.fc1.", "self_attn.out_proj."),
    "lw_detr": ("attention.attention.query.", "attention.output."),
    "rf_detr": ("transformer.decoder.layers.0.linear1.", "self_attn.in_proj_weight", "refpoint_embed.weight"),
}
"""Parts of names as published files have them, which are not those of modules where these were renamed since."""


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_the_files_that_these_tests_load_have_the_names_of_published_files(kind):
    """transformers writes the names that the first version of a type had; so all other tests read such files."""
    names = safetensors.torch.load_file(folder_of(kind) / "model.safetensors")
    for part in OLD_NAMES[kind]:
        assert any(part in name for name in names), part


@torch.no_grad()
def same_output(kind, folder):
    pixels, mask = batch(torch.float32)
    expected, found = loaded(kind, torch.float32)(pixels, mask), headoff.load(folder)(pixels, mask)
    return torch.equal(expected.logits, found.logits) and torch.equal(expected.boxes, found.boxes)


def with_both_names(tensors):
    """As `torch.save` of transformers 4 writes it: heads under the decoder's name and the model's."""
    heads = {n.removeprefix("model.decoder."): t.clone() for n, t in tensors.items() if "decoder.class" in n}
    heads |= {n.removeprefix("model.decoder."): t.clone() for n, t in tensors.items() if "decoder.bbox" in n}
    assert heads
    counts = {"model.backbone.model.layer2.0.downsample.1.num_batches_tracked": torch.tensor(7)}
    return {**tensors, **heads, **counts}


@pytest.mark.parametrize("kind", ["rt_detr", "rt_detr_v2", "d_fine", "deformable_detr two-stage"])
def test_heads_under_two_names(kind, copy_of):
    assert same_output(kind, copy_of(kind, tensors=with_both_names))


def test_heads_that_differ_under_two_names_are_unexpected(copy_of):
    def change(tensors):
        tensors = with_both_names(tensors)
        tensors["class_embed.1.bias"] += 1
        return tensors

    assert "1 tensor is unexpected (class_embed.1.bias)" in message_of(copy_of("rt_detr", tensors=change))


@pytest.mark.parametrize(
    "there",
    [("bbox_predictor.",), ("model.decoder.bbox_embed.",), ("bbox_predictor.", "model.decoder.bbox_embed.")],
)
def test_the_box_head_of_dab_detr_has_either_name(there, copy_of):
    """Published files have the decoder's, with which some versions of transformers load nothing, and do not say so."""

    def rename(tensors):
        head = {n.split("layers")[-1]: t for n, t in tensors.items() if "bbox_" in n}
        rest = {n: t for n, t in tensors.items() if "bbox_" not in n}
        return rest | {f"{name}layers{end}": t.clone() for end, t in head.items() for name in there}

    assert same_output("dab-detr", copy_of("dab-detr", tensors=rename))


def test_a_dilation_of_null(copy_of):
    """As transformers 4 writes it for a backbone that is described, and 5.9 rejects it."""
    assert same_output("table-transformer", copy_of("table-transformer", {"dilation": None}))


# --- preprocessing -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("RTDetr", {}),
        ("RTDetr", {"size": {"height": 80, "width": 112}, "do_normalize": True, "resample": 3}),
        ("RTDetr", {"rescale_factor": 1 / 128}),
        ("RTDetr", {"do_rescale": False}),
        ("DeformableDetr", {"size": {"shortest_edge": 80, "longest_edge": 133}}),
        ("ConditionalDetr", {"size": {"shortest_edge": 96, "longest_edge": 100}}),
    ],
    ids=str,
)
def test_pixels_are_those_of_the_image_processor(name, values, tmp_path):
    processor = getattr(transformers, f"{name}ImageProcessorPil")(**values)
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    kind = "rt_detr" if name == "RTDetr" else "deformable_detr"
    default = loaded(kind, torch.float32).adapter.preprocessing(loaded(kind, torch.float32).model.config)
    for given in (stored, values):  # a file may say only what differs
        ours = preprocessing_from_config(given, default)
        for height, width in ((60, 90), (91, 57), (50, 230)):
            picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), "uint8"))
            expected = torch.as_tensor(np.array(processor(images=picture)["pixel_values"]))
            found, _ = preprocess(picture, ours)
            scale = expected.abs().max()
            torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6 * float(scale))


def test_a_missing_processor_is_assumed_and_said_to_be():
    with pytest.warns(UserWarning, match="640 x 640 pixels\\) assumed, for there is no preprocessor_config"):
        detector = headoff.load(folder_of("rt_detr"))
    assert detector.preprocessing == Preprocessing(
        size=(640, 640), mean=(0, 0, 0), std=(1, 1, 1), rounding="transformers"
    )
    with pytest.warns(UserWarning, match="a short side of 800 pixels"):
        headoff.load(folder_of("deformable_detr"))


def test_a_processor_is_read(copy_of):
    folder = copy_of()
    transformers.RTDetrImageProcessorPil(size={"height": 64, "width": 96}).save_pretrained(folder)
    detector = headoff.load(folder)
    assert detector.preprocessing.size == (64, 96) and not detector.assumptions


# --- what is rejected --------------------------------------------------------------------------------------------


def test_unknown_types_name_similar_ones(copy_of):
    assert "'rt_detr_v3' (did you mean 'rt_detr_v2'?)" in message_of(
        copy_of(config={"model_type": "rt_detr_v3"})
    )
    assert "grounding-dino" in message_of(copy_of(config={"model_type": "grounding-dino"}))


@pytest.mark.parametrize("name", ["RTDetrModel", "RTDetrForSemanticSegmentation"])
def test_a_member_of_the_family_that_is_not_a_detector(name, copy_of):
    message = message_of(copy_of(config={"architectures": [name]}))
    assert name in message and "not a detector" in message and "RTDetrForObjectDetection" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: {n: v for n, v in t.items() if "sampling_offsets" not in n}, "missing"),
        (
            lambda t: {**t, "model.surplus.weight": torch.ones(2)},
            "1 tensor is unexpected (model.surplus.weight)",
        ),
        (
            lambda t: {n: v[:-1] if n.endswith("enc_score_head.bias") else v for n, v in t.items()},
            "another shape",
        ),
        (lambda t: {n: v * torch.nan if "enc_output" in n else v for n, v in t.items()}, "holds NaN"),
        (lambda t: {**t, "model.enc_score_head.bias": torch.ones(CLASSES, dtype=torch.int8)}, "quantised"),
    ],
    ids=["missing", "unexpected", "shape", "nan", "quantised"],
)
def test_tensors_that_do_not_fit(change, expected, copy_of):
    assert expected in message_of(copy_of(tensors=change))


def test_configurations_that_do_not_fit(copy_of):
    assert "config.json cannot be used" in message_of(
        copy_of(config={"backbone_config": {"model_type": "no"}})
    )
    assert "quantised" in message_of(copy_of(config={"quantization_config": {"quant_method": "bnb"}}))
    assert "tensors are" in message_of(copy_of(config={"d_model": 16}))
    assert "6 class names" in message_of(copy_of(), class_names=list("abcdef"))


def test_files_that_are_damaged_or_want_to_run_code(copy_of):
    folder = copy_of()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5000])
    assert "damaged or cut off" in message_of(folder)
    weights.unlink()

    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weights": Evil()}))
    assert "pytorch_model.bin" in message_of(folder)


def test_options_of_other_files_do_not_apply():
    for how in ({"heads": 8}, {"dilated": True}, {"dilated": False}):
        assert "leave them out" in message_of(folder_of("rt_detr"), SettingError, **how)


def test_transformers_is_an_extra(monkeypatch):
    for found, expected in (
        ("5.1.0", f"need transformers {OLDEST} or newer, and 5.1.0 is installed"),
        ("4.57", OLDEST),
    ):
        monkeypatch.setattr(sys.modules["transformers"], "__version__", found)
        assert expected in message_of(folder_of("rt_detr"))
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'headoff[family]'" in message_of(folder_of("rt_detr"))


def test_the_oldest_transformers_is_that_of_the_extra():
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"transformers>={OLDEST}" in extras["family"]
    assert f"transformers=={OLDEST}.0" in (root / "tox.ini").read_text()


# --- on the command line -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments", "expected"),
    [
        (
            "lw_detr",
            ["sweep", "--site", "encoder_self"],
            "encoder_self, where this detector has no attention",
        ),
        ("lw_detr", ["heads", "--site", "encoder_self"], "use decoder_self or decoder_cross"),
        (
            "lw_detr",
            ["sweep", "--off", "encoder_self H1"],
            "encoder_self, where this detector has no attention",
        ),
        ("lw_detr", ["sweep", "--off", "L3H1"], "goes from layer 0 to layer 2"),
        ("lw_detr", ["sweep", "--off", "decoder_self H4"], "goes from head 0 to head 3"),
        ("rt_detr", ["detect", "--heads-per-layer", "4"], "leave them out"),
    ],
)
def test_one_sentence_and_exit_code_2(kind, arguments, expected, tmp_path, capsys):
    out = [] if arguments[0] == "detect" else ["--out", str(tmp_path / "out")]
    model = ["--model", str(folder_of(kind)), "--short-side", "64"]
    assert main([*arguments, *model, *out]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("headoff: error: ") and expected in message
    assert not (tmp_path / "out").exists()


def test_sets_of_configurations_have_the_heads_of_the_site(tmp_path, capsys):
    model = ["--model", str(folder_of("lw_detr")), "--short-side", "64", "--figures", "none"]
    for site, count in (("decoder_self", 5), ("decoder_cross", 9)):
        assert main(["sweep", *model, "--site", site, "--out", str(tmp_path / site)]) == 0
        assert len(json.loads((tmp_path / site / "sweep.json").read_text())["configurations"]) == count


@pytest.mark.parametrize("kind", ["conditional_detr", "dab-detr", "rt_detr"])
def test_a_detector_goes_to_other_processes(kind):
    """It pickles, and the copy is made of modules of its own."""
    detector = loaded(kind)
    copied = pickle.loads(pickle.dumps(detector))
    pixels, _ = detector.preprocess([headoff.sample_image(0)])
    with torch.inference_mode():
        one, other = (x.decode(x.encode(pixels), ["none", "H0"]) for x in (detector, copied))
    assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)
    assert copied.model is not detector.model and not copied.training
