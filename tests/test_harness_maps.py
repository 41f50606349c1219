"""Comparison of maps, tolerances, and the wrong results that a tolerance must reject."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from headoff.attention import eager
from headoff.detr.checkpoints.choice import ModelChoice
from headoff.errors import SettingError
from headoff.gates import Clause, Configuration, HeadLayout, first_off, stack
from headoff.harness.model import relevance
from headoff.harness.model.mutations import accepted_wrongly, require_rejected, some_heads, with_wrong_heads
from headoff.harness.reference.cases import reference_case
from headoff.harness.reference.maps import CaseMaps, map_errors, map_tolerance, mismatches
from headoff.harness.settings import Settings
from headoff.harness.tolerance import MOST_RAISED, Tolerance


def case(maps, allowed=1e-6) -> CaseMaps:
    maps = np.asarray(maps, np.float64)
    names = tuple(f"query {index}" for index in range(len(maps)))
    return CaseMaps("a case", maps, names, {"weights": "w"}, Tolerance(0.0, allowed))


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


def test_a_tolerance_is_measured():
    errors = np.array([[1e-6, 3e-6]])
    single = map_tolerance(errors, 10, torch.float32)
    assert single.allowed == pytest.approx(4 * 3e-6 + 10 * 2**-23)
    double = map_tolerance(errors, 10, torch.float64, measured_in=torch.float32)
    assert double.allowed == pytest.approx(single.allowed * 2**-29)
    half = map_tolerance(errors, 10, torch.bfloat16)
    assert half.allowed == pytest.approx(4 * 3e-6 + 10 * 2**-7)


def test_a_tolerance_is_raised_within_limits():
    tolerance = Tolerance(3e-6, 1e-6)
    assert tolerance.limit == pytest.approx(MOST_RAISED * tolerance.allowed)
    assert tolerance.raised(2e-6).allowed == tolerance.allowed, "never lowered"
    assert tolerance.raised(9e-6).allowed == pytest.approx(4 * 9e-6 + tolerance.floor)
    assert tolerance.raised(1.0).allowed == pytest.approx(tolerance.limit)


def test_an_unlucky_tolerance_is_measured_again(monkeypatch, tmp_path):
    """Where few right implementations were near the oracle by luck, more are asked before a map is called wrong."""
    monkeypatch.setenv("HEADOFF_CACHE", str(tmp_path))
    reference = reference_case(Settings(), "scene-000")
    configuration = reference.cumulative[3]
    how = torch.device("cpu"), torch.float32, [configuration]
    found = relevance.maps_with(eager, reference, *how).maps
    off = float(map_errors(reference.maps([configuration]), found).max())
    unlucky = Tolerance(off / 8, 0.0)
    monkeypatch.setattr(relevance, "relevance_tolerance", lambda *_: unlucky)
    monkeypatch.setattr(relevance, "SECOND_LOOKS", 2)
    relevance.largest_error.cache_clear()
    objects = tuple(range(len(reference.objects)))
    largest = relevance.largest_error(reference, configuration, objects, *how[:2])
    assert off / 16 < largest < 16 * off, "of the same kind"
    for error, findings in ((off / 3, 0), (off / 5, 1)):
        monkeypatch.setattr(relevance, "largest_error", lambda *_, error=error: error)
        assert len(relevance.map_findings(reference, [configuration], found, *how[:2], "eager")) == findings


@pytest.mark.parametrize("model", ["scenes", "another.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_results_that_pass_are_a_failure_or_are_told(model, dtype):
    """In float32 with the bundled model the run ends without a verdict; elsewhere the verdict names what passed."""
    told = []
    under_test = SimpleNamespace(dtype=dtype, cannot_tell=told.append)
    reference = SimpleNamespace(model=ModelChoice(model), name="street")
    require_rejected(under_test, reference, "wrong maps", [], 12)
    assert told == []
    if model == "scenes" and dtype == torch.float32:
        with pytest.raises(AssertionError, match="a map of zeros passes"):
            require_rejected(under_test, reference, "wrong maps", ["a map of zeros passes"], 12)
    else:
        require_rejected(under_test, reference, "wrong maps", ["a map of zeros passes"], 12)
        (sentence,) = told
        assert sentence.startswith("1 of 12 wrong maps of street") and "a map of zeros passes" in sentence


def test_bytes_and_back():
    true = case(random_maps())
    again = CaseMaps.from_bytes(true.to_bytes())
    assert np.array_equal(again.maps, true.maps) and again.maps.dtype == np.float64
    for name in ("case", "objects", "inputs", "found_by"):
        assert getattr(again, name) == getattr(true, name)
    assert again.tolerance == true.tolerance


@pytest.mark.parametrize("data", [b"", b"PK\x05\x06" + bytes(18), case(random_maps()).to_bytes()[:-100]])
def test_what_is_no_golden_file_raises(data):
    with pytest.raises(SettingError, match="golden file cannot be read .* --snapshot-update"):
        CaseMaps.from_bytes(data)


def test_shapes_that_do_not_fit_raise():
    with pytest.raises(SettingError, match="do not fit 1 objects"):
        CaseMaps("a case", random_maps(), ("query 0",), {}, Tolerance(0.0, 1.0))


def test_the_worst_maps_come_first_and_the_rest_counted():
    true = case(random_maps().repeat(2, axis=0))
    wrong = case(true.maps * (1 + np.linspace(0.01, 0.12, 12).reshape(4, 3, 1, 1)))
    problems = mismatches(true, wrong)
    assert problems[0].startswith("a case: 12 of 12 maps")
    assert "query 3, after layer 2" in problems[1] and "off by 1.2e-01" in problems[1]
    assert problems[-2] == "  and 6 more"
    assert mismatches(true, case(true.maps)) == []


def test_evidence_where_there_is_none_is_reported():
    true, found = case(np.zeros((1, 1, 2, 2))), case(np.full((1, 1, 2, 2), 1e-30))
    assert "not zero, 1.000e-30 at token (0, 0)" in mismatches(true, found)[1]


def test_a_tolerance_that_accepts_zero_maps_is_found_out():
    true = case(random_maps())
    assert accepted_wrongly(true, 1e-3) == []
    problems = accepted_wrongly(true, 1.0)
    assert len([one for one in problems if "a map of zeros passes" in one]) == 6
    assert problems[0] == "a case: query 0, after layer 0: a map of zeros passes"


def test_a_tolerance_that_accepts_another_querys_map_is_found_out():
    """Of one layer only, even."""
    maps = random_maps()
    maps[1, 2] = maps[0, 2] * 1.001
    problems = accepted_wrongly(case(maps), 1e-2)
    assert problems == [
        "a case: query 0, after layer 2: the map of query 1 passes",
        "a case: query 1, after layer 2: the map of query 0 passes",
    ]
    assert accepted_wrongly(case(maps), 1e-5) == []


def test_no_evidence_at_all_leaves_nothing_to_reject():
    assert accepted_wrongly(case(np.zeros((2, 1, 2, 2))), 1.0) == []


def test_a_gate_is_wrong_for_one_head_at_a_time():
    layout = HeadLayout(2, 3, 4, 5)
    right = first_off(1).gate("decoder_cross", layout)
    wrong = with_wrong_heads(
        stack([first_off(1).named(name) for name in "abc"], layout), layout, [(0, 0), (1, 1), (2, 3)]
    )
    difference = (wrong.decoder_cross - right)[:, :, 0]
    assert difference.nonzero().tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 3]]
    assert difference[0, 0, 0] == 1 and difference[1, 1, 1] == -1


def test_a_gate_that_is_half_open_is_wrong_when_it_is_shut():
    half = Configuration(clauses=(Clause(layers=(1,), heads=(2,), gate=0.5),))
    wrong = with_wrong_heads(stack([half], HeadLayout(2, 3, 4, 5)), HeadLayout(2, 3, 4, 5), [(1, 2)])
    assert wrong.decoder_cross[0, 1, 0, 2] == 0


def test_every_head_gets_its_turn():
    layout = HeadLayout(2, 3, 4, 5)
    turns = [some_heads(layout, number, 3) for number in range(4)]
    assert sorted(pair for turn in turns for pair in turn) == [
        (layer, head) for layer in range(3) for head in range(4)
    ]
