"""For every cumulative configuration, relevance maps made with the attention under test are those of the golden files.

`test_heads_off_truth` runs the dense float64 oracle and is the only test that writes golden files, by
`pytest -k heads_off --snapshot-update`. All others only read them. For a model or an image without golden files the
oracle's maps are computed when they are needed, and cached.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import headoff
from headoff.detr.detector import Detr, Features
from headoff.detr.transformer import MultiHeadAttention
from headoff.gates import stack
from headoff.harness.finding import Finding, fail_on
from headoff.harness.model.detections import output_tolerance
from headoff.harness.model.mutations import accepted_wrongly, require_rejected, some_heads, with_wrong_heads
from headoff.harness.model.patched import features_on, findings_about, model_dtype, own_detector
from headoff.harness.model.relevance import (
    case_maps,
    map_findings,
    maps_by,
    maps_with,
    relevance_findings,
    relevance_tolerance,
    roundings,
)
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.plugin.options import settings_from
from headoff.harness.plugin.scenes import golden_files, parametrize_scenes
from headoff.harness.reference.cases import (
    MANY_TOKENS,
    METHOD,
    case_names,
    cumulative_names,
    reference_case,
)
from headoff.harness.reference.golden import GoldenMaps
from headoff.harness.reference.maps import UPDATE, CaseMaps, map_errors, map_tolerance, stale
from headoff.harness.reference.oracle import dense_maps

MAPPED = 3
"""Bundled scenes whose maps are compared, each under all configurations; of a user's own images, all are."""
SOME = 1
"""Images that invariances are tried on: they hold for any image or for none."""
WRONG_HEADS = 2
"""One-head errors tried for a configuration of an image; other images and seeds try others."""


def pytest_generate_tests(metafunc):
    mapped = None if settings_from(metafunc.config).images else MAPPED
    parametrize_scenes(metafunc, mapped_scene=mapped, some_scene=SOME, oracle_scene=None)


every_configuration = pytest.mark.parametrize("configuration", cumulative_names())


@pytest.fixture
def case(mapped_scene, under_test):
    return reference_case(under_test.settings, mapped_scene)


@pytest.fixture
def some_case(some_scene, under_test):
    return reference_case(under_test.settings, some_scene)


def findings_of(under_test, case):
    return under_test.in_model(relevance_findings, case, pictures=under_test.settings.failures)


# The oracle, and the patch compared with it


@every_configuration
@pytest.mark.oracle
def test_heads_off_truth(snapshot, pytestconfig, oracle_scene, configuration):
    """The dense float64 oracle gives the golden file, and writes it under --snapshot-update.

    It takes its time, so a plain run computes one configuration of every second image, and others for another seed; of
    the others it is checked that the golden file is about this model, image and configuration. The tolerance is eager's
    float32 error scaled to float64: as much as another machine's float64 may be off by.
    """
    settings = settings_from(pytestconfig)
    case = reference_case(settings, oracle_scene)
    chosen = case.configuration(configuration)
    turn = case_names(settings).index(case.name) + settings.seed
    its_turn = turn % 2 == 0 and cumulative_names()[turn % len(cumulative_names())] == configuration
    recompute = its_turn or pytestconfig.option.update_snapshots
    if case.golden is None:
        known = case.maps([chosen])[0]
        assert np.isfinite(known).all()
        if recompute and case.features.tokens.shape[1] <= MANY_TOKENS:
            errors = map_errors(known, case.compute_maps(chosen))
            assert errors.max() <= map_tolerance(errors, roundings(case), torch.float64).floor
        return
    golden = golden_files(snapshot, case.golden, GoldenMaps)
    path = case.golden_file(chosen)
    if recompute:
        assert golden == oracle_maps(case, chosen)
        return
    assert path.is_file(), f"there is no golden file for {case.name}, {configuration}: run `{UPDATE}`"
    stored = CaseMaps.from_bytes(path.read_bytes())
    problems = stale(stored, case.inputs(chosen), case.object_names)
    assert not problems, "\n".join(problems)
    assert golden == stored


@every_configuration
def test_expected_maps(case, under_test, configuration):
    """Maps made with the attention's own backward pass are the oracle's."""
    fail_on(findings_about(findings_of(under_test, case), configuration))


def test_attention_is_called_at_every_site(case, under_test):
    """In every layer at least once for encoding, and for decoding."""
    fail_on(findings_about(findings_of(under_test, case), None))


def test_the_tolerance_rejects_wrong_maps(case, under_test):
    """Under the tolerance used above, no map of zeros, no other query's map and no one-head error passes.

    Not even where a second look has raised it as far as it can. One-head errors are shared out over images and seeds:
    each run tries some under every configuration.
    """
    assert len(case.objects) > 1, "with one object queries cannot be told apart"
    device, dtype = under_test.device, under_test.dtype
    tolerance = relevance_tolerance(case, device, dtype)
    expected = case.maps(case.cumulative)
    accepted = []
    for configuration, maps in zip(case.cumulative, expected, strict=True):
        accepted += accepted_wrongly(case_maps(case, configuration, maps, tolerance), tolerance.limit)
    turn = case_names(under_test.settings).index(case.name) + under_test.seed * 10
    gated = [configuration for configuration in case.cumulative for _ in range(WRONG_HEADS)]
    heads = [
        pair
        for index in range(len(case.cumulative))
        for pair in some_heads(case.layout, turn + index, WRONG_HEADS)
    ]
    named = [
        configuration.named(f"{configuration.name}, L{layer}H{head} wrong")
        for configuration, (layer, head) in zip(gated, heads, strict=True)
    ]
    gates = with_wrong_heads(stack(named, case.layout), case.layout, heads)
    # One object's maps mostly give an error away, and more of them can only do so better.
    found = maps_with(
        case.detector.attention,
        case,
        device,
        model_dtype(dtype),
        gated,
        backward="analytic",
        gates=gates,
        objects=[0],
    )
    for place, (configuration, (layer, head)) in enumerate(zip(gated, heads, strict=True)):
        true = expected[case.cumulative.index(configuration)][:1]
        error = map_errors(true, found.maps[place]).max()
        if error <= tolerance.limit:
            accepted.append(
                f"maps under '{configuration.name}' with the gate of head {head} in layer {layer} wrong "
                f"(off by {error:.1e}, allowed {tolerance.limit:.1e})"
            )
    tested = int(np.prod(expected.shape[:3])) * len(case.objects) + len(heads)
    require_rejected(under_test, case, "wrong maps", accepted, tested)


# What must hold whatever the weights are


def test_everything_off_leaves_no_image_evidence(some_case, under_test):
    """All cross-attention off: maps are exactly zero, the oracle's as well; with a head left there is evidence."""
    case = some_case
    one_left, all_off = case.cumulative[-2:]
    expected = case.maps([one_left, all_off])
    assert not expected[1].any(), "the oracle, which takes no short cut"
    assert expected[0].any(), "one head sees the image"
    found = maps_with(
        under_test.attention, case, under_test.device, under_test.dtype, [one_left, all_off]
    ).maps
    if not found[0].any():
        message = "there is no evidence from the last head"
        fail_on([Finding("relevance", message, case.name, configuration=one_left.name)])
    if found[1].any():
        message = "there is evidence from heads that are off"
        fail_on([Finding("gate", message, case.name, configuration=all_off.name)])


def test_padding_changes_nothing(some_case, under_test):
    """Whatever stands in the padding, the image's tokens get the expected maps, and the padding gets none.

    From the encoder on: at the image's border a convolution does see the padding.
    """
    case = some_case
    height, width = case.features.grid
    features = padded(features_on(case, under_test.device, under_test.dtype), bottom=2, right=3)
    chosen = some_configurations(case)
    masks = {
        name: embedded(mask, case.features.grid, features.grid) if name.startswith("encoder") else mask
        for name, mask in case.masks_of(chosen).masks.items()
    }
    detector = own_detector(case, under_test.attention, under_test.device, under_test.dtype)
    found = maps_by(detector, features, stack(chosen, case.layout), case.targets, ReluMasks(masks))
    if found.maps[..., height:, :].any() or found.maps[..., width:].any():
        fail_on([Finding("mask", "there is evidence in the padding", case.name)])
    fail_on_maps(under_test, case, chosen, found.maps[..., :height, :width], "padded")


def test_permuting_heads_changes_nothing(some_case, under_test):
    """Heads in another order, at every site and in every layer, and gates with them: the expected maps."""
    case = some_case
    detector = own_detector(case, under_test.attention, under_test.device, under_test.dtype)
    generator = torch.Generator().manual_seed(under_test.seed)
    heads = detector.config.heads
    order = []
    for layer in attention_layers(detector):
        permutation = torch.randperm(heads, generator=generator)
        permute_heads(layer, permutation.to(under_test.device))
        if layer.address.site == "decoder_cross":
            order.append(permutation.argsort().tolist())
    chosen = some_configurations(case)
    permuted = headoff.cumulative(heads, order)
    gates = stack([permuted[case.cumulative.index(configuration)] for configuration in chosen], case.layout)
    features = features_on(case, under_test.device, under_test.dtype)
    found = maps_by(detector, features, gates, case.targets, case.masks_of(chosen))
    fail_on_maps(under_test, case, chosen, found.maps, "heads permuted")


def test_switching_off_a_head_without_output_changes_nothing(some_case, under_test):
    """A head whose output projection is zero, at any site: on or off, the same maps and outputs.

    But for rounding: a right attention may take another path where there is a gate.
    """
    case = some_case
    detector = own_detector(case, under_test.attention, under_test.device, under_test.dtype)
    generator = torch.Generator().manual_seed(under_test.seed)
    heads = detector.config.heads
    silent = headoff.none_off()
    for layer in attention_layers(detector):
        head = int(torch.randint(heads, (), generator=generator))
        layer.output.weight.unflatten(1, (heads, -1))[:, head] = 0
        silent &= headoff.heads_off(head, layers=[layer.address.layer], site=layer.address.site)
    chosen = some_configurations(case)
    features = features_on(case, under_test.device, under_test.dtype)
    on, off = (
        maps_by(detector, features, stack(some, case.layout), case.targets, case.masks_of(chosen))
        for some in (chosen, [configuration & silent for configuration in chosen])
    )
    if not on.maps.any():
        fail_on([Finding("relevance", "there is no evidence with heads without output", case.name)])
    # This is not the model that tolerances were measured on: up to their limit, which still tells heads apart.
    maps = relevance_tolerance(case, under_test.device, under_test.dtype)
    output = output_tolerance(case, under_test.device, under_test.dtype)
    differences = {
        "maps": (map_errors(on.maps, off.maps).max(), maps.limit),
        "logits": ((on.logits - off.logits).abs().max().item(), 2 * output.logits.allowed),
        "boxes": ((on.boxes - off.boxes).abs().max().item(), 2 * output.boxes.allowed),
    }
    fail_on(
        [
            Finding(
                "gate",
                f"switching off a head without output changes {what} by {difference:.1e} (allowed {allowed:.1e})",
                case=case.name,
            )
            for what, (difference, allowed) in differences.items()
            if not difference <= allowed
        ]
    )


# What the tests are made of


def oracle_maps(case, configuration) -> CaseMaps:
    """The oracle's maps, with a tolerance made of eager's float32 errors."""
    maps = case.compute_maps(configuration)
    single = dense_maps(
        case.model.load(attention="eager", dtype=torch.float32),
        features_on(case, torch.device("cpu"), torch.float32),
        configuration,
        case.targets,
        METHOD,
    )
    errors = map_errors(maps, single.numpy())
    tolerance = map_tolerance(errors, roundings(case), torch.float64, measured_in=torch.float32)
    return case_maps(case, configuration, maps, tolerance)


def fail_on_maps(under_test, case, configurations, maps, how: str) -> None:
    __tracebackhide__ = True
    label = f"{under_test.label}, {how},"
    pictures = under_test.settings.failures
    fail_on(map_findings(case, configurations, maps, under_test.device, under_test.dtype, label, pictures))


def some_configurations(case):
    """None off, some heads off, all but one off."""
    return tuple(case.cumulative[index] for index in (0, len(case.cumulative) // 3, -2))


def padded(features: Features, bottom: int, right: int) -> Features:
    """The features with rows and columns of padding, which large random numbers stand in."""
    (height, width), generator = features.grid, torch.Generator().manual_seed(0)
    grid = height + bottom, width + right
    image = torch.zeros(grid, dtype=torch.bool)
    image[:height, :width] = True

    def around(values: torch.Tensor) -> torch.Tensor:
        noise = 10 * torch.randn(1, grid[0] * grid[1], values.shape[-1], generator=generator)
        return embedded(values, features.grid, grid, noise.to(values))

    mask = image.flatten()[None, None, None].to(features.tokens.device)
    return Features(around(features.tokens), around(features.positions), mask, grid)


def embedded(values, grid, into, around=None):
    """Values (n, h * w, ...) of a grid as the upper left part of a larger one, of zeros unless it is given."""
    count, _, width = values.shape
    result = values.new_zeros(count, into[0] * into[1], width) if around is None else around
    result = result.unflatten(1, into)
    result[:, : grid[0], : grid[1]] = values.unflatten(1, grid)
    return result.flatten(1, 2)


def attention_layers(detector: Detr) -> list[MultiHeadAttention]:
    return [module for module in detector.modules() if isinstance(module, MultiHeadAttention)]


def permute_heads(layer: MultiHeadAttention, permutation: torch.Tensor) -> None:
    """Head `permutation[i]` becomes head i."""
    for projection in (layer.query, layer.key, layer.value):
        for parameter in (projection.weight, projection.bias):
            by_head = parameter.unflatten(0, (layer.heads, -1))
            by_head.copy_(by_head[permutation].clone())
    by_head = layer.output.weight.unflatten(1, (layer.heads, -1))
    by_head.copy_(by_head[:, permutation].clone())
