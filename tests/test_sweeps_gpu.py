"""The sweep on a GPU: no waiting for the device, one copy to it, CUDA graphs, and mixed precision.

These tests need no GPU. Tensors on torch's `meta` device have no values, so reading a value, for which the host would
wait, is an error there. A CUDA graph is simulated by recording operators and calling them again on the same tensors.
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import headoff
from headoff.attention import eager
from headoff.cli import main
from headoff.detr import Detr, DetrConfig
from headoff.detr.config import BackboneConfig
from headoff.detr.detector import Memory
from headoff.detr.graphs import MOST_GRAPHS, DecodeGraphs
from headoff.detr.transfers import copy_to_device
from headoff.effects import effect_on_detections, effect_on_maps
from headoff.errors import GateError, SettingError
from headoff.gates import stack
from headoff.images import Preprocessing
from headoff.sweeps import decode_all, sweep

CUDA = torch.cuda.is_available()
SMALL = DetrConfig(
    backbone=BackboneConfig(block="basic", depths=(1, 1), widths=(8, 8), stem=8),
    width=16,
    heads=4,
    encoder_layers=2,
    decoder_layers=3,
    feedforward=32,
    queries=5,
    classes=3,
    preprocessing=Preprocessing(short_side=48, long_side=96),
)
TEXTS = [
    "none",
    "first 1",
    "first 3",
    "L2H1",
    "query 2: L1H0",
    "decoder_self L0-2H2=0.5",
    "encoder_self L0H1; H2",
]


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    small = Detr(SMALL, ["cat", "dog", "owl"]).eval().requires_grad_(False)
    small.class_head.weight *= 8
    return small


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def gates_of(detector, texts):
    return stack([headoff.parse_configuration(text) for text in texts], detector.head_layout)


def memory_of(detector, seed=0, height=48):
    generator = torch.Generator().manual_seed(seed)
    with torch.inference_mode():
        return detector.encode(torch.randn(1, 3, height, 64, generator=generator))


# --- nothing is read back -----------------------------------------------------------------------------------


class Transfers(TorchDispatchMode):
    """Records copies between the host and another device."""

    def __init__(self):
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {
                tensor.device.type
                for tensor in tree_leaves((args, result))
                if isinstance(tensor, torch.Tensor)
            }
            if len(devices) > 1:
                self.sizes.append(result.numel())
        return result


@pytest.fixture
def away(detector):
    """The same detector on a device whose values cannot be read."""
    return Detr(SMALL).eval().requires_grad_(False).to("meta")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("memory_budget", [1, 2**30], ids=["one by one", "together"])
def test_a_sweep_reads_nothing_back_before_its_answers(away, attention, memory_budget):
    away.attention = attention
    with torch.inference_mode():
        features = away.features(torch.zeros(1, 3, 48, 64))
        output = decode_all(away, features, gates_of(away, TEXTS), memory_budget=memory_budget)
    assert output.logits.device.type == output.boxes.device.type == "meta"
    assert output.logits.shape == (len(TEXTS), 1, SMALL.queries, SMALL.classes + 1)


def test_a_read_would_be_noticed(away):
    """What the test above relies on."""
    for read in (lambda x: x.cpu(), lambda x: x.item(), lambda x: bool(x), lambda x: x.tolist()):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read(away.class_head.bias[0])


def test_gates_and_indices_go_over_once(away):
    memory = Memory(
        torch.zeros(1, 12, SMALL.width, device="meta"),
        torch.zeros(1, 12, SMALL.width, device="meta"),
        None,
        (3, 4),
    )
    gates = gates_of(away, TEXTS[:-1])
    with torch.no_grad(), Transfers() as seen:
        away.decode(memory, gates)
    assert len(seen.sizes) == 2, "one copy of the gates, one of the indices"
    plan = away.plan(gates)
    with torch.no_grad(), Transfers() as seen:
        away.decode(memory, plan)
    assert seen.sizes == []


def test_a_plan_is_a_decode_of_its_gates(detector):
    memory, gates = memory_of(detector), gates_of(detector, TEXTS[:-1])
    with torch.inference_mode():
        one, other = detector.decode(memory, gates), detector.decode(memory, detector.plan(gates))
    assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)


def test_tensors_sent_together_keep_shapes_values_and_places():
    """To the dtype's neighbour, for lack of another device: on the same one nothing is copied."""
    tensors = [torch.arange(6).view(2, 3), torch.rand(()), torch.empty(0, 4), torch.rand(3).double()]
    assert all(a is b for a, b in zip(copy_to_device(tensors, torch.device("cpu")), tensors, strict=True))
    there = copy_to_device(tensors, torch.device("meta"))
    assert [(tensor.shape, tensor.dtype) for tensor in there] == [
        (tensor.shape, tensor.dtype) for tensor in tensors
    ]
    (cast,) = copy_to_device([tensors[3]], torch.device("cpu"), torch.float32)
    assert torch.equal(cast, tensors[3].float())


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device here")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "triton"])
def test_a_sweep_on_cuda_waits_for_nothing(attention):
    there = Detr(SMALL, attention=attention).eval().requires_grad_(False).cuda()
    pixels = torch.zeros(1, 3, 48, 64, device="cuda")
    gates = gates_of(there, TEXTS)
    with torch.inference_mode():
        decode_all(there, there.features(pixels), gates)  # libraries are loaded, workspace is taken
        torch.cuda.synchronize()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            decode_all(there, there.features(pixels), gates)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device here")
def test_the_sweep_on_cuda_is_that_of_the_cpu(detector, image):
    here = sweep(detector, image, TEXTS, confidence=0.2)
    there = sweep(Detr(SMALL).eval().cuda(), image, TEXTS[:1])
    assert there.logits.device.type == "cpu"
    moved = Detr(SMALL, ["cat", "dog", "owl"]).eval().requires_grad_(False)
    moved.load_state_dict(detector.state_dict())
    there = sweep(moved.cuda(), image, TEXTS, confidence=0.2)
    torch.testing.assert_close(there.logits, here.logits, rtol=1e-3, atol=1e-3)


# --- graphs -------------------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """A CUDA graph simulated on a CPU: operators that were called, and are called again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.replays = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def wait_stream(self, other):
        pass


class FakeCuda:
    """The part of `torch.cuda` that graphs need. `failing` makes captures fail."""

    CUDAGraph = Tape
    Stream = Stream

    def __init__(self, failing=False):
        self.failing = failing
        self.captures = []
        self.devices = []
        self.streams = [Stream()]

    def current_stream(self):
        return self.streams[-1]

    @contextmanager
    def device(self, device):
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()

    @contextmanager
    def stream(self, stream):
        before = list(self.streams)
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams = before

    @contextmanager
    def graph(self, tape, stream):
        assert self.devices, "a capture is of a stream of the detector's device"
        self.streams.append(stream)
        if self.failing:  # as torch's, which does not leave its stream then
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.captures.append(tape)
        with tape:
            yield
        self.streams.pop()


def graphs_here(failing=False):
    cuda = FakeCuda(failing)
    return DecodeGraphs(cuda, device_type="cpu"), cuda


def assert_same(one, other):
    assert torch.equal(one.logits, other.logits) and torch.equal(one.boxes, other.boxes)


@pytest.fixture
def plain(detector):
    """`eager`, as `sdpa` on a CPU reads gates to skip heads, which both do not do on a GPU."""
    detector.attention = "eager"
    yield detector
    detector.attention = "sdpa"


def test_replays_are_decodes(plain):
    graphs, cuda = graphs_here()
    gates = gates_of(plain, TEXTS[:-1])
    memories = [memory_of(plain, seed) for seed in range(5)]
    found = [graphs.decode(plain, memory, gates) for memory in memories]
    with torch.inference_mode():
        for output, memory in zip(found, memories, strict=True):
            assert_same(output, plain.decode(memory, gates))
    assert graphs.replays == 4 and len(cuda.captures) == 1


def test_weights_changed_in_place_are_those_of_the_next_replay(plain):
    graphs, cuda = graphs_here()
    memory, gates = memory_of(plain), gates_of(plain, ["first 2"])
    for _ in range(2):
        before = graphs.decode(plain, memory, gates)
    weight = plain.decoder.layers[0].feedforward.expand.weight
    saved = weight.clone()
    try:
        weight.mul_(0.5)
        after = graphs.decode(plain, memory, gates)
        with torch.inference_mode():
            assert_same(after, plain.decode(memory, gates))
    finally:
        weight.copy_(saved)
    assert not torch.equal(before.logits, after.logits) and len(cuda.captures) == 1


def test_other_gates_sizes_weights_and_attentions_are_other_decodes(plain):
    graphs, cuda = graphs_here()
    other = Detr(SMALL, attention="eager").eval().requires_grad_(False)
    cases = [
        (plain, memory_of(plain), gates_of(plain, ["first 2"])),
        (plain, memory_of(plain), gates_of(plain, ["first 3"])),
        (plain, memory_of(plain, height=32), gates_of(plain, ["first 2"])),
        (other, memory_of(other), gates_of(other, ["first 2"])),
    ]
    for _ in range(3):
        for case in cases:
            with torch.inference_mode():
                assert_same(graphs.decode(*case), case[0].decode(*case[1:]))
    assert len(cuda.captures) == len(cases) == MOST_GRAPHS


def test_the_least_used_graph_makes_room(plain):
    graphs, cuda = graphs_here()
    memory = memory_of(plain)
    gates = [gates_of(plain, [f"L{layer}H{head}"]) for layer in range(2) for head in range(3)]
    for _ in range(3):
        for gate in gates:
            with torch.inference_mode():
                assert_same(graphs.decode(plain, memory, gate), plain.decode(memory, gate))
    assert len(gates) > MOST_GRAPHS and len(cuda.captures) > len(gates)
    assert len(graphs._graphs) == MOST_GRAPHS


def test_where_a_capture_fails_decodes_go_on(plain):
    graphs, cuda = graphs_here(failing=True)
    memory, gates = memory_of(plain), gates_of(plain, ["first 2"])
    for _ in range(3):
        with torch.inference_mode():
            assert_same(graphs.decode(plain, memory, gates), plain.decode(memory, gates))
    assert graphs.replays == 0
    assert graphs.failures == ["RuntimeError: CUDA error: operation not permitted when stream is capturing"]
    assert len(cuda.streams) == 1 and not cuda.devices, "and stream and device are those of before"


def test_what_is_not_captured(plain):
    """Padding, a patch that may do anything, an overridden `attend`, autocast, another device."""
    graphs, cuda = graphs_here()
    memory, gates = memory_of(plain), gates_of(plain, ["first 2"])
    padded = Memory(
        memory.tokens, memory.positions, torch.ones(1, 1, 1, len(memory.tokens[0])).bool(), memory.grid
    )
    calls = []

    def counting(query, key, value, attn_mask=None, *, head_gate=None):
        calls.append(query.shape)
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    class Overridden(Detr):
        def attend(self, call):
            calls.append(call.address)
            return super().attend(call)

    overridden = Overridden(SMALL, attention="eager").eval().requires_grad_(False)
    for _ in range(3):
        graphs.decode(plain, padded, gates)
        graphs.decode(overridden, memory, gates)
        with plain.autocasting(torch.bfloat16):
            graphs.decode(plain, memory, gates)
        plain.attention = counting
        graphs.decode(plain, memory, gates)
        plain.attention = "eager"
    elsewhere = DecodeGraphs(FakeCuda())
    for _ in range(3):
        elsewhere.decode(plain, memory, gates)
    assert not cuda.captures and graphs.replays == elsewhere.replays == 0
    assert len(calls) == 3 * 2 * 2 * SMALL.decoder_layers


def test_errors_are_those_of_a_decode(plain):
    graphs, _ = graphs_here()
    for _ in range(3):
        with pytest.raises(GateError, match="encoder_self"):
            graphs.decode(plain, memory_of(plain), gates_of(plain, ["encoder_self L0"]))


def test_a_sweep_over_images_with_graphs(plain, image):
    graphs, cuda = graphs_here()
    for flipped in (image, image[::-1].copy(), image[:, ::-1].copy()):
        with_graphs = sweep(plain, flipped, TEXTS, graphs=graphs)
        alone = sweep(plain, flipped, TEXTS)
        assert torch.equal(with_graphs.logits, alone.logits) and torch.equal(with_graphs.boxes, alone.boxes)
    # The gated encoder makes a second batch, which is a decode of its own.
    assert len(cuda.captures) == 2 and graphs.replays == 4


@pytest.mark.skipif(not CUDA, reason="there is no CUDA device here")
@pytest.mark.parametrize("attention", ["sdpa", "eager", "triton"])
@pytest.mark.parametrize(
    "device",
    [
        "cuda:0",
        pytest.param(
            "cuda:1",
            marks=pytest.mark.skipif(
                torch.cuda.device_count() < 2, reason="there is no second CUDA device here"
            ),
        ),
    ],
)
def test_graphs_on_cuda(device, attention):
    torch.manual_seed(0)
    there = Detr(SMALL, attention=attention).eval().requires_grad_(False).to(device)
    graphs, gates = DecodeGraphs(), gates_of(there, TEXTS[:-1])
    with torch.inference_mode():
        for seed in range(4):
            memory = there.encode(torch.randn(1, 3, 48, 64, generator=torch.Generator().manual_seed(seed)))
            found, expected = graphs.decode(there, memory, gates), there.decode(memory, gates)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-5, atol=1e-5)
    assert graphs.replays == 3 and not graphs.failures


# --- mixed precision ----------------------------------------------------------------------------------------


def test_under_autocast_attention_is_given_bfloat16_and_the_rest_stays(detector, image):
    given, gates = [], []

    def noting(query, key, value, attn_mask=None, *, head_gate=None):
        given.extend((query.dtype, key.dtype, value.dtype))
        gates.append(head_gate)
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    detector.attention = noting
    try:
        result = sweep(detector, image, TEXTS, autocast=torch.bfloat16)
        assert set(given) == {torch.bfloat16} and any(gate is not None for gate in gates)
        given.clear()
        sweep(detector, image, TEXTS)
        assert set(given) == {torch.float32}, "and it is off again"
    finally:
        detector.attention = "sdpa"
    assert result.logits.dtype == result.boxes.dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_autocast_is_near_full_precision_and_not_equal_to_it(detector, image, attention):
    detector.attention = attention
    full, half = (sweep(detector, image, TEXTS, autocast=dtype) for dtype in (None, torch.bfloat16))
    detector.attention = "sdpa"
    double = Detr(SMALL).double().eval()
    double.load_state_dict(detector.state_dict())
    truth = sweep(double, image, TEXTS)
    error = (half.logits.double() - truth.logits).abs().amax() / truth.logits.abs().amax()
    single = (full.logits.double() - truth.logits).abs().amax() / truth.logits.abs().amax()
    # A dozen layers of sums whose terms are each rounded to 8 bits; float32 rounds to 24.
    assert 16 * single < error < 16 * torch.finfo(torch.bfloat16).eps


def test_autocast_ends_with_an_error_too(detector, image):
    with pytest.raises(ZeroDivisionError), detector.autocasting(torch.bfloat16):
        assert detector.autocast_dtype == torch.bfloat16
        raise ZeroDivisionError
    assert detector.autocast_dtype is None and not torch.is_autocast_enabled("cpu")


def test_an_invalid_autocast(detector, image):
    with pytest.raises(SettingError, match=r"torch.int8: use torch.bfloat16"):
        sweep(detector, image, autocast=torch.int8)
    with pytest.raises(SettingError, match="float64: load it in float32"):
        sweep(Detr(SMALL).double().eval(), image, autocast=torch.bfloat16)


def test_relevance_under_autocast_is_float32_of_what_was_captured(detector, image):
    queries = [0, 3]
    full = headoff.explain(detector, image, ["none", "first 2"], queries)
    with detector.autocasting(torch.bfloat16):
        half = headoff.explain(detector, image, ["none", "first 2"], queries)
    assert half.maps.dtype == torch.float32
    # Rules in bfloat16 would leave no more than 8 bits in any number.
    some = half.maps[half.maps > 0]
    assert not torch.equal(some, some.bfloat16().float())
    effect = effect_on_maps(full, half)
    assert effect.compared + effect.other_targets == full.maps.flatten(0, 2).shape[0]
    assert 0 < effect.error < 1


# --- effects ------------------------------------------------------------------------------------------------


def test_a_sweep_beside_itself_is_the_same(detector, image):
    result = sweep(detector, image, TEXTS, confidence=0.3)
    effect = effect_on_detections(result, result)
    assert (effect.score, effect.box, effect.gained, effect.lost) == (0, 0, 0, 0)
    assert effect.detections == sum(map(len, result.detections)) > 0


def test_effects_are_counted_per_detection(detector, image):
    scores = torch.cat([found.scores for found in sweep(detector, image, TEXTS, confidence=0.2).detections])
    low, high = (
        sweep(detector, image, TEXTS, confidence=confidence) for confidence in (0.2, float(scores.median()))
    )
    counts = [sum(map(len, result.detections)) for result in (low, high)]
    assert counts[0] > counts[1]
    fewer, more = effect_on_detections(low, high), effect_on_detections(high, low)
    assert (fewer.lost, fewer.gained) == (counts[0] - counts[1], 0) == (more.gained, more.lost)
    assert fewer.score == fewer.box == 0


def test_effects_are_those_of_scores_and_boxes(detector, image):
    other = Detr(SMALL, ["cat", "dog", "owl"]).eval().requires_grad_(False)
    other.load_state_dict(detector.state_dict())
    other.box_head[-1].bias += 0.01
    other.class_head.bias += torch.tensor([0.01, 0, 0, 0])
    one, two = (sweep(model, image, TEXTS, confidence=0.05) for model in (detector, other))
    effect = effect_on_detections(one, two)
    change = (two.logits.double().softmax(-1) - one.logits.double().softmax(-1))[..., :3].abs().amax()
    assert effect.score == pytest.approx(float(change))
    # The sigmoid's slope is at most 1/4, on the longer side of 60 pixels; a corner moves by its middle and half a side.
    assert 0 < effect.box <= 60 * 0.01 / 4 * 1.5
    assert "boxes by" in effect.sentence("bfloat16")


def test_effects_of_other_things_are_rejected(detector, image):
    one, two = sweep(detector, image, ["first 1"]), sweep(detector, image, ["first 2"])
    with pytest.raises(SettingError, match="other configurations"):
        effect_on_detections(one, two)
    maps = [headoff.explain(detector, image, ["first 1"], queries) for queries in ([0], [1])]
    with pytest.raises(SettingError, match="other queries"):
        effect_on_maps(*maps)


# --- the command line ---------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Two bundled scenes in a folder; the current one is empty."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(2):
        source = headoff.sample_image(index)
        (folder / source.name).write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    return sorted(folder.iterdir())


@pytest.mark.usefixtures("blank_figures")
def test_explain_says_what_autocast_changed(images, capsys):
    arguments = ["--off", "first 3", "--layers", "last", "--autocast", "bfloat16", "--device", "cpu"]
    assert main(["explain", str(images[0]), *arguments]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("autocast to bfloat16")]
    assert len(said) == 2
    assert "detections in the sweep" in said[0] and "of their peak" in said[1]


@pytest.mark.usefixtures("blank_figures")
def test_a_sweep_of_a_folder_says_it_of_every_image(images, capsys):
    arguments = ["--off", "first 3", "--autocast", "bfloat16", "--device", "cpu", "--object", "0"]
    assert main(["sweep", str(images[0].parent), *arguments]) == 0
    shown = capsys.readouterr().out
    for image in images:
        assert f"{image}: autocast to bfloat16 compared with full precision: scores differ" in shown
    # Finished is what was finished with the same options: autocast is one of them.
    assert main(["sweep", str(images[0].parent), *arguments]) == 0
    assert "autocast to" not in capsys.readouterr().out
    arguments[3] = "float16"
    assert main(["sweep", str(images[0].parent), *arguments]) == 0
    assert "autocast to float16" in capsys.readouterr().out


def test_autocast_of_other_weights_is_refused_before_they_are_read(images, capsys):
    for command in ("sweep", "explain"):
        assert main([command, "--autocast", "bfloat16", "--dtype", "float64", "--model", "nowhere.pth"]) == 2
        assert "leave out --dtype float64, or leave out --autocast" in capsys.readouterr().err
