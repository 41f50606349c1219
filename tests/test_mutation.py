"""Mutants made mechanically: what is drawn, what operators do, which mutants count as different, and how runs go on."""

from __future__ import annotations

import ast
import json
import time

import pytest
import torch
from mutation import judging, runs, score
from mutation.differences import difference
from mutation.judging import Hangs, explanation, judged, time_limit
from mutation.operators import mutations
from mutation.sources import BY_NAME, SOURCES, Mutant, drawn

pytestmark = pytest.mark.usefixtures("one_thread")

OPERATORS = (
    "arguments swapped",
    "boundary",
    "cast added",
    "comparison",
    "constant",
    "index or axis",
    "keyword removed",
    "logic",
    "operator",
    "statement dropped",
    "term dropped",
    "wrong name",
)
OF_HALF_PRECISION = "dtype"
"""The dtypes that are named in right implementations are those to compute half precision in."""


def mutant_of(source: str, before: str, after: str) -> Mutant:
    """The first mutant of a source with this change."""
    wanted = (before, after)
    return next(
        Mutant(BY_NAME[source], number)
        for number, change in enumerate(BY_NAME[source].mutations)
        if (change.before, change.after) == wanted
    )


def test_a_seed_always_draws_the_same():
    names = [mutant.name for mutant in drawn(3, 60)]
    assert names == [mutant.name for mutant in drawn(3, 60)]
    assert [mutant.name for mutant in drawn(3, 90)][:60] == names
    assert names != [mutant.name for mutant in drawn(4, 60)]
    assert len({name.rpartition("-")[0] for name in names}) > len(SOURCES) * 0.7


def test_a_second_draw_has_nothing_of_the_first():
    first = frozenset(mutant.name for mutant in drawn(3, 500))
    assert not first & {mutant.name for mutant in drawn(4, 500, first)}


def test_every_mutation_changes_the_code_in_one_place():
    code = "def f(x, y):\n    if x.sum(-1) < 1:\n        y += x[0:2].to(y) @ g(x, y, dim=0) * 0.5\n    return y\n"
    tree = ast.parse(code)
    made = mutations(tree, ["f"])
    texts = [ast.unparse(mutation.applied(tree)) for mutation in made]
    assert ast.unparse(tree) == ast.unparse(ast.parse(code)), "the tree itself is left alone"
    assert len(set(texts)) == len(texts) > 20
    lines = [
        sum(a != b for a, b in zip(t.split("\n"), ast.unparse(tree).split("\n"), strict=False)) for t in texts
    ]
    assert min(lines) >= 1


def test_only_functions_that_exist_are_mutated():
    with pytest.raises(AssertionError, match="there are no"):
        mutations(ast.parse("x = 1 + 1"), ["f"])


def test_these_are_all_operators():
    made = {mutation.operator for source in SOURCES for mutation in source.mutations}
    assert made == {*OPERATORS, OF_HALF_PRECISION}


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_makes_mutants_that_differ(operator):
    for source in map(BY_NAME.get, ("eager", "packed", "sdpa", "tiled")):
        for number, mutation in enumerate(source.mutations):
            if mutation.operator == operator:
                mutant = Mutant(source, number)
                if difference(mutant.make, source.make, "dense"):
                    return
    pytest.fail(f"no mutant by {operator!r} differs")


@pytest.mark.parametrize("source", ["eager", "gather"])
def test_right_implementations_do_not_differ_from_themselves(source):
    one = BY_NAME[source]
    assert difference(one.make, one.make, one.contract) is None


@pytest.mark.parametrize(
    ("source", "before", "after", "is_different"),
    [
        # The weights of a fully masked row are set to 0 whatever its scores were.
        ("eager", "0.0", "1.0", False),
        ("eager", "scores.masked_fill(~attn_mask, -math.inf)", "scores", True),
        ("gather", "locations * size - 0.5", "locations * size + 0.5", True),
    ],
)
def test_equivalent_mutants_are_sorted_out(source, before, after, is_different):
    mutant = mutant_of(source, before, after)
    found = difference(mutant.make, mutant.source.make, mutant.source.contract)
    assert (found is not None) == is_different, found


def test_a_difference_in_float64_alone_is_one_of_float64():
    one = BY_NAME["eager"]

    def make():
        return lambda q, k, v, mask=None, *, head_gate=None: one.make()(
            q * (1 + 1e-10), k, v, mask, head_gate=head_gate
        )

    found = difference(make, one.make, "dense")
    assert found is not None and found[0] == torch.float64


def test_a_mutant_is_judged_and_explained():
    mutant = mutant_of("gather", "locations * size - 0.5", "locations * size + 0.5")
    row = judged(mutant)
    assert row["status"] == "differs" and row["dtype"] == "float32" and row["excess"] > score.MUCH
    assert "deformable" in row["caught"]
    assert "tokens are read that are next to no sampling point" in str(
        explanation(mutant.make, "deformable", torch.float32, failing=3)
    )


def test_a_mutant_that_raises_is_no_part_of_the_score():
    assert judged(mutant_of("eager", "attn_mask is None", "attn_mask is not None"))["status"] == "crashes"
    # Float masks alone: no model makes them, and an attention need not support them.
    mutant = mutant_of(
        "sdpa", "attn_mask.masked_fill(fully_masked, 0.0)", "attn_mask.masked_fill(0.0, fully_masked)"
    )
    assert judged(mutant)["status"] == "unsupported"


def test_what_hangs_is_stopped():
    with pytest.raises(Hangs), time_limit(1):
        time.sleep(5)


def test_runs_that_were_cut_short_go_on(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"mutant": "eager-0", "status": "crashes"}\n{"mutant": "eag')
    assert [row["mutant"] for row in runs.rows_in(path)] == ["eager-0"]


def test_the_summary_counts_and_names_survivors():
    base = {
        "operator": "constant",
        "diff": "a -> b",
        "how": "call 0",
        "dtype": "float32",
        "status": "differs",
    }
    rows = [
        {**base, "mutant": "eager-1", "excess": 20.0, "caught": {"operator": "dq: off"}},
        {**base, "mutant": "eager-2", "excess": 0.1, "caught": {}},
        {**base, "mutant": "eager-3", "status": "equivalent"},
    ]
    text = score.summary(rows)
    assert "1 of 2 (50.0%" in text and "1 of 1 (100.0%" in text
    assert "`eager-2` a -> b" in text and "| constant | 0 | 1 | 2 | 1 |" in text


def test_wilson_interval():
    low, high = score.wilson(498, 500)
    assert (round(low, 4), round(high, 4)) == (0.9855, 0.9989)


def test_results_are_reported_without_a_run(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    name = drawn(5, 1)[0].name
    results.write_text(f'{{"mutant": "{name}", "operator": "constant", "status": "equivalent"}}\n')
    score.main(["--seed", "5", "--count", "3", "--report", "--results", str(results)])
    text = capsys.readouterr().out
    assert "Of 1 mutants 0 raise at once, 1 are as right" in text and "0 of 0" in text


def test_right_implementations_are_tried_and_counted(monkeypatch, tmp_path, capsys):
    def too_large(value, *others, **keywords):
        return BY_NAME["gather"].make()(value, *others, **keywords) * 1.01

    right = judging._right("deformable")
    assert {"gather", "transformers_own", "grid_sample"} <= right.keys()
    monkeypatch.setattr(
        judging, "_right", lambda contract: {"gather": right["gather"], "large": lambda: too_large}
    )
    monkeypatch.setattr(judging, "PARTS", {"deformable": 60})
    row = score._checked(("deformable", "numbers", 3, 0))
    assert row["checks"] > 0 and row["implementations"] == 2
    assert row["caught"].keys() == {"large"} and row["caught"]["large"].startswith("context: ")
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    score.main(["--right", "4", "--report", "--results", str(tmp_path / "results.jsonl")])
    said = capsys.readouterr().out
    assert "deformable numbers: 2 right implementations, 1 seeds" in said
    assert "1 false alarms" in said and "- large, seed 3: context: " in said
