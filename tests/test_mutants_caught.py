"""The suites catch every wrong attention of the zoo and pass every right one.

What is run here is what the suites' tests run, in this process and up to the first thing that is found wrong.
`tools/mutation_score.py` runs every suite on everything and writes the table of docs/harness.md.
"""

from __future__ import annotations

import os

import pytest
from mutants import RIGHT, WRONG
from mutants.entries import Right, Wrong
from mutants.judging import Judge

from headoff.attention import resolve_attention

IN_MODEL = 12
"""One in so many wrong attentions is tried in the model as well, where it costs a second each."""

SLOW = os.environ.get("HEADOFF_SLOW_TESTS")

# A fault that the calls suite alone can see: the numbers are right.
BY_CALLS = [name for name, entry in WRONG.items() if entry.shows == {"calls"}]


@pytest.mark.parametrize("entry", [e for e in WRONG.values() if e.name not in BY_CALLS], ids=lambda e: e.name)
def test_the_operator_suite_catches(entry: Wrong):
    found = next(Judge(dtype=entry.dtype).operator(resolve_attention(entry.make())), None)
    assert found is not None, f"not caught: {entry.fault}"
    assert found.message


@pytest.mark.parametrize("name", BY_CALLS)
def test_the_calls_suite_catches(name):
    found = next(Judge().calls(resolve_attention(WRONG[name].make())), None)
    assert found is not None and found.property == "calls"


@pytest.mark.parametrize("entry", RIGHT.values(), ids=lambda entry: entry.name)
def test_every_suite_passes(entry: Right):
    if reason := entry.missing():
        pytest.skip(reason)
    if entry.slow and not SLOW:
        pytest.skip("takes long to get started: set HEADOFF_SLOW_TESTS=1")
    judge, attention = Judge(), resolve_attention(entry.make())
    for suite, check in judge.suites().items():
        found = next(check(attention), None)
        assert found is None, f"{suite}: {found}"
