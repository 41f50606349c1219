"""The command line: `headoff sweep`, `explain`, `detect`, `verify`, `bench` and `scenes`.

Parsers are built without torch, so that --help answers at once: a command imports what it needs in its `run`.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from headoff import __version__
from headoff.cli import bench, detect, explain, scenes, sweep, verify
from headoff.errors import HeadoffError

EPILOG = """\
Exit codes: 0 done; 1 `verify` found an attention wrong; 2 an option or a file was wrong, and one sentence says which;
130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. Its result's `run` takes the parsed options and returns the exit code."""
    top = argparse.ArgumentParser(
        prog="headoff",
        description="Switch off attention heads of a DETR decoder: see which detections survive, and which parts of "
        "the image each one draws its evidence from.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"headoff {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (sweep, explain, detect, verify, bench, scenes):
        command.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    pytest_options: list[str] = []
    if words[:1] == ["verify"] and "--" in words:
        place = words.index("--")
        words, pytest_options = words[:place], words[place + 1 :]
    settings = parser().parse_args(words)
    settings.pytest_options = pytest_options
    try:
        # Warnings of libraries are for the authors of code; errors and notes of headoff are printed in its own words.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            return settings.run(settings)
    except HeadoffError as error:
        print(f"headoff: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nheadoff: interrupted; finished reports are complete", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output (`| head`) has closed it, so nothing more can be printed.
        sys.stderr.close()
        return 0
