"""For every cumulative configuration, relevance maps made with the attention under test are those of the golden files.

`test_heads_off_truth` runs the dense float64 oracle and is the only test that writes golden files, by
`pytest -k heads_off --snapshot-update`. All others are candidates: they read, under any option. For a model or an image
without golden files the oracle's maps are made on the spot, and kept in the cache.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

import headoff
from headoff.detr.detector import Detector, Features
from headoff.detr.transformer import MultiHeadAttention
from headoff.gates import stack
from headoff.harness.finding import Finding, fail_on
from headoff.harness.model.detections import answer_budget
from headoff.harness.model.mutations import accepted_wrongly, share_of_heads, with_wrong_heads
from headoff.harness.model.patched import features_on, width_of
from headoff.harness.model.precision import InDtype
from headoff.harness.model.relevance import (
    case_of,
    found_maps,
    map_findings,
    maps_by,
    relevance_budget,
    relevance_findings,
    roundings,
)
from headoff.harness.model.relu_masks import Decisions
from headoff.harness.plugin.options import settings_from
from headoff.harness.reference import cases as subjects
from headoff.harness.reference.cases import METHOD, cumulative_names
from headoff.harness.reference.golden import GoldenMaps, kept_in
from headoff.harness.reference.maps import UPDATE, Budget, CaseMaps, map_errors, stale
from headoff.harness.reference.oracle import dense_maps

MAPPED = 3
"""Bundled scenes whose maps are looked at, each under all configurations; of images of a user's own, all are."""
SOME = 1
"""Images that invariances are tried on: they hold for any image or for none."""
ANALYTIC = 2
"""Images that the analytic backward pass is tried on."""
WRONG_HEADS = 2
"""One-head errors tried for a configuration of an image; other images and seeds try others."""


def pytest_generate_tests(metafunc):
    settings = settings_from(metafunc.config)
    mapped = None if settings.images else MAPPED
    for name, count in (("mapped_scene", mapped), ("some_scene", SOME), ("analytic_scene", ANALYTIC)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, subjects.names(settings)[:count])


every_configuration = pytest.mark.parametrize("configuration", cumulative_names())


@pytest.fixture
def subject(mapped_scene, under_test):
    return subjects.subject(under_test.settings, mapped_scene)


@pytest.fixture
def some_subject(some_scene, under_test):
    return subjects.subject(under_test.settings, some_scene)


@pytest.fixture(scope="module")
def findings_of(under_test):
    """All that is wrong on a subject, found once."""

    @functools.cache
    def find(subject):
        return relevance_findings(
            under_test.attention,
            subject,
            under_test.device,
            under_test.dtype,
            pictures=under_test.settings.failures,
            calls=under_test.calls,
        )

    return find


# The truth, and the candidate for it


@every_configuration
def test_heads_off_truth(request, snapshot, under_test, scene, configuration):
    """The dense float64 oracle gives the golden file, and writes it under --snapshot-update.

    It takes its time, so a plain run makes one configuration of every second image anew, and others for another seed;
    of the others it is seen that the golden file is of this model, image and configuration. What the truth may be off
    by is the float32 error scaled to float64: as much as another machine would make of it.
    """
    subject = subjects.subject(under_test.settings, scene)
    chosen = subject.configuration(configuration)
    anew = is_its_turn(subject, configuration, under_test) or request.config.option.update_snapshots
    if subject.golden is None:
        # Made on the spot, or kept from another day: then it is to be what would be made today.
        known = subject.maps([chosen])[0]
        assert np.isfinite(known).all()
        if anew and subject.features.tokens.shape[1] <= subjects.MANY_TOKENS:
            errors = map_errors(known, subject.make_maps(chosen))
            assert errors.max() <= Budget.measured(errors, roundings(subject), dtype=torch.float64).floor
        return
    golden = snapshot.use_extension(kept_in(subject.golden, GoldenMaps))
    path = subject.golden_file(chosen)
    if anew:
        assert golden == truth_of(subject, chosen)
        return
    if not path.is_file():
        pytest.fail(f"there is no golden file for {scene}, {configuration}: run `{UPDATE}`")
    kept = CaseMaps.from_bytes(path.read_bytes())
    problems = stale(kept, subject.inputs(chosen), subject.object_names)
    assert not problems, "\n".join(problems)
    assert golden == kept


@every_configuration
def test_expected_maps(subject, configuration, findings_of):
    """Maps made with the attention's own backward pass are the oracle's."""
    fail_on(
        [
            each
            for each in findings_of(subject)
            if each.configuration == configuration
            or (each.configuration is None and each.property != "calls")
        ]
    )


def test_attention_is_called_at_every_site(subject, findings_of):
    """In every layer at least once for encoding, and for decoding."""
    fail_on([each for each in findings_of(subject) if each.configuration is None])


def test_analytic_maps(analytic_scene, under_test):
    """headoff's own attentions are differentiated by formula as well: the same maps."""
    subject = subjects.subject(under_test.settings, analytic_scene)
    device, dtype = under_test.device, width_of(under_test.dtype)
    for name in ("eager", "sdpa"):
        attention = headoff.attention.resolve_attention(name)
        found = found_maps(attention, subject, device, dtype, subject.cumulative, backward="analytic")
        fail_on(map_findings(subject, subject.cumulative, found.maps, device, dtype, f"{name}, analytic"))


def test_the_tolerance_refuses_wrong_maps(subject, under_test):
    """Under the tolerance used above, no map of zeros, no other query's map and no one-head error passes.

    Not even where a second look has raised it as far as it can.
    One-head errors are shared out over images and seeds: each run tries some under every configuration.
    """
    assert len(subject.objects) > 1, "with one object queries cannot be told apart"
    device, dtype = under_test.device, under_test.dtype
    budget = relevance_budget(subject, device, dtype)
    truth = subject.maps(subject.cumulative)
    problems = []
    turn = subjects.names(under_test.settings).index(subject.name) + under_test.seed * 10
    for index, configuration in enumerate(subject.cumulative):
        case = case_of(subject, configuration, truth[index], budget, "the float64 oracle")
        problems += accepted_wrongly(case, budget.limit)
    gated = [configuration for configuration in subject.cumulative for _ in range(WRONG_HEADS)]
    heads = [
        pair
        for index in range(len(subject.cumulative))
        for pair in share_of_heads(subject.layout, turn + index, WRONG_HEADS)
    ]
    names = [
        each.named(f"{each.name}, L{layer}H{head} wrong")
        for each, (layer, head) in zip(gated, heads, strict=True)
    ]
    gates = with_wrong_heads(stack(names, subject.layout), subject.layout, heads)
    # One object's maps mostly give an error away, and more of them can only do so better.
    found = found_maps(
        subject.detector.attention, subject, device, width_of(dtype), gated, backward="analytic",
        gates=gates, objects=[0],
    )  # fmt: skip
    for place, (configuration, (layer, head)) in enumerate(zip(gated, heads, strict=True)):
        true = truth[subject.cumulative.index(configuration)][:1]
        error = map_errors(true, found.maps[place]).max()
        if error <= budget.limit:
            problems.append(
                f"{subject.name}, {configuration.name}: with the gate of head {head} in layer {layer} wrong, maps pass "
                f"(off by {error:.1e}, allowed {budget.limit:.1e})"
            )
    if problems and (subject.model != subjects.BUNDLED or torch.finfo(dtype).bits < 32):
        pytest.skip(f"the tolerance cannot tell {len(problems)} wrong maps from rounding: {problems[0]}")
    assert not problems, "\n".join(problems)


# What must hold whatever the weights are


def test_everything_off_leaves_no_image_evidence(some_subject, under_test):
    """All cross-attention off: maps are exactly zero, the oracle's as well; with a head left there is evidence."""
    subject = some_subject
    chosen = subject.cumulative[-2:]
    found = found_maps(under_test.attention, subject, under_test.device, under_test.dtype, chosen)
    truth = subject.maps(chosen)
    assert not truth[1].any(), "the oracle, which takes no short cut"
    assert truth[0].any(), "one head sees the image"
    fail_on(
        [
            Finding(property, message, subject.name, configuration=configuration.name)
            for property, message, configuration, is_wrong in (
                ("gate", "there is evidence from heads that are off", chosen[1], found.maps[1].any()),
                ("relevance", "there is no evidence from the last head", chosen[0], not found.maps[0].any()),
            )
            if is_wrong
        ]
    )


def test_padding_changes_nothing(some_subject, under_test):
    """Whatever stands in the padding, the image's tokens get the expected maps, and the padding gets none.

    From the encoder on: at the image's border a convolution does see the padding.
    """
    subject = some_subject
    height, width = subject.features.grid
    features = padded(features_on(subject, under_test.device, under_test.dtype), bottom=2, right=3)
    chosen = some_configurations(subject)
    decisions = {
        name: embedded(on, subject.features.grid, features.grid) if name.startswith("encoder") else on
        for name, on in decisions_of(subject, chosen).on.items()
    }
    detector = own_detector(subject, under_test)
    found = maps_by(detector, features, stack(chosen, subject.layout), subject.targets, Decisions(decisions))
    if found.maps[..., height:, :].any() or found.maps[..., width:].any():
        fail_on([Finding("mask", "there is evidence in the padding", subject.name)])
    refuse_wrong(subject, under_test, chosen, found.maps[..., :height, :width], "padded")


def test_permuting_heads_changes_nothing(some_subject, under_test):
    """Heads in another order, at every site and in every layer, and gates with them: the expected maps."""
    subject = some_subject
    detector = own_detector(subject, under_test)
    generator = torch.Generator().manual_seed(under_test.seed)
    heads = detector.config.heads
    order = []
    for layer in attention_layers(detector):
        permutation = torch.randperm(heads, generator=generator)
        permute_heads(layer, permutation.to(under_test.device))
        if layer.address.site == "decoder_cross":
            order.append(permutation.argsort().tolist())
    chosen = some_configurations(subject)
    permuted = headoff.cumulative(heads, order)
    gates = stack([permuted[subject.cumulative.index(each)] for each in chosen], subject.layout)
    features = features_on(subject, under_test.device, under_test.dtype)
    found = maps_by(detector, features, gates, subject.targets, decisions_of(subject, chosen))
    refuse_wrong(subject, under_test, chosen, found.maps, "heads permuted")


def test_switching_off_a_head_without_output_changes_nothing(some_subject, under_test):
    """A head whose output projection is zero, at any site: on or off, the same maps and answers.

    But for rounding: a right attention may take another way where a gate is.
    """
    subject = some_subject
    detector = own_detector(subject, under_test)
    generator = torch.Generator().manual_seed(under_test.seed)
    heads = detector.config.heads
    silent = headoff.none_off()
    for layer in attention_layers(detector):
        head = int(torch.randint(heads, (), generator=generator))
        layer.output.weight.unflatten(1, (heads, -1))[:, head] = 0
        silent &= headoff.heads_off(head, layers=[layer.address.layer], site=layer.address.site)
    chosen = some_configurations(subject)
    features = features_on(subject, under_test.device, under_test.dtype)
    on, off = (
        maps_by(
            detector,
            features,
            stack(configurations, subject.layout),
            subject.targets,
            decisions_of(subject, chosen),
        )
        for configurations in (chosen, [each & silent for each in chosen])
    )
    if not on.maps.any():
        fail_on([Finding("relevance", "there is no evidence with heads without output", subject.name)])
    # The model is another than the one that budgets were measured on: up to their limit, which still tells heads apart.
    budget = relevance_budget(subject, under_test.device, under_test.dtype)
    answers = answer_budget(subject, under_test.device, under_test.dtype)
    apart = map_errors(on.maps, off.maps).max(), budget.limit
    logits = (on.logits - off.logits).abs().max().item(), 2 * answers.logits
    boxes = (on.boxes - off.boxes).abs().max().item(), 2 * answers.boxes
    fail_on(
        [
            Finding(
                "gate",
                f"switching off a head without output changes {what} by {by:.1e} (allowed {allowed:.1e})",
            )
            for what, (by, allowed) in {"maps": apart, "logits": logits, "boxes": boxes}.items()
            if not by <= allowed
        ]
    )


# What the tests are made of


def is_its_turn(subject, configuration: str, under_test) -> bool:
    names = cumulative_names()
    scene = subjects.names(under_test.settings).index(subject.name)
    turn = scene + under_test.seed
    return turn % 2 == 0 and names[turn % len(names)] == configuration


def truth_of(subject, configuration) -> CaseMaps:
    """The oracle's maps, with eager's float32 errors beside them."""
    maps = subject.make_maps(configuration)
    detector = headoff.load(subject.model, attention="eager", dtype=torch.float32)
    single = dense_maps(
        detector,
        features_on(subject, torch.device("cpu"), torch.float32),
        configuration,
        subject.targets,
        METHOD,
    )
    budget = Budget.measured(
        map_errors(maps, single.numpy()), roundings(subject), dtype=torch.float64, measured_in=torch.float32
    )
    return case_of(subject, configuration, maps, budget, "the float64 oracle")


def refuse_wrong(subject, under_test, configurations, maps, how: str) -> None:
    settings = under_test.settings
    label = f"{under_test.label}, {how},"
    fail_on(
        map_findings(
            subject, configurations, maps, under_test.device, under_test.dtype, label, settings.failures
        )
    )


def some_configurations(subject):
    """Nothing off, some heads off, all but one off."""
    return tuple(subject.cumulative[index] for index in (0, len(subject.cumulative) // 3, -2))


def decisions_of(subject, configurations) -> Decisions:
    return subject.decisions[[subject.configurations.index(each) for each in configurations]]


def own_detector(subject, under_test) -> Detector:
    """One whose weights may be changed."""
    attention = InDtype(under_test.attention, under_test.dtype)
    return headoff.load(
        subject.model, attention=attention, device=under_test.device, dtype=width_of(under_test.dtype)
    )


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


def attention_layers(detector: Detector) -> list[MultiHeadAttention]:
    return [module for module in detector.modules() if isinstance(module, MultiHeadAttention)]


def permute_heads(layer: MultiHeadAttention, permutation: torch.Tensor) -> None:
    """Head `permutation[i]` becomes head i."""
    for projection in (layer.query, layer.key, layer.value):
        for parameter in (projection.weight, projection.bias):
            by_head = parameter.unflatten(0, (layer.heads, -1))
            by_head.copy_(by_head[permutation].clone())
    by_head = layer.output.weight.unflatten(1, (layer.heads, -1))
    by_head.copy_(by_head[:, permutation].clone())
