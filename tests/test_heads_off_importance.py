"""With the attention under test every head contributes what the oracle says: the cost of its removal, per object.

Leaving heads out one by one, in one layer and in all, decodes 57 configurations that a cumulative sweep has not.
"""

from __future__ import annotations

import pytest

from headoff.harness.finding import fail_on
from headoff.harness.model.importance import (
    MEASURES,
    expected_importance,
    importance_findings,
    importance_tolerance,
)
from headoff.harness.model.mutations import require_rejected
from headoff.harness.plugin.options import settings_from
from headoff.harness.plugin.scenes import STALE, golden_files, parametrize_scenes
from headoff.harness.reference.cases import reference_case
from headoff.harness.reference.golden import SCORE_DECIMALS, GoldenScores

SCENES = 2
"""Images that are tried."""


def pytest_generate_tests(metafunc):
    parametrize_scenes(metafunc, oracle_scene=SCENES, some_scene=SCENES)


@pytest.fixture
def case(some_scene, under_test):
    return reference_case(under_test.settings, some_scene)


@pytest.mark.oracle
def test_oracle(snapshot, pytestconfig, oracle_scene):
    """The float64 oracle gives the golden file, and writes it under --snapshot-update."""
    case = reference_case(settings_from(pytestconfig), oracle_scene)
    golden = golden_files(snapshot, case.golden, GoldenScores)
    scores = expected_importance(case)
    expected = {
        "objects": list(case.object_names),
        **{
            measure: [
                [[round(score, SCORE_DECIMALS) + 0.0 for score in heads] for heads in layers]  # no -0.0
                for layers in scores[measure].tolist()
            ]
            for measure in MEASURES
        },
    }
    assert golden == expected, STALE


def test_expected_importance(case, under_test):
    """What the removal of a head costs each object is within what right implementations differ by."""
    fail_on(under_test.in_model(importance_findings, case))


def test_the_tolerance_rejects_scores_of_other_heads(case, under_test):
    """The scores of the next head, and of the same head in the next layer, are rejected."""
    allowed = importance_tolerance(case, under_test.device, under_test.dtype).allowed
    accepted, tested = [], 0
    for measure, scores in expected_importance(case).items():
        for what, dim in (("head", 2), ("layer", 1)):
            if scores.shape[dim] == 1:
                continue
            off = (scores - scores.roll(-1, dim)).abs().amax((0, 3 - dim))
            for number, error in enumerate(off.tolist()):
                tested += 1
                if error <= allowed:
                    accepted.append(
                        f"{measure} of {what} {number} passes for that of the one before (off by {error:.1e}, "
                        f"allowed {allowed:.1e})"
                    )
    require_rejected(under_test, case, "scores of other heads", accepted, tested)
