"""`headoff verify`: whether a patched attention is right, and what it costs."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from headoff.cli.options import positive, ratio, whole
from headoff.devices import DTYPES, chosen_device
from headoff.errors import SettingError
from headoff.harness.suite_files import suite_file, suite_names, suites_folder

EPILOG = """\
the attention:
  path/to/file.py:name or package.module:name, a callable
      attention(query, key, value, attn_mask=None, *, head_gate=None) -> context
  with query (B, H, Q, D), key and value (B, H, S, D). Without a head_gate parameter it is called like
  torch.nn.functional.scaled_dot_product_attention, and its context is gated for it.

exit codes:
  0   it is right (and, with --benchmark, no slower than allowed)
  1   it is wrong, or slower: the first lines of the summary say what, where and by how much
  2   it cannot be tested at all: one sentence says why
  130 interrupted

examples:
  headoff verify my_kernel.py:attention
  headoff verify my_kernel.py:attention --device cuda --dtype bfloat16 --report report.html
  headoff verify my_kernel.py:attention --benchmark --baseline sdpa --max-slowdown 1.05
  headoff verify my_kernel.py:attention --model detr-resnet-50 --image street.jpg
  headoff verify my_kernel.py:attention --only operator -- -x --lf     (pytest's own options after --)
  headoff verify --render results.json report.html
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check a patched attention: is it right, and what does it cost?",
        description="Run the heads_off suites against an attention: its numbers and its conduct by itself, then "
        "detections, relevance maps and gradients of a detector that uses it, under all numbers of heads off.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="headoff verify PATCH [options] [-- PYTEST OPTIONS]",
    )
    parser.add_argument("patch", nargs="?", metavar="PATCH", help="the attention under test")
    what = parser.add_argument_group("on what")
    what.add_argument(
        "--model", default="scenes", metavar="MODEL", help="as of `headoff sweep`; the bundled one by default"
    )
    what.add_argument(
        "--image",
        type=Path,
        action="append",
        metavar="FILE",
        help="an image instead of the bundled scenes; can be repeated. What is right for it is computed in float64 at "
        "first, which takes a while, and kept",
    )
    what.add_argument("--device", help="`cpu`, `cuda`, `cuda:1`; CUDA where there is one by default")
    what.add_argument("--dtype", default="float32", choices=DTYPES, help="of the model (default float32)")
    what.add_argument("--golden-dir", type=Path, metavar="FOLDER", help="golden files of your own")
    what.add_argument("--seed", type=whole, default=0, metavar="N", help="of the random inputs (default 0)")
    what.add_argument(
        "--only", action="append", metavar="SUITE", help="this suite alone; can be repeated. There are: "
        "operator, calls, detections, relevance, gradients"
    )  # fmt: skip
    cost = parser.add_argument_group("what it costs")
    cost.add_argument(
        "--benchmark", action="store_true", help="measure its time as well, beside the baseline's"
    )
    cost.add_argument(
        "--baseline", default="sdpa", metavar="PATCH", help="what its time is compared with (default sdpa)"
    )
    cost.add_argument(
        "--max-slowdown",
        type=ratio,
        default=1.10,
        metavar="RATIO",
        help="it is too slow where its time is surely above this many times the baseline's (default 1.10)",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help=".html, with the .json it is made of beside it, or .json alone",
    )
    results.add_argument("--junitxml", type=Path, metavar="FILE", help="results for a CI server")
    results.add_argument(
        "--failures",
        type=Path,
        default=Path("headoff-failures"),
        metavar="FOLDER",
        help="where pictures of failures go (default headoff-failures)",
    )
    results.add_argument("-v", "--verbose", action="store_true", help="a line for every check")
    results.add_argument(
        "--render",
        nargs=2,
        type=Path,
        metavar=("JSON", "PAGE"),
        help="only make the page (.html) or the summary (.md) of an earlier run's results",
    )
    parser.add_argument(
        "-n",
        "--workers",
        type=positive,
        default=None,
        metavar="N",
        help="run in N processes (needs pytest-xdist)",
    )
    parser.set_defaults(run=run, pytest_options=[])


def run(settings: argparse.Namespace) -> int:
    if settings.render:
        from headoff.harness.report import render_file

        render_file(*settings.render)
        print(f"wrote {settings.render[1]}")
        return 0
    if not settings.patch:
        raise SettingError("nothing to verify was named: write path/to/file.py:name or package.module:name")
    if settings.workers and not importlib.util.find_spec("xdist"):
        raise SettingError("-n needs pytest-xdist: `pip install pytest-xdist`, or leave it out")

    import pytest

    from headoff.harness.plugin.preflight import preflight
    from headoff.harness.plugin.reporter import make_way

    if settings.benchmark and settings.workers:
        raise SettingError("times need the machine to themselves: leave out -n, or --benchmark")
    if settings.report:
        make_way(settings.report)
    preflight(settings.patch, str(chosen_device(settings.device)), settings.dtype)
    # What a person set for pytest in their own project is not about these suites.
    os.environ.pop("PYTEST_ADDOPTS", None)
    interrupts = _Interrupts()
    code = int(pytest.main(_pytest_arguments(settings), plugins=[interrupts]))
    if interrupts.seen:
        return 130
    return code if code in (0, 1) else 2  # by any other of pytest's, the suites could not be run


class _Interrupts:
    """A plugin that tells Ctrl-C from a suite that cannot be read: pytest has one exit code for both."""

    seen = False

    def pytest_keyboard_interrupt(self) -> None:
        self.seen = True


def _pytest_arguments(settings: argparse.Namespace) -> list[str]:
    from headoff.detr.checkpoints import cache_folder

    folder = suites_folder()
    names = settings.only or [name for name in suite_names() if name != "benchmark"]
    if settings.benchmark:
        names = [*names, "benchmark"]
    files = [str(suite_file(name)) for name in dict.fromkeys(names)]
    isolated = ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder / 'tests'}"]
    # Not in the folder that somebody happens to stand in: what --lf and --benchmark-save keep.
    kept = ["-o", f"cache_dir={cache_folder() / 'pytest'}"]
    kept.append(f"--benchmark-storage=file://{cache_folder() / 'benchmarks'}")
    said = (
        ["-v", "--tb=short"]
        if settings.verbose
        else ["-q", "--no-header", "--tb=no", "-rN", "--disable-warnings"]
    )
    chosen = {
        "attention": settings.patch,
        "model": settings.model,
        "device": settings.device,
        "dtype": settings.dtype,
        "golden-dir": settings.golden_dir,
        "seed": settings.seed,
        "baseline": settings.baseline,
        "max-slowdown": settings.max_slowdown,
        "report": settings.report,
        "failures": settings.failures,
    }
    options = [f"--headoff-{name}={value}" for name, value in chosen.items() if value is not None]
    options += [f"--headoff-image={image}" for image in settings.image or ()]
    if settings.junitxml:
        options.append(f"--junitxml={settings.junitxml}")
    if settings.workers:
        options += ["-n", str(settings.workers)]
    return [
        "-p",
        "headoff.harness.plugin.hooks",
        *isolated,
        *kept,
        *said,
        *options,
        *settings.pytest_options,
        *files,
    ]
