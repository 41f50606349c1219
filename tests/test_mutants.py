"""The zoo of attentions: the right ones are right, and each wrong one is wrong as it says, and in no other way."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from mutants import FAMILIES, RIGHT, WRONG
from mutants.cases import CASES, CONDUCT, FEATURES, Case, numbers
from mutants.entries import ALL_DTYPES, Right, Wrong
from mutants.parts import by_hand, plain
from mutants.symptoms import MARGIN, symptoms_of_conduct, symptoms_of_numbers

from headoff.attention import eager
from headoff.attention.contract import AdaptedAttention

OF_CONDUCT = frozenset(
    {
        "randomness",
        "state",
        "memory",
        "threads",
        "gate gradient",
        "grad mode",
        "second backward",
        "settings",
        "calls",
    }
)
"""Symptoms that more than one call is needed for."""

NEAR_MISSES = 4
"""Cases that a wrong attention is tried on although it must be right there."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are so small here that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def covering(cases: Iterable[Case]) -> list[Case]:
    """Few of these cases that have every feature among them, each that has one which no case before it has."""
    seen: set[str] = set()
    chosen = []
    for case in sorted(cases, key=lambda case: -len(case.features)):
        if not case.features <= seen:
            chosen.append(case)
            seen |= case.features
    return chosen


def lacking(entry: Wrong, case: Case) -> frozenset[str]:
    return entry.needs - case.features


@pytest.mark.parametrize("entry", WRONG.values(), ids=WRONG)
def test_wrong_attentions_are_wrong_as_registered(entry: Wrong):
    """By a margin, where everything is there that the fault needs; with no symptom that is not registered."""
    shown = set()
    for case in CASES:
        if not lacking(entry, case):
            shown |= symptoms_of_numbers(entry.make(), case, MARGIN)
            if shown >= entry.shows - OF_CONDUCT:
                break
    if entry.shows & OF_CONDUCT:
        case = next(case for case in (CONDUCT, *CASES) if not lacking(entry, case))
        shown |= symptoms_of_conduct(entry.make, case)
    assert shown == entry.shows


@pytest.mark.parametrize(
    "entry", [entry for entry in WRONG.values() if entry.needs], ids=lambda entry: entry.name
)
def test_wrong_attentions_are_right_without_what_their_fault_needs(entry: Wrong):
    """Each has one fault, then, and not two."""
    others = sorted(
        (case for case in CASES if lacking(entry, case)), key=lambda case: len(lacking(entry, case))
    )
    # The nearest, and from all over the rest.
    step = max(1, len(others) // NEAR_MISSES)
    for case in others[::step][:NEAR_MISSES]:
        assert not symptoms_of_numbers(entry.make(), case), case.name


def runnable(entry: Right) -> pytest.param:
    reason = entry.missing()
    if reason is None and entry.slow and "HEADOFF_SLOW_TESTS" not in os.environ:
        reason = "it takes long to compile: set HEADOFF_SLOW_TESTS to try it"
    return pytest.param(
        entry, id=entry.name, marks=pytest.mark.skipif(reason is not None, reason=str(reason))
    )


@pytest.mark.parametrize("entry", [runnable(entry) for entry in RIGHT.values()])
def test_right_attentions_are_right(entry: Right):
    for case in covering(case for case in CASES if case.dtype in entry.dtypes):
        assert not symptoms_of_numbers(entry.make(), case), case.name
    assert not symptoms_of_conduct(entry.make, CONDUCT)


@pytest.mark.parametrize(
    "entry", [entry for entry in RIGHT.values() if entry.dtypes != ALL_DTYPES], ids=lambda entry: entry.name
)
def test_dtypes_that_are_left_out_raise(entry: Right):
    for case in CASES:
        if case.dtype not in entry.dtypes:
            with pytest.raises(TypeError, match="not supported"):
                case.call().of(entry.make())


def test_building_blocks_are_the_formula():
    """Without a step replaced, both agree with the oracle to the rounding of float64."""
    for case in CASES:
        call = case.call()
        truth = numbers(call, eager, torch.float64)
        for attention in (plain(), by_hand()):
            found = numbers(call, attention, torch.float64)
            for name, expected in truth.items():
                torch.testing.assert_close(found[name], expected)


def test_every_family_and_every_feature_has_an_inhabitant():
    families = Counter(entry.family for entry in WRONG.values())
    assert set(families) == set(FAMILIES)
    assert set().union(*(entry.needs for entry in WRONG.values())) <= FEATURES.keys()
    assert set().union(*(case.features for case in CASES)) == FEATURES.keys()
    assert len({entry.fault for entry in WRONG.values()}) == len(WRONG)
    assert len(WRONG) >= 200 and len(RIGHT) >= 30


def test_entries_are_made_fresh():
    """Nothing that one of them remembers is known to the next."""
    entry = WRONG["state_cached_by_shape"]
    first, second = CASES[0].call(), CASES[0].call(seed=1)
    used = entry.make()
    assert torch.equal(first.of(used), second.of(used))
    assert not torch.equal(first.of(used), second.of(entry.make()))


def test_right_attentions_without_a_gate_are_adapted():
    call = CASES[0].call()
    gate = torch.zeros(1)
    for name in ("torch_function", "mask_by_keyword", "apply_of_function"):
        attention = RIGHT[name].make()
        assert isinstance(attention, AdaptedAttention) and not attention.takes_gate
        assert not attention(call.query, call.key, call.value, head_gate=gate).any()
