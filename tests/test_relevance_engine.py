"""The engine compared with the oracle and with autograd, and properties for any weights. All in float64."""

import math
from dataclasses import replace

import pytest
import torch
from relevance_examples import (
    HEADS,
    QUERIES,
    TARGETS,
    assert_matches_oracle,
    engine_results,
    features_of,
    random_gates,
    tiny_detector,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from headoff.attention import eager
from headoff.detr.detector import Features
from headoff.errors import AttentionError, NonFiniteError, SettingError
from headoff.gates import SITES, Gates, cumulative, first_off, layers_off, none_off, stack
from headoff.relevance import RelevanceEngine, class_logit
from headoff.relevance.attention_vjp import AttentionVjp, is_builtin
from headoff.relevance.records import AttentionRecord
from headoff.relevance.trace import EncoderTrace

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    ),
]


def on(device, features):
    mask = None if features.attn_mask is None else features.attn_mask.to(device)
    return Features(features.tokens.to(device), features.positions.to(device), mask, features.grid)


def cumulative_gates(detector, **site):
    return stack(cumulative(detector.config.heads, **site), detector.head_layout)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("decoder_layers", [1, 3])
def test_every_k_agrees_with_the_oracle(decoder_layers, pre_norm, padded):
    """Cumulative sweeps of 8 heads at the default site, all targets, every decoder layer."""
    detector = tiny_detector(decoder_layers, heads=8, decoder_layers=decoder_layers, pre_norm=pre_norm)
    features = features_of(detector, padded=padded)
    assert assert_matches_oracle(detector, features, cumulative_gates(detector)) > 8 * QUERIES / 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("per_query", [False, True])
def test_random_gates_at_all_sites_agree_with_the_oracle(seed, per_query):
    """Fractional gates, encoder gates and gates per query included."""
    detector = tiny_detector(seed, pre_norm=bool(seed % 2), decoder_layers=1 + seed % 3)
    features = features_of(detector, padded=seed % 3 == 0, seed=seed)
    gates = random_gates(detector, 4, per_query=per_query, seed=seed)
    assert (
        assert_matches_oracle(detector, features, gates, zero_rows=["identity", "reference"][seed % 2])
        or seed % 2
    )


@pytest.mark.parametrize("site", ["encoder_self", "decoder_self"])
def test_other_sites_agree_with_the_oracle(site):
    detector = tiny_detector(4)
    features = features_of(detector)
    gates = stack(cumulative(HEADS, site=site), detector.head_layout)
    assert_matches_oracle(detector, features, gates, specs=TARGETS[:2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options", [{"memory_budget": 1}, {"backward": "callable"}, {"backward": "analytic"}], ids=str
)
def test_neither_budget_nor_way_back_changes_anything(options, device):
    detector = tiny_detector(5).to(device)
    features = on(device, features_of(detector.cpu(), padded=True))
    detector.to(device)
    gates = random_gates(detector, 5, seed=5)
    for ours, theirs in zip(
        engine_results(detector, features, gates),
        engine_results(detector, features, gates, **options),
        strict=True,
    ):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.rows, other.rows, rtol=1e-10, atol=1e-15)
            assert one.encoder_identity_rows == other.encoder_identity_rows
            assert one.decoder_identity_rows.equal(other.decoder_identity_rows)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_is_near_float64(device):
    detector = tiny_detector(6)
    features = features_of(detector)
    gates = stack([none_off(), first_off(1)], detector.head_layout)
    precise = engine_results(detector, features, gates, specs=TARGETS[:2])
    single = Features(features.tokens.float(), features.positions.float(), None, features.grid)
    rounded = engine_results(detector.float().to(device), on(device, single), gates, specs=TARGETS[:2])
    for expected, found in zip(sum(precise, []), sum(rounded, []), strict=True):
        assert found.rows.dtype == torch.float32
        torch.testing.assert_close(
            found.rows.double(), expected.rows, rtol=0, atol=1e-4 * float(expected.rows.max())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_detectors_have_relevance_in_float32(dtype):
    detector = tiny_detector(6)
    features = features_of(detector)
    gates = stack([none_off()], detector.head_layout)
    (expected,) = engine_results(detector, features, gates, specs=["class"])[0]
    half = Features(features.tokens.to(dtype), features.positions.to(dtype), None, features.grid)
    for backward in ("analytic", "callable"):
        (found,) = engine_results(detector.to(dtype), half, gates, specs=["class"], backward=backward)[0]
        assert found.rows.dtype == torch.float32
        assert (found.rows - expected.rows).abs().max() < 0.3 * expected.rows.max()


# The backward pass by itself.


@pytest.mark.parametrize("tile", [1, 40, None])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_vjp_is_autograds(masked, tile):
    """Including fractional gates, for which rowsum(dO * O) has the gated context, and dS the ungated weights."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, cotangent = (
        torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (5, 7, 7, 5)
    )
    gate = torch.rand(2, 3, 5, 1, generator=generator).double()
    gate[0, 1] = 0
    keys = torch.tensor([True] * 6 + [False]) if masked else None
    leaves = [x.requires_grad_() for x in (query, key, value)]
    context = eager(*leaves, None if keys is None else keys[None, None, None], head_gate=gate)
    expected = torch.autograd.grad(context, leaves, cotangent)
    with torch.no_grad():
        record = AttentionRecord(
            ("decoder_self", 0), *(x.detach() for x in leaves), gate, keys, context.detach()
        )
        runs = torch.tensor([1, 0, 1])
        for kept in (False, True):
            if kept:
                record.keep_weights()
            vjp = AttentionVjp(record, "gradient", tile=tile)
            cams, found = vjp(cotangent[runs], runs)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, theirs[runs], rtol=1e-12, atol=1e-14)
            scores = query @ key.transpose(-1, -2) / 2
            weights = (scores if keys is None else scores.masked_fill(~keys, -math.inf)).softmax(-1) * gate
            of_weights = cotangent @ value.transpose(-1, -2)
            expected_cams = (weights * of_weights).clamp(min=0).mean(1)[runs]
            torch.testing.assert_close(cams, expected_cams, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_context_gradients_of_the_encoder_are_autograds(pre_norm):
    detector = tiny_detector(3, pre_norm=pre_norm, encoder_layers=3)
    features = features_of(detector, padded=True)
    gate = random_gates(detector, 1).encoder_self[0].double()
    contexts = []

    def attend(call):
        contexts.append(detector.attend(call))
        return contexts[-1]

    tokens = features.tokens.requires_grad_()
    memory = detector.encoder(tokens, features.positions, attend, features.attn_mask, gate)
    cotangents = torch.randn(2, *memory.shape[1:], dtype=torch.float64)
    cotangents[:, ~features.attn_mask.flatten()] = 0
    with torch.no_grad():
        trace = EncoderTrace.run(detector, features, gate, lambda record: AttentionVjp(record, "gradient"))
        found = trace.backward(cotangents, keep_cams=False)
    for pair, cotangent in enumerate(cotangents):
        expected = torch.autograd.grad(memory, contexts, cotangent[None], retain_graph=True)
        for (_, ours), theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours[pair : pair + 1], theirs, rtol=1e-10, atol=1e-13)


# Invariants.


def test_no_cross_attention_is_no_evidence_and_no_work():
    """Maps are exactly zero in every layer, and computed without a backward pass."""
    detector = tiny_detector(0)
    features = features_of(detector)
    gates = stack([first_off(HEADS), none_off()], detector.head_layout)
    asked = []

    def ask(call, proceed):
        asked.append(torch.is_grad_enabled())
        return proceed(call)

    with detector.intercepting(ask):
        off, on_ = engine_results(detector, features, gates[0]), engine_results(detector, features, gates[1])
        assert all(pair.rows.eq(0).all() and math.isfinite(pair.value) for pair in off[0])
        assert all(pair.rows.gt(0).any() for pair in on_[0])
        assert any(asked)
        asked.clear()
        engine_results(detector, features, gates[0])
    assert not any(asked), "a patched attention was differentiated for nothing"


def test_layers_without_cross_attention_add_nothing_of_their_own():
    """Off in all layers but the last: the maps before it are zero."""
    detector = tiny_detector(0)
    gates = stack([layers_off(0, 1)], detector.head_layout)
    for pair in engine_results(detector, features_of(detector), gates)[0]:
        assert pair.rows[:2].eq(0).all() and pair.rows[2].gt(0).any()


@pytest.mark.parametrize("method", ["chefer", "chefer_centred", "rollout", "attention_gradcam"])
def test_padding_changes_nothing_and_gets_nothing(method):
    detector = tiny_detector(1)
    padded = features_of(detector, padded=True)
    image = padded.attn_mask.flatten()
    bare = Features(padded.tokens[:, image], padded.positions[:, image], None, (1, int(image.sum())))
    gates = random_gates(detector, 3, seed=3)
    for with_padding, without in zip(
        engine_results(detector, padded, gates, method=method),
        engine_results(detector, bare, gates, method=method),
        strict=True,
    ):
        for one, other in zip(with_padding, without, strict=True):
            torch.testing.assert_close(one.rows[:, image], other.rows, rtol=1e-9, atol=1e-16)
            assert one.rows[:, ~image].eq(0).all()
            assert one.encoder_identity_rows == other.encoder_identity_rows


def attentions(detector):
    for layer in (*detector.encoder.layers, *detector.decoder.layers):
        yield layer.self_attention
        if hasattr(layer, "cross_attention"):
            yield layer.cross_attention


def test_permuting_heads_changes_nothing():
    detector, permuted = tiny_detector(2), tiny_detector(2)
    order = torch.tensor([2, 0, 3, 1])
    channels = (order[:, None] * 4 + torch.arange(4)).flatten()
    for attention in attentions(permuted):
        for layer in (attention.query, attention.key, attention.value):
            layer.weight.copy_(layer.weight[channels])
            layer.bias.copy_(layer.bias[channels])
        attention.output.weight.copy_(attention.output.weight[:, channels])
    features = features_of(detector)
    gates = random_gates(detector, 2)
    other = Gates(gates.names, *(gates.site(site)[..., order] for site in SITES))
    for ours, theirs in zip(
        engine_results(detector, features, gates), engine_results(permuted, features, other), strict=True
    ):
        for one, another in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.rows, another.rows, rtol=1e-9, atol=1e-16)


def test_a_head_that_is_not_heard_can_be_switched_off():
    detector = tiny_detector(2)
    for attention in attentions(detector):
        attention.output.weight[:, 4:8] = 0
    gates = stack([none_off()], detector.head_layout)
    ones = torch.ones(1, 3, 1, HEADS)
    ones[..., 1] = 0
    off = Gates(("L*H1 off everywhere",), ones[:, :2], ones, ones)
    features = features_of(detector)
    for one, other in zip(
        engine_results(detector, features, gates)[0], engine_results(detector, features, off)[0], strict=True
    ):
        torch.testing.assert_close(one.rows, other.rows, rtol=1e-11, atol=1e-17)


def test_results_come_with_their_configuration_when_the_encoder_is_gated():
    detector = tiny_detector(0)
    features = features_of(detector)
    gates = stack(
        [first_off(1, site="encoder_self"), none_off(), first_off(1), first_off(2, site="encoder_self")],
        detector.head_layout,
    )
    together = engine_results(detector, features, gates)
    for index, alone in enumerate(together):
        for one, other in zip(alone, engine_results(detector, features, gates[index])[0], strict=True):
            torch.testing.assert_close(one.rows, other.rows, rtol=1e-11, atol=0)


# Memory.


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that is created."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def test_a_small_budget_forms_no_matrix_of_tokens_by_tokens():
    detector = tiny_detector(0, heads=1, width=8, feedforward=8, queries=3)
    features = features_of(detector, grid=(30, 40))
    gates = stack([none_off()], detector.head_layout)
    with LargestTensor() as mode:
        kept = engine_results(detector, features, gates, specs=["class"])
    assert mode.largest >= 1200**2
    with LargestTensor() as mode:
        streamed = engine_results(detector, features, gates, specs=["class"], memory_budget=1)
    assert mode.largest < 1200**2 / 8
    torch.testing.assert_close(streamed[0][0].rows, kept[0][0].rows, rtol=1e-10, atol=0)


def test_hooks_do_not_outlive_a_run():
    detector = tiny_detector(0)
    engine_results(detector, features_of(detector), stack([none_off()], detector.head_layout))
    assert not any(module._forward_hooks for module in detector.modules())


# Patched attention.


class WrongKeyGradient(torch.autograd.Function):
    """The right context, with a gradient of the key that is wrong by a tenth."""

    @staticmethod
    def forward(ctx, query, key, value):
        ctx.save_for_backward(query, key, value)
        return eager(query, key, value)

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            dq, dk, dv = torch.autograd.grad(eager(*leaves), leaves, gradient)
        return dq, 0.9 * dk, dv


def wrong_backward(query, key, value, attn_mask=None):
    return WrongKeyGradient.apply(query, key, value)


def test_a_patch_is_judged_by_its_own_backward_pass():
    detector = tiny_detector(0)
    features = features_of(detector)
    gates = stack([none_off(), first_off(2)], detector.head_layout)
    expected = engine_results(detector, features, gates, specs=TARGETS[:1])
    detector.attention = wrong_backward
    assert not RelevanceEngine(detector, features).analytic
    found = engine_results(detector, features, gates, specs=TARGETS[:1])
    analytic = engine_results(detector, features, gates, specs=TARGETS[:1], backward="analytic")
    for right, wrong, formula in zip(expected, found, analytic, strict=True):
        assert (wrong[0].rows - right[0].rows).abs().max() > 1e-3 * right[0].rows.max()
        torch.testing.assert_close(formula[0].rows, right[0].rows, rtol=1e-10, atol=0)


def test_builtins_are_known_by_identity():
    detector = tiny_detector(0)
    for name in ("sdpa", "eager"):
        detector.attention = name
        assert is_builtin(detector.attention)
        assert RelevanceEngine(detector, features_of(detector)).analytic
    detector.attention = torch.nn.functional.scaled_dot_product_attention
    assert not is_builtin(detector.attention)
    found = engine_results(detector, features_of(detector), random_gates(detector, 2), specs=TARGETS[:1])
    detector.attention = "eager"
    expected = engine_results(detector, features_of(detector), random_gates(detector, 2), specs=TARGETS[:1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one[0].rows, other[0].rows, rtol=1e-10, atol=1e-16)


def test_a_patch_without_backward_pass_is_named():
    detector = tiny_detector(0)
    detector.attention = lambda query, key, value, attn_mask=None: eager(
        query.detach(), key.detach(), value.detach()
    )
    gates = stack([none_off()], detector.head_layout)
    with pytest.raises(AttentionError, match="backward pass .* decoder_cross, layer 2.*backward='analytic'"):
        engine_results(detector, features_of(detector), gates)
    assert engine_results(detector, features_of(detector), gates, backward="analytic")


# What is wrong.


@pytest.mark.parametrize(
    ("parameter", "place"),
    [
        ("encoder.layers.1.feedforward.expand.weight", "encoder's feed-forward block of layer 1"),
        ("encoder.layers.0.self_attention.value.weight", "encoder_self attention of layer 0"),
        ("decoder.layers.2.cross_attention.key.bias", "decoder_cross attention of layer 2"),
        ("class_head.weight", "class or box head"),
    ],
)
def test_nan_is_named_by_the_layer_it_appears_in_first(parameter, place):
    detector = tiny_detector(0)
    detector.get_parameter(parameter).view(-1)[0] = math.nan
    with pytest.raises(NonFiniteError, match=place):
        engine_results(detector, features_of(detector), stack([none_off()], detector.head_layout))


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, context):
        return context.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def test_nan_of_a_backward_pass_is_not_silent():
    detector = tiny_detector(0)
    detector.attention = lambda query, key, value, attn_mask=None: NanGradient.apply(eager(query, key, value))
    with pytest.raises(NonFiniteError, match="query 0 under 'none off'.*backward pass"):
        engine_results(detector, features_of(detector), stack([none_off()], detector.head_layout))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": 0}, "budget of 0 bytes"),
        ({"backward": "fast"}, "backward cannot be 'fast'.*callable"),
        ({"zero_rows": "nan"}, "zero_rows cannot be 'nan'"),
        ({"method": "chefr"}, "did you mean 'chefer'"),
    ],
)
def test_options_that_are_invalid(options, message):
    detector = tiny_detector(0)
    with pytest.raises(SettingError, match=message):
        RelevanceEngine(detector, features_of(detector), **options)


def test_one_image_at_a_time():
    detector = tiny_detector(0)
    one = features_of(detector)
    two = Features(one.tokens.expand(2, -1, -1), one.positions.expand(2, -1, -1), None, one.grid)
    with pytest.raises(SettingError, match="one image at a time"):
        RelevanceEngine(detector, two)


def test_layers_and_targets_are_chosen():
    detector = tiny_detector(0)
    features = features_of(detector)
    gates = stack([none_off(), first_off(1)], detector.head_layout)
    everything = engine_results(detector, features, gates, specs=["class"])
    engine = RelevanceEngine(detector, features)

    def only_second(index, logits, boxes):
        return [None, class_logit(0, int(logits[0, :-1].argmax()))] if index else [None, None]

    first, second = engine.run(gates, only_second, layers=[2, 0], heads=True)
    assert first.pairs == [None, None] and first.heads.eq(0).all()
    torch.testing.assert_close(second.pairs[1].rows, everything[1][0].rows[[2, 0]])
    assert second.pairs[0] is None and second.heads.shape == (2, 2, HEADS, 15)
    torch.testing.assert_close(second.heads[1].sum(-1)[:, 1:], torch.ones(2, HEADS - 1).double())
    assert second.heads[1][:, 0].eq(0).all()


def test_config_is_left_alone():
    """Explaining changes nothing about the detector: gradients stay off, mode stays as it was."""
    detector = tiny_detector(0)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    engine_results(detector, features_of(detector), stack([none_off()], detector.head_layout))
    assert all(value.equal(before[name]) for name, value in detector.state_dict().items())
    assert all(parameter.grad is None for parameter in detector.parameters())
    assert replace(detector.config) == detector.config
