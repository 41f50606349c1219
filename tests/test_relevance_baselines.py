"""Gradient x input, integrated gradients, Grad-CAM of the backbone, and D-RISE."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from family_examples import KINDS, loaded, reference
from relevance_examples import QUERIES, TARGETS, features_of, random_gates, targets_of, tiny_detector
from torch import Tensor

from headoff.detector import Detector, DetectorOutput
from headoff.errors import SettingError
from headoff.gates import HeadLayout, first_off, none_off, stack
from headoff.images import Preprocessing
from headoff.relevance import d_rise, explain, integrated_gradients, resolve_method
from headoff.relevance.d_rise import DRiseEngine, Masks
from headoff.relevance.decoded import of_decoder
from headoff.relevance.gradient_engine import GradientEngine

LAYERS = 3


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)


def results(detector, features, gates, method, specs=TARGETS, **options):
    """The results by configuration, with their targets."""
    method = resolve_method(method)
    engine = method.engine(detector, features, method=method)
    targets = {}

    def choose(index, logits, boxes):
        targets[index] = targets_of(logits, specs)
        return targets[index]

    found = sorted(engine.run(gates, choose, **options), key=lambda one: one.index)
    return [(one, targets[one.index]) for one in found]


def decoded_from(detector, seen, perturbed, layer, gates) -> DetectorOutput:
    """The output where layers up to `layer` see the memory `perturbed`, and later ones `seen`."""
    keys_and_values = {}

    def record(call, proceed):
        keys_and_values[call.address] = call.key, call.value
        return proceed(call)

    def put(call, proceed):
        if call.address.site == "decoder_cross" and call.address.layer <= layer:
            key, value = keys_and_values[call.address]
            call = call._replace(key=key, value=value)
        return proceed(call)

    with detector.intercepting(record):
        detector.decode(perturbed, gates)
    with detector.intercepting(put):
        return detector.decode(seen, gates)


@pytest.mark.parametrize("padded", [False, True])
def test_gradient_input_is_what_scaling_a_token_changes(padded):
    """By central differences, for all tokens, layers and configurations."""
    detector = tiny_detector(1)
    features = features_of(detector, grid=(2, 4), padded=padded)
    gates = random_gates(detector, 2, per_query=True)
    step = 1e-5
    for one, targets in results(detector, features, gates, "gradient_input"):
        gate = gates.encoder_self[one.index]
        of_decoder_gates = of_decoder(gates[[one.index]])
        memory = detector.encode_features(features, gate)
        differences = torch.zeros(len(targets), LAYERS, features.tokens.shape[1]).double()
        for token in range(features.tokens.shape[1]):
            for sign in (1, -1):
                tokens = features.tokens.clone()
                tokens[:, token] *= 1 + sign * step
                perturbed = detector.encode_features(replace(features, tokens=tokens), gate)
                for layer in range(LAYERS):
                    output = decoded_from(detector, memory, perturbed, layer, of_decoder_gates)
                    for index, target in enumerate(targets):
                        value = target.function(output.logits[0, 0], output.boxes[0, 0])
                        differences[index, layer, token] += sign * value / (2 * step)
        rows = torch.stack([pair.rows for pair in one.pairs])
        torch.testing.assert_close(rows, differences, rtol=1e-5, atol=1e-7)
        assert rows.abs().amax() > 1e-3
        if padded:
            assert rows[..., ~features.attn_mask.flatten()].eq(0).all()


@pytest.mark.parametrize("method", ["gradient_input", "integrated_gradients", "gradcam_backbone"])
def test_the_last_layer_alone_is_the_last_of_all(method):
    detector, features = tiny_detector(1), features_of(tiny_detector(1))
    gates = random_gates(detector, 2)
    every = results(detector, features, gates, method)
    last = results(detector, features, gates, method, layers=[LAYERS - 1])
    for (all_layers, _), (one_layer, _) in zip(every, last, strict=True):
        for pair, alone in zip(all_layers.pairs, one_layer.pairs, strict=True):
            torch.testing.assert_close(pair.rows[-1:], alone.rows, rtol=1e-9, atol=1e-12)


def test_integrated_gradients_are_complete():
    """Their sum is the value minus that of tokens of zero. Without the jumps that ReLUs make in gradients the
    quadrature converges fast."""
    detector = tiny_detector(1)
    for layer in (*detector.encoder.layers, *detector.decoder.layers):
        layer.feedforward.expand.bias += 20
    features = features_of(detector, padded=True)
    gates = random_gates(detector, 3)
    blank = replace(features, tokens=torch.zeros_like(features.tokens))
    found = results(detector, features, gates, integrated_gradients(48), specs=("class",) * QUERIES)
    for one, targets in found:
        memory = detector.encode_features(blank, gates.encoder_self[one.index])
        output = detector.decode(memory, of_decoder(gates[[one.index]]))
        for pair, target in zip(one.pairs, targets, strict=True):
            change = pair.value - float(target.function(output.logits[0, 0], output.boxes[0, 0]))
            assert abs(float(pair.rows[-1].sum()) - change) < 1e-6 * abs(change)


def test_few_steps_at_once_give_the_same_integral():
    detector, features = tiny_detector(1), features_of(tiny_detector(1))
    gates = stack([none_off(), first_off(1)], detector.head_layout)
    method = integrated_gradients(7)

    def rows(budget):
        engine = method.engine(detector, features, method=method, memory_budget=budget)
        found = engine.run(gates, lambda _, logits, __: targets_of(logits))
        return torch.stack([pair.rows for one in found for pair in one.pairs])

    torch.testing.assert_close(rows(1), rows(None), rtol=1e-9, atol=1e-12)
    one_step = integrated_gradients(1).engine(detector, features, method=method)
    assert isinstance(one_step, GradientEngine)
    with pytest.raises(SettingError, match="at least 1 step, not 0"):
        integrated_gradients(0).engine(detector, features, method=method)


@pytest.mark.parametrize("padded", [False, True])
def test_gradcam_by_its_definition(padded):
    """From the feature map of a run of the whole detector, and its gradient."""
    detector = tiny_detector(2)
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)).double()
    mask = torch.ones(1, 64, 96, dtype=torch.bool)
    if padded:
        pixels[..., 64:], mask[..., 64:] = 0, False
    gates = random_gates(detector, 2)
    kept = []

    def keep(module, inputs, output):
        kept.append(output.requires_grad_())

    features = detector.features(pixels, mask)
    found = results(detector, features, gates, "gradcam_backbone", layers=[LAYERS - 1])
    for one, targets in found:
        handle = detector.backbone.register_forward_hook(keep)
        memory = detector.encode(pixels, mask, gate=gates.encoder_self[one.index])
        handle.remove()
        output = detector.decode(memory, of_decoder(gates[[one.index]]))
        for pair, target in zip(one.pairs, targets, strict=True):
            (gradient,) = torch.autograd.grad(
                target.value(output.logits[0, 0], output.boxes[0, 0]), kept[-1], retain_graph=True
            )
            inside = torch.ones(1, *features.grid, dtype=torch.bool)
            if padded:
                inside = features.attn_mask.view(1, *features.grid)
            alpha = (gradient * inside).sum((-2, -1)) / inside.sum()
            expected = (torch.einsum("bk,bkhw->bhw", alpha, kept[-1]).relu() * inside).flatten()
            torch.testing.assert_close(pair.rows[0], expected.detach(), rtol=1e-8, atol=1e-12)
    assert any(pair.rows.any() for one, _ in found for pair in one.pairs)


@pytest.mark.parametrize("method", ["gradient_input", "gradcam_backbone", d_rise(8)])
@pytest.mark.parametrize("ablation", ["zero", "uniform"])
def test_nothing_comes_from_the_image_without_heads(method, ablation, picture):
    detector = tiny_detector(0)
    found = explain(detector, picture, ["none", "first 4"], [1, 2], method=method, heads=True)
    assert found.maps[0].any() and found.heads.shape == (2, 2, LAYERS, 4, *found.grid)
    expected = explain(detector, picture, ["none", "first 4"], [1, 2], method="raw", heads=True)
    torch.testing.assert_close(found.heads, expected.heads)
    torch.testing.assert_close(found.values, expected.values)
    assert not found.maps[1].any()
    # What replaces a head is held constant: it has no gradient.
    if method == "gradient_input" and ablation == "uniform":
        replaced = explain(detector, picture, "first 4", [1, 2], method=method, ablation=ablation)
        assert not replaced.maps.any()


# D-RISE.


class Patch(Detector):
    """Finds one object of class 0 in a fixed box, as surely as a patch of the image is bright; query 1 finds none."""

    BOX = (0.3, 0.4, 0.2, 0.2)
    GRID = 8, 8

    def __init__(self) -> None:
        super().__init__(("thing", "other"), 2, "eager")
        self.seen: list[int] = []

    head_layout = HeadLayout(encoder_layers=0, decoder_layers=2, heads=2, queries=2)
    preprocessing = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), size=(64, 64))
    device, dtype = torch.device("cpu"), torch.float64

    def stride(self, features) -> int:
        return 8

    def decoder_bytes(self, features) -> int:
        return 1

    def brightness(self, pixels: Tensor) -> Tensor:
        return pixels[:, :, 24:32, 16:24].mean((1, 2, 3))

    def features(self, pixel_values, pixel_mask=None):
        self.seen.append(len(pixel_values))
        return _Seen(self.brightness(pixel_values))

    def encode_features(self, features, gate=None):
        return features

    def plan(self, gates, *, share=True):
        return gates

    def decode(self, memory, gates=None) -> DetectorOutput:
        on = (
            torch.ones(1)
            if gates is None or gates.decoder_cross is None
            else gates.decoder_cross.mean((1, 2, 3))
        )
        bright = on[:, None].double() * memory.bright
        logits = torch.stack((6 * bright - 3, -3 * torch.ones_like(bright), torch.zeros_like(bright)), -1)
        nothing = torch.tensor([-9.0, -9.0, 9.0]).double().expand_as(logits)
        boxes = torch.tensor([self.BOX, (0.5, 0.5, 1, 1)]).double()
        return DetectorOutput(torch.stack((logits, nothing), 2), boxes.expand(*bright.shape, 2, 4))


class _Seen(SimpleNamespace):
    shapes = (Patch.GRID,)
    grid = Patch.GRID

    def __init__(self, bright) -> None:
        self.bright = bright

    def __len__(self) -> int:
        return len(self.bright)

    def to_grid(self, x):
        return x.unflatten(-1, self.grid)

    def clone(self):
        return self


WHITE = np.full((64, 64, 3), 255, dtype=np.uint8)
PLANTED = 3, 2
"""The token of the patch."""


def test_d_rise_finds_the_patch_that_a_detector_reads():
    detector = Patch()
    found = explain(detector, WHITE, ["none", "first 2"], [0], method=d_rise(400, batch=37))
    maps = found.maps[:, 0]
    peak = maps[0, -1].flatten().argmax()
    assert divmod(int(peak), 8) == PLANTED
    # Above the level of the rest, what there is is at the patch and the tokens next to it, which masks cover with it.
    above = (maps[0, -1] - maps[0, -1].median()).clamp(min=0)
    assert above[2:5, 1:4].sum() > 0.5 * above.sum()
    assert torch.equal(maps[0, 0], maps[0, 1])  # it has no heads for earlier layers
    assert not maps[1].any()  # without heads the image has no part
    assert sum(detector.seen) == 401 and max(detector.seen) == 37


def test_d_rise_tells_how_many_masks_are_done():
    seen = []
    detector = tiny_detector()
    explain(
        detector,
        WHITE,
        ["none", "first 2"],
        [0],
        method=d_rise(10, batch=4),
        progress=lambda *now: seen.append(now),
    )
    assert seen == [(4, 12), (8, 12), (10, 12), (11, 12), (12, 12)]


def test_d_rise_by_its_definition():
    detector, masks = Patch(), Masks(50, cells=5, probability=0.3, seed=4)
    found = explain(detector, WHITE, ["none"], [0], method=d_rise(50, cells=5, probability=0.3, seed=4))
    (given,) = masks.batches(64, 64, 64)
    assert given.shape == (50, 64, 64) and 0.2 < given.mean() < 0.4 and 0 <= given.min() and given.max() <= 1
    weights, target = [], torch.tensor([1.0, 0, 0])
    for bright in detector.brightness(given[:, None].expand(-1, 3, -1, -1)):
        one = torch.tensor([6.0 * float(bright) - 3, -3, 0]).softmax(0)
        nothing = torch.tensor([-9.0, -9.0, 9.0]).softmax(0)
        second = F.cosine_similarity(target, nothing, 0) * 0.04  # IoU of the box with the whole image
        weights.append(max(F.cosine_similarity(target, one, 0), second))
    tokens = given.view(50, 8, 8, 8, 8).mean((2, 4))
    similar = torch.stack(weights)
    expected = (similar[:, None, None] * tokens).sum(0) / tokens.sum(0) - similar.mean()
    torch.testing.assert_close(found.maps[0, 0, 0], expected.double(), rtol=1e-5, atol=1e-7)


def test_masks_depend_on_the_seed_alone(picture):
    detector = tiny_detector(0)

    def maps(method):
        return explain(detector, picture, ["none", "H0", "encoder_self: H1"], [0, 3], method=method).maps

    first = maps(d_rise(9, batch=2, seed=1))
    torch.testing.assert_close(first, maps(d_rise(9, batch=9, seed=1)), rtol=1e-9, atol=1e-12)
    assert not torch.equal(first, maps(d_rise(9, seed=2)))
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])
    assert not torch.equal(first[:, :, 0], first[:, :, 2])  # class and box heads see every layer's states


def test_d_rise_explains_detections_in_known_pictures(picture):
    detector = tiny_detector(0)
    with pytest.raises(SettingError, match="not the target 'cx': leave the target out"):
        explain(detector, picture, "none", [0], method=d_rise(2), target="cx")
    method = d_rise(2)
    with pytest.raises(SettingError, match="give the picture"):
        method.engine(detector, features_of(detector), method=method)
    with pytest.raises(SettingError, match="0 masks"):
        d_rise(0)


# Detectors of transformers.


@pytest.mark.parametrize("kind", ["deformable_detr", "rt_detr", "rf_detr"])
def test_gradcam_of_models_of_transformers(kind):
    """Against the model of transformers, which runs as a whole."""
    detector = loaded(kind)
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5)).double()
    features = detector.features(pixels)
    gates = stack([none_off()], detector.head_layout)
    ((one, targets),) = results(detector, features, gates, "gradcam_backbone", specs=("class",) * 2)
    model = reference(kind, torch.float64)
    kept = []

    def keep(module, inputs, output):
        leaves, _ = torch.utils._pytree.tree_flatten(output)
        kept.append([x.requires_grad_() for x in leaves if x.ndim == 4][-1])

    handle = model.model.backbone.register_forward_hook(keep)
    logits = model(pixels).logits[0]
    handle.remove()
    level = max(i for i, shape in enumerate(features.shapes) if shape == kept[0].shape[-2:])
    before = sum(h * w for h, w in features.shapes[:level])
    for pair, target in zip(one.pairs, targets, strict=True):
        (gradient,) = torch.autograd.grad(logits[target.query, target.label], kept[0], retain_graph=True)
        expected = (gradient.mean((-2, -1), keepdim=True) * kept[0]).sum(1).relu().flatten().detach()
        cells = slice(before, before + len(expected))
        torch.testing.assert_close(pair.rows[-1, cells], expected, rtol=1e-7, atol=1e-12)
        assert torch.equal(pair.rows[-1].sum(), pair.rows[-1, cells].sum())


@pytest.mark.parametrize("kind", ["table-transformer", "deformable_detr", "rt_detr"])
def test_gradient_input_of_models_of_transformers(kind):
    """By central differences along the maps of every level, of which cells are scaled."""
    detector = loaded(kind)
    pixels = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5)).double()
    features = detector.features(pixels)
    gates = stack([first_off(1)], detector.head_layout)
    ((one, targets),) = results(detector, features, gates, "gradient_input", specs=("class",) * 2)
    maps, step = [x for x, _ in features.feature_maps], 1e-6
    start = 0
    for level, shape in enumerate(features.shapes):
        for row, column in ((0, 0), (shape[0] - 1, 1)):
            differences = []
            for sign in (1, -1):
                changed = [x.clone() for x in maps]
                changed[level][..., row, column] *= 1 + sign * step
                memory = detector.encode_features(features.with_feature_maps(changed))
                output = detector.decode(memory, gates)
                differences.append(
                    [float(t.function(output.logits[0, 0], output.boxes[0, 0])) for t in targets]
                )
            expected = torch.tensor(differences, dtype=torch.float64).diff(dim=0)[0] / (-2 * step)
            found = torch.stack([pair.rows[-1, start + row * shape[1] + column] for pair in one.pairs])
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
            assert found.any()
        start += shape[0] * shape[1]
    assert start == len(one.pairs[0].rows[-1])


def test_engines_need_what_encoders_start_from():
    detector = Patch()
    features = detector.features(torch.zeros(1, 3, 64, 64).double())
    for name in ("gradient_input", "gradcam_backbone"):
        method = resolve_method(name)
        with pytest.raises(SettingError, match=f"{name} needs the backbone's feature maps.*use d_rise or"):
            method.engine(detector, features, method=method)


@pytest.mark.parametrize("kind", KINDS)
def test_baselines_of_all_models_of_transformers(kind, picture):
    detector = loaded(kind, torch.float32)
    small = replace(detector.preprocessing, size=(96, 96))
    detector._preprocessing, before = small, detector._preprocessing
    try:
        dear = (integrated_gradients(2), d_rise(2, probability=0.9)) if kind in ("d_fine", "rf_detr") else ()
        for method in ("gradcam_backbone", "gradient_input", *dear):
            found = explain(detector, picture, ["none", "H0+1"], [0], method, "last")
            assert found.maps.isfinite().all() and found.maps.any()
            assert resolve_method(method).signed or found.maps.ge(0).all()
            assert not torch.equal(found.maps[0], found.maps[1])
    finally:
        detector._preprocessing = before


def test_engines_of_baselines_take_one_image():
    detector = tiny_detector(0)
    two = detector.features(torch.zeros(2, 3, 64, 64).double())
    for name in ("gradient_input", "gradcam_backbone", "d_rise"):
        method = resolve_method(name)
        with pytest.raises(SettingError, match="one image at a time"):
            method.engine(detector, two, method=method)
    assert DRiseEngine is d_rise(3).engine.func
