"""Tests of tests/mutants: right attentions are right, and each wrong one has its registered fault and no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pytest
import torch
from mutants import FAMILIES, RIGHT, WRONG
from mutants.cases import ACROSS_CALLS, CASES, FEATURES, Case, numbers
from mutants.effects import MARGIN, effects_across_calls, effects_on_one_call
from mutants.parts import by_hand, plain
from mutants.registry import ALL_DTYPES, Right, Wrong, in_every_run, sampled

from headoff.attention import eager
from headoff.attention.contract import AdaptedAttention

ACROSS = frozenset(
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
"""Effects that take more than one call to show."""

NEAR_MISSES = 4
"""Cases that a wrong attention is tried on although it must be right there."""


SAMPLE = in_every_run(WRONG, 3)
SAMPLE_OF_RIGHT = in_every_run(RIGHT, 1)


pytestmark = pytest.mark.usefixtures("one_thread")


def covering(cases: Iterable[Case]) -> list[Case]:
    """Few of these cases that have every feature among them, each that has one which no case before it has."""
    seen: set[str] = set()
    chosen = []
    for case in sorted(cases, key=lambda case: -len(case.features)):
        if not case.features <= seen:
            chosen.append(case)
            seen |= case.features
    return chosen


def lacking(attention: Wrong, case: Case) -> frozenset[str]:
    return attention.needs - case.features


@pytest.mark.parametrize("attention", sampled(WRONG.values(), SAMPLE))
def test_wrong_attentions_are_wrong_as_registered(attention: Wrong):
    """By a margin, in cases with all features that the fault needs; with no effect that is not registered."""
    shown = set()
    for case in CASES:
        if not lacking(attention, case):
            shown |= effects_on_one_call(attention.make(), case, MARGIN)
            if shown >= attention.shows - ACROSS:
                break
    if attention.shows & ACROSS:
        case = next(case for case in (ACROSS_CALLS, *CASES) if not lacking(attention, case))
        shown |= effects_across_calls(attention.make, case)
    assert shown == attention.shows


@pytest.mark.parametrize("attention", sampled((wrong for wrong in WRONG.values() if wrong.needs), SAMPLE))
def test_wrong_attentions_are_right_without_what_their_fault_needs(attention: Wrong):
    """Each has one fault, then, and not two."""
    others = sorted(
        (case for case in CASES if lacking(attention, case)), key=lambda case: len(lacking(attention, case))
    )
    # The nearest, and from all over the rest.
    step = max(1, len(others) // NEAR_MISSES)
    for case in others[::step][:NEAR_MISSES]:
        assert not effects_on_one_call(attention.make(), case), case.name


@pytest.mark.parametrize("attention", sampled(RIGHT.values(), SAMPLE_OF_RIGHT))
def test_right_attentions_are_right(attention: Right):
    for case in covering(case for case in CASES if case.dtype in attention.dtypes):
        assert not effects_on_one_call(attention.make(), case), case.name
    assert not effects_across_calls(attention.make, ACROSS_CALLS)


@pytest.mark.parametrize(
    "attention",
    [attention for attention in RIGHT.values() if attention.dtypes != ALL_DTYPES],
    ids=lambda attention: attention.name,
)
def test_dtypes_that_are_left_out_raise(attention: Right):
    for case in CASES:
        if case.dtype not in attention.dtypes:
            with pytest.raises(TypeError, match="not supported"):
                case.call().run(attention.make())


def test_building_blocks_are_the_formula():
    """Without a step replaced, both agree with the oracle to the rounding of float64."""
    for case in CASES:
        call = case.call()
        truth = numbers(call, eager, torch.float64)
        for attention in (plain(), by_hand()):
            found = numbers(call, attention, torch.float64)
            for name, expected in truth.items():
                torch.testing.assert_close(found[name], expected)


def test_every_family_has_a_mutant_and_every_feature_a_case():
    families = Counter(attention.family for attention in WRONG.values())
    assert set(families) == set(FAMILIES)
    assert set().union(*(attention.needs for attention in WRONG.values())) <= FEATURES.keys()
    assert set().union(*(case.features for case in CASES)) == FEATURES.keys()
    assert len({attention.fault for attention in WRONG.values()}) == len(WRONG)
    assert len(WRONG) >= 200 and len(RIGHT) >= 30


def test_attentions_are_made_fresh():
    """Nothing that one of them caches is known to the next."""
    attention = WRONG["state_cached_by_shape"]
    first, second = CASES[0].call(), CASES[0].call(seed=1)
    used = attention.make()
    assert torch.equal(first.run(used), second.run(used))
    assert not torch.equal(first.run(used), second.run(attention.make()))


def test_right_attentions_without_a_gate_are_adapted():
    call = CASES[0].call()
    gate = torch.zeros(1)
    for name in ("torch_function", "mask_by_keyword", "apply_of_function"):
        made = RIGHT[name].make()
        assert isinstance(made, AdaptedAttention) and not made.takes_gate
        assert not made(call.query, call.key, call.value, head_gate=gate).any()
