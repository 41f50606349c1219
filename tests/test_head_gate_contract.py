"""All callers of attention callables pass a head gate of 4 dimensions, in the query's dtype.

So `weights * head_gate` is a right patch, without conversion or reshaping.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from relevance_examples import features_of, random_gates, tiny_detector
from torch import Tensor

from headoff.gates import SITES
from headoff.relevance import RelevanceEngine, class_logit


class PlainPatch:
    """Attention as people write it, which counts its calls by number of dimensions and dtype of the gate."""

    def __init__(self) -> None:
        self.gates: Counter[tuple[int, torch.dtype, torch.dtype]] = Counter()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *,
        head_gate: Tensor | None = None,
    ) -> Tensor:
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf)
        weights = scores.softmax(-1)
        if head_gate is not None:
            assert head_gate.shape[0] in (1, len(query)) and head_gate.shape[-1] == 1
            self.gates[head_gate.dim(), head_gate.dtype, query.dtype] += 1
            weights = weights * head_gate
        context = weights @ value
        assert context.dtype == value.dtype
        return context


MODES = [(torch.float32, None), (torch.float64, None), (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("dtype", "autocast"), MODES, ids=["float32", "float64", "autocast"])
@pytest.mark.parametrize("per_query", [False, True])
def test_every_site_of_the_detector(dtype, autocast, per_query):
    detector = tiny_detector(0, dtype)
    detector.attention = patch = PlainPatch()
    features = features_of(detector, padded=True)
    # Gates in float64: the model converts them, whatever they come in.
    gates = random_gates(detector, 3, per_query=per_query).to(dtype=torch.float64)
    assert all(gates.site(site) is not None for site in SITES)
    with torch.no_grad(), detector.autocasting(autocast):
        memory = detector.encode_features(features, gates.encoder_self[0])
        plan_gates = type(gates)(gates.names, None, gates.decoder_self, gates.decoder_cross)
        output = detector.decode(memory, plan_gates)
    assert output.logits.isfinite().all()
    expected = autocast or dtype
    config = detector.config
    assert patch.gates == {(4, expected, expected): config.encoder_layers + 2 * config.decoder_layers}


@pytest.mark.parametrize(("dtype", "autocast"), MODES, ids=["float32", "float64", "autocast"])
def test_forward_and_backward_passes_of_relevance(dtype, autocast):
    detector = tiny_detector(0, dtype)
    detector.attention = patch = PlainPatch()
    features, gates = features_of(detector, padded=True), random_gates(detector, 2, per_query=True)
    with detector.autocasting(autocast):
        engine = RelevanceEngine(detector, features)
        assert not engine.analytic
        results = list(engine.run(gates, lambda *_: [class_logit(1, 0)]))
    assert len(results) == 2 and all(float(result.pairs[0].rows.sum()) > 0 for result in results)
    assert {dimensions for dimensions, _, _ in patch.gates} == {4}
    assert all(gate == query for _, gate, query in patch.gates)
