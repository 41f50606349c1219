"""The sweep compared with decoding one by one, its batches, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headoff
from headoff.detr import Detr, DetrConfig
from headoff.detr.config import BackboneConfig
from headoff.encoded import EncodedImage
from headoff.errors import GateError, ImageError, NonFiniteError, SettingError
from headoff.gates import Gates
from headoff.images import Preprocessing
from headoff.sweeps import configurations_at_once, decode_all, sweep

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


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    small = Detr(SMALL, ["cat", "dog", "owl"]).double().eval().requires_grad_(False)
    # Fresh heads say "no object" or a class with no conviction; sharper ones make detections come and go.
    small.class_head.weight *= 8
    return small


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


CONFIGURATIONS = [
    *headoff.cumulative(4),
    *headoff.single_heads(3, 4),
    headoff.parse_configuration("query 2: L1-2H0"),
    headoff.parse_configuration("encoder_self L0H1"),
    headoff.parse_configuration("encoder_self L0H1; decoder_self H2=0.5; L2"),
]


def test_a_batch_equals_its_configurations_one_by_one(detector, image):
    together = sweep(detector, image, CONFIGURATIONS, confidence=0.3)
    for index, configuration in enumerate(CONFIGURATIONS):
        alone = sweep(detector, image, [configuration], confidence=0.3)
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together.boxes[index], alone.boxes[0], rtol=0, atol=1e-12)
        assert together.outcomes[index].counts == alone.outcomes[0].counts


def test_a_small_memory_budget_changes_rounding_at_most(detector, image):
    whole = sweep(detector, image, CONFIGURATIONS)
    pieces = sweep(detector, image, CONFIGURATIONS, memory_budget=1)
    torch.testing.assert_close(whole.logits, pieces.logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.boxes, pieces.boxes, rtol=0, atol=1e-12)


def test_the_budget_is_what_limits_the_batch(detector):
    features = detector.features(torch.zeros(1, 3, 48, 72, dtype=torch.float64))
    one = configurations_at_once(detector, features, 1)
    many = configurations_at_once(detector, features, 2**24)
    assert one == 1 < many < configurations_at_once(detector, features, 2**25) <= 2 * many + 1
    with pytest.raises(SettingError, match="memory budget"):
        configurations_at_once(detector, features, 0)


def test_encoder_gates_are_applied_by_the_sweep_and_refused_by_decode(detector, image):
    configuration = headoff.parse_configuration("encoder_self L0-1")
    result = sweep(detector, image, [headoff.none_off(), configuration])
    assert not torch.allclose(result.logits[0], result.logits[1])
    gates = headoff.stack([configuration], detector.head_layout)
    memory = detector.encode(torch.zeros(1, 3, 48, 48))
    with pytest.raises(GateError, match="encoder_self"):
        detector.decode(memory, gates)


def test_the_encoder_runs_once_however_many_configurations(detector, image):
    calls = []

    def counting(call, proceed):
        calls.append(call.address.site)
        return proceed(call)

    with detector.intercepting(counting):
        sweep(detector, image, headoff.all_subsets(4))
    assert calls.count("encoder_self") == SMALL.encoder_layers
    assert calls.count("decoder_cross") == SMALL.decoder_layers


def test_one_object_alone(detector, image):
    """Heads off for one object's query: before any exchange between queries, the others do not notice."""
    baseline = sweep(detector, image, confidence=0.2).baseline
    assert len(baseline) >= 2
    last = SMALL.decoder_layers - 1
    result = sweep(detector, image, [headoff.layers_off(last)], object_index=1, confidence=0.2)
    (configuration,) = result.configurations
    query = baseline[1].query
    assert configuration.text.startswith(f"query {query}")
    plain = sweep(detector, image, [headoff.none_off()], confidence=0.2)
    changed = (result.logits[0] - plain.logits[0]).abs().amax(-1) > 1e-9
    assert changed.nonzero().flatten().tolist() == [query]


def test_objects_named_in_configurations_are_those_of_the_image(detector, image):
    baseline = sweep(detector, image, "none", confidence=0.2).baseline
    queries = baseline.queries.tolist()
    named = sweep(detector, image, ["object 1: L2", "objects 0-1: H0", "last 1", "mine = L1"], confidence=0.2)
    assert [one.name for one in named.configurations] == [
        "object 1: L2 off", "object 0-1: H0 off", "last 1 off", "mine"
    ]  # fmt: skip
    numbered = [f"query {queries[1]}: L2", f"queries {queries[0]},{queries[1]}: H0", "H3", "L1"]
    torch.testing.assert_close(
        named.logits, sweep(detector, image, numbered, confidence=0.2).logits, rtol=0, atol=0
    )
    explained = headoff.explain(detector, image, "object 1: L2", confidence=0.2)
    assert explained.configurations == named.configurations[:1]
    torch.testing.assert_close(explained.logits[0], named.logits[0], rtol=0, atol=1e-12)
    for run in (sweep, headoff.explain):
        with pytest.raises(SettingError, match="object 99 does not exist"):
            run(detector, image, "object 99: H0")
        with pytest.raises(GateError, match="names the last 5 heads, but this detector has 4"):
            run(detector, image, "object 0: last 5")
    with pytest.raises(
        GateError, match="names objects, and which queries detect these is known for an image"
    ):
        detector.decode(detector.encode(torch.zeros(1, 3, 48, 48)), "object 0: H0")


def test_an_object_that_is_not_there(detector, image):
    with pytest.raises(SettingError, match="object 99 does not exist; with none off there are"):
        sweep(detector, image, object_index=99)


def test_survival_is_the_probability_at_the_objects_query(detector, image):
    result = sweep(detector, image, confidence=0.2)
    survival = result.survival()
    assert survival.shape == (len(result.baseline), len(result))
    for number, found in enumerate(result.baseline):
        probabilities = result.logits[:, found.query].softmax(-1)[:, found.label]
        torch.testing.assert_close(survival[number], probabilities.float())
    torch.testing.assert_close(survival[:, 0], result.baseline.scores)


def test_no_detections_are_a_result(detector, image):
    result = sweep(detector, image, confidence=1.0)
    assert len(result.baseline) == 0 and result.survival().shape == (0, 5)
    assert result.as_dict()["configurations"][0]["outcomes"] == []


def test_numbers_that_are_not_finite(image):
    torch.manual_seed(0)
    broken = Detr(SMALL).eval().requires_grad_(False)
    broken.decoder.layers[1].feedforward.expand.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="query 0"):
        sweep(broken, image)


@pytest.mark.parametrize(
    "configurations, error", [(["first 9"], GateError), (["L7H0"], GateError), (["query 5: H0"], GateError)]
)
def test_configurations_the_detector_cannot_have(detector, image, configurations, error):
    with pytest.raises(error):
        sweep(detector, image, configurations)


def test_an_image_that_is_not_there(detector, tmp_path):
    with pytest.raises(ImageError, match="nothing.png"):
        sweep(detector, tmp_path / "nothing.png")


def test_decode_all_keeps_the_order_over_encoder_gates(detector):
    """Configurations are grouped by encoder gate inside and come back in the order they were asked for."""
    texts = ["H0", "encoder_self L0", "H1", "encoder_self L0; H0", "none", "encoder_self L1"]
    gates = headoff.stack([headoff.parse_configuration(text) for text in texts], detector.head_layout)
    features = detector.features(torch.randn(2, 3, 48, 48, dtype=torch.float64))
    together = decode_all(detector, features, gates)
    for index in range(len(gates)):
        one: Gates = gates[index]
        alone = decode_all(detector, features, one)
        torch.testing.assert_close(together.logits[index], alone.logits[0], rtol=0, atol=1e-12)


def test_results_are_short_to_print():
    detector = headoff.load("scenes")
    result = headoff.sweep(detector, headoff.sample_image(0), "first 3")
    assert repr(result).startswith("<SweepResult: 1 configuration, ") and len(repr(result)) < 80
    assert (
        repr(result.baseline).startswith(f"<Detections: {len(result.baseline)} (")
        and len(repr(result.baseline)) < 120
    )
    assert repr(headoff.Status.KEPT) == str(headoff.Status.KEPT) == "kept"
    explanation = headoff.explain(detector, headoff.sample_image(0), "first 3")
    assert repr(explanation).startswith("<Explanation by chefer: 1 configuration, ")


def test_an_encoded_image_is_encoded_once_and_gives_the_same(detector, image, monkeypatch):
    configurations = ["first 3", "encoder_self L1H2", "query 2: L2H2"]
    expected = sweep(detector, image, configurations, confidence=0.2)
    maps = headoff.explain(detector, image, configurations, [0]).maps
    calls = []

    def count(name, run):
        monkeypatch.setattr(detector, name, lambda *arguments: (calls.append(name), run(*arguments))[1])

    for name in ("preprocess", "features", "encode_features"):
        count(name, getattr(detector, name))
    encoded = EncodedImage.of(detector, image)
    for number, configuration in enumerate(configurations):
        found = sweep(detector, encoded, configuration, confidence=0.2)
        torch.testing.assert_close(found.logits[0], expected.logits[number])
        torch.testing.assert_close(found.boxes[0], expected.boxes[number])
    # The encoder: once for the memory, once for its own gate.
    assert calls == ["preprocess", "features", "encode_features", "encode_features"]
    torch.testing.assert_close(headoff.explain(detector, encoded, configurations, [0]).maps, maps)
    assert calls.count("features") == 1
