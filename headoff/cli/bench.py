"""`headoff bench`: what attention, decoder, sweep and relevance cost on this machine, compared with alternatives."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headoff.cli.options import positive, ratio
from headoff.devices import DTYPES, chosen_device, torch_dtype
from headoff.errors import OutputError, SettingError
from headoff.files import atomic_write

if TYPE_CHECKING:
    from headoff.bench.runner import Plan

# Written out, because importing them would import torch; a test compares them with the originals.
SIZE_NAMES = ("scenes", "r50", "dc5")
SUITES = ("attention", "skipping", "decoder", "sweep", "relevance")

EPILOG = """\
suites:
  attention   each backend of torch's SDPA times the gate (the fastest is the reference), flex_attention, eager, and
              headoff's own, with 0, 4, 8 heads off and for whole sweeps; forward, and forward with backward
  skipping    SDPA that leaves out the rows of heads that are off, relative to plain SDPA (CPU only)
  decoder     all configurations decoded together, by each attention, and one by one
  sweep       from the image to the outcomes, relative to one plain forward pass
  relevance   from the image to the maps, relative to the notebooks' way; with the encoder's cams kept, and recomputed
              tile by tile in little memory

  Every provider is checked against the float64 oracle before it is timed. Wrong and unsupported ones are listed.
  Provider and reference take turns; the interval of a ratio has 99% confidence.
examples:
  headoff bench                                            the bundled detector on a CPU, R50 on a GPU
  headoff bench --only sweep --size r50 --threads 2        9, 49 and 256 configurations of R50 at 800x1066
  headoff bench --only attention --dtype bfloat16
  headoff bench --size r50 --size dc5 --out bench          bench.json, bench.csv, bench.md and plots
"""


def add_parser(commands: Any) -> None:
    """Add the command to the parser; imports nothing heavy."""
    parser = commands.add_parser(
        "bench",
        help="measure what attention, decoder, sweep and relevance cost on this machine",
        description="Measure attention, decoder, sweep and relevance on this machine, in one run, against torch's own "
        "kernels, a plain forward pass and the notebooks' way.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; by default CUDA where there is one")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="can be repeated; by default float32, on a GPU also bfloat16",
    )
    parser.add_argument(
        "--size",
        action="append",
        choices=SIZE_NAMES,
        help="scenes: the bundled detector (default on a CPU); r50: a ResNet-50 DETR with random weights at 800x1066 "
        "(default on a GPU); dc5: the same with 4 times the tokens; can be repeated",
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=SUITES,
        metavar="SUITE",
        help=f"{', '.join(SUITES)}; can be repeated",
    )
    parser.add_argument(
        "--seconds",
        type=ratio,
        metavar="S",
        help="about how long each comparison takes, at least 8 rounds (default 0.05 for scenes, else 1); longer makes "
        "intervals narrower",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="CPU threads (default 1: with several, times on a busy machine mean little)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write bench.json, bench.csv, bench.md and plots there"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Raises HeadoffError with a sentence for the user."""
    _check_places(settings)
    from headoff.bench.runner import run as run_plan
    from headoff.bench.tables import markdown_of, text_of

    plan = plan_of(settings)
    try:
        report = run_plan(plan, shlex.join(["headoff", *sys.argv[1:]]), _progress)
    except KeyboardInterrupt:
        print("\nheadoff: interrupted; no results were written", file=sys.stderr)
        return 130
    print(text_of(report))
    files: dict[Path, bytes] = {}
    if settings.markdown:
        files[settings.markdown] = markdown_of(report).encode()
    if settings.out:
        from headoff.bench.plots import plots_of

        contents = {
            "bench.json": report.to_json().encode(),
            "bench.csv": report.to_csv().encode(),
            "bench.md": markdown_of(report).encode(),
            **plots_of(report),
        }
        files |= {settings.out / name: content for name, content in contents.items()}
    _write(files)
    return 0


def plan_of(settings: argparse.Namespace) -> Plan:
    """What the options ask for. Raises SettingError for a device that is not there."""
    from headoff.bench.runner import Plan

    device = chosen_device(settings.device)
    on_gpu = device.type == "cuda"
    sizes = tuple(dict.fromkeys(settings.size or ["r50" if on_gpu else "scenes"]))
    dtypes = settings.dtype or (["float32", "bfloat16"] if on_gpu else ["float32"])
    return Plan(
        device=device,
        dtypes=tuple(torch_dtype(name) for name in dict.fromkeys(dtypes)),
        sizes=sizes,
        suites=tuple(dict.fromkeys(settings.only or SUITES)),
        seconds=settings.seconds or (0.05 if sizes == ("scenes",) else 1.0),
        threads=settings.threads,
    )


def _check_places(settings: argparse.Namespace) -> None:
    """Raise SettingError before anything is measured if results cannot be written where they should go."""
    if settings.out and settings.out.exists() and not settings.out.is_dir():
        raise SettingError(f"--out {settings.out} is a file: name a folder")
    if settings.markdown and settings.markdown.is_dir():
        raise SettingError(f"--markdown {settings.markdown} is a folder: name a file")
    for folder in filter(None, (settings.out, settings.markdown and settings.markdown.parent)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be created ({error.strerror or error}): choose another folder"
            ) from error


def _progress(name: str) -> None:
    print(f"bench: {name}", file=sys.stderr, flush=True)


def _write(files: Mapping[Path, bytes]) -> None:
    """Write all files atomically. Raises OutputError."""
    for path, content in files.items():
        try:
            with atomic_write(path) as file:
                file.write(content)
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"{path} cannot be written ({reason}): choose another folder") from error
        print(f"written: {path}")
