"""`headoff bench`: what attention, decoder, sweep and relevance cost here, beside what else there is."""

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
from headoff.files import written_atomically

if TYPE_CHECKING:
    from headoff.bench.cases import Scale
    from headoff.bench.records import Level
    from headoff.bench.running import Plan

LEVELS: tuple[Level, ...] = ("attention", "decoder", "sweep", "relevance", "blocked")

EPILOG = """\
what is compared:
  attention   each backend of torch's SDPA times the gate (the fastest is the reference), flex_attention, eager, and
              headoff's own, for 0, 4, 8 heads off and for whole sweeps; forward, and forward with backward
  decoder     all configurations decoded together, with each attention
  sweep       from the picture to the outcomes, beside one forward pass for every configuration
  relevance   from the picture to the maps, beside a forward and a backward pass for every map
  blocked     from the picture to the maps of DC5 (quick: the bundled model), with the encoder's cams kept, and made
              anew tile by tile in little memory: time, memory, and how the maps differ

  Everything is checked against the float64 oracle before it is timed; what is wrong or unsupported is listed. Two that
  are compared take turns; the interval of a ratio is of 99%.
examples:
  headoff bench                                     on a CPU quick, on a GPU with the shapes of DETR R50 and DC5
  headoff bench --only attention --dtype bfloat16
  headoff bench --only blocked --device cuda
  headoff bench --full --out bench                  bench.json, bench.csv, bench.md and plots
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure what attention, decoder, sweep and relevance cost here",
        description="Measure attention, decoder, sweep and relevance beside torch's own kernels and the notebooks' "
        "way, on this machine, in one run.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device", default=None, help="`cpu`, `cuda`, `cuda:1`; CUDA where there is one by default"
    )
    parser.add_argument(
        "--dtype",
        action="append",
        choices=DTYPES,
        help="can be repeated; float32 by default, on a GPU bfloat16 as well",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small shapes, under a minute (default on a CPU)")
    size.add_argument("--full", action="store_true", help="all shapes, DC5 throughout")
    parser.add_argument(
        "--only",
        action="append",
        choices=LEVELS,
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)}; can be repeated",
    )
    parser.add_argument(
        "--seconds",
        type=ratio,
        default=None,
        metavar="S",
        help="for each comparison, about (default 0.05 where quick, else 1); more makes intervals narrower",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="CPU threads (default 1: several wait for the slowest, which makes times of a busy machine useless)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write bench.json, bench.csv, bench.md and plots there"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables as Markdown")
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    _check_places(settings)
    # What pytest and matplotlib bring along is for this command alone.
    from headoff.bench.plots import plots_of
    from headoff.bench.running import run as run_plan
    from headoff.bench.tables import markdown_of, text_of

    plan = plan_of(settings)
    try:
        report = run_plan(plan, shlex.join(["headoff", *sys.argv[1:]]), _progress)
    except KeyboardInterrupt:
        print("\nheadoff: interrupted; of a benchmark that is not whole nothing is written", file=sys.stderr)
        return 130
    print(text_of(report))
    files: dict[Path, bytes] = {}
    if settings.markdown:
        files[settings.markdown] = markdown_of(report).encode()
    if settings.out:
        made = {
            "bench.json": report.to_json().encode(),
            "bench.csv": report.to_csv().encode(),
            "bench.md": markdown_of(report).encode(),
            **plots_of(report),
        }
        files |= {settings.out / name: content for name, content in made.items()}
    _write(files)
    return 0


def plan_of(settings: argparse.Namespace) -> Plan:
    """What the options ask for. Raises SettingError for a device that is not there."""
    from headoff.bench.running import Plan

    device = chosen_device(settings.device)
    on_gpu = device.type == "cuda"
    scale: Scale = "quick"
    if not settings.quick and (settings.full or on_gpu):
        scale = "full" if settings.full else "standard"
    dtypes = settings.dtype or (("float32", "bfloat16") if on_gpu else ("float32",))
    return Plan(
        device=device,
        dtypes=tuple(torch_dtype(name) for name in dict.fromkeys(dtypes)),
        scale=scale,
        levels=tuple(dict.fromkeys(settings.only or LEVELS)),
        seconds=settings.seconds or (0.05 if scale == "quick" else 1.0),
        threads=settings.threads,
    )


def _check_places(settings: argparse.Namespace) -> None:
    """Refuse, before anything is measured, places that nothing can be written to."""
    if settings.out and settings.out.exists() and not settings.out.is_dir():
        raise SettingError(f"--out {settings.out} is a file; name a folder")
    if settings.markdown and settings.markdown.is_dir():
        raise SettingError(f"--markdown {settings.markdown} is a folder; name a file")


def _progress(name: str) -> None:
    print(f"bench: {name}", file=sys.stderr, flush=True)


def _write(files: Mapping[Path, bytes]) -> None:
    """All of them, each whole. Raises OutputError."""
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_atomically(path) as file:
                file.write(content)
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}): choose another place"
            ) from error
        print(f"written: {path}")
