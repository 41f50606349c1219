"""LRP: conservation, two oracles by autograd, and properties under gates and padding. In float64 unless said."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lrp_examples import modified_gradient, positive_evidence
from relevance_examples import (
    HEADS,
    QUERIES,
    features_of,
    random_gates,
    targets_of,
    tiny_detector,
)
from relevance_examples import (
    TARGETS as ALL_TARGETS,
)
from torch import nn

from headoff.detr.detector import Features
from headoff.errors import SettingError
from headoff.gates import heads_off, none_off, stack
from headoff.relevance import EngineMethod, class_logit, explain, method_names, resolve_method
from headoff.relevance.engine import TargetGradients
from headoff.relevance.engines import make_engine
from headoff.relevance.lrp import EpsilonRules, PositiveRules
from headoff.relevance.lrp.attention import AttentionRelevance
from headoff.relevance.records import AttentionRecord
from headoff.relevance.rules import chefer, gradient_cam


def positive_target(logits, boxes):
    """A target that several queries have a part in, and both heads."""
    return logits[4, 0] + boxes[0, 3] + 0.5 * logits[1, 1] * logits[1, 1].detach().sign()


TARGETS = (*ALL_TARGETS[:4], positive_target)
METHODS = ("chefer_lrp", "transformer_attribution", "partial_lrp", "attn_lrp")
RULES = (PositiveRules(0), EpsilonRules(0))


def results(detector, features, gates, method, specs=TARGETS, layers=None, **options):
    """Rows (C, targets, M, N)."""
    engine = make_engine(detector, features, method=method, **options)
    found = sorted(
        engine.run(gates, lambda _, logits, __: targets_of(logits, specs), layers=layers),
        key=lambda found: found.index,
    )
    return torch.stack([torch.stack([pair.rows for pair in found.pairs]) for found in found])


def exact(name):
    """The method without a stabiliser."""
    method = resolve_method(name)
    assert isinstance(method, EngineMethod)
    return replace(method, rules=type(method.rules)(0))


def on_and_random(detector, seed, **options):
    """None off, and random gates at all sites."""
    gates = random_gates(detector, 3, seed=seed, **options)
    for site in (gates.encoder_self, gates.decoder_self, gates.decoder_cross):
        assert site is not None
        site[0] = 1
    return gates


# Operators.


def operands(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: type(rules).__name__)
@pytest.mark.parametrize("after_relu", [False, True])
def test_linear_layers_keep_relevance(rules, after_relu):
    """The z+ rule keeps the total; the epsilon rule gives the bias its share of each output, and keeps the rest."""
    layer = nn.Linear(6, 4).double().requires_grad_(False)
    x = operands(2, 5, 6).abs() if after_relu else operands(2, 5, 6)
    y, runs, relevance = layer(x), torch.tensor([1, 0, 1]), operands(3, 5, 4, seed=1)
    found = rules.linear(layer, x, y, after_relu=after_relu)(relevance, runs)
    kept = relevance if isinstance(rules, PositiveRules) else relevance * (1 - layer.bias / y[runs])
    torch.testing.assert_close(found.sum((1, 2)), kept.sum((1, 2)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: type(rules).__name__)
def test_sums_keep_relevance(rules):
    x, update, relevance = operands(2, 5, 6), operands(2, 5, 6, seed=1), operands(3, 5, 6, seed=2)
    parts = rules.residual(x, update)(relevance, torch.tensor([1, 0, 1]))
    torch.testing.assert_close(sum(parts).sum((1, 2)), relevance.sum((1, 2)), rtol=1e-10, atol=1e-12)
    if isinstance(rules, PositiveRules):
        assert (torch.stack(parts).sum((2, 3)) * relevance.sum((1, 2)) >= 0).all()
    else:
        torch.testing.assert_close(sum(parts), relevance)  # number by number


def test_epsilon_rules_give_the_norm_s_bias_its_share():
    norm = nn.LayerNorm(6).double().requires_grad_(False)
    norm.weight.copy_(operands(6)), norm.bias.copy_(operands(6, seed=1))
    x, relevance, runs = operands(2, 5, 6, seed=2), operands(3, 5, 6, seed=3), torch.tensor([1, 0, 1])
    y = norm(x)
    found = EpsilonRules(0).norm(norm, x, y)(relevance, runs)
    kept = (relevance * (1 - norm.bias / y[runs])).sum(-1)
    torch.testing.assert_close(found.sum(-1), kept, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("tile", [1, 30, 2**17])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: type(rules).__name__)
def test_attention_keeps_relevance(rules, batched, tile):
    """Values get half; what queries get is what keys get; without the softmax's bias that is a quarter each."""
    query, key, value = (operands(2, 3, n, 4, seed=n) for n in (5, 7, 8))
    value = value[:, :, :7]
    keys = torch.tensor([True] * 6 + [False])
    gate = torch.tensor([1.0, 0.3, 0.0]).double().view(1, 3, 1, 1)
    weights = (query @ key.mT / 2).masked_fill(~keys, -torch.inf).softmax(-1)
    record = AttentionRecord(("decoder_self", 0), query, key, value, gate, keys, gate * weights @ value)
    relevance, runs = operands(3, 3, 5, 4, seed=3), torch.tensor([1, 0, 1])
    found = AttentionRelevance(record, rules, tile, batched, keep=tile == 30)(relevance, runs)
    if isinstance(rules, PositiveRules):  # 1 / 0 is 0 there: the head that is off keeps nothing
        assert not any(tensor[:, 2].any() for tensor in found)
    on = slice(0, 2)
    total = relevance[:, on].sum((1, 2, 3))
    sums = [tensor[:, on].sum((1, 2, 3)) for tensor in found[1:]]
    torch.testing.assert_close(sums[2], total / 2)
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-8, atol=1e-10)
    if isinstance(rules, PositiveRules):
        torch.testing.assert_close(sums[0], total / 4)
    assert found.key[:, on, 6].eq(0).all() and found.value[:, on, 6].eq(0).all()
    weights = (gate * weights)[runs]
    of_weights = (weights * (found.contribution @ value[runs].mT))[:, on]
    torch.testing.assert_close(of_weights.sum((1, 2, 3)), total / 2)


# The whole.


@pytest.mark.parametrize("pre_norm", [False, True])
def test_positive_relevance_is_kept_from_the_target_to_the_memory_and_to_the_image(pre_norm):
    """Relevance 1 of the target goes to the memory and to the decoder's first self-attention, whose input is only the
    queries' embeddings; what the memory gets comes out at the image tokens.
    """
    detector = tiny_detector(3, pre_norm=pre_norm)
    features = features_of(detector, padded=True)
    engine = make_engine(detector, features, method=exact("chefer_lrp"))
    gates = random_gates(detector, 2, per_query=True)
    with torch.no_grad():
        encoder = engine._run_encoder(None)
        decoder = engine._run_decoder(encoder, gates)
        runs = torch.tensor([0, 1, 1])
        one = torch.zeros(3, QUERIES, 4, dtype=torch.float64)
        one[:, 2, 1] = 1
        contributions, of_memory = engine._decoder_relevance(
            decoder, TargetGradients(one, one, torch.zeros_like(one)), runs
        )
        first = contributions.self_attention[0] * decoder.layers[0].self_attention.vjp.record.context[runs]
        # S is half of the relevance over the context.
        total = sum(of_memory).sum((1, 2)) + 2 * first.sum((1, 2, 3))
        torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-8, atol=0)
        memory = sum(of_memory)
        tokens = encoder.relevance(memory)
        torch.testing.assert_close(tokens.sum((1, 2)), memory.sum((1, 2)), rtol=1e-8, atol=0)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_attn_lrp_is_kept_by_image_positions_queries_and_biases_together(pre_norm):
    detector = tiny_detector(4, pre_norm=pre_norm)
    features = features_of(detector, padded=True)
    features = replace(features, positions=features.positions.clone().requires_grad_())
    absorbing = [features.positions, detector.query_embedding.weight.requires_grad_()]
    for module in detector.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            absorbing.append(module.bias.requires_grad_())
    gates = random_gates(detector, 1, seed=5)
    parts = modified_gradient(detector, features, gates, class_logit(1, 2), 2, *absorbing)
    detector.requires_grad_(False)
    memory = detector.encode_features(
        replace(features, positions=features.positions.detach()), gates.encoder_self[0]
    )
    value = detector.decode(memory, replace(gates, encoder_self=None)).logits[0, 0, 1, 2]
    size = max(float(part.abs().sum()) for part in parts)
    assert sum(part.sum() for part in parts) == pytest.approx(float(value), abs=1e-10 * size)
    (found,) = results(
        detector,
        features_of(detector, padded=True),
        gates,
        exact("attn_lrp"),
        layers=[2],
        specs=["cx", lambda logits, _: logits[1, 2]],
    )[:, 1]
    torch.testing.assert_close(found[0], parts[0][0].sum(-1), rtol=1e-7, atol=1e-9 * size)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_query", [False, True])
def test_methods_of_cams_agree_with_the_oracle(seed, per_query):
    detector = tiny_detector(seed, pre_norm=seed == 1)
    features = features_of(detector, padded=seed != 2, seed=seed)
    gates = on_and_random(detector, seed, per_query=per_query)
    logits = {}
    engine = make_engine(detector, features, method="chefer_lrp")
    for found in engine.run(gates, lambda *_: ()):
        logits[found.index] = found.logits
    found = {name: results(detector, features, gates, exact(name)) for name in METHODS[:3]}
    for index in range(len(gates)):
        for query, target in enumerate(targets_of(logits[index], TARGETS)):
            evidence = positive_evidence(detector, features, gates[index], target)
            expected = {
                "chefer_lrp": chefer(evidence).relevance[:, query],
                "transformer_attribution": torch.stack(
                    [gradient_cam(layer)[query] for layer in evidence.decoder_cross]
                ),
                "partial_lrp": torch.stack(
                    [layer.weights.mean(0)[query] for layer in evidence.decoder_cross]
                ),
            }
            for name, rows in expected.items():
                difference = (found[name][index, query] - rows).abs().max()
                assert difference <= 1e-7 * rows.abs().max(), (name, index, target.name, difference)
    assert all(rows.abs().amax((2, 3)).gt(0).any() for rows in found.values())


@pytest.mark.parametrize("seed", range(3))
def test_attn_lrp_is_gradient_times_input_with_modified_gradients(seed):
    """After every decoder layer: the memory is a constant for later layers."""
    detector = tiny_detector(seed, pre_norm=seed == 1)
    features = features_of(detector, padded=seed != 2, seed=seed)
    gates = on_and_random(detector, seed, per_query=True)
    found = results(detector, features, gates, exact("attn_lrp"), ALL_TARGETS)
    logits = [
        found.logits
        for found in sorted(
            make_engine(detector, features, method="attn_lrp").run(gates, lambda *_: ()),
            key=lambda found: found.index,
        )
    ]
    for index in range(len(gates)):
        for query, target in enumerate(targets_of(logits[index], ALL_TARGETS)):
            for layer in range(3):
                tokens, _ = modified_gradient(detector, features, gates[index], target, layer)
                difference = (found[index, query, layer] - tokens[0].sum(-1)).abs().max()
                # Relevance of single channels is larger than that of tokens, and so are rounding errors.
                assert difference <= 1e-8 * tokens.abs().max(), (index, target.name, layer)


@pytest.mark.parametrize("name", METHODS)
def test_neither_batches_nor_budget_nor_layers_change_anything(name):
    detector = tiny_detector(5)
    features = features_of(detector, padded=True)
    gates = on_and_random(detector, 5)
    together = results(detector, features, gates, name)
    scale = together.abs().amax()
    torch.testing.assert_close(
        results(detector, features, gates, name, memory_budget=1), together, rtol=1e-8, atol=1e-12 * scale
    )
    alone = torch.cat([results(detector, features, gates[index], name, layers=[1]) for index in range(3)])
    torch.testing.assert_close(alone[:, :, 0], together[:, :, 1], rtol=1e-8, atol=1e-12 * scale)


@pytest.mark.parametrize("name", METHODS)
def test_no_head_no_map(name):
    """With all cross-attention off maps are zero, and a head that is off carries no relevance; nothing is NaN."""
    detector = tiny_detector(6)
    features = features_of(detector, padded=True)
    gates = stack([none_off(), heads_off(*range(HEADS))], detector.head_layout)
    found = results(detector, features, gates, name)
    assert found.isfinite().all() and found[0].any() and not found[1].any()
    assert not found[..., ~features.attn_mask.flatten()].any()


@pytest.mark.parametrize("name", ["chefer_lrp", "attn_lrp"])
def test_a_head_that_is_off_carries_no_relevance(name):
    detector = tiny_detector(6)
    engine = make_engine(detector, features_of(detector), method=name)
    gates = stack([heads_off(1)], detector.head_layout)
    with torch.no_grad():
        decoder = engine._run_decoder(engine._run_encoder(None), gates)
        for layer, traced in zip(decoder.relevance.cross_attention, decoder.layers, strict=True):
            *_, value = layer.attention(operands(1, HEADS, QUERIES, 4), torch.tensor([0]))
            assert not value[:, 1].any() and value[:, [0, 2, 3]].flatten(2).any(-1).all()
            assert not traced.cross_attention.vjp.record.context[:, 1].any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("pre_norm", [False, True])
def test_float32_is_near_float64(name, pre_norm):
    detector = tiny_detector(7, pre_norm=pre_norm)
    features = features_of(detector)
    gates = stack([none_off(), heads_off(0, 2)], detector.head_layout)
    precise = results(detector, features, gates, name, TARGETS[:2])
    single = Features(features.tokens.float(), features.positions.float(), None, features.grid)
    rounded = results(detector.float(), single, gates, name, TARGETS[:2])
    assert rounded.dtype == torch.float32
    error = (rounded - precise).abs().amax((2, 3)) / precise.abs().amax((2, 3))
    assert error.max() < 1e-2, error


def test_explanations():
    detector = tiny_detector(0)
    picture = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    for name in METHODS:
        found = explain(detector, picture, ["none", "first 2"], [3, 0], name, ablation="uniform")
        assert found.method == name and found.maps.isfinite().all() and found.maps.any()
        assert resolve_method(name).signed or not (found.maps < 0).any()
    reference = explain(detector, picture, ["none"], [3], "chefer_lrp", zero_rows="reference")
    assert reference.zero_rows == "reference"
    with pytest.raises(SettingError, match="zero_rows cannot be 'reference' for attn_lrp"):
        explain(detector, picture, queries=[3], method="attn_lrp", zero_rows="reference")


def test_other_detectors_are_refused_with_the_methods_that_work_there():
    with pytest.raises(
        SettingError, match="chefer_lrp knows the layers of headoff's own DETR only.*chefer_centred"
    ):
        make_engine(nn.Identity(), None, method="chefer_lrp")
    others = set(method_names()) - set(method_names(nn.Identity()))
    assert others == set(METHODS) and method_names(tiny_detector()) == method_names()


def test_a_target_whose_relevance_sums_to_zero_is_refused():
    detector = tiny_detector(0)
    gates = stack([none_off()], detector.head_layout)
    for function in (
        lambda logits, _: logits[0, 0] - logits[0, 1],
        lambda logits, _: logits.softmax(-1)[0, 0],
    ):
        with pytest.raises(SettingError, match="sums to zero.*class logit.*attn_lrp"):
            results(detector, features_of(detector), gates, "chefer_lrp", [function])
        assert results(detector, features_of(detector), gates, "attn_lrp", [function]).any()
