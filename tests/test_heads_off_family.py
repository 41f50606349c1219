"""In a model of transformers, the attention under test gives the oracle's memory, logits and boxes.

Run where `--model` names such a model, and left out otherwise. The attention is called at the dense sites, or with
`--contract deformable` at the deformable ones. Queries are those that the oracle has chosen. Golden files are of
`--model scenes-deformable`.
"""

from __future__ import annotations

import pytest

import headoff
from headoff.harness.finding import fail_on
from headoff.harness.model.family import CONFIDENCE, FamilyCase, family_case, family_findings, undetected
from headoff.harness.plugin.options import settings_from
from headoff.harness.plugin.scenes import golden_detections, golden_files, parametrize_scenes
from headoff.harness.reference.cases import reference_case
from headoff.harness.reference.golden import GoldenDetections, GoldenMaps, golden_root
from headoff.harness.reference.maps import CaseMaps, mismatches
from headoff.harness.tolerance import Tolerance

EXPLAINED = ("none off", "first 4 off")
MAPS = Tolerance(0.0, 1e-9)
"""The sum of float64 roundings of two ways to the same maps, relative to a map's peak."""


def pytest_generate_tests(metafunc):
    parametrize_scenes(metafunc, oracle_scene=None)


def case_of(settings, scene) -> FamilyCase:
    where = reference_case(settings, scene)
    return family_case(where.name, where.model, where.image)


@pytest.fixture
def case(scene, under_test):
    case = case_of(under_test.settings, scene)
    if not case.sites(under_test.settings.of_contract):
        pytest.skip(f"this model has no {under_test.settings.contract} attention")
    return case


@pytest.fixture
def golden_case(oracle_scene, pytestconfig):
    return case_of(settings_from(pytestconfig), oracle_scene)


@pytest.fixture
def golden_folder(golden_case, pytestconfig):
    return golden_root(settings_from(pytestconfig)) if golden_case.bundled else None


@pytest.mark.oracle
def test_oracle(snapshot, golden_folder, golden_case):
    """The float64 oracle gives the golden file, and writes it under --snapshot-update."""
    golden = golden_files(snapshot, golden_folder, GoldenDetections)
    assert golden == golden_detections(CONFIDENCE, golden_case.detections), (
        "the golden file is stale: see docs/harness.md"
    )


@pytest.mark.parametrize("configuration", EXPLAINED)
@pytest.mark.oracle
def test_relevance(snapshot, pytestconfig, golden_folder, golden_case, configuration):
    """`headoff.explain` gives the maps of the golden file, which the dense oracle writes under --snapshot-update."""
    golden = golden_files(snapshot, golden_folder, GoldenMaps)
    chosen = next(one for one in golden_case.configurations if one.name == configuration)
    objects, _ = golden_case.explained()

    def maps(found, by) -> CaseMaps:
        names = tuple(f"query {one.query} ({one.class_name})" for one in objects)
        inputs = {**golden_case.inputs, "configuration": chosen.text}
        return CaseMaps(
            f"{golden_case.name}, {configuration}", found.double().numpy(), names, inputs, MAPS, by
        )

    explanation = headoff.explain(golden_case.detector, golden_case.image, [chosen], objects)
    found = maps(explanation.maps[0], "headoff.explain")
    if pytestconfig.option.update_snapshots:
        oracle = maps(golden_case.maps(chosen), "the float64 oracle")
        assert not mismatches(oracle, found)
        found = oracle
    assert golden == found, "maps differ from the golden file: see docs/harness.md"


def test_heads_off_family(case, under_test):
    """Under every configuration, the decoder's logits and boxes; with none and half of the heads off, their gradients;
    with none and some of its heads off, the encoder's memory; and the attention is called at every site.
    """
    fail_on(
        family_findings(
            under_test.attention,
            under_test.settings.of_contract,
            case,
            under_test.device,
            under_test.dtype,
            under_test.calls,
        )
    )


def test_heads_off_tolerance_tells_configurations_apart(case, under_test):
    """Under the tolerance used above, the logits for k heads off are rejected as those for k + 1."""
    for accepted in undetected(case, under_test.settings.of_contract, under_test.device, under_test.dtype):
        under_test.cannot_tell(accepted)
