"""How many threads torch computes with while it is timed on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

THREADS = 1
"""Several would wait for the slowest of them. On a machine that has anything else to do, that is a matter of whole time
slices, which no pairing of rounds takes out of the ratio again."""


@contextmanager
def torch_threads(count: int = THREADS) -> Iterator[None]:
    """Let torch compute with so many threads on the CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
