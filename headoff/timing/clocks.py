"""Clocks: when something began and ended on a device, in a form that pytest-benchmark takes as its timer.

pytest-benchmark calls its timer before and after the timed call and takes `end - start`, nothing else. So a timer may
return any object whose subtraction gives seconds.

- On a CPU, that is the time that passed less the time in which the thread was ready to run and got no processor. On a
  machine with other work, that waiting is many times the call itself, comes in whole time slices, and says nothing of
  the call.
- On a GPU the calls only queue work, so that a number read on the host says little. The timer records an event in the
  queue, and the subtraction waits for the later one. Nothing waits between the two, and the time is that of the device.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headoff.errors import SettingError

RESOLUTION = time.get_clock_info("perf_counter").resolution
"""Seconds; nothing takes less, whatever two files of different times say."""


LEAST_SHARE = 0.05
"""Of the time that passed, that a thread is believed to have worked."""


class Clock(Protocol):
    """How calls are timed on one device."""

    name: str

    def now(self) -> Any:
        """A moment. The difference of two is in seconds."""

    def prepare(self) -> None:
        """What is to happen right before each timed call, outside of the time."""

    def finish(self) -> None:
        """Wait for all that was queued."""


@dataclass(frozen=True)
class HostMoment:
    """A moment in one thread's life: `wait` is how long it has waited for a processor so far, in seconds.

    That takes a few microseconds to be read, between `before` and `after`, which are left out of what is timed.
    """

    before: float
    wait: float
    after: float

    def __sub__(self, start: HostMoment) -> float:
        """Seconds that passed and in which the thread did not wait for a processor.

        All that passed, where it should have waited nearly throughout: then the two clocks disagree, and a difference
        of nothing would count as a call of no time.
        """
        passed = self.before - start.after
        worked = passed - (self.wait - start.wait)
        return max(worked if worked > LEAST_SHARE * passed else passed, RESOLUTION)


class HostClock:
    """Of a CPU, for the thread that makes it. Caches are as the other side's call left them, as they are in a model.

    `schedstat` is a file as Linux has it: nanoseconds on a processor, nanoseconds in wait for one, and more. Where
    there is none, the clock tells all time that passed.
    """

    def __init__(self, schedstat: str = "/proc/thread-self/schedstat") -> None:
        try:
            self._file: io.FileIO | None = io.FileIO(schedstat)
        except OSError:
            self._file = None
        self.name = (
            "time.perf_counter" if self._file is None else "time.perf_counter less wait for a processor"
        )

    def now(self) -> HostMoment:
        before = time.perf_counter()
        return HostMoment(before, self._wait(), time.perf_counter())

    def prepare(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing: a call has done its work when it returns."""

    def _wait(self) -> float:
        if self._file is None:
            return 0.0
        self._file.seek(0)
        return int(self._file.read().split()[1]) / 1e9


@dataclass(frozen=True)
class CudaMoment:
    """A place in a GPU's queue of work."""

    event: Any

    def __sub__(self, start: CudaMoment) -> float:
        """Seconds of the device's time. Waits until this moment has come."""
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


class CudaClock:
    """Of a GPU, by events in the current stream; the L2 cache is flushed before each timed call.

    Without the flush a call of a few megabytes would find its inputs in the cache, as no model does. The flush has
    another use: while it runs, the host queues the timed call, so that a single kernel's time does not have the
    host's delay in it. What keeps the host busy for longer than that (many small launches, a wait for the device) is
    in the time, as it is in a model's.

    `cuda` is torch's module, or what stands for it in a test.
    """

    name = "CUDA events"

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._device = device
        self._cuda = cuda
        # Twice the cache: its replacement is not strictly the oldest first.
        size = 2 * int(cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def now(self) -> CudaMoment:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return CudaMoment(event)

    def prepare(self) -> None:
        """Flush the L2 cache."""
        self._buffer.zero_()

    def finish(self) -> None:
        self._cuda.synchronize(self._device)


def clock_of(device: torch.device) -> Clock:
    """The clock for calls on `device`. Raises SettingError for a device that there is none for."""
    if device.type == "cpu":
        return HostClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise SettingError(f"calls on {device} cannot be timed: use cpu or cuda")


def timer_of(clock: Clock) -> Callable[[], Any]:
    """`clock` as a plain function, with a name that pytest-benchmark can write into its results."""

    def timer() -> Any:
        return clock.now()

    timer.__name__ = clock.name
    return timer
