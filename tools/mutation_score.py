"""Mutation score: which wrong attentions every suite catches, and what the diagnosis says of them.

    python tools/mutation_score.py --processes 2

runs every suite on every attention of tests/mutants, and diagnoses the wrong ones. Results are kept line by line in
`--results`, so that a run that was cut short goes on. Writes the tables of docs/harness.md and docs/mutation_score.md.

    python tools/mutation_score.py drawn --seed 2

scores mutants that are made mechanically from right implementations and drawn by a seed (`mutation.score`).
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mutation.runs import rows_in, run  # noqa: E402
from mutation.score import main as score_drawn  # noqa: E402

from headoff.wording import markdown_table  # noqa: E402

RIGHT_SCENES = 3
FAILING = 3
"""Failing cases that a diagnosis gets."""

BEGIN, END = "<!-- mutation score: begin -->", "<!-- mutation score: end -->"
SUITES = ("operator", "calls", "detections", "relevance", "gradients")
REVIEWED = ROOT / "tests" / "mutants" / "diagnoses.toml"
"""Sentences of diagnoses by mutant, read by a person and found true."""

VERDICTS = ("cause named and right", "property right", "nothing named", "FALSE")

SHOWN_BY: dict[str, set[str]] = {
    "state": {"memory", "threads", "second backward", "settings"},
    "gate": {"gate gradient"},
    "dq": {"no gradient"},
}
"""Effects (`Wrong.shows`) other than the property itself that make a finding true which is not about numbers."""


def judge(task: tuple[str, str, int]) -> dict[str, Any]:
    """One line of results: what the suites find of one attention, or what the diagnosis says of it."""
    kind, name, seed = task
    row: dict[str, Any] = {"kind": kind, "name": name, "seed": seed}
    return {**row, **(diagnosis(name, seed) if kind == "diagnosis" else {"caught": caught(kind, name, seed)})}


def caught(kind: str, name: str, seed: int) -> dict[str, str]:
    """By suite, the first thing that it finds wrong."""
    from mutants import RIGHT, WRONG
    from mutants.judging import Judge

    from headoff.attention import resolve_attention
    from headoff.harness.torch_settings import watched_settings

    entry = (WRONG if kind == "wrong" else RIGHT)[name]
    judge = Judge(seed, 1, entry.dtype) if kind == "wrong" else Judge(seed, RIGHT_SCENES)
    found = {}
    # What is wrong shows in one scene or in none; a false alarm may be of one scene alone.
    for suite, check in judge.suites().items():
        # What one attention does to torch's settings must not be held against the next.
        with watched_settings():
            if first := next(check(resolve_attention(entry.make())), None):
                found[suite] = f"{first.property}: {first.message}"
    return found


def diagnosis(name: str, seed: int) -> dict[str, Any]:
    """What a run would say first, and of what a diagnosis it is the sentence."""
    from mutants import WRONG
    from mutation.judging import explanation

    said = explanation(WRONG[name].make, "dense", WRONG[name].dtype, seed, failing=FAILING)
    first, details = said.finding, said.diagnosis
    return {
        "property": first.property if first else None,
        "sentence": first.message.split("; ")[0].replace(f"{ROOT}/", "") if first else "",
        "causes": [fault.clause for fault in details.causes] if details else [],
        "outputs": list(details.outputs) if details else [],
        "conditions": list(details.conditions) if details else [],
        "seconds": round(said.seconds, 1),
        "seconds_to_find": round(said.seconds_to_find, 1),
    }


def verdict_on(row: dict[str, Any], reviewed: dict[str, list[str]]) -> str:
    """One of `VERDICTS`. What neither follows from the registered effects nor was reviewed is false."""
    from mutants import WRONG

    shows, outputs = set(WRONG[row["name"]].shows), set(row["outputs"])
    gradients = {"dq", "dk", "dv"} if "no gradient" in shows else shows & {"dq", "dk", "dv"}
    claims = {f"{row['property']}: {clause}" for clause in row["causes"]}
    claims |= {f"only with {condition}" for condition in row["conditions"]}
    if outputs == {"context"}:
        is_shown = bool(shows & {"context", "grad mode"})
    elif outputs:
        is_shown = "context" not in shows and outputs == gradients
    else:
        effects = {row["property"], *SHOWN_BY.get(row["property"], ())}
        is_shown = row["property"] is None or bool(effects & shows)
    if not is_shown:
        claims.add(f"{row['property']}: {' and '.join(sorted(outputs)) or '*'}")
    if not claims <= set(reviewed.get(row["name"], [])):
        return "FALSE"
    if row["causes"]:
        return "cause named and right"
    is_named = row["property"] not in ("context", None) or row["conditions"]
    return "property right" if is_named else "nothing named"


def tasks(seeds: int, slow: bool) -> list[tuple[str, str, int]]:
    from mutants import RIGHT, WRONG

    right = [
        ("right", name, seed)
        for name, entry in RIGHT.items()
        if entry.missing() is None and (slow or not entry.slow)
        for seed in range(seeds)
    ]
    return [(kind, name, 0) for kind in ("diagnosis", "wrong") for name in WRONG] + right


def summary(rows: list[dict[str, Any]], command: str) -> str:
    """The tables of docs/harness.md: detection and diagnosis by family."""
    from mutants import FAMILIES, WRONG

    reviewed = tomllib.loads(REVIEWED.read_text())
    wrong, right, diagnosed = (
        [row for row in rows if row["kind"] == kind] for kind in ("wrong", "right", "diagnosis")
    )
    missed = [row["name"] for row in wrong if not row["caught"]]
    alarms = [row for row in right if row["caught"]]
    not_run = [f"the suites on {len(WRONG) - len(wrong)} mutants"] if len(wrong) < len(WRONG) else []
    not_run += [f"the diagnosis of {len(WRONG) - len(diagnosed)}"] if len(diagnosed) < len(WRONG) else []
    not_run += [] if right else ["right attentions"]
    alarmed = f" {len({r['name'] for r in right})} right ones raise {len(alarms)} false alarms in {len(right)} runs."
    lines = [
        f"`{command}`, float32 on a CPU, one scene in the model ({RIGHT_SCENES} for right attentions). "
        f"{len(wrong) - len(missed)} of {len(wrong)} wrong attentions are caught.{alarmed if right else ''}"
        + (f" Not run for this table: {', '.join(not_run)}." if not_run else ""),
        "",
    ]
    by_family = []
    for family in [*sorted(FAMILIES), "all"]:
        names = {name for name, entry in WRONG.items() if family in ("all", entry.family)}
        some = [row["caught"] for row in wrong if row["name"] in names]
        said = Counter(verdict_on(row, reviewed) for row in diagnosed if row["name"] in names)
        counts = [sum(suite in caught for caught in some) for suite in SUITES]
        verdicts = [said[verdict] for verdict in VERDICTS]
        by_family.append((family, len(names), len(some), *counts, sum(map(bool, some)), *verdicts))
    head = ("family", "mutants", "run", *SUITES, "any", *VERDICTS)
    lines += markdown_table(head, by_family, padded=False)
    seconds = sorted(row["seconds"] for row in diagnosed) or [0.0]
    lines += [
        "",
        f"A diagnosis takes {seconds[len(seconds) // 2]:.1f} s in the median and {seconds[-1]:.1f} s at most.",
    ]
    for title, some in (
        ("Missed", missed),
        ("False alarms", [f"{r['name']}: {r['caught']}" for r in alarms]),
    ):
        if some:
            lines += ["", f"{title}:", "", *(f"- {one}" for one in some)]
    return "\n".join(lines)


def page(rows: list[dict[str, Any]], command: str) -> str:
    """docs/mutation_score.md: every mutant."""
    from mutants import RIGHT, WRONG

    reviewed = tomllib.loads(REVIEWED.read_text())
    by = {(row["kind"], row["name"]): row for row in rows if row["name"] in {**WRONG, **RIGHT}}
    lines = [
        "# Mutation score, one by one",
        "",
        f"Written by `{command}`: every attention of `tests/mutants`, the suites that catch it, what the diagnosis "
        "says and whether that is true. [harness.md](harness.md) has the summary.",
        "",
    ]
    wrong = []
    for name, entry in sorted(WRONG.items(), key=lambda item: (item[1].family, item[0])):
        row, found = by.get(("diagnosis", name)), by.get(("wrong", name), {"caught": {}})["caught"]
        said = (f"{row['property']}: {row['sentence']}", verdict_on(row, reviewed)) if row else ("", "")
        caught_by = ", ".join(suite for suite in SUITES if suite in found)
        wrong.append((f"`{name}`", entry.fault.replace("<", "&lt;"), caught_by, *said))
    head = ("mutant", "what is wrong", "caught by", "diagnosis", "which is")
    lines += [*markdown_table(head, wrong, padded=False), "", "## Right attentions", ""]
    right = [(f"`{name}`", RIGHT[name].style) for kind, name in by if kind == "right"]
    lines += markdown_table(("attention", "style"), right, padded=False)
    return "\n".join(lines) + "\n"


def write(path: Path, text: str) -> None:
    """Between the marks of the page."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{path} has no {BEGIN} ... {END}: put them where the tables belong")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    if sys.argv[1:2] == ["drawn"]:
        score_drawn(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seeds", type=int, default=1, help="of random inputs, for right attentions (default 1)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument("--slow", action="store_true", help="right attentions that compile, as well")
    parser.add_argument(
        "--only", metavar="KIND", choices=("diagnosis", "wrong", "right"), help="nothing is written"
    )
    parser.add_argument(
        "--sample", type=int, metavar="N", help="N attentions, drawn by --seed; nothing is written"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument(
        "--report", action="store_true", help="run nothing, and write tables of the results so far"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutation_score.jsonl")
    chosen = parser.parse_args()
    todo = [task for task in tasks(chosen.seeds, chosen.slow) if chosen.only in (None, task[0])]
    if chosen.sample:
        names = random.Random(chosen.seed).sample(sorted({name for _, name, _ in todo}), chosen.sample)
        todo = [task for task in todo if task[1] in names]
    rows = rows_in(chosen.results)
    done = {(row["kind"], row["name"], row["seed"]) for row in rows}
    left = [] if chosen.report else [task for task in todo if task not in done]
    reviewed = tomllib.loads(REVIEWED.read_text())

    def describe(row: dict[str, Any]) -> str:
        said = verdict_on(row, reviewed) if row["kind"] == "diagnosis" else ", ".join(row["caught"])
        return f"{row['kind']} {row['name']}: {said} {row.get('sentence', '')}"

    rows += run(judge, left, chosen.results, chosen.processes, describe)
    by_task = {(row["kind"], row["name"], row["seed"]): row for row in rows}
    rows = [by_task[task] for task in todo if task in by_task]
    command = "python tools/mutation_score.py" + (f" --seeds {chosen.seeds}" if chosen.seeds != 1 else "")
    print(summary(rows, command))
    if not chosen.only and not chosen.sample:
        write(ROOT / "docs" / "harness.md", summary(rows, command))
        (ROOT / "docs" / "mutation_score.md").write_text(page(rows, command))


if __name__ == "__main__":
    main()
