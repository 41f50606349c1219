"""The detector: effects of gates at each site, decoding many configurations together, and batches of images.

Models are tiny and random, in float64 where results must be equal.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from headoff.ablation.kinds import attend_uniformly
from headoff.attention import sdpa
from headoff.detr import BackboneConfig, Detr, DetrConfig
from headoff.detr.detector import Features
from headoff.detr.positions import sine_positions
from headoff.detr.sharing import sharing_plan
from headoff.errors import CheckpointError, GateError, ImageError
from headoff.gates import (
    Gates,
    cumulative,
    first_off,
    none_off,
    parse_configuration,
    read_configurations,
    single_heads,
    stack,
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    ),
]
LAYERS, HEADS, QUERIES = 3, 4, 5
ROUNDING = {"rtol": 0, "atol": 1e-11}


def tiny_config(**changes):
    config = DetrConfig(
        backbone=BackboneConfig("basic", depths=(1, 1, 1), widths=(4, 8, 12), stem=4),
        width=16,
        heads=HEADS,
        encoder_layers=2,
        decoder_layers=LAYERS,
        feedforward=24,
        queries=QUERIES,
        classes=3,
    )
    return replace(config, **changes)


def tiny_detector(device="cpu", dtype=torch.float64, **changes):
    """Random weights, larger than those of an initialisation, so that every part affects the outputs."""
    torch.manual_seed(0)
    detector = Detr(tiny_config(**changes))
    with torch.no_grad():
        for name, value in detector.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif value.ndim > 1:
                value.normal_(0, 1.3 / value[0].numel() ** 0.5)
            else:
                value.add_(torch.randn_like(value), alpha=0.2)
    return detector.to(device, dtype).eval().requires_grad_(False)


def padded_batch(device="cpu"):
    """Two images of 64 x 96 pixels, the second one 40 x 70 and padding."""
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, 40:] = False
    mask[1, :, 70:] = False
    return (pixels * mask[:, None]).to(device), mask.to(device)


def random_gates(count, *, per_query=False, seed=2, values=(0.0, 0.5, 1.0)):
    """Gates whose configurations agree in many first layers, at both of the decoder's sites."""
    generator = torch.Generator().manual_seed(seed)
    rows = QUERIES if per_query else 1
    drawn = torch.tensor(values)[
        torch.randint(len(values), (2, count, LAYERS, rows, HEADS), generator=generator)
    ]
    for other in range(1, count):
        same = int(torch.randint(LAYERS + 1, (1,), generator=generator))
        like = int(torch.randint(other, (1,), generator=generator))
        drawn[:, other, :same] = drawn[:, like, :same]
    names = tuple(f"random {index}" for index in range(count))
    return Gates(names, decoder_self=drawn[0], decoder_cross=drawn[1])


def assert_same(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.logits, theirs.logits, **(tolerance or ROUNDING))
    torch.testing.assert_close(ours.boxes, theirs.boxes, **(tolerance or ROUNDING))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_shapes(device, pre_norm):
    detector = tiny_detector(device, pre_norm=pre_norm)
    memory = detector.encode(*padded_batch(device))
    assert memory.grid == (4, 6) and memory.tokens.shape == (2, 24, 16) and len(memory) == 2
    output = detector.decode(memory, stack(cumulative(HEADS), detector.head_layout))
    assert output.logits.shape == (HEADS + 1, 2, QUERIES, 4)
    assert output.boxes.shape == (HEADS + 1, 2, QUERIES, 4)
    assert output.boxes.min() >= 0 and output.boxes.max() <= 1


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("gate_value", [0.0, 0.25])
@pytest.mark.parametrize("site", ["encoder_self", "decoder_self", "decoder_cross"])
def test_gate_is_a_factor_on_the_output_projection(site, gate_value, pre_norm):
    """Switching a head off equals setting its columns of the output projection to zero."""
    detector = tiny_detector(pre_norm=pre_norm)
    pixels, mask = padded_batch()
    layer, head = 1, 2
    stack_of_site, attention = {
        "encoder_self": (detector.encoder, "self_attention"),
        "decoder_self": (detector.decoder, "self_attention"),
        "decoder_cross": (detector.decoder, "cross_attention"),
    }[site]
    gate = torch.ones(len(stack_of_site.layers), 1, HEADS)
    gate[layer, :, head] = gate_value
    before = detector(pixels, mask)
    if site == "encoder_self":
        gated = detector.decode(detector.encode(pixels, mask, gate=gate))
    else:
        gated = detector.decode(detector.encode(pixels, mask), Gates(("one",), **{site: gate[None]}))
    width = detector.config.width // HEADS
    stack_of_site.layers[layer].get_submodule(attention).output.weight[
        :, head * width : (head + 1) * width
    ] *= gate_value
    expected = detector(pixels, mask)
    assert (expected.logits - before.logits).abs().max() > 1e-3
    assert_same(gated, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("per_query", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
def test_many_configurations_at_once_equal_each_alone(device, per_query, pre_norm):
    """With shared layers, padding and two images; compared with one configuration and one image at a time."""
    detector = tiny_detector(device, pre_norm=pre_norm)
    memory = detector.encode(*padded_batch(device))
    for seed in range(2):
        gates = random_gates(8, per_query=per_query, seed=seed)
        together = detector.decode(memory, gates)
        for index in range(len(gates)):
            alone = detector.decode(memory, gates[index])
            for image in range(2):
                single = replace(
                    memory,
                    tokens=memory.tokens[image : image + 1],
                    positions=memory.positions[image : image + 1],
                    attn_mask=memory.attn_mask[image : image + 1],
                )
                single_alone = detector.decode(single, gates[index])
                torch.testing.assert_close(
                    together.logits[index, image], single_alone.logits[0, 0], **ROUNDING
                )
                torch.testing.assert_close(together.boxes[index, image], single_alone.boxes[0, 0], **ROUNDING)
            torch.testing.assert_close(together.logits[index], alone.logits[0], **ROUNDING)


def test_one_site_gated_leaves_the_other_on():
    detector = tiny_detector()
    memory = detector.encode(*padded_batch())
    gates = random_gates(6)
    ones = torch.ones(6, LAYERS, 1, HEADS)
    for site, other in (("decoder_self", "decoder_cross"), ("decoder_cross", "decoder_self")):
        alone = detector.decode(memory, Gates(gates.names, **{site: gates.site(site)}))
        beside_ones = detector.decode(memory, Gates(gates.names, **{site: gates.site(site), other: ones}))
        assert_same(alone, beside_ones)


def test_nothing_off_is_the_plain_model():
    detector = tiny_detector()
    memory = detector.encode(*padded_batch())
    plain = detector.decode(memory)
    assert plain.logits.shape[0] == 1
    for gates in (
        stack([none_off()], detector.head_layout),
        Gates(("on",), decoder_cross=torch.ones(1, LAYERS, 1, HEADS)),
    ):
        assert_same(detector.decode(memory, gates), plain, rtol=0, atol=0)


def test_gate_of_one_query_in_the_last_layer_leaves_the_others_alone():
    detector = tiny_detector()
    memory = detector.encode(*padded_batch())
    gate = torch.ones(1, LAYERS, QUERIES, HEADS)
    gate[0, -1, 3] = 0
    changed = detector.decode(memory, Gates(("L2 of query 3",), decoder_cross=gate)).logits
    difference = (changed - detector.decode(memory).logits).abs().amax((0, 1, 3))
    others = torch.arange(QUERIES) != 3
    assert difference[3] > 1e-3
    torch.testing.assert_close(difference[others], torch.zeros(QUERIES - 1).double(), **ROUNDING)


def test_everything_off_is_finite_and_blind():
    detector = tiny_detector()
    closed = torch.zeros(1, LAYERS, 1, HEADS)
    gates = Gates(("all off",), decoder_cross=closed)
    pixels, mask = padded_batch()
    seen = detector.decode(detector.encode(pixels, mask), gates)
    other = detector.decode(detector.encode(pixels.flip(-1), mask), gates)
    assert seen.logits.isfinite().all()
    assert_same(seen, other)


@pytest.mark.parametrize(
    "gates",
    [
        Gates(("too few layers",), decoder_cross=torch.ones(1, LAYERS - 1, 1, HEADS)),
        Gates(("too many layers",), decoder_self=torch.ones(1, LAYERS + 1, 1, HEADS)),
        Gates(("one head",), decoder_cross=torch.zeros(1, LAYERS, 1, 1)),
        Gates(("other queries",), decoder_cross=torch.zeros(1, LAYERS, QUERIES + 1, HEADS)),
    ],
    ids=lambda gates: gates.names[0],
)
def test_gates_of_another_layout_are_rejected(gates):
    detector = tiny_detector()
    with pytest.raises(GateError, match="shape"):
        detector.decode(detector.encode(*padded_batch()), gates)


@pytest.mark.parametrize("shape", [(1, 1, HEADS), (2, 1, 1), (2, 7, HEADS), (1, 2, 1, HEADS)], ids=str)
def test_encoder_gates_of_another_layout_are_rejected(shape):
    with pytest.raises(GateError, match="shape"):
        tiny_detector().encode(*padded_batch(), gate=torch.ones(shape))


def test_encoder_gates_are_refused_by_decode():
    detector = tiny_detector()
    gates = Gates(("encoder",), encoder_self=torch.zeros(1, 2, 1, HEADS))
    with pytest.raises(GateError, match="encode"):
        detector.decode(detector.encode(*padded_batch()), gates)


# --- sharing ------------------------------------------------------------------------------------------------


def test_sharing_follows_the_first_difference():
    """None off, L2H0 off and L2H1 off are one run up to the last layer."""
    gate = torch.ones(3, LAYERS, 1, HEADS)
    gate[1, 2, 0, 0] = 0
    gate[2, 2, 0, 1] = 0
    plan = sharing_plan(None, gate, LAYERS, 3)
    assert plan.runs == (1, 1, 3)
    assert sorted(plan.member.tolist()) == [0, 1, 2]
    assert [step.gate is None for step in plan.cross_attention] == [True, True, False]
    torch.testing.assert_close(plan.cross_attention[2].gate[plan.member], gate[:, 2])


def test_equal_configurations_are_one_run():
    gate = torch.rand(4, LAYERS, 1, HEADS)[[0, 1, 0, 1, 1]]
    plan = sharing_plan(gate, None, LAYERS, 5)
    assert plan.runs == (2,) * LAYERS
    assert plan.member[0] == plan.member[2] and plan.member[1] == plan.member[3] == plan.member[4]


def test_runs_that_differed_never_merge():
    """Runs that differ in layer 0 stay separate, even if later gates are equal."""
    gate = torch.ones(2, LAYERS, 1, HEADS)
    gate[1, 0] = 0
    plan = sharing_plan(None, gate, LAYERS, 2)
    assert plan.runs == (2,) * LAYERS and plan.cross_attention[1].gate is None


def test_sharing_of_the_single_head_sweep():
    """In layer l there is a run for every head of layers 0 to l, and one run without gates."""
    gates = stack([none_off(), *single_heads(LAYERS, HEADS)], tiny_detector().head_layout)
    plan = sharing_plan(gates.decoder_self, gates.decoder_cross, LAYERS, len(gates))
    assert plan.runs == tuple((layer + 1) * HEADS + 1 for layer in range(LAYERS))


@pytest.mark.parametrize("kind", ["zero", "uniform", "constant"])
@pytest.mark.parametrize("site", ["decoder_self", "decoder_cross"])
def test_runs_that_split_by_gates_alone_share_their_attention(site, kind):
    """Contexts that are gated after a split are those that are gated before it, in every configuration and image."""
    detector = tiny_detector()
    memory = detector.encode(*padded_batch())
    gate = torch.rand(7, LAYERS, QUERIES, HEADS).round(decimals=1)
    gate[0], gate[1, 1:], gate[2, 1:], gate[3:5, 0] = 1, 1, gate[1, 1:], 0.5
    gates = Gates(tuple(map(str, range(7))), **{site: gate})
    steps = detector.plan(gates)
    steps = steps.self_attention if site == "decoder_self" else steps.cross_attention
    assert any(step.shares_attention for step in steps)
    constants = torch.randn(1, HEADS, QUERIES, 4, dtype=torch.float64)
    replacement = {
        "zero": None,
        "uniform": attend_uniformly,
        "constant": lambda call: constants.repeat(1, 1, call.rows // QUERIES, 1),
    }[kind]
    with detector.replacing(replacement), torch.no_grad():
        shared = detector.decode(memory, gates)
        with detector.intercepting(lambda call, proceed: proceed(call)):
            separate = detector.decode(memory, gates)
        prepared = detector.decode(detector.prepare(memory), gates)
    for name in ("logits", "boxes"):
        torch.testing.assert_close(getattr(shared, name), getattr(separate, name), **ROUNDING)
        torch.testing.assert_close(getattr(prepared, name), getattr(shared, name), **ROUNDING)


def test_a_feed_forward_block_in_parts_is_the_whole(monkeypatch):
    block = tiny_detector().decoder.layers[0].feedforward
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    monkeypatch.setattr("headoff.detr.transformer.ROWS", 7)
    kept = x.clone()
    with torch.no_grad():
        parts = block(x)
    assert torch.equal(x, kept)
    torch.testing.assert_close(parts, block(x), **ROUNDING)
    seen = []
    with block.expand.register_forward_hook(lambda *call: seen.append(call[-1])), torch.no_grad():
        block(x)
    assert seen[0].shape == (2, 3, 5, 24) and seen[0].min() < 0  # whole, and before the ReLU


def test_shared_attention_computes_fewer_rows(monkeypatch):
    detector = tiny_detector()
    memory = detector.encode(*padded_batch())
    gates = stack([none_off(), *single_heads(LAYERS, HEADS)], detector.head_layout)
    seen = []

    def attend(query, *arguments):
        seen.append(query.shape[:-1].numel())
        return scaled_dot_product_attention(query, *arguments)

    monkeypatch.setitem(sdpa.__globals__, "scaled_dot_product_attention", attend)
    detector.decode(memory, gates)
    shared = sum(seen)
    seen.clear()
    with detector.intercepting(lambda call, proceed: proceed(call)):
        detector.decode(memory, gates)
    images_heads_queries = len(memory) * HEADS * QUERIES
    assert (
        sum(seen) - shared == images_heads_queries * LAYERS * HEADS
    )  # of cross-attention, a run less for each head


# --- images in a batch --------------------------------------------------------------------------------------


def test_images_of_one_size_do_not_see_each_other():
    detector = tiny_detector()
    pixels, _ = padded_batch()
    together = detector(pixels)
    for image in range(2):
        alone = detector(pixels[image : image + 1])
        torch.testing.assert_close(together.logits[:, image], alone.logits[:, 0], **ROUNDING)


def test_a_padded_image_does_not_see_its_neighbour():
    detector = tiny_detector()
    pixels, mask = padded_batch()
    alone = detector(pixels[1:], mask[1:])
    torch.testing.assert_close(detector(pixels, mask).logits[:, 1], alone.logits[:, 0], **ROUNDING)


def test_the_transformer_does_not_see_padding():
    """The values of padded tokens change neither positions nor memory nor boxes."""
    detector = tiny_detector()
    features = detector.features(padded_batch()[0][:1, :, :48, :64])  # 3 x 4 tokens
    grid = (5, 6)
    token_mask = torch.zeros(1, *grid, dtype=torch.bool)
    token_mask[:, :3, :4] = True
    inside = token_mask.flatten()
    positions = sine_positions(token_mask, detector.config.width, torch.float64)
    torch.testing.assert_close(positions[:, inside], features.positions, **ROUNDING)
    tokens = torch.full((1, 30, 16), 1e3, dtype=torch.float64)
    tokens[:, inside] = features.tokens
    padded = Features(tokens, positions, token_mask.flatten(1)[:, None, None], grid)
    memory, padded_memory = detector.encode_features(features), detector.encode_features(padded)
    torch.testing.assert_close(padded_memory.tokens[:, inside], memory.tokens, **ROUNDING)
    assert_same(detector.decode(padded_memory), detector.decode(memory))


def test_the_backbone_sees_padding_at_the_border_only():
    """A known inexactness of DETR: batch norm turns padding into values that convolutions mix into the image.

    So an image padded to the size of its batch is not quite the image alone. Tokens whose receptive field
    stays inside the image are the same.
    """
    backbone = tiny_detector().backbone
    torch.manual_seed(3)
    pixels = torch.randn(1, 3, 64, 256, dtype=torch.float64)
    alone = backbone(pixels)
    padded = backbone(nn.functional.pad(pixels, (0, 64)))[..., : alone.shape[-1]]
    difference = (alone - padded).abs().amax((0, 1, 2))
    assert difference[-1] > 1e-3
    torch.testing.assert_close(difference[:8], torch.zeros(8).double(), **ROUNDING)


def test_an_unpadded_batch_needs_no_mask():
    detector = tiny_detector()
    pixels, mask = padded_batch()
    assert detector.features(pixels, torch.ones_like(mask)).attn_mask is None
    assert_same(detector(pixels, torch.ones_like(mask)), detector(pixels), rtol=0, atol=0)


# --- numbers and attention ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 0.05), (torch.bfloat16, 0.4)], ids=str
)
def test_dtypes(device, dtype, tolerance):
    """Every dtype runs, is the dtype of the results, and agrees with float64."""
    exact = tiny_detector(device)
    detector = tiny_detector(device, dtype)
    gates = random_gates(4, per_query=True)
    pixels, mask = padded_batch(device)
    output = detector.decode(detector.encode(pixels, mask), gates)
    expected = exact.decode(exact.encode(pixels, mask), gates)
    assert output.logits.dtype == output.boxes.dtype == dtype
    torch.testing.assert_close(output.logits.double(), expected.logits, rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", DEVICES)
def test_attentions_agree(device):
    detector = tiny_detector(device)
    pixels, mask = padded_batch(device)
    gates = random_gates(4, per_query=True)
    outputs = []
    for name in ("eager", "sdpa"):
        detector.attention = name
        outputs.append(detector.decode(detector.encode(pixels, mask), gates))
    assert_same(*outputs)


def test_every_attention_goes_through_attend():
    detector = tiny_detector()
    calls = []

    def counting(call, proceed):
        calls.append(call.address)
        return proceed(call)

    with detector.intercepting(counting):
        detector(*padded_batch())
    expected = [("encoder_self", layer) for layer in range(2)]
    expected += [(site, layer) for layer in range(LAYERS) for site in ("decoder_self", "decoder_cross")]
    assert calls == expected


def test_an_attention_that_is_a_module_is_called_and_is_no_part_of_the_weights():
    class Kernel(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, query, key, value, attn_mask=None, *, head_gate=None):
            return query * self.weight

    detector = tiny_detector()
    names, before = set(detector.state_dict()), detector(*padded_batch()).logits
    detector.attention = Kernel()
    assert set(detector.state_dict()) == names
    assert (detector(*padded_batch()).logits - before).abs().max() > 1e-3
    built = Detr(tiny_config(), attention=Kernel())
    assert set(built.state_dict()) == names and isinstance(built.attention, Kernel)


def test_configurations_that_are_invalid():
    with pytest.raises(CheckpointError, match="5 heads"):
        tiny_config(heads=5)
    with pytest.raises(CheckpointError, match="2 class names"):
        Detr(tiny_config(), ["cat", "dog"])
    assert Detr(tiny_config()).class_names == ("class 0", "class 1", "class 2")
    with pytest.raises(CheckpointError, match="configuration"):
        DetrConfig.from_dict({"width": 256})
    config = tiny_config(pre_norm=True)
    assert DetrConfig.from_dict(config.as_dict()) == config


@pytest.fixture(scope="module")
def detector():
    return tiny_detector()


@pytest.fixture(scope="module")
def memory(detector):
    return detector.encode(*padded_batch())


class TestArguments:
    """What people give by mistake is answered by a typed error of one sentence, or accepted."""

    def test_decode_takes_configurations_and_their_texts(self, detector, memory):
        expected = detector.decode(memory, stack((none_off(), first_off(2)), detector.head_layout))
        found = detector.decode(memory, ["none", first_off(2)])
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.boxes, expected.boxes)
        alone = detector.decode(memory, "first 2")
        torch.testing.assert_close(alone.logits[0], expected.logits[1])

    def test_decode_of_nothing(self, detector, memory):
        with pytest.raises(GateError, match="there is no configuration: give at least one"):
            detector.decode(memory, [])

    @pytest.mark.parametrize(
        "pixels, mask, said",
        [
            (torch.zeros(3, 64, 64), None, r"pixel_values\[None\] for one image"),
            (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), None, "torch.uint8 of shape"),
            (torch.full((1, 3, 64, 64), math.nan), None, "hold NaN or infinity"),
            (torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 32, dtype=torch.bool), r"shape \(1, 64, 64\) was"),
            (torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 64), "the pixel mask is torch.float32"),
            (
                torch.zeros(1, 3, 64, 64),
                torch.zeros(1, 64, 64, dtype=torch.bool),
                "all of an image as padding",
            ),
        ],
    )
    def test_pixels_that_cannot_be_encoded(self, detector, pixels, mask, said):
        with pytest.raises(ImageError, match=said) as raised:
            detector.encode(pixels, mask)
        assert "\n" not in str(raised.value)

    def test_preprocess_takes_one_image_of_any_kind(self, detector, tmp_path):
        picture = Image.new("RGB", (40, 30), "red")
        picture.save(tmp_path / "red.png")
        expected, _ = detector.preprocess([picture])
        for image in (picture, tmp_path / "red.png", str(tmp_path / "red.png"), np.asarray(picture)):
            found, mask = detector.preprocess(image)
            assert torch.equal(found, expected) and mask.all()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda detector: detector.preprocess(None), ImageError, "NoneType"),
        (lambda detector: detector.preprocess(3), ImageError, "int"),
        (lambda detector: detector.encode(None), ImageError, "NoneType"),
        (lambda detector: detector.encode(np.zeros((1, 3, 8, 8), np.float32)), ImageError, "ndarray"),
        (lambda detector: detector.encode(torch.zeros(1, 3, 8, 8), [[True]]), ImageError, "list"),
        (lambda detector: read_configurations(3), GateError, "3 is no configuration"),
        (lambda detector: parse_configuration("object x: H0"), GateError, "an object number"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(call, error, words):
    with pytest.raises(error, match=words):
        call(tiny_detector())
