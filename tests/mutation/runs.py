"""Runs of many small tasks in several processes. Results are kept line by line: a run that was cut short goes on."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def rows_in(path: Path) -> list[Row]:
    """Those that earlier runs have written; a line that was cut off in the middle is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _one_thread() -> None:
    """The processes share the cores; threads of several would wait for one another."""
    import torch

    torch.set_num_threads(1)


def run(
    task: Callable[[Any], Row],
    todo: Iterable[Any],
    path: Path,
    processes: int,
    describe: Callable[[Row], str],
) -> list[Row]:
    """The rows of `todo`, each appended to the file at `path` as soon as it is there, and described on a line."""
    todo = list(todo)
    rows: list[Row] = []
    if not todo:
        return rows
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with (
        multiprocessing.get_context("spawn").Pool(processes, _one_thread, maxtasksperchild=300) as pool,
        path.open("a") as file,
    ):
        for number, row in enumerate(pool.imap_unordered(task, todo, chunksize=1), 1):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            print(
                f"{number} of {len(todo)}, {time.perf_counter() - started:.0f} s: {describe(row)}", flush=True
            )
    return rows
