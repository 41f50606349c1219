"""The mutation score on mutants that were made mechanically and drawn by a seed; `tools/mutation_score.py drawn`."""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from headoff.wording import markdown_table
from mutation.runs import Row, rows_in, run
from mutation.sources import BY_NAME, ROOT, Mutant, drawn

MUCH = 16.0
"""Times the tolerance: a change of a DETR call that must not go unseen."""

Z = 1.96


def mutant_named(name: str) -> Mutant:
    source, _, number = name.rpartition("-")
    return Mutant(BY_NAME[source], int(number))


def _judged(name: str) -> Row:
    from mutation.judging import judged

    return judged(mutant_named(name))


Part = tuple[str, str, int, int]
"""Contract, suite, seed and part of a run of right implementations."""


def _checked(task: Part) -> Row:
    from mutation.judging import false_alarms

    gc.freeze()  # what is imported by now is not looked at by every check that collects garbage
    started = time.process_time()
    found = false_alarms(*task)
    return {"right": task, **found, "seconds": round(time.process_time() - started, 1)}


def _explained(task: tuple[str, str]) -> Row:
    import torch

    from mutation.judging import explanation

    name, dtype = task
    mutant = mutant_named(name)
    said = explanation(mutant.make, mutant.source.contract, getattr(torch, dtype))
    return {"mutant": name, "diff": mutant.diff, "explanation": str(said)}


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The interval of 95% of a proportion (Wilson, 1927)."""
    share, spread = hits / of, Z * Z / of
    centre = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / of + spread / (4 * of))
    return (centre - half) / (1 + spread), (centre + half) / (1 + spread)


def proportion(hits: int, of: int) -> str:
    """`498 of 500 (99.6%, 98.6% to 99.9%)`"""
    if not of:
        return "0 of 0"
    low, high = wilson(hits, of)
    return f"{hits} of {of} ({hits / of:.1%}, {low:.1%} to {high:.1%})"


def summary(rows: list[Row]) -> str:
    """The score in a few lines of Markdown, by operator and by contract, and all survivors."""
    status = Counter(row["status"] for row in rows)
    differ = [row for row in rows if row["status"] == "differs"]
    great = [row for row in differ if row["excess"] > MUCH]
    survivors = [row for row in differ if not row["caught"]]
    suites = Counter(next(iter(row["caught"]), "none") for row in differ)
    lines = [
        f"Of {len(rows)} mutants {status['crashes']} raise at once, {status['equivalent']} are as right as what they "
        f"were made of, {status['hangs']} hang, {status['unsupported']} raise for masks that no model makes and are "
        f"else right (runs note that), and {len(differ)} differ, "
        f"{sum(row['dtype'] == 'float64' for row in differ)} of them in float64 only.",
        "",
        f"- rejected of those that differ: {proportion(len(differ) - len(survivors), len(differ))}",
        f"- rejected of those that change a DETR call by more than {MUCH:g} times the tolerance: "
        f"{proportion(sum(bool(row['caught']) for row in great), len(great))}",
        f"- first suite to reject: {', '.join(f'{name} {count}' for name, count in suites.most_common())}",
        "",
    ]
    by_operator = []
    for operator in sorted({row["operator"] for row in rows}):
        some = [row for row in rows if row["operator"] == operator]
        counts = Counter(row["status"] for row in some)
        caught = sum(row["status"] == "differs" and bool(row["caught"]) for row in some)
        by_operator.append((operator, counts["crashes"], counts["equivalent"], counts["differs"], caught))
    lines += markdown_table(
        ("operator", "raise", "equivalent", "differ", "rejected"), by_operator, padded=False
    )
    if survivors:
        lines += ["", "Survivors:", ""]
        lines += [
            f"- `{row['mutant']}` {row['diff']}: {row['dtype']}, {row['how']}; {row['excess']:.3g} times the "
            "tolerance in DETR"
            for row in survivors
        ]
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Run what is asked for and print the summary."""
    parser = argparse.ArgumentParser(
        prog="mutation_score.py drawn", description=(__doc__ or "").split(";")[0]
    )
    parser.add_argument("--seed", type=int, default=1, help="of the draw (default 1)")
    parser.add_argument("--count", type=int, default=1800, help="mutants drawn (default 1800)")
    parser.add_argument(
        "--not-of",
        type=int,
        nargs=2,
        action="append",
        default=[],
        metavar=("SEED", "COUNT"),
        help="none of this draw: the suites have seen it; can be repeated",
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    parser.add_argument(
        "--again", action="store_true", help="judge survivors once more: the suites have changed"
    )
    parser.add_argument(
        "--right", type=int, metavar="SEEDS", help="false alarms over right implementations instead"
    )
    parser.add_argument(
        "--explain",
        type=int,
        metavar="N",
        help="what runs would say of the first N that are rejected, to be read",
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing, and print what the results so far give"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "drawn_mutants.jsonl")
    chosen = parser.parse_args(arguments)
    if chosen.right:
        _right(chosen)
        return
    without = frozenset(mutant.name for seen in chosen.not_of for mutant in drawn(*seen))
    names = [mutant.name for mutant in drawn(chosen.seed, chosen.count, without)]
    known = {row["mutant"]: row for row in rows_in(chosen.results) if "status" in row}
    if chosen.again:
        known = {name: row for name, row in known.items() if row["status"] != "differs" or row["caught"]}
    left = [] if chosen.report else [name for name in names if name not in known]
    for row in run(_judged, left, chosen.results, chosen.processes, _line):
        known[row["mutant"]] = row
    rows = [known[name] for name in names if name in known]
    print(summary(rows))
    if chosen.explain:
        differ = [
            (row["mutant"], row["dtype"]) for row in rows if row["status"] == "differs" and row["caught"]
        ]
        said = {row["mutant"]: row for row in rows_in(chosen.results) if "explanation" in row}
        sample = differ[: chosen.explain]  # the order is that of the draw, which is random
        todo = [task for task in sample if task[0] not in said]
        for row in run(_explained, todo, chosen.results, chosen.processes, lambda row: row["explanation"]):
            said[row["mutant"]] = row
        for name, _ in sample:
            print(f"\n{said[name]['mutant']} {said[name]['diff']}\n    {said[name]['explanation']}")


def _right(chosen: Any) -> None:
    from mutation.judging import PARTS

    tasks: list[Part] = [
        (contract, suite, seed, part)
        for suite in ("numbers", "side effects")
        for seed in range(chosen.right)
        for contract, parts in PARTS.items()
        for part in range(parts)
    ]
    known = {tuple(row["right"]): row for row in rows_in(chosen.results) if "right" in row}
    left = [] if chosen.report else [task for task in tasks if task not in known]
    for row in run(
        _checked, left, chosen.results, chosen.processes, lambda row: f"{row['right']} {row['caught']}"
    ):
        known[tuple(row["right"])] = row
    print(alarms([known[task] for task in tasks if task in known]))


def alarms(rows: list[Row]) -> str:
    """How often right implementations were tried, and what was said against them."""
    lines = []
    for contract, suite in sorted({tuple(row["right"][:2]) for row in rows}):
        some = [row for row in rows if tuple(row["right"][:2]) == (contract, suite)]
        seeds = {row["right"][2] for row in some}
        tried = sum(row["checks"] * row["implementations"] for row in some)
        lines.append(
            f"{contract} {suite}: {some[0]['implementations']} right implementations, {len(seeds)} seeds, {tried} "
            f"checks, {sum(len(row['caught']) for row in some)} false alarms, "
            f"{sum(row['seconds'] for row in some):.0f} s of the processor"
        )
    for row in rows:
        lines += [f"- {name}, seed {row['right'][2]}: {said}" for name, said in row["caught"].items()]
    return "\n".join(lines)


def _line(row: Row) -> str:
    said = row["status"]
    if said == "differs":
        said = f"rejected by {next(iter(row['caught']))}" if row["caught"] else f"SURVIVES: {row['how']}"
    return f"{row['mutant']} {said}"
