"""The suite of transformers' models: what it accepts, and what it must not."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

pytest.importorskip("transformers")

from family_examples import folder_of

from headoff.attention import eager
from headoff.deformable import gather_attention
from headoff.detr.checkpoints import ModelChoice
from headoff.harness.contracts import CONTRACTS, DEFORMABLE, DENSE, is_of_contract, suits_model
from headoff.harness.model.family import FamilyCase, family_case, family_findings, undetected
from headoff.scenes.samples import sample_image

CPU = torch.device("cpu")


@functools.cache
def case_of(kind: str) -> FamilyCase:
    return family_case(kind, ModelChoice(str(folder_of(kind)), short_side=128), sample_image(0))


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Small models have no preprocessor_config.json."""


def found_by(kind, contract, attention, dtype=torch.float32):
    calls: Counter[str] = Counter()
    return family_findings(attention, contract, case_of(kind), CPU, dtype, calls), calls


@pytest.mark.parametrize(
    "kind", ("conditional_detr", "dab-detr", "rt_detr", "deformable_detr two-stage", "lw_detr")
)
def test_a_right_attention_passes_at_the_sites_of_its_contract(kind):
    found, calls = found_by(kind, DENSE, eager)
    assert not found
    deformable = kind not in ("conditional_detr", "dab-detr")
    assert bool(calls["decoder_cross"]) != deformable and calls["decoder_self"]
    if deformable:
        found, calls = found_by(kind, DEFORMABLE, gather_attention)
        assert not found and calls["decoder_cross"] and not calls["decoder_self"]
        assert bool(calls["encoder_self"]) == (kind == "deformable_detr two-stage")
    else:
        assert not case_of(kind).sites(DEFORMABLE)


def reversed_gate(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=None if head_gate is None else head_gate.flip(1))


def first_row_gate(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query, key, value, attn_mask, head_gate=None if head_gate is None else head_gate[:, :, :1])


def wrong_scale(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query * 2, key, value, attn_mask, head_gate=head_gate)


def shifted(value, shapes, locations, weights, *, head_gate=None):
    return gather_attention(value, shapes, locations + 1e-4, weights, head_gate=head_gate)


def last_level_left_out(value, shapes, locations, weights, *, head_gate=None):
    weights = weights * torch.tensor([1.0] * (weights.shape[3] - 1) + [0.0])[:, None].to(weights)
    return gather_attention(value, shapes, locations, weights, head_gate=head_gate)


def gate_left_out(value, shapes, locations, weights, *, head_gate=None):
    return gather_attention(value, shapes, locations, weights)


@pytest.mark.parametrize("attention", (reversed_gate, first_row_gate, wrong_scale))
def test_a_wrong_dense_attention_is_found(attention):
    found, _ = found_by("rt_detr", DENSE, attention)
    assert found and {finding.property for finding in found} == {"detections"}


@pytest.mark.parametrize("attention", (shifted, last_level_left_out, gate_left_out))
def test_a_wrong_deformable_attention_is_found(attention):
    found, _ = found_by("deformable_detr two-stage", DEFORMABLE, attention)
    assert found and {finding.property for finding in found} == {"detections"}
    if attention is not gate_left_out:
        assert any("memory" in finding.message for finding in found)


class _GateLeftOutBackward(torch.autograd.Function):
    """The context with a gate, and the gradient as if there were none."""

    @staticmethod
    def forward(ctx, gated, ungated):
        return gated.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None, gradient


def dense_gate_left_out_backward(query, key, value, attn_mask=None, *, head_gate=None):
    gated = eager(query, key, value, attn_mask, head_gate=head_gate)
    return _GateLeftOutBackward.apply(gated, eager(query, key, value, attn_mask))


def deformable_gate_left_out_backward(value, shapes, locations, weights, *, head_gate=None):
    gated = gather_attention(value, shapes, locations, weights, head_gate=head_gate)
    return _GateLeftOutBackward.apply(gated, gather_attention(value, shapes, locations, weights))


def locations_without_gradient(value, shapes, locations, weights, *, head_gate=None):
    return gather_attention(value, shapes, locations.detach(), weights, head_gate=head_gate)


@pytest.mark.parametrize(
    ("kind", "contract", "attention"),
    (
        ("conditional_detr", DENSE, dense_gate_left_out_backward),
        ("rt_detr", DEFORMABLE, deformable_gate_left_out_backward),
        ("deformable_detr two-stage", DEFORMABLE, locations_without_gradient),
    ),
)
def test_an_attention_that_is_wrong_in_its_backward_pass_alone_is_found(kind, contract, attention):
    found, _ = found_by(kind, contract, attention)
    assert found and all("gradient of the" in finding.message for finding in found), found
    if attention is not locations_without_gradient:
        assert {finding.configuration for finding in found} == {"first 2 off"}


def test_an_exception_is_a_finding():
    def raises(*arguments, head_gate=None):
        raise ValueError("no such shape")

    found, _ = found_by("rt_detr", DENSE, raises)
    assert [finding.property for finding in found] == ["crash"] and "no such shape" in found[0].message


def test_the_tolerance_tells_configurations_apart():
    assert not undetected(case_of("rt_detr"), DENSE, CPU, torch.float32)


def test_suites_by_contract_and_model():
    assert suits_model("family", True) and not suits_model("family", False)
    assert not suits_model("gradients", True) and suits_model("gradients", False)
    assert suits_model("operator", True) and suits_model("my_own", True)
    for contract in CONTRACTS.values():
        assert is_of_contract("family", contract) and is_of_contract("my_own", contract)
    assert not is_of_contract("operator", DEFORMABLE) and not is_of_contract("deformable", DENSE)
    assert ModelChoice(str(folder_of("rt_detr"))).is_of_family() and not ModelChoice("scenes").is_of_family()


def test_the_bundled_model_gives_its_golden_files():
    # What `pytest -k heads_off --model scenes-deformable` compares, for one scene.
    from headoff.harness.reference.golden import GoldenDetections, detection_rows
    from headoff.harness.reference.maps import CaseMaps, map_errors
    from headoff.harness.suite_files import suites_folder

    case = family_case("scene-000", ModelChoice("scenes-deformable"), sample_image(0))
    assert case.bundled
    folder = suites_folder() / "golden" / "test_heads_off_family"
    expected = (folder / "test_oracle[scene-000].json").read_text()
    found = GoldenDetections.serialize(
        None,  # type: ignore[arg-type]
        {
            "confidence": 0.5,
            "image_size": list(case.detections["none off"].image_size),
            "configurations": {name: detection_rows(one) for name, one in case.detections.items()},
        },
    )
    assert GoldenDetections.matches(None, serialized_data=found, snapshot_data=expected)  # type: ignore[arg-type]
    golden = CaseMaps.from_bytes((folder / "test_relevance[scene-000-first 4 off].npz").read_bytes())
    (chosen,) = [one for one in case.configurations if one.name == "first 4 off"]
    assert map_errors(golden.maps, case.maps(chosen).numpy()).max() < 1e-9
    for contract, attention in ((DENSE, eager), (DEFORMABLE, gather_attention)):
        assert not family_findings(attention, contract, case, CPU, torch.float32)
