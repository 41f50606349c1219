"""The suites catch every wrong attention of tests/mutants and pass every right one: a sample in every run.

What runs here is what the suites' tests run, in this process and up to the first finding. All attentions are tried by
`tox -e mutation`; `tools/mutation_score.py` runs every suite on all of them and writes the tables of docs/harness.md.
"""

from __future__ import annotations

import pytest
import torch
from mutants import RIGHT, WRONG
from mutants.judging import Judge
from mutants.registry import Right, Wrong, in_every_run, sampled

from headoff.attention import resolve_attention

# Faults that the calls suite alone can see: the numbers are right.
BY_CALLS = [name for name, mutant in WRONG.items() if mutant.shows == {"calls"}]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "mutant", sampled((WRONG[name] for name in WRONG if name not in BY_CALLS), in_every_run(WRONG, 2))
)
def test_the_operator_suite_catches(mutant: Wrong):
    found = next(Judge(dtype=mutant.dtype).operator(resolve_attention(mutant.make())), None)
    assert found is not None, f"not caught: {mutant.fault}"
    assert found.message


@pytest.mark.parametrize("name", BY_CALLS)
def test_the_calls_suite_catches(name):
    found = next(Judge().calls(resolve_attention(WRONG[name].make())), None)
    assert found is not None and found.property == "calls"


@pytest.mark.mutation
@pytest.mark.parametrize("right", sampled(RIGHT.values(), frozenset()))
def test_every_suite_passes(right: Right):
    """In every run the suites' own tests pass one right attention, sdpa."""
    judge, attention = Judge(), resolve_attention(right.make())
    for suite, check in judge.suites().items():
        found = next(check(attention), None)
        assert found is None, f"{suite}: {found}"


@pytest.mark.mutation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("right", sampled(RIGHT.values(), frozenset()))
def test_the_operator_suite_passes_in_other_dtypes(right: Right, dtype: torch.dtype):
    if dtype not in right.dtypes:
        pytest.skip(f"{right.name} does not take {dtype}")
    assert not list(Judge(dtype=dtype).operator(resolve_attention(right.make())))
