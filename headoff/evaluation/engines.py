"""Engines: who computes the batches. `local` is this process with a detector, and others that read images.

An engine is given the numbers of batches, and yields a `Shard` for each that was computed and written, in any order.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.utils.data import DataLoader, Dataset

from headoff.detector import Detector
from headoff.errors import ImageError, SettingError, error_line
from headoff.evaluation.shards import Shard
from headoff.evaluation.work import ReadBatch, Work, Worker
from headoff.timing import torch_threads


class Engine(Protocol):
    """Computes batches, and writes them to a folder of results."""

    def connected(self, detector: Detector) -> AbstractContextManager[str]:
        """Within this context the engine is ready for `run`; the type of the device that it computes on.

        Raises:
            SettingError: it cannot be reached, or a package is not installed.
        """
        ...

    def run(self, work: Work, detector: Detector, batches: Sequence[int], folder: Path) -> Iterator[Shard]:
        """Compute batches.

        Args:
            work: what is to be computed.
            detector: what detects; an engine may use copies of it, on other devices.
            batches: their numbers.
            folder: of the results.

        Raises:
            HeadoffError: what `Work.read`, `Worker.compute` and `Detected.write` raise.
        """
        ...


@dataclass(frozen=True)
class LocalEngine:
    """This process computes, while others read and resize images, and a thread writes.

    Attributes:
        workers: processes that read; 0 for this one. None for as many as suit the device.
    """

    workers: int | None = None

    def connected(self, detector: Detector) -> AbstractContextManager[str]:
        """See `Engine`: always ready."""
        return nullcontext(detector.device.type)

    def run(self, work: Work, detector: Detector, batches: Sequence[int], folder: Path) -> Iterator[Shard]:
        on_cpu = detector.device.type == "cpu"
        workers = readers(on_cpu) if self.workers is None else self.workers
        loader = DataLoader(
            _Reading(work),
            batch_size=None,
            sampler=batches,
            num_workers=min(workers, len(batches)),
            pin_memory=detector.device.type == "cuda",
        )
        worker = Worker(work, detector)
        with _dead_readers(), torch_threads(work.threads), ThreadPoolExecutor(1) as writer:
            writing: deque[Future[Shard]] = deque()
            for read in loader:
                if isinstance(read, ImageError):
                    raise read
                writing.append(writer.submit(worker.compute(read).write, folder))
                # One is written while the next is computed; more would fill the memory where writing is slow.
                while len(writing) > 1 or (writing and writing[0].done()):
                    yield writing.popleft().result()
            for last in writing:
                yield last.result()


@contextmanager
def _dead_readers() -> Iterator[None]:
    """A sentence where a process of a DataLoader has ended: for lack of memory, or of a container's shared memory."""
    try:
        yield
    except RuntimeError as error:
        # torch raises it from a signal handler, so anywhere, and with no other sign of what it is.
        if "DataLoader worker" not in str(error):
            raise
        raise SettingError(
            f"a process that reads images has ended ({error_line(error)}): free memory, allow more shared memory, or "
            "give --workers 0; what was finished is kept"
        ) from error


class _Reading(Dataset):
    """The batches of a `Work`, as they are read. An error is an item: the DataLoader would change it."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __getitem__(self, number: int) -> ReadBatch | ImageError:
        try:
            return self.work.read(number)
        except ImageError as error:
            return error


def readers(on_cpu: bool) -> int:
    """How many processes read images: one on four cores where the model needs these, as many as cores but one where it
    is on a GPU; at most 16.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores // 4 if on_cpu else max(1, cores - 1))
