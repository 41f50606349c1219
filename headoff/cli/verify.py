"""`headoff verify`: whether a patched attention is right, and what it costs."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any

from headoff.cli.options import positive
from headoff.errors import SettingError
from headoff.harness.settings import OPTIONS, read_settings
from headoff.harness.suite_files import suite_file, suite_names, suites_folder

EPILOG = """\
the attention:
  path/to/file.py:name or package.module:name, a callable
      attention(query, key, value, attn_mask=None, *, head_gate=None) -> context
  with query (B, H, Q, D), key and value (B, H, S, D). Without a head_gate parameter it is called like
  torch.nn.functional.scaled_dot_product_attention, and its context is gated for it.

exit codes:
  0   it is right in the dtypes asked for (and, with --benchmark, no slower than allowed)
  1   it is wrong, or slower: the first lines of the summary say what, where and by how much
  2   no verdict: it cannot be tested, or a check failed that is not about it; one sentence says why
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
        description="Run the heads_off suites against an attention: single calls and their side effects, then "
        "detections, relevance maps and gradients of a detector that uses it, under all numbers of heads off.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="headoff verify PATCH [options] [-- PYTEST OPTIONS]",
    )
    parser.add_argument("patch", nargs="?", metavar="PATCH", help="the attention under test")
    groups = {title: parser.add_argument_group(title) for title in ("input", "speed", "output")}
    for option in OPTIONS:
        if option.name != "attention":
            groups[option.group].add_argument(
                f"--{option.name}",
                metavar=option.metavar,
                help=option.help,
                action="append" if option.several else "store",
            )
    groups["input"].add_argument(
        "--only", action="append", metavar="SUITE", help="run only this suite; can be repeated: operator, calls, "
        "detections, relevance, gradients or benchmark"
    )  # fmt: skip
    groups["speed"].add_argument(
        "--benchmark", action="store_true", help="compare its time with the baseline's"
    )
    results = groups["output"]
    results.add_argument("--junitxml", type=Path, metavar="FILE", help="results for a CI server")
    results.add_argument("-v", "--verbose", action="store_true", help="a line for every check")
    results.add_argument(
        "--render",
        nargs=2,
        type=Path,
        metavar=("JSON", "PAGE"),
        help="make only the page (.html) or the summary (.md) of an earlier run's results",
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

    if settings.benchmark and settings.workers:
        raise SettingError("times need the machine to themselves: leave out -n, or --benchmark")

    import pytest

    from headoff.harness.plugin.preflight import preflight
    from headoff.harness.plugin.reporter import remove_earlier_report

    chosen = read_settings(_texts(settings))
    arguments = _pytest_arguments(settings)
    if chosen[0].report:
        remove_earlier_report(chosen[0].report)
    for one in chosen:
        preflight(one.attention, one.device, one.dtype)
    # pytest's options of somebody's own project are not meant for these suites.
    os.environ.pop("PYTEST_ADDOPTS", None)
    watcher = _Watcher()
    code = int(pytest.main(arguments, plugins=[watcher]))
    if watcher.interrupted:
        return 130
    if code > 2:  # pytest itself failed, or ran nothing
        return 2
    return {"right": 0, "wrong": 1, "slower": 1}.get(watcher.verdict or "", 2)


class _Watcher:
    """A plugin that learns the verdict, and tells Ctrl-C from other ends: pytest's exit codes do not say."""

    interrupted = False
    verdict: str | None = None

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True

    def pytest_unconfigure(self, config: Any) -> None:
        reporter = config.pluginmanager.get_plugin("headoff-reporter")
        if reporter is not None and reporter.document is not None:
            self.verdict = reporter.document["verdict"]


def _texts(settings: argparse.Namespace) -> dict[str, Any]:
    """What was given for each option."""
    given = vars(settings)
    return {option.name: given.get(option.name.replace("-", "_")) for option in OPTIONS} | {
        "attention": settings.patch
    }


def _pytest_arguments(settings: argparse.Namespace) -> list[str]:
    from headoff.detr.checkpoints import cache_folder

    folder = suites_folder()
    names = settings.only or [name for name in suite_names() if name != "benchmark"]
    if settings.benchmark:
        names = [*names, "benchmark"]
    files = [str(suite_file(name)) for name in dict.fromkeys(names)]
    isolated = ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder / 'tests'}"]
    # What --lf and --benchmark-save write goes to the cache, not to the current folder.
    cached = ["-o", f"cache_dir={cache_folder() / 'pytest'}"]
    cached.append(f"--benchmark-storage=file://{cache_folder() / 'benchmarks'}")
    quiet = ["-q", "--no-header", "--tb=no", "-rN", "--disable-warnings"]
    options = ["-v", "--tb=short"] if settings.verbose else quiet
    for name, given in _texts(settings).items():
        texts = given if isinstance(given, list) else [given] if given is not None else []
        options += [f"--headoff-{name}={text}" for text in texts]
    if settings.junitxml:
        options.append(f"--junitxml={settings.junitxml}")
    if settings.workers:
        options += ["-n", str(settings.workers)]
    plugin = ["-p", "headoff.harness.plugin.hooks"]
    return [*plugin, *isolated, *cached, *options, *settings.pytest_options, *files]
