"""Notes and errors of a command, on stderr, one line each."""

from __future__ import annotations

import sys

from headoff.wording import counted


def note(text: str) -> None:
    """Print what users should know of a run that goes on as they asked."""
    print(f"headoff: note: {text}", file=sys.stderr)


def error(reason: object) -> None:
    """Print what went wrong; above a progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(f"headoff: error: {reason}", file=sys.stderr)


def left_out(images: int) -> int:
    """Say how many images were left out, if any, after an `error` for each. Returns the exit code."""
    if not images:
        return 0
    print(f"{counted(images, 'image')} left out, see above", file=sys.stderr)
    return 2
