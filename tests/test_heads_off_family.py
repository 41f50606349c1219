"""In a model of transformers, the attention under test gives the oracle's memory, logits and boxes.

Run where `--model` names such a model, and left out otherwise. The attention is called at the dense sites, or with
`--contract deformable` at the deformable ones. Queries are those that the oracle has chosen.
"""

from __future__ import annotations

import pytest

from headoff.harness.finding import fail_on
from headoff.harness.model.family import family_case, family_findings, undetected
from headoff.harness.reference.cases import reference_case


@pytest.fixture
def case(scene, under_test):
    where = reference_case(under_test.settings, scene)
    case = family_case(where.name, where.model, where.image)
    if not case.sites(under_test.settings.of_contract):
        pytest.skip(f"this model has no {under_test.settings.contract} attention")
    return case


def test_heads_off_family(case, under_test):
    """Under every configuration, the decoder's logits and boxes; with none and some of its heads off, the encoder's
    memory; and the attention is called at every site.
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
