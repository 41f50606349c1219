"""What each heads_off suite catches of the zoo of wrong attentions, and whether any raises a false alarm.

    python tools/mutation_score.py --seeds 3 --processes 2

runs every suite on every attention of tests/mutants, and writes the tables of docs/harness.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
RIGHT_SCENES = 3
BEGIN, END = "<!-- kill table: begin -->", "<!-- kill table: end -->"


@dataclass
class Row:
    """What was found wrong with one attention: by suite, the property and the message; empty where it passed."""

    name: str
    family: str
    is_wrong: bool
    about: str
    seed: int
    caught: dict[str, str] = field(default_factory=dict)
    diagnosis: str = ""


def judge(task: tuple[str, bool, int]) -> Row:
    """Run every suite on one attention; a suite ends at the first thing it finds wrong."""
    import torch
    from mutants import RIGHT, WRONG
    from mutants.judging import CPU, Judge

    from headoff.attention import resolve_attention
    from headoff.harness.finding import Finding
    from headoff.harness.operator import SIDE_EFFECTS, case_of_text, diagnose, side_effect_findings
    from headoff.harness.plugin.diagnosis import CONDUCT, NUMBERS
    from headoff.harness.torch_settings import watched_settings

    def root_of() -> Finding | None:
        """As of a whole run: conduct first, then what experiments say of a few failing cases."""
        attention = resolve_attention(entry.make())
        conduct = [
            each
            for check in SIDE_EFFECTS
            for each in side_effect_findings(attention, check, torch.float32, CPU, seed)
        ]
        if first := next(
            (each for each in conduct if each.property in CONDUCT and each.property != "state"), None
        ):
            return first
        wrong = (each for each in Judge(seed).numbers(attention) if each.property in NUMBERS)
        cases = [case_of_text(each.case, seed) for each in itertools.islice(wrong, 3)]
        return diagnose(attention, [case for case in cases if case], CPU) or next(iter(conduct), None)

    torch.set_num_threads(1)
    name, is_wrong, seed = task
    entry = (WRONG if is_wrong else RIGHT)[name]
    row = Row(name, entry.family, is_wrong, entry.fault if is_wrong else entry.style, seed)
    # What is wrong shows in one scene or in none; a false alarm may be of one scene alone.
    for suite, check in Judge(seed, 1 if is_wrong else RIGHT_SCENES).suites().items():
        # What one attention does to torch's settings must not be held against the next.
        with watched_settings():
            found = next(check(resolve_attention(entry.make())), None)
        if found is None:
            continue
        row.caught[suite] = found.message
        if is_wrong and not row.diagnosis:
            with watched_settings():
                root = (root_of() if suite == "operator" else None) or found
            said = root.message.split("; ")[0].replace(f"{ROOT}/", "")
            row.diagnosis = f"{root.property}: {said}"
    return row


def tasks(seeds: int, slow: bool) -> list[tuple[str, bool, int]]:
    from mutants import RIGHT, WRONG

    wrong = [(name, True, 0) for name in WRONG]
    right = [
        (name, False, seed)
        for name, entry in RIGHT.items()
        if entry.missing() is None and (slow or not entry.slow)
        for seed in range(seeds)
    ]
    return right + wrong


def tables(rows: list[Row], command: str) -> str:
    """Markdown."""
    suites = ("operator", "calls", "detections", "relevance", "gradients")
    wrong = [row for row in rows if row.is_wrong]
    right = [row for row in rows if not row.is_wrong]
    missed = [row for row in wrong if not row.caught]
    alarms = [row for row in right if row.caught]
    styles = len({row.name for row in right})
    seeds = len({row.seed for row in right})
    lines = [
        f"`{command}`, float32 on a CPU, one scene in the model ({RIGHT_SCENES} for right ones): "
        f"of {len(wrong)} wrong attentions {len(wrong) - len(missed)} are caught; {styles} right ones with {seeds} "
        f"seed{'s' if seeds > 1 else ''} each raise {len(alarms)} false alarms in {len(right)} runs.",
        "",
        "| family | wrong ones | " + " | ".join(suites) + " | any |",
        "| --- " * (len(suites) + 3) + "|",
    ]
    for family in sorted({row.family for row in wrong}) + ["all"]:
        some = [row for row in wrong if family in ("all", row.family)]
        counts = [sum(suite in row.caught for row in some) for suite in suites]
        cells = [str(len(some)), *map(str, counts), str(sum(bool(row.caught) for row in some))]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "The model's suites cannot see what the model does not do: odd sizes, fully masked rows, additive",
    ]
    lines += ["masks, other dtypes, calls in other orders. That is what the operator suite is for.", ""]
    for title, some in (("Missed", missed), ("False alarms", alarms)):
        if some:
            lines += [f"{title}:", ""]
            lines += [
                f"- `{row.name}` ({row.about}), seed {row.seed}: {row.caught or 'passes'}" for row in some
            ]
            lines.append("")
    lines += ["<details><summary>Every wrong attention, with what caught it</summary>", ""]
    lines += ["| attention | what is wrong | caught by | diagnosis |", "| --- | --- | --- | --- |"]
    for row in sorted(wrong, key=lambda each: (each.family, each.name)):
        by = ", ".join(suite for suite in suites if suite in row.caught)
        lines.append(
            f"| `{row.name}` | {row.about.replace('|', '/')} | {by} | {row.diagnosis.replace('|', '/')} |"
        )
    lines += ["", "</details>", "", "<details><summary>The right attentions</summary>", ""]
    lines += ["| attention | style |", "| --- | --- |"]
    lines += [
        f"| `{name}` | {about.replace('|', '/')} |"
        for name, about in {r.name: r.about for r in right}.items()
    ]
    lines += ["", "</details>"]
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Between the marks of the page."""
    page = path.read_text()
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        sys.exit(f"{path} has no {BEGIN} ... {END}: put them where the tables belong")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--seeds", type=int, default=3, help="of random inputs, for right attentions (default 3)"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one a core")
    parser.add_argument("--slow", action="store_true", help="right attentions that compile, as well")
    parser.add_argument("--only", metavar="TEXT", help="those whose name contains it; nothing is written")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "harness.md")
    chosen = parser.parse_args()
    todo = [task for task in tasks(chosen.seeds, chosen.slow) if not chosen.only or chosen.only in task[0]]
    started, rows = time.perf_counter(), []
    with multiprocessing.get_context("spawn").Pool(chosen.processes) as pool:
        for row in pool.imap_unordered(judge, todo, chunksize=4):
            rows.append(row)
            if row.is_wrong != bool(row.caught):
                print(f"{'missed' if row.is_wrong else 'false alarm'}: {row}", flush=True)
            if len(rows) % 20 == 0:
                print(f"{len(rows)} of {len(todo)}, {time.perf_counter() - started:.0f} s", flush=True)
    print(Counter((row.family, row.diagnosis.split(":")[0]) for row in rows if row.is_wrong))
    if not chosen.only:
        write(chosen.page, tables(rows, f"python tools/mutation_score.py --seeds {chosen.seeds}"))


if __name__ == "__main__":
    main()
