"""For every cumulative configuration, the relevance maps of the bundled scenes are those of the golden files.

`test_heads_off_truth` runs the dense float64 oracle and is the only test that writes golden files, by
`pytest -k heads_off --snapshot-update`. All others are candidates: they read, under any option.

Parametrized over configuration, scene, device and attention. CUDA cases are collected everywhere and skipped where
there is no GPU, so that the list of cases is the same on every machine.
"""

from __future__ import annotations

import copy
import functools
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

import headoff
from headoff.detr.detector import Features
from headoff.detr.transformer import MultiHeadAttention
from headoff.gates import Configuration, stack
from headoff.harness.golden import ExpectedMaps, GoldenMaps, golden_folder, read_only
from headoff.harness.kinks import is_undecided
from headoff.harness.maps import UPDATE, Budget, CaseMaps, map_errors, stale
from headoff.harness.refusals import accepted_wrongly, one_head_errors_accepted
from headoff.harness.truth import dense_maps, features_of, sha256_of
from headoff.relevance import Explanation, RelevanceEngine, Target, class_logit, explain
from headoff.scenes.samples import sample_folder

METHOD = "chefer"
SCENES = [path.stem for path in headoff.sample_images()]
OBJECTS = 3
"""Objects explained in a scene, the surest ones: more of them test little more, and take room in the repository."""
SHARES = 5
"""A scene tries every fifth one-head error: with ten scenes, each is tried in two."""
CONFIGURATIONS = {configuration.name: configuration for configuration in headoff.cumulative()}
WEIGHTS = sample_folder().parent / "weights" / "scenes.safetensors"
ATTENTIONS = ["eager", "sdpa"]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
    ),
]
every_device = pytest.mark.parametrize("device", DEVICES)
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)
every_scene = pytest.mark.parametrize("scene", SCENES)
every_configuration = pytest.mark.parametrize("configuration", CONFIGURATIONS)
# Analytic tests compare with golden files as well: a few scenes say as much as all.
some_scenes = pytest.mark.parametrize("scene", SCENES[:3])


@pytest.fixture(autouse=True, scope="module")
def full_float32():
    """No TF32 in convolutions on CUDA: float32 is to mean the same everywhere."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def expected(snapshot):
    """`expected(name=truth_name(...)) == maps`: compared with the oracle's golden file, which stays as it is."""
    return read_only(snapshot.use_extension(ExpectedMaps))


# What is compared


@functools.cache
def detector_of(attention: str, dtype: torch.dtype, device: str) -> headoff.Detector:
    return headoff.load("scenes", attention=attention, dtype=dtype, device=device)


@functools.cache
def objects_of(scene: str) -> list[headoff.Detection]:
    detector = detector_of("eager", torch.float64, "cpu")
    baseline = headoff.sweep(detector, image_of(scene), [headoff.none_off()]).baseline
    return list(baseline)[:OBJECTS]


def targets_of(scene: str) -> list[Target]:
    return [class_logit(each.query, each.label) for each in objects_of(scene)]


def names_of(objects) -> tuple[str, ...]:
    return tuple(f"query {each.query} ({each.class_name})" for each in objects)


def image_of(scene: str) -> Path:
    return headoff.sample_image(SCENES.index(scene))


@functools.cache
def inputs_of(scene: str, configuration: str) -> dict[str, str]:
    return {
        "configuration": CONFIGURATIONS[configuration].text,
        "image": sha256_of(image_of(scene)),
        "method": METHOD,
        "weights": weights_hash(),
    }


@functools.cache
def weights_hash() -> str:
    return sha256_of(WEIGHTS)


@functools.cache
def dense(scene: str, configuration: str, dtype: torch.dtype, device: str) -> np.ndarray:
    """By the oracle's code, (O, M, h, w)."""
    detector = detector_of("eager", dtype, device)
    features = scene_features(scene, dtype, device)
    found = dense_maps(detector, features, CONFIGURATIONS[configuration], targets_of(scene), METHOD)
    return found.double().numpy()


@functools.cache
def scene_features(scene: str, dtype: torch.dtype, device: str) -> Features:
    return features_of(detector_of("eager", dtype, device), image_of(scene))


def truth_name(scene: str, configuration: str) -> str:
    return f"{test_heads_off_truth.__name__}[{scene}-{configuration}]"


@functools.cache
def golden_of(scene: str, configuration: str) -> CaseMaps:
    path = golden_folder(Path(__file__)) / Path(__file__).stem / f"{truth_name(scene, configuration)}.npz"
    if not path.exists():
        pytest.fail(f"there is no golden file for {scene}, {configuration}: run `{UPDATE}`")
    golden = CaseMaps.from_bytes(path.read_bytes())
    if problems := stale(golden, inputs_of(scene, configuration), names_of(objects_of(scene))):
        pytest.fail("\n".join(problems))
    return golden


@functools.cache
def budget_of(scene: str, configuration: str, device: str) -> Budget:
    """What a float32 candidate on `device` may be off by: measured here and now, against the golden files."""
    errors = {
        name: map_errors(golden_of(scene, name).maps, dense(scene, name, torch.float32, device))
        for name in decided(scene)
    }
    return Budget.measured(errors[configuration], roundings(), among=max(map(np.max, errors.values())))


@functools.cache
def decided(scene: str) -> list[str]:
    """Names of the configurations whose maps float32 can be asked for; the others are left out with a reason."""
    detector = detector_of("eager", torch.float64, "cpu")
    features = scene_features(scene, torch.float64, "cpu")
    return [name for name, each in CONFIGURATIONS.items() if not is_undecided(detector, features, each)]


def roundings() -> int:
    """Attention layers of the detector: one in an encoder layer, two in a decoder layer."""
    config = detector_of("eager", torch.float64, "cpu").config
    return config.encoder_layers + 2 * config.decoder_layers


@functools.cache
def explanation_of(scene: str, attention: str, device: str) -> Explanation:
    """By `explain`, all configurations, in float32."""
    return explained(detector_of(attention, torch.float32, device), scene, tuple(CONFIGURATIONS.values()))


def explained(
    detector: headoff.Detector, scene: str, configurations: tuple[Configuration, ...]
) -> Explanation:
    queries = [each.query for each in objects_of(scene)]
    return explain(detector, image_of(scene), configurations, queries=queries, method=METHOD)


def candidate(scene: str, configuration: str, maps, objects, device: str, found_by: str) -> CaseMaps:
    return CaseMaps(
        case=f"{scene}, {configuration}",
        maps=np.asarray(maps, np.float64),
        objects=names_of(objects),
        inputs=inputs_of(scene, configuration),
        budget=budget_of(scene, configuration, device),
        found_by=f"{found_by} in float32 on {device}",
    )


def truth_of(scene: str, configuration: str) -> tuple[np.ndarray, np.ndarray, float]:
    """The oracle's maps, eager's float32 errors beside them, and the largest of the scene."""
    errors = {
        name: map_errors(dense(scene, name, torch.float64, "cpu"), dense(scene, name, torch.float32, "cpu"))
        for name in {*decided(scene), configuration}
    }
    among = max(float(errors[name].max()) for name in decided(scene))
    return dense(scene, configuration, torch.float64, "cpu"), errors[configuration], among


# The truth, and candidates for it


@every_configuration
@every_scene
def test_heads_off_truth(snapshot, scene, configuration):
    """The dense float64 oracle gives the golden file, and writes it under --snapshot-update.

    What it may be off by is the float32 error scaled to float64: as much as another machine would make of it.
    """
    maps, errors, among = truth_of(scene, configuration)
    assert snapshot.use_extension(GoldenMaps) == CaseMaps(
        case=f"{scene}, {configuration}",
        maps=maps,
        objects=names_of(objects_of(scene)),
        inputs=inputs_of(scene, configuration),
        budget=Budget.measured(
            errors, roundings(), among=among, dtype=torch.float64, measured_in=torch.float32
        ),
    )


@every_configuration
@every_scene
@every_attention
@every_device
def test_expected_maps(expected, device, attention, scene, configuration):
    """`headoff.explain` in float32, with each attention, gives the maps of the golden file."""
    if configuration not in decided(scene):
        pytest.skip("a ReLU of the decoder is so near zero here that float32 cannot tell on which side it is")
    found = explanation_of(scene, attention, device)
    maps = found.maps[list(CONFIGURATIONS).index(configuration)]
    assert expected(name=truth_name(scene, configuration)) == candidate(
        scene, configuration, maps, found.objects, device, attention
    )


@every_scene
@every_device
def test_the_tolerance_refuses_wrong_maps(device, scene):
    """Under the tolerance used above, no map of zeros, no other query's map and no one-head error passes.

    One-head errors are shared out: each head of each layer is wrong in some scenes, under every configuration.
    """
    assert len(objects_of(scene)) > 1, "a scene with one object cannot tell queries apart"
    engine = RelevanceEngine(
        detector_of("sdpa", torch.float32, "cpu"), scene_features(scene, torch.float32, "cpu"), method=METHOD
    )
    layout = engine.detector.head_layout
    heads = list(product(range(layout.decoder_layers), range(layout.heads)))
    share = heads[SCENES.index(scene) % SHARES :: SHARES]
    problems = []
    for name in decided(scene):
        truth, allowed = golden_of(scene, name), budget_of(scene, name, device).allowed
        problems += accepted_wrongly(truth, allowed)
        problems += one_head_errors_accepted(
            engine, CONFIGURATIONS[name], targets_of(scene), truth, allowed, share
        )
    assert not problems, "\n".join(problems)


# What must hold whatever the weights are


@every_attention
@every_device
def test_everything_off_leaves_no_image_evidence(device, attention):
    """All cross-attention off: maps are exactly zero, and detections are the same for every image."""
    everything_off = list(CONFIGURATIONS)[-1]
    found = [explanation_of(scene, attention, device) for scene in SCENES]
    for scene, each in zip(SCENES, found, strict=True):
        assert not golden_of(scene, everything_off).maps.any(), "the oracle, which takes no short cut"
        assert not each.maps[-1].any()
        assert {status for row in each.statuses[-1] for status in row} == {"no image evidence"}
        assert each.maps[:-1].flatten(3).any(-1).all(), "with a head left there is evidence"
        assert torch.equal(each.logits[-1], found[0].logits[-1])
        assert torch.equal(each.boxes[-1], found[0].boxes[-1])


@some_scenes
@every_attention
@every_device
def test_padding_changes_nothing(expected, device, attention, scene):
    """Whatever stands in the padding, the image's tokens get the maps of the golden file, and the padding gets none.

    From the encoder on: at the image's border a convolution does see the padding.
    """
    detector = detector_of(attention, torch.float32, device)
    features = padded(scene_features(scene, torch.float32, device), bottom=2, right=3)
    height, width = scene_features(scene, torch.float32, device).grid
    targets = targets_of(scene)
    gates = stack((CONFIGURATIONS[name] for name in decided(scene)), detector.head_layout)
    for found in RelevanceEngine(detector, features, method=METHOD).run(gates, lambda *_: targets):
        maps = torch.stack([pair.rows for pair in found.pairs]).unflatten(-1, features.grid)
        assert not maps[..., height:, :].any() and not maps[..., width:].any()
        name = gates.names[found.index]
        assert expected(name=truth_name(scene, name)) == candidate(
            scene, name, maps[..., :height, :width], objects_of(scene), device, f"{attention}, padded,"
        )


def padded(features: Features, bottom: int, right: int) -> Features:
    """The features with rows and columns of padding, which large random numbers stand in."""
    (height, width), generator = features.grid, torch.Generator().manual_seed(0)
    grid = height + bottom, width + right
    image = torch.zeros(grid, dtype=torch.bool)
    image[:height, :width] = True

    def embed(values: torch.Tensor) -> torch.Tensor:
        around = 10 * torch.randn(1, *grid, values.shape[-1], generator=generator).to(values)
        around[:, :height, :width] = values.unflatten(1, features.grid)
        return around.flatten(1, 2)

    mask = image.flatten()[None, None, None].to(features.tokens.device)
    return Features(embed(features.tokens), embed(features.positions), mask, grid)


@some_scenes
@every_attention
@every_device
def test_permuting_heads_changes_nothing(expected, device, attention, scene):
    """Heads in another order, at every site and in every layer, and gates with them: the maps of the golden file."""
    detector = copy.deepcopy(detector_of(attention, torch.float32, device))
    generator = torch.Generator().manual_seed(0)
    heads = detector.config.heads
    order = []
    for layer in attention_layers(detector):
        permutation = torch.randperm(heads, generator=generator)
        permute_heads(layer, permutation.to(device))
        if layer.address.site == "decoder_cross":
            order.append(permutation.argsort().tolist())
    found = explained(detector, scene, headoff.cumulative(heads, order))
    for name, maps in zip(CONFIGURATIONS, found.maps, strict=True):
        if name not in decided(scene):
            continue
        assert expected(name=truth_name(scene, name)) == candidate(
            scene, name, maps, found.objects, device, f"{attention}, heads permuted,"
        )


@some_scenes
@every_attention
@every_device
def test_switching_off_a_head_without_output_changes_nothing(device, attention, scene):
    """A head whose output projection is zero, at any site: on or off, the very same maps and detections."""
    detector = copy.deepcopy(detector_of(attention, torch.float32, device))
    generator = torch.Generator().manual_seed(0)
    heads = detector.config.heads
    silent = headoff.none_off()
    for layer in attention_layers(detector):
        head = int(torch.randint(heads, (), generator=generator))
        layer.output.weight.unflatten(1, (heads, -1))[:, head] = 0
        silent &= headoff.heads_off(head, layers=[layer.address.layer], site=layer.address.site)
    some = (headoff.none_off(), headoff.first_off(3), headoff.first_off(7))
    on = explained(detector, scene, some)
    off = explained(detector, scene, tuple(each & silent for each in some))
    assert on.maps.any()
    assert torch.equal(on.logits, off.logits) and torch.equal(on.boxes, off.boxes)
    assert torch.equal(on.maps, off.maps)


def attention_layers(detector: headoff.Detector) -> list[MultiHeadAttention]:
    return [module for module in detector.modules() if isinstance(module, MultiHeadAttention)]


def permute_heads(layer: MultiHeadAttention, permutation: torch.Tensor) -> None:
    """Head `permutation[i]` becomes head i."""
    for projection in (layer.query, layer.key, layer.value):
        for parameter in (projection.weight, projection.bias):
            by_head = parameter.unflatten(0, (layer.heads, -1))
            by_head.copy_(by_head[permutation].clone())
    by_head = layer.output.weight.unflatten(1, (layer.heads, -1))
    by_head.copy_(by_head[:, permutation].clone())
