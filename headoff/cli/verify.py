"""`headoff verify`: whether a patched attention is right, and what it costs."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from headoff.cli.options import positive
from headoff.errors import SettingError
from headoff.harness.contracts import (
    CHECKS_SUITE,
    CONTRACTS,
    contract_named,
    is_of_contract,
    is_under_test,
    suits_model,
)
from headoff.harness.settings import OPTIONS, Option, default_value
from headoff.harness.suite_files import suite_file, suite_names

EPILOG = """\
the attention:
  path/to/file.py:name or package.module:name, a callable
      attention(query, key, value, attn_mask=None, *, head_gate=None) -> context
  with query (B, H, Q, D), key and value (B, H, S, D). Without a head_gate parameter it is called like
  torch.nn.functional.scaled_dot_product_attention, and its context is gated for it.
  With --contract deformable, a callable
      ms_deform_attention(value, spatial_shapes, sampling_locations, attention_weights, *, head_gate=None) -> context
  with value (B, N, H, D), spatial_shapes ((h, w), ...), sampling_locations (B, Q, H, L, P, 2) from 0 to 1,
  attention_weights (B, Q, H, L, P) and context (B, Q, H, D).

exit codes:
  0   it is right in the dtypes asked for (and, with --benchmark, no slower than allowed)
  1   it is wrong, or slower: the first lines of the summary say what, where and by how much
  2   no verdict: it cannot be tested, it crashed or hung, or a check failed that is not about it; one sentence says why
  130 interrupted

examples:
  headoff verify my_kernel.py:attention
  headoff verify my_kernel.py:attention --device cuda --dtype bfloat16 --report report.html
  headoff verify my_kernel.py:attention --forward-only
  headoff verify my_kernel.py:attention --check compile,opcheck
  headoff verify my_kernel.py:attention --benchmark --baseline sdpa --max-slowdown 1.05
  headoff verify my_kernel.py:attention --model detr-resnet-50 --image street.jpg
  headoff verify my_msda.py:kernel --contract deformable --benchmark
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
                help=option.help,
                **_kind(option),
            )
    groups["input"].add_argument(
        "--only", action="append", metavar="SUITE", help="run only this suite; can be repeated: operator, calls, "
        "detections, relevance, gradients, importance, checks or benchmark; deformable or deformable_benchmark"
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

    from headoff.harness.judge import judge

    contract = contract_named(settings.contract or "dense")
    is_of_family = _is_of_family(settings.model)
    if CHECKS_SUITE in (settings.only or ()) and not settings.check:
        raise SettingError("the suite 'checks' runs what --check names: add --check compile, or another one")
    for name in settings.only or ():
        if not is_of_contract(name, contract):
            other = next(one.name for one in CONTRACTS.values() if name in one.suites)
            raise SettingError(
                f"the suite {name!r} is for --contract {other}: name one of {', '.join(contract.suites)}"
            )
        if not suits_model(name, is_of_family):
            suited = [suite for suite in contract.suites if suits_model(suite, is_of_family)]
            raise SettingError(
                f"the suite {name!r} cannot test an attention in this model: name one of {', '.join(suited)}"
            )
    names = settings.only or [
        name
        for name in suite_names()
        if is_under_test(name, contract, is_of_family, bool(settings.forward_only))
        and name not in (contract.benchmark, CHECKS_SUITE)
    ]
    if settings.check:
        names = [*names, CHECKS_SUITE]
    if settings.benchmark and not suits_model(contract.benchmark, is_of_family):
        raise SettingError("attention is timed in headoff's own DETR: leave out --model, or --benchmark")
    if settings.benchmark:
        names = [*names, contract.benchmark]
    return judge(
        _texts(settings), [str(suite_file(name)) for name in dict.fromkeys(names)], _pytest_options(settings)
    )


def _is_of_family(model: str | None) -> bool:
    if model in (None, default_value("model")):
        return False  # without importing torch
    from headoff.detr.checkpoints.load import is_of_family

    return is_of_family(str(model))


def _kind(option: Option) -> dict[str, Any]:
    if option.flag:
        return {"action": "store_const", "const": "yes"}
    if option.switch:
        return {"action": argparse.BooleanOptionalAction}
    return {"metavar": option.metavar, "action": "append" if option.several else "store"}


def _texts(settings: argparse.Namespace) -> dict[str, Any]:
    """What was given for each option."""
    given = vars(settings)
    texts = {option.name: given.get(option.name.replace("-", "_")) for option in OPTIONS}
    switches = {name: "yes" if value else "no" for name, value in texts.items() if isinstance(value, bool)}
    return {**texts, **switches, "attention": settings.patch}


def _pytest_options(settings: argparse.Namespace) -> list[str]:
    quiet = ["-q", "--no-header", "--tb=no", "-rN", "--disable-warnings"]
    options = ["-v", "--tb=short"] if settings.verbose else quiet
    times = {contract.benchmark for contract in CONTRACTS.values()}
    if (settings.benchmark or times & set(settings.only or ())) and not settings.verbose:
        options.append("--benchmark-quiet")  # the verdict comes first, then our table
    if settings.junitxml:
        options.append(f"--junitxml={settings.junitxml}")
    if settings.workers:
        # A worker that the attention has ended is not started again: there is no verdict without its checks.
        # Neighbouring checks share results, so each worker gets a run of them.
        options += ["-n", str(settings.workers), "--max-worker-restart=0", "--dist=worksteal"]
    return [*options, *settings.pytest_options]
