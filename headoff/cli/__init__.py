"""The command line: `headoff sweep`, `headoff explain`, `headoff detect`, `headoff verify`, `headoff bench`,
`headoff scenes`."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from headoff.cli import bench, detect, explain, scenes, sweep, verify
from headoff.errors import HeadoffError

EPILOG = """\
Exit codes: 0 done, 1 an attention was found wrong (`verify`), 2 something was wrong with what was asked or given (one
sentence says what), 130 interrupted.
"""


def parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    top = argparse.ArgumentParser(
        prog="headoff",
        description="Switch off attention heads of a DETR decoder and see which detections survive, and where each "
        "draws its evidence from.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"headoff {_version()}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (sweep, explain, detect, verify, bench, scenes):
        command.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    pytest_options: list[str] = []
    if given[:1] == ["verify"] and "--" in given:
        place = given.index("--")
        given, pytest_options = given[:place], given[place + 1 :]
    settings = parser().parse_args(given)
    settings.pytest_options = pytest_options
    try:
        # A user's warning filters are for their code; ours says what matters in its own words.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            return settings.run(settings)
    except HeadoffError as error:
        print(f"headoff: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nheadoff: interrupted; what was finished is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0


def _version() -> str:
    from headoff import __version__

    return __version__
