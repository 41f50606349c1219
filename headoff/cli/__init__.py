"""The command line: one module for each command, such as `headoff sweep` and `headoff verify`.

Parsers are built without torch, so that --help is fast: a command imports what it needs in its `run`.
"""

from __future__ import annotations

import argparse
import errno
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from headoff import __version__
from headoff.cli import (
    bench,
    compare,
    detect,
    evaluate,
    explain,
    faithfulness,
    heads,
    live,
    references,
    roles,
    scenes,
    sweep,
    verify,
)
from headoff.cli.messages import error
from headoff.errors import HeadoffError, error_line, is_out_of_memory

EPILOG = """\
Exit codes: 0 success; 1 `verify` found a wrong attention, or `evaluate` left images out; 2 an option or a file is
invalid, see the message; 130 interrupted.
"""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"headoff: error: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands. Parsed options have `run`, which takes them and returns the exit code."""
    top = Parser(
        prog="headoff",
        description="Switch off attention heads of a DETR decoder, and see which detections survive and which parts of "
        "the image they depend on.",
        epilog=EPILOG,
    )
    top.add_argument("--version", action="version", version=f"headoff {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (
        sweep,
        explain,
        faithfulness,
        heads,
        live,
        detect,
        roles,
        evaluate,
        compare,
        references,
        verify,
        bench,
        scenes,
    ):
        command.add_parser(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (`sys.argv` by default) and return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    pytest_options: list[str] = []
    if words[:1] == ["verify"] and "--" in words:
        place = words.index("--")
        words, pytest_options = words[:place], words[place + 1 :]
    for stream in (sys.stdout, sys.stderr):
        # Names of files and classes may have letters that the terminal's encoding lacks.
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="backslashreplace")
    settings = parser().parse_args(words)
    settings.pytest_options = pytest_options
    try:
        return _run(settings)
    except HeadoffError as error:
        return _failed(str(error))
    except KeyboardInterrupt:
        print("\nheadoff: interrupted; finished reports are complete", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has closed it, so nothing more can be printed.
        _discard_output()
        return 0
    except (Exception, SystemExit) as error:
        reason = _reason(error)
        if reason is None:
            raise
        return _failed(reason)


def _run(settings: argparse.Namespace) -> int:
    # Warnings of libraries do not concern users of the command line.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        code: int = settings.run(settings)
        sys.stdout.flush()  # where the output is full, that shows here
        return code


def _discard_output() -> None:
    """What is left in the buffer goes nowhere: Python flushes it at its end, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _failed(reason: str) -> int:
    error(reason)
    return 2


def _reason(error: BaseException) -> str | None:
    """What went wrong outside headoff, and a remedy; None for what must be a fault of headoff."""
    if is_out_of_memory(error):
        return (
            f"out of memory ({error_line(error)}); give fewer or smaller images, a smaller --short-side or --batch, or "
            "fewer configurations"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _discard_output()
        return "the output cannot be written (no space left there); free some"
    from headoff.callables import failure_in_callable

    return failure_in_callable(error)
