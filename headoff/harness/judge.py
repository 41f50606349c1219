"""The process that judges a patch: it runs the suites in another process, and knows of the patch what that one tells.

The patch is never imported here. A crash, an exit, a hang or a report that is not complete is no verdict.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from headoff.errors import AttentionError
from headoff.harness.plugin.reporter import NO_VERDICT, about_contract, command_line
from headoff.harness.plugin.run import Run
from headoff.harness.process import Event, emit, run_in_process
from headoff.harness.report import remove_earlier_report, write_report
from headoff.harness.report.terminal import benchmark_lines, summary_lines
from headoff.harness.settings import OPTIONS, Settings, default_value, read_settings
from headoff.harness.suite_files import suites_folder

INTERRUPTED = 130
EXIT_CODES = {"right": 0, "wrong": 1, "slower": 1, "incomplete": NO_VERDICT}

PLUGINS = ("headoff.harness.plugin.hooks", "syrupy", "pytest_benchmark.plugin", "xdist.plugin")
"""Of pytest, those that the suites need; xdist where it is installed."""


def judge(texts: Mapping[str, Any], files: Sequence[str], pytest_options: Sequence[str]) -> int:
    """Run test files against a patch in another process; print the verdict and write the report.

    Args:
        texts: of the options of `headoff.harness.settings`, by name; `attention` is the patch.
        files: the suites.
        pytest_options: further options of pytest.

    Returns:
        The exit code of `headoff verify`.

    Raises:
        AttentionError: the patch cannot be tested at all.
        SettingError: an option cannot be read.
        OutputError: the report cannot be written.
    """
    values = {option.name: option.value(texts[option.name]) for option in _given_once(texts)}
    report: Path | None = values.get("report")
    if report:
        remove_earlier_report(report)
    names = ("attention", "baseline", "model", "seed")
    contract = values.get("contract", Settings.contract)
    chosen = {name: str(values.get(name, default_value(name, contract))) for name in names}
    run_about = about_contract(chosen, contract, values.get("forward-only", False))
    run = Run({**run_about, "command": command_line()})
    errors: list[str] = []

    def notice(sentence: str) -> None:
        print(f"\nheadoff: {sentence}", file=sys.stderr, flush=True)  # below pytest's dots

    def take(event: Event) -> None:
        errors.extend(event.pop("error", ()))
        found = event.get("test", {}).get("noted", {}).get("findings")
        nothing_yet = bool(found) and not run.findings
        run.take(event)
        if nothing_yet and run.findings:
            first = run.findings[0]
            notice(
                f"the first check that fails says: {first.property}: {first.message.split('; ')[0]}; the others "
                "go on, to say where and why"
            )

    interactive = any(option in ("--pdb", "--trace") for option in pytest_options)
    ended = run_in_process(
        f"{__name__}:run_suites",
        [dict(texts), [*files], [*pytest_options]],
        take,
        limit=values.get("timeout", Settings.timeout),
        notice=notice,
        interactive=interactive,
    )
    if errors:
        if report:
            run.broken = errors[0]
            write_report(run.document(), report)
        raise AttentionError(errors[0])
    run.interrupted |= ended.interrupted
    if not run.collected and not run.interrupted and not ended.running:
        run.broken = "no check was run: look at the options after `--`"
    else:
        run.end(ended.how if ended.running or not run.finished else "")
    document = run.document()
    _print(document, values.get("failures", Settings.failures), report)
    if report:
        write_report(document, report)
    return INTERRUPTED if run.interrupted else EXIT_CODES[document["verdict"]]


def _given_once(texts: Mapping[str, Any]) -> list[Any]:
    """Options whose value does not depend on torch or on the machine."""
    return [
        option
        for option in OPTIONS
        if texts.get(option.name) and not option.several and option.name != "device"
    ]


def _print(document: Mapping[str, Any], failures: Path, report: Path | None) -> None:
    right = document["verdict"] == "right"
    colour, plain = (f"\033[1;{32 if right else 31}m", "\033[0m") if _has_colours() else ("", "")
    print(f"{colour}{' headoff '.center(80, '=')}\n{document['headline']}{plain}")
    print("\n".join(summary_lines(document, failures)))
    if report:
        print(f"  report: {report}")
    for line in benchmark_lines(document["benchmarks"]):
        print(line)


def _has_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def run_suites(job: Sequence[Any]) -> int:
    """What the other process does."""
    from headoff.errors import HeadoffError
    from headoff.harness.plugin.preflight import preflight_all

    texts, files, pytest_options = job
    if any("benchmark" in file for file in files):
        # Before the attention is: what times rest on is written down when this is imported.
        import headoff.bench.pytest_runner  # noqa: F401
    try:
        preflight_all(read_settings(texts))
    except HeadoffError as error:
        emit({"error": [str(error)]})
        return NO_VERDICT
    return _run_pytest(texts, files, pytest_options)


def _run_pytest(texts: Mapping[str, Any], files: Sequence[str], pytest_options: Sequence[str]) -> int:
    import pytest

    from headoff.detr.checkpoints import cache_folder

    # pytest's options and plugins of somebody's own project are not meant for these suites.
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    folder = suites_folder()
    isolated = ["-c", os.devnull, f"--rootdir={folder}", f"--confcutdir={folder / 'tests'}"]
    # What --lf and --benchmark-save write goes to the cache, not to the current folder.
    cached = ["-o", f"cache_dir={cache_folder() / 'pytest'}"]
    cached.append(f"--benchmark-storage=file://{cache_folder() / 'benchmarks'}")
    flags = {option.name for option in OPTIONS if option.flag}
    own = [
        f"--headoff-{name}" if name in flags else f"--headoff-{name}={text}"
        for name, given in texts.items()
        if given is not None
        for text in (given if isinstance(given, list) else [given])
    ]
    plugins = [
        part for name in PLUGINS if importlib.util.find_spec(name.partition(".")[0]) for part in ("-p", name)
    ]
    of_patch = ["-m", "not oracle"]
    return int(pytest.main([*plugins, *isolated, *cached, *own, *of_patch, *pytest_options, *files]))
