"""The rules: small cases worked by hand, identities, and the published implementation's numbers."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from relevance_examples import CONFIG, assert_matches_oracle, features_of, oracle_result, tiny_detector

from headoff.detr import Detr
from headoff.detr.detector import Features
from headoff.gates import Configuration, first_off, stack
from headoff.relevance import class_logit, resolve_cam_method
from headoff.relevance.oracle import dense_evidence
from headoff.relevance.rules import (
    AttentionEvidence,
    Evidence,
    attention_cam,
    centred_cam,
    chefer,
    encoder_excess,
    gradient_cam,
    normalise,
)


def evidence_of(weights, gradient):
    weights, gradient = (
        torch.tensor(weights, dtype=torch.float64),
        torch.tensor(gradient, dtype=torch.float64),
    )
    return AttentionEvidence(weights, gradient, torch.ones_like(weights[..., :1]))


def test_equation_5_averages_over_all_heads():
    """Two heads, one of them off: its zero counts in the mean."""
    evidence = evidence_of([[[0.25, 0.75]], [[0.0, 0.0]]], [[[2.0, -1.0]], [[5.0, 5.0]]])
    assert gradient_cam(evidence).tolist() == [[0.25, 0.0]]
    assert attention_cam(evidence).tolist() == [[0.125, 0.375]]


def test_centred_cam_ignores_what_all_keys_share():
    shared = evidence_of([[[0.25, 0.75]]], [[[3.0, 3.0]]])
    assert centred_cam(shared).tolist() == [[0.0, 0.0]]
    shifted = [evidence_of([[[0.25, 0.75]]], [[[1.0 + shift, -1.0 + shift]]]) for shift in (0.0, 7.0)]
    torch.testing.assert_close(*(centred_cam(layer) for layer in shifted), rtol=1e-14, atol=0)


def test_centred_cam_is_relu_of_the_gradient_of_the_scores():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    gate = torch.tensor([1.0, 0.3], dtype=torch.float64)[:, None, None]
    weights = scores.softmax(-1) * gate
    factor = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    (of_scores,) = torch.autograd.grad((weights * factor).sum(), scores)
    evidence = AttentionEvidence(weights.detach(), factor, torch.ones(2, 3, 1))
    torch.testing.assert_close(centred_cam(evidence), of_scores.clamp(min=0).mean(0), rtol=1e-13, atol=1e-15)


def test_equation_6_multiplies_up():
    first, second = torch.rand(2, 4, 4, dtype=torch.float64)
    identity = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(
        encoder_excess([first, second]),
        (identity + second) @ (identity + first) - identity,
        rtol=0,
        atol=1e-14,
    )


def test_normalised_rows_sum_to_2_and_zero_rows_are_identity():
    excess = torch.tensor([[0.0, 1e-30], [0.0, 0.0]], dtype=torch.float64)
    assert normalise(excess).tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_excess_keeps_cams_that_adding_1_would_lose():
    tiny = torch.full((2, 2), 1e-20, dtype=torch.float64)
    assert encoder_excess([tiny]).equal(tiny)


@pytest.mark.parametrize("seed", range(3))
def test_chefer_is_the_paper_written_with_r(seed):
    """With R itself instead of R - I, where no row is zero."""
    detector = tiny_detector(seed, heads=8)
    features = features_of(detector)
    evidence = dense_evidence(detector, features, None, class_logit(2, 1))
    identity_i, identity_q = torch.eye(15, dtype=torch.float64), torch.eye(5, dtype=torch.float64)

    def bar(relevance, identity):
        excess = relevance - identity
        return excess / excess.sum(-1, keepdim=True) + identity

    r_ii, r_qq, r_qi = identity_i, identity_q, torch.zeros(5, 15, dtype=torch.float64)
    for layer in evidence.encoder:
        r_ii = r_ii + gradient_cam(layer) @ r_ii
    for own, cross in zip(evidence.decoder_self, evidence.decoder_cross, strict=True):
        r_qi = r_qi + gradient_cam(own) @ r_qi
        r_qq = r_qq + gradient_cam(own) @ r_qq
        r_qi = r_qi + bar(r_qq, identity_q).T @ gradient_cam(cross) @ bar(r_ii, identity_i)
    assert r_qi.isfinite().all()
    torch.testing.assert_close(chefer(evidence).relevance[-1], r_qi, rtol=1e-9, atol=0)


def test_a_zero_row_costs_the_reference_a_layer_and_here_a_row():
    weights, gradient = [[[0.5, 0.5]] * 2], [[[1.0, 1.0]] * 2]
    some = evidence_of(weights, gradient)
    half = evidence_of(weights, [[[1.0, 1.0], [0.0, 0.0]]])
    image = torch.ones(2, dtype=torch.bool)
    evidence = Evidence((some,), (half, some), (some, some), image)
    ours, theirs = chefer(evidence), chefer(evidence, zero_rows="reference")
    assert ours.decoder_identity_rows.tolist() == [1, 0] and ours.encoder_identity_rows == 0
    assert theirs.relevance[0].eq(0).all() and ours.relevance[0].gt(0).all()
    # e.g. row 1: Rbar_qq = [[1.5, 0.5], [0, 1]], X = 0.5 everywhere, Rbar_ii = [[1.5, 0.5], [0.5, 1.5]]
    assert ours.relevance[0].tolist() == [[1.5, 1.5], [1.5, 1.5]]
    assert theirs.relevance[1].gt(0).all()


# The published implementation's numbers.
#
# `data/relevance_reference.npz` was made by running the explanation generators that the paper's authors published (the
# DETR part of hila-chefer/Transformer-MM-Explainability at 58eaea8, its `.cuda()` calls taken out, LRP switched off,
# in float64) around their transformer, with the weights, tokens and positions that the file holds: normal numbers of
# seed 20 (matrices times 1.5 / sqrt(inputs), vectors times 0.2, those of norms plus 1), in float32. Heads were
# switched off by zeros in the columns of the output projection, in all decoder layers, which leaves their cams the
# zero that a gate does. R_qi was read after each decoder layer, at the row of the query.
#
# - `weights.*`: by the names of `Detector.state_dict()`; `tokens`, `positions` (1, 12, 16)
# - `cases`: JSON, per case the decoder layers used, sites and number of first heads off, method, query and class
# - `maps.<index of the case>`: (layers, 12), or (1, 12) for methods that the generators apply after the last layer only

with np.load(Path(__file__).parent / "data" / "relevance_reference.npz") as archive:
    REFERENCE = dict(archive)
CASES = json.loads(str(REFERENCE["cases"]))


@cache
def reference_detector(decoder_layers):
    detector = Detr(replace(CONFIG, decoder_layers=decoder_layers))
    state = detector.state_dict()
    for name in state:
        if f"weights.{name}" in REFERENCE:
            state[name] = torch.from_numpy(REFERENCE[f"weights.{name}"])
    detector.load_state_dict(state)
    return detector.double().eval().requires_grad_(False)


def reference_setting(case):
    detector = reference_detector(case["decoder_layers"])
    tokens, positions = (torch.from_numpy(REFERENCE[name]).double() for name in ("tokens", "positions"))
    features = Features(tokens, positions, None, (3, 4))
    configuration = Configuration()
    for site in case["sites"]:
        configuration = configuration & first_off(case["heads_off"], site=site)
    gates = stack([configuration], detector.head_layout)
    return detector, features, gates, class_logit(case["query"], case["label"])


@pytest.mark.parametrize("method", sorted({case["method"] for case in CASES}))
def test_oracle_agrees_with_the_published_implementation(method):
    wiped = 0
    for index, case in enumerate(CASES):
        if case["method"] != method:
            continue
        detector, features, gates, target = reference_setting(case)
        published = torch.from_numpy(REFERENCE[f"maps.{index}"])
        found = oracle_result(detector, features, gates, target, method, "reference")
        ours = found.relevance[-len(published) :, case["query"]]
        torch.testing.assert_close(
            ours, published, rtol=1e-9, atol=1e-13 * float(published.max()), msg=str(case)
        )
        if resolve_cam_method(method).takes_zero_rows:
            identity = oracle_result(detector, features, gates, target, method).relevance[:, case["query"]]
            rows_replaced = int(found.decoder_identity_rows.sum()) + found.encoder_identity_rows
            evident = case["heads_off"] < detector.config.heads
            if rows_replaced == 0:
                assert identity.equal(ours), case
            elif evident and not published.any():
                wiped += 1
                assert identity[-1].any(), "the evidence that the published code loses"
    if method == "chefer":
        assert wiped >= 4, "a decoder of one layer loses all of it"


@pytest.mark.parametrize("zero_rows", ["identity", "reference"])
@pytest.mark.parametrize("layers", [1, 2])
def test_engine_agrees_with_the_published_implementations_setting(layers, zero_rows):
    sites = ["decoder_self", "decoder_cross"]
    case = {"decoder_layers": layers, "sites": sites, "heads_off": 2, "query": 0, "label": 0}
    detector, features, gates, _ = reference_setting(case)
    assert_matches_oracle(detector, features, gates, zero_rows=zero_rows)
