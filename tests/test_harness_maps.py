"""Comparison of maps, error budgets, and the proof that a tolerance is small enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from headoff.attention import eager
from headoff.errors import SettingError
from headoff.gates import Clause, Configuration, HeadLayout, first_off
from headoff.harness.model import relevance
from headoff.harness.model.mutations import accepted_wrongly, share_of_heads, wrong_by_one_head
from headoff.harness.reference import cases as subjects
from headoff.harness.reference.maps import MOST_RAISED, Budget, CaseMaps, map_errors, mismatches
from headoff.harness.settings import Settings


def case(maps, allowed=1e-6) -> CaseMaps:
    maps = np.asarray(maps, np.float64)
    names = tuple(f"query {index}" for index in range(len(maps)))
    budget = Budget(np.zeros(maps.shape[:2]), 0.0, allowed)
    return CaseMaps("a case", maps, names, {"weights": "w"}, budget)


def random_maps(seed=0):
    return np.random.default_rng(seed).random((2, 3, 4, 5))


def test_errors_are_relative_to_the_true_peak():
    true = np.array([[[1.0, 4.0]], [[1e-9, 4e-9]]])
    assert map_errors(true, true * [1.0, 1.5]).tolist() == pytest.approx([0.5, 0.5])


def test_what_is_truly_zero_must_be_exactly_zero():
    zero = np.zeros((1, 2))
    assert map_errors(zero, zero) == 0
    assert map_errors(zero, zero + 1e-300) == np.inf


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_wrong(value):
    assert map_errors(np.ones((1, 2)), np.array([[1.0, value]])) == np.inf


def test_a_budget_is_measured():
    errors = np.array([[1e-6, 3e-6]])
    single = Budget.measured(errors, 10)
    assert single.allowed == pytest.approx(4 * 3e-6 + 10 * 2**-23)
    assert Budget.measured(errors, 10, among=9e-6).allowed == pytest.approx(4 * 9e-6 + 10 * 2**-23)
    double = Budget.measured(errors, 10, dtype=torch.float64)
    assert double.allowed == pytest.approx(single.allowed * 2**-29)
    half = Budget.measured(errors, 10, dtype=torch.bfloat16, measured_in=torch.bfloat16)
    assert half.allowed == pytest.approx(4 * 3e-6 + 10 * 2**-7)


def test_a_budget_is_raised_within_limits():
    errors = np.array([[1e-6, 3e-6]])
    budget = Budget.measured(errors, 10)
    assert budget.limit == pytest.approx(MOST_RAISED * budget.allowed)
    assert budget.raised(2e-6).allowed == budget.allowed, "never lowered"
    assert budget.raised(9e-6).allowed == pytest.approx(4 * 9e-6 + budget.floor)
    assert budget.raised(1.0).allowed == pytest.approx(budget.limit)


def softmax_of_others(query, key, value, attn_mask=None, *, head_gate=None):
    return eager(query * (1 + 1.3e-5), key, value, attn_mask, head_gate=head_gate)


def test_an_unlucky_budget_is_looked_at_again(monkeypatch, tmp_path):
    """Where few right implementations came out near the truth by luck, more are asked; a wrong one stays wrong."""
    subject = subjects.subject(Settings(), "scene-000")
    configuration = subject.cumulative[3]
    how = torch.device("cpu"), torch.float32, [configuration]
    lucky = relevance.relevance_budget(subject, *how[:2])
    found = relevance.found_maps(eager, subject, *how).maps
    off = float(map_errors(subject.maps([configuration]), found).max())
    unlucky = replace(lucky, eager_error=(off / 2 - lucky.floor) / 4)
    monkeypatch.setattr(relevance, "relevance_budget", lambda *_: unlucky)
    monkeypatch.setattr(relevance, "SECOND_LOOKS", 8)
    monkeypatch.setenv("HEADOFF_CACHE", str(tmp_path))
    relevance.error_reached.cache_clear()
    assert off > unlucky.allowed
    assert relevance.relevance_findings(eager, subject, *how) == []

    (wrong,) = relevance.relevance_findings(softmax_of_others, subject, *how)
    assert wrong.property == "relevance" and unlucky.allowed < wrong.budget < wrong.error < unlucky.limit
    relevance.error_reached.cache_clear()


def test_bytes_and_back():
    true = case(random_maps())
    again = CaseMaps.from_bytes(true.to_bytes())
    assert np.array_equal(again.maps, true.maps) and again.maps.dtype == np.float64
    assert np.array_equal(again.budget.eager_errors, true.budget.eager_errors)
    for name in ("case", "objects", "inputs", "found_by"):
        assert getattr(again, name) == getattr(true, name)
    assert again.budget.allowed == true.budget.allowed


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), case(random_maps()).to_bytes()[:-100]])
def test_what_is_no_golden_file_is_told(data):
    with pytest.raises(SettingError, match="golden file cannot be read .* --snapshot-update"):
        CaseMaps.from_bytes(data)


def test_shapes_that_do_not_go_together_are_told():
    with pytest.raises(SettingError, match="do not go with 1 objects"):
        CaseMaps("a case", random_maps(), ("query 0",), {}, Budget(np.zeros((2, 3)), 0.0, 1.0))


def test_the_worst_maps_are_told_first_and_the_rest_counted():
    true = case(random_maps().repeat(2, axis=0))
    wrong = case(true.maps * (1 + np.linspace(0.01, 0.12, 12).reshape(4, 3, 1, 1)))
    problems = mismatches(true, wrong)
    assert problems[0].startswith("a case: 12 of 12 maps")
    assert "query 3, after layer 2" in problems[1] and "off by 1.2e-01" in problems[1]
    assert problems[-2] == "  and 6 more"
    assert mismatches(true, case(true.maps)) == []


def test_evidence_where_there_is_none_is_told():
    true, found = case(np.zeros((1, 1, 2, 2))), case(np.full((1, 1, 2, 2), 1e-30))
    assert "not zero, 1.000e-30 at token (0, 0)" in mismatches(true, found)[1]


def test_a_tolerance_that_lets_zero_maps_pass_is_refused():
    true = case(random_maps())
    assert accepted_wrongly(true, 1e-3) == []
    problems = accepted_wrongly(true, 1.0)
    assert len([each for each in problems if "a map of zeros passes" in each]) == 6
    assert problems[0] == "a case: query 0, after layer 0: a map of zeros passes"


def test_a_tolerance_that_lets_another_querys_map_pass_is_refused():
    """Of one layer only, even."""
    maps = random_maps()
    maps[1, 2] = maps[0, 2] * 1.001
    problems = accepted_wrongly(case(maps), 1e-2)
    assert problems == [
        "a case: query 0, after layer 2: the map of query 1 passes",
        "a case: query 1, after layer 2: the map of query 0 passes",
    ]
    assert accepted_wrongly(case(maps), 1e-5) == []


def test_no_evidence_at_all_leaves_nothing_to_refuse():
    assert accepted_wrongly(case(np.zeros((2, 1, 2, 2))), 1.0) == []


def test_a_gate_is_wrong_for_one_head_at_a_time():
    layout = HeadLayout(2, 3, 4, 5)
    right = first_off(1).gate("decoder_cross", layout)
    wrong = wrong_by_one_head(first_off(1), layout, [(0, 0), (1, 1), (2, 3)])
    difference = (wrong.decoder_cross - right)[:, :, 0]
    assert difference.nonzero().tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 3]]
    assert difference[0, 0, 0] == 1 and difference[1, 1, 1] == -1
    assert wrong.names[1] == "L1H1 wrong"


def test_a_gate_that_is_half_open_is_wrong_when_it_is_shut():
    half = Configuration(clauses=(Clause(layers=(1,), heads=(2,), gate=0.5),))
    wrong = wrong_by_one_head(half, HeadLayout(2, 3, 4, 5), [(1, 2)])
    assert wrong.decoder_cross[0, 1, 0, 2] == 0


def test_every_head_gets_its_turn():
    layout = HeadLayout(2, 3, 4, 5)
    turns = [share_of_heads(layout, number, 3) for number in range(4)]
    assert sorted(pair for turn in turns for pair in turn) == [
        (layer, head) for layer in range(3) for head in range(4)
    ]
