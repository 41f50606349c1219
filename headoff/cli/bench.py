"""`headoff bench`: benchmarks of attention, decoder, sweep, relevance and importance on this machine."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headoff.cli.options import add_model_options, named_path, positive, ratio
from headoff.devices import DTYPES, chosen_device, torch_dtype
from headoff.errors import OutputError, SettingError, error_line
from headoff.files import write_file

if TYPE_CHECKING:
    from headoff.bench.runner import Plan

# Written out, because importing them would import torch; a test compares them with the originals.
SIZE_NAMES = ("scenes", "r50", "dc5")
SUITES = (
    "attention",
    "skipping",
    "decoder",
    "sweep",
    "relevance",
    "methods",
    "importance",
    "faithfulness",
    "deformable",
)

STAGE_SECONDS = 1.0
"""Stages that follow the line before faster than this are not announced."""

EPILOG = """\
suites:
  attention   each backend of torch's SDPA times the gate (the fastest is the reference), flex_attention, eager, and
              headoff's kernels, with 0, 4, 8 heads off and for whole sweeps; forward, and forward with backward
  skipping    SDPA that leaves out the rows of heads that are off, relative to plain SDPA (CPU only)
  decoder     all configurations decoded together, by each attention, and one by one
  sweep       from the image to the outcomes, relative to one plain forward pass
  relevance   from the image to the maps, and the notebooks' way; with the encoder's cams kept, and recomputed tile by
              tile in little memory
  methods     maps by every relevance method, relative to one plain forward pass
  importance  scores of all heads by several measures, relative to one plain forward pass
  faithfulness  deletion curves of 20 steps for 5 objects by what fills the place of tokens, relative to one plain
              forward pass
  deformable  single calls of deformable attention by formulations in PyTorch (grid_sample, gathered
              corners, embedding bag) at the sizes of RT-DETR and Deformable DETR

  Every provider is checked against the float64 oracle before it is timed. Wrong and unsupported ones are listed.
  Providers take turns; the interval of a ratio has 99% confidence. It takes 8 rounds; where those take more than a
  minute, fewer are made and there is no interval.
examples:
  headoff bench                                            the bundled detector on a CPU, R50 on a GPU
  headoff bench --only sweep --size r50 --threads 2        9, 49 and 256 configurations of R50 at 800x1066
  headoff bench --only attention --dtype bfloat16
  headoff bench --model my-detr.pth --image street.jpg --only sweep
  headoff bench --size r50 --size dc5 --out bench          bench.json, bench.csv and bench.md
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "bench",
        help="benchmark attention, decoder, sweep, relevance and importance of heads",
        description="Benchmark attention, decoder, sweep, relevance and importance of heads on this machine, relative "
        "to torch's kernels, a plain forward pass and the published notebooks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:1; by default CUDA if available")
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
    add_model_options(parser, default=None).add_argument(
        "--image", type=named_path, metavar="FILE", help="the image for --model (default: a bundled scene)"
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
        help="about how long each provider of a case is timed (default 0.05 for scenes, else 1); longer makes "
        "intervals narrower",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=1,
        metavar="N",
        help="CPU threads (default 1, as times with several threads are unreliable on a busy machine)",
    )
    parser.add_argument(
        "--out", type=named_path, metavar="FOLDER", help="write bench.json, bench.csv and bench.md there"
    )
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command; returns the exit code. Raises HeadoffError with a sentence for the user."""
    if settings.out:
        _check_folder(settings.out)
    from headoff.bench.runner import run as run_plan

    plan = plan_of(settings)
    try:
        report = run_plan(plan, shlex.join(["headoff", *sys.argv[1:]]), Progress())
    except KeyboardInterrupt:
        print("\nheadoff: interrupted; no results were written", file=sys.stderr)
        return 130
    page = report.to_markdown()
    print(page, end="")
    if settings.out:
        contents = {"bench.json": report.to_json(), "bench.csv": report.to_csv(), "bench.md": page}
        for name, content in contents.items():
            write_file(settings.out / name, content)
            print(f"written: {settings.out / name}")
    return 0


def plan_of(settings: argparse.Namespace) -> Plan:
    """The benchmarks that the options ask for.

    Raises:
        SettingError: there is no such device, or options contradict each other.
    """
    from headoff.bench.runner import Plan
    from headoff.cli.detectors import model_choice

    if settings.model and settings.size:
        raise SettingError("--model is timed instead of the detectors of --size: give one of the two")
    of_a_model = ("heads_per_layer", "dc5", "classes", "short_side", "image")
    if not settings.model and any(getattr(settings, name) is not None for name in of_a_model):
        raise SettingError(
            "--heads-per-layer, --dc5, --classes, --short-side and --image are about --model: give it as well"
        )
    device = chosen_device(settings.device)
    on_gpu = device.type == "cuda"
    default = "model" if settings.model else "r50" if on_gpu else "scenes"
    sizes = tuple(dict.fromkeys(settings.size or [default]))
    dtypes = settings.dtype or (["float32", "bfloat16"] if on_gpu else ["float32"])
    return Plan(
        device=device,
        dtypes=tuple(torch_dtype(name) for name in dict.fromkeys(dtypes)),
        sizes=sizes,
        suites=tuple(dict.fromkeys(settings.only or SUITES)),
        seconds=settings.seconds or (0.05 if sizes == ("scenes",) else 1.0),
        threads=settings.threads,
        model=model_choice(settings) if settings.model else None,
        image=settings.image,
    )


def _check_folder(folder: Path) -> None:
    """Raise an error before anything is measured if results cannot be written where they should go."""
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"--out {folder} is a file: name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be created ({error_line(error)}): choose another folder"
        ) from error


class Progress:
    """Prints a line for each case, and for each stage of a case whose stages take seconds."""

    def __init__(self) -> None:
        self._started = self._last = time.monotonic()

    def __call__(self, case: str, stage: str) -> None:
        now = time.monotonic()
        if stage and now - self._last < STAGE_SECONDS:
            return
        self._last = now
        print(
            f"bench {now - self._started:5.0f} s: {stage and '  '}{stage or case}",
            file=sys.stderr,
            flush=True,
        )
