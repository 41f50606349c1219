"""Progress of what takes long, on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(what: str, unit: str, *, show: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A function that is called with how much is done, and of how much; it vanishes when the block ends."""
    with tqdm(desc=what, unit=unit, disable=not show, leave=False) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            bar.refresh()

        yield update
