"""Reference cases of a user's own model and image, the cache, and what is found wrong with wrong attentions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from relevance_examples import tiny_detector

from headoff.attention.eager import eager
from headoff.attention.sdpa import sdpa
from headoff.calls import AttentionAddress
from headoff.detr.checkpoints import save_native
from headoff.errors import HeadoffError, SettingError
from headoff.gates import first_off, none_off, stack
from headoff.harness.finding import WrongAttention
from headoff.harness.model.attention_calls import faulty_layers, largest_excess
from headoff.harness.model.detections import detection_findings
from headoff.harness.model.gradients import expected_gradients, gradient_findings, sum_of_targets, target_of
from headoff.harness.model.patched import InDtype, counting_calls
from headoff.harness.model.relevance import maps_by, relevance_findings
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.reference.cache import FOLDER, cached
from headoff.harness.reference.cases import METHOD, case_names, reference_case
from headoff.harness.reference.maps import map_errors
from headoff.harness.reference.oracle import dense_maps, forward_batch
from headoff.harness.settings import Settings
from headoff.relevance import class_logit
from headoff.sweeps import decode_all

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADOFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / FOLDER


@pytest.fixture
def own(tmp_path):
    """A random model and a random image, saved where a user might have them."""
    model, image = tmp_path / "mine.safetensors", tmp_path / "street.png"
    save_native(tiny_detector(dtype=torch.float32), model, torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    return Settings(model=str(model), images=(image,))


def test_a_model_and_an_image_of_a_users_own_are_judged_as_the_bundled_ones(own):
    """With a right attention nothing is found on any level, with a wrong one something is on each."""
    mine = reference_case(own, "street")
    assert len(mine.objects) >= 2, "random weights detect nothing, and are explained all the same"
    for dtype in (torch.float32, torch.bfloat16):
        for check in (detection_findings, relevance_findings, gradient_findings):
            assert check(sdpa, mine, CPU, dtype) == []
        assert faulty_layers(sdpa, mine, mine.cumulative, CPU, dtype) == []
    for check in (detection_findings, relevance_findings, gradient_findings):
        found = check(gate_of_the_next_head, mine, CPU, torch.float32)
        assert {one.configuration for one in found} >= {"first 1 off", "first 2 off"}
        assert all(one.error > one.budget for one in found if one.error is not None)


def test_results_are_computed_once_and_again_where_the_file_is_damaged(cache, capfd):
    computed = []

    def compute():
        computed.append(1)
        return {"maps": np.arange(6.0).reshape(2, 3)}

    first = cached("example", {"image": "a"}, compute)
    assert np.array_equal(cached("example", {"image": "a"}, compute)["maps"], first["maps"])
    assert len(computed) == 1
    cached("example", {"image": "b"}, compute)
    assert len(computed) == 2, "another image has other results"
    for path in cache.iterdir():
        path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(cached("example", {"image": "a"}, compute)["maps"], first["maps"])
    assert len(computed) == 3


def test_results_that_cannot_be_written_are_used_all_the_same(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HEADOFF_CACHE", str(tmp_path / "file"))
    assert cached("example", {}, lambda: {"maps": np.ones(2)})["maps"].sum() == 2


def test_names_are_those_of_the_images(tmp_path):
    assert case_names(Settings())[:2] == ["scene-000", "scene-001"]
    twice = Settings(images=(tmp_path / "a" / "cup.png", tmp_path / "b" / "cup.jpg"))
    assert case_names(twice) == ["cup", "cup (2)"]
    assert 0 < len(case_names(Settings(model="detr-resnet-50"))) < len(case_names(Settings()))
    with pytest.raises(SettingError, match="there is no image 'tree' here: use one of cup"):
        reference_case(twice, "tree")


def test_what_cannot_be_read_is_said(own, tmp_path):
    with pytest.raises(HeadoffError, match="gone.png"):
        reference_case(Settings(images=(tmp_path / "gone.png",)), "gone").features  # noqa: B018
    broken = Settings(model=str(tmp_path / "gone.safetensors"), images=own.images)
    with pytest.raises(HeadoffError, match="gone.safetensors"):
        reference_case(broken, "street").detector  # noqa: B018


def test_exceptions_of_an_attention_are_findings(own):
    mine = reference_case(own, "street")

    def fails(query, key, value, attn_mask=None, *, head_gate=None):
        raise ValueError("no kernel\nfor this size")

    for check in (detection_findings, relevance_findings, gradient_findings):
        (found,) = check(fails, mine, CPU, torch.float32)
        assert found.property == "crash"
        assert "ValueError: no kernel for this size" in found.message and "\n" not in found.message


def test_nan_is_a_finding(own):
    def nan(query, key, value, attn_mask=None, *, head_gate=None):
        return query * torch.nan

    mine = reference_case(own, "street")
    for check in (detection_findings, relevance_findings, gradient_findings):
        assert check(nan, mine, CPU, torch.float32)


def test_one_wrong_layer_does_not_blame_its_successors(own):
    mine = reference_case(own, "street")
    calls = []

    def third_call_wrong(query, key, value, attn_mask=None, *, head_gate=None):
        calls.append(1)
        # The encoder has two layers, and then come the decoder's: its first cross-attention is the fourth.
        factor = 1.01 if len(calls) == 4 else 1.0
        return eager(query * factor, key, value, attn_mask, head_gate=head_gate)

    (found,) = faulty_layers(third_call_wrong, mine, mine.cumulative, CPU, torch.float32)
    assert (found.property, found.site, found.layer) == ("context", "decoder_cross", 0)


@pytest.mark.parametrize("wrong", ["dq", "dk", "dv"])
def test_the_wrong_gradient_is_named(own, wrong):
    mine = reference_case(own, "street")

    def attention(query, key, value, attn_mask=None, *, head_gate=None):
        inputs = {"dq": query, "dk": key, "dv": value}
        inputs[wrong] = 0.99 * inputs[wrong] + 0.01 * inputs[wrong].detach()
        return eager(*inputs.values(), attn_mask, head_gate=head_gate)

    found = faulty_layers(attention, mine, mine.cumulative, CPU, torch.float32)
    assert found and {one.property for one in found} == {wrong}
    assert {one.property for one in gradient_findings(attention, mine, CPU, torch.float32)} == {"gradients"}


def test_a_head_is_blamed_from_the_configuration_on_where_it_is_off(own):
    def second_head_stays_on(query, key, value, attn_mask=None, *, head_gate=None):
        if head_gate is not None:
            head_gate = head_gate.clone()
            head_gate[:, 1] = 1
        return eager(query, key, value, attn_mask, head_gate=head_gate)

    mine = reference_case(own, "street")
    (found,) = faulty_layers(second_head_stays_on, mine, mine.cumulative, CPU, torch.float32)
    assert (found.site, found.head, found.configuration) == ("decoder_cross", 1, "first 2 off")
    assert largest_excess(second_head_stays_on, mine, mine.cumulative, CPU, torch.float32) > 16
    assert largest_excess(eager, mine, mine.cumulative, CPU, torch.float32) <= 1


def test_calls_are_counted_site_by_site():
    detector = tiny_detector()
    from relevance_examples import features_of

    features = features_of(detector)
    with counting_calls(detector, 1, 1) as count:
        decode_all(detector, features, stack([none_off(), first_off(2)], detector.head_layout))
    assert not detector.is_intercepted
    assert count.by_site == {"encoder_self": 2, "decoder_self": 3, "decoder_cross": 3}
    assert count.findings("a case") == []
    count.of[AttentionAddress("decoder_cross", 1)] = 0
    (found,) = count.findings("a case")
    assert (found.property, found.site, found.layer) == ("calls", "decoder_cross", 1)
    assert "never" in found.message


def test_pinned_masks_carry_maps_over_a_jump_of_the_gradient():
    """A hidden unit that is zero but for rounding: float32 decides by luck, and as the oracle when it is pinned."""
    from relevance_examples import features_of

    exact = tiny_detector()
    features = features_of(exact)
    expand = exact.decoder.layers[0].feedforward.expand
    seen = []
    handle = expand.register_forward_hook(lambda module, inputs, hidden: seen.append(hidden))
    gates = stack([none_off()], exact.head_layout)
    decode_all(exact, features, gates)
    handle.remove()
    expand.bias[3] -= seen[0][0, 0, 0, 3] - 1e-12
    expected = dense_maps(exact, features, none_off(), [class_logit(0, 1)], METHOD).numpy()
    below = tiny_detector()
    below.decoder.layers[0].feedforward.expand.bias[3] = expand.bias[3] - 2e-12
    masks, own_masks = ReluMasks(), ReluMasks()
    for recorded, detector in ((masks, exact), (own_masks, below)):
        with recorded.recording(detector), torch.no_grad():
            forward_batch(detector, features, gates)
    pinned, jumped = (
        maps_by(below, features, gates, [class_logit(0, 1)], some).maps[0] for some in (masks, own_masks)
    )
    assert map_errors(expected, pinned).max() < 1e-9
    assert map_errors(expected, jumped).max() > 1e-5


@pytest.mark.parametrize(("resolution", "follows"), [(1e-9, True), (1e-15, False)])
def test_masks_are_aligned_where_rounding_decides_and_nowhere_else(resolution, follows):
    """A unit at 1e-12 follows the other run's mask if that is below the resolution; all others keep their own."""
    from relevance_examples import features_of

    detector = tiny_detector()
    features, layer = features_of(detector), detector.encoder.layers[0].feedforward
    gates, masks, name = (
        stack([none_off()], detector.head_layout),
        ReluMasks(),
        "encoder.layers.0.feedforward.expand",
    )
    seen = []
    handle = layer.expand.register_forward_hook(lambda module, inputs, hidden: seen.append(hidden))
    with torch.no_grad():
        forward_batch(detector, features, gates)
        layer.expand.bias[3] -= seen[0][0, 0, 3] - 1e-12
    handle.remove()
    with masks.recording(detector), torch.no_grad():
        forward_batch(detector, features, gates)
    before = masks.masks[name]
    flipped = ReluMasks({**masks.masks, name: ~before})
    handle = layer.contract.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with flipped.pinned(detector, resolution=resolution), torch.no_grad():
        forward_batch(detector, features, gates)
    handle.remove()
    changed = (seen[-1].flatten(0, -3) > 0) != before
    assert changed.nonzero().tolist() == ([[0, 0, 3]] if follows else [])


def test_gradients_are_the_slopes_of_their_targets(own):
    """Central differences along a random direction, in float64."""
    mine = reference_case(own, "street")
    chosen = mine.configurations[:3]
    gates, targets = stack(chosen, mine.layout), [target_of(mine, configuration) for configuration in chosen]
    grad_tokens = expected_gradients(mine)["tokens"][:3]
    direction = torch.randn(mine.features.tokens.shape, generator=torch.Generator().manual_seed(0)).double()
    step = 1e-6

    def value(sign: int) -> torch.Tensor:
        moved = mine.features.tokens + sign * step * direction
        features = type(mine.features)(moved, mine.features.positions, None, mine.features.grid)
        with torch.enable_grad():
            return sum_of_targets(targets, forward_batch(mine.detector, features, gates)[0]).detach()

    slope = (value(1) - value(-1)) / (2 * step)
    assert slope.item() == pytest.approx((grad_tokens * direction).sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_attention_in_another_dtype_keeps_tiny_gradients(dtype):
    """Gradients below the smallest number of half precision come through."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(4))
    seen = []

    def attention(*inputs, head_gate=None):
        seen.extend(one.dtype for one in inputs[:3])
        return eager(*inputs, head_gate=head_gate)

    found = []
    for attend in (InDtype(attention, dtype), eager):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        context = attend(*leaves)
        assert context.dtype == torch.float32
        found.append(torch.autograd.grad(context, leaves, 1e-9 * gradient))
    assert set(seen) == {dtype}
    unit = torch.finfo(dtype).eps
    for got, true in zip(*found, strict=True):
        assert (got - true).abs().max() <= 20 * unit * true.abs().max()


def test_a_gate_that_changes_other_heads_is_found_on_heads_without_output(own):
    """The suite's own check, which no other check of this attention goes before."""
    import test_heads_off_relevance as suite

    def larger_where_gated(query, key, value, attn_mask=None, *, head_gate=None):
        context = eager(query, key, value, attn_mask, head_gate=head_gate)
        return context if head_gate is None else 1.2 * context

    def check(attention):
        under_test = SimpleNamespace(attention=attention, device=CPU, dtype=torch.float32, seed=0)
        case = reference_case(own, "street")
        suite.test_switching_off_a_head_without_output_changes_nothing(case, under_test)

    check(sdpa)
    with pytest.raises(WrongAttention) as wrong:
        check(larger_where_gated)
    assert {finding.property for finding in wrong.value.findings} == {"gate"}
    assert all(finding.case == "street" for finding in wrong.value.findings)
    assert "switching off a head without output changes" in str(wrong.value)


def gate_of_the_next_head(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=None if head_gate is None else head_gate.roll(1, 1))
