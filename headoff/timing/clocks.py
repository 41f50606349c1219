"""Calls to be timed, and the clocks of a CPU and a GPU, in a form that pytest-benchmark accepts as its timer.

pytest-benchmark calls its timer before and after the timed call and computes `end - start`, nothing else. So a clock
may return any object whose difference is in seconds.

- On a CPU the difference is the time that passed minus the time in which the thread was ready but had no processor. On
  a busy machine that wait is many times the call itself and says nothing about the call.
- On a GPU calls only queue work. The clock records an event in the queue, and the difference waits for the later event.
  The host waits for nothing between the two, and the time is the device's.
"""

from __future__ import annotations

import ctypes
import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from headoff.errors import SettingError

# Bound here, so that code under test that replaces `time.perf_counter` later does not set this clock.
perf_counter = time.perf_counter

THREADS = 1
"""CPU threads while timing. With several, a call takes as long as its slowest thread, and on a machine with other work
that thread waits for whole time slices, which turns cannot take out of the ratio."""

RESOLUTION = time.get_clock_info("perf_counter").resolution
"""Seconds: the least that a call can take, whatever the difference of the two clocks is."""

LEAST_SHARE = 0.05
"""The least share of the elapsed time in which a thread can have worked; below it, the wait time is not believed."""


class Clock(Protocol):
    """Times calls on one device."""

    name: str

    def now(self) -> Any:
        """The current moment. The difference of two moments is in seconds."""

    def prepare(self) -> None:
        """To be called right before each timed call; not part of the time."""

    def finish(self) -> None:
        """Wait for all queued work."""


@dataclass(frozen=True)
class HostMoment:
    """A moment of one thread, in seconds.

    Reading the wait time takes a few microseconds, which are not part of what is timed.

    Attributes:
        before, after: the time before and after the wait time was read.
        wait: how long the thread has waited for a processor so far.
    """

    before: float
    wait: float
    after: float

    def __sub__(self, start: HostMoment) -> float:
        """Seconds in which the thread did not wait for a processor.

        All elapsed seconds, where it seems to have waited nearly all the time: then the two clocks disagree.
        """
        passed = self.before - start.after
        worked = passed - (self.wait - start.wait)
        return max(worked if worked > LEAST_SHARE * passed else passed, RESOLUTION)


class HostClock:
    """The clock of a CPU, for the thread that makes it. Caches are left as they are, as in a model.

    Args:
        schedstat: Linux's file of a thread's nanoseconds on a processor, nanoseconds waiting for one, and more. Where
            it does not exist, the clock counts all elapsed time.
    """

    def __init__(self, schedstat: str = "/proc/thread-self/schedstat") -> None:
        try:
            self._file: io.FileIO | None = io.FileIO(schedstat)
        except OSError:
            self._file = None
        self.name = (
            "time.perf_counter" if self._file is None else "time.perf_counter minus wait for a processor"
        )

    def now(self) -> HostMoment:
        before = perf_counter()
        return HostMoment(before, self._wait(), perf_counter())

    def prepare(self) -> None:
        """Nothing."""

    def finish(self) -> None:
        """Nothing: a call is finished when it returns."""

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
    """The clock of a GPU: events in the current stream, and a flush of the L2 cache before each timed call.

    Without the flush, a call of a few megabytes would find its inputs in the cache, which no model does. The flush also
    hides the host: while it runs, the host queues the timed call, so that a single kernel's time does not include the
    launch. What keeps the host busy longer than the flush (many small launches, a wait for the device) is in the time,
    as it is in a model.

    Args:
        device: the GPU.
        cuda: torch's module, or a substitute for tests.
        driver: NVIDIA's driver library, or a substitute for tests.
    """

    name = "CUDA events"

    PERSISTING_L2 = 0x06
    """The driver's number for the limit on the part of the L2 cache that a kernel can keep."""

    def __init__(self, device: torch.device, cuda: Any = torch.cuda, driver: Any = None) -> None:
        self._device = device
        self._cuda = cuda
        # Twice the cache: its replacement is not strictly the oldest first.
        size = 2 * int(cuda.get_device_properties(device).L2_cache_size)
        self._buffer = torch.empty(size, dtype=torch.uint8, device=device)
        self.driver = cuda_driver() if driver is None else driver

    def now(self) -> CudaMoment:
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(self._device))
        return CudaMoment(event)

    def prepare(self) -> None:
        """Flush the L2 cache, also of what a kernel asked to keep there: filling the buffer would not evict that."""
        if self.driver is not None:
            self.driver.cuCtxSetLimit(self.PERSISTING_L2, 0)
            self.driver.cuCtxResetPersistingL2Cache()
        self._buffer.zero_()

    def persisting_l2(self) -> int:
        """Bytes of the L2 cache that kernels can keep; 0 where the driver cannot be asked."""
        size = ctypes.c_size_t()
        if self.driver is not None:
            self.driver.cuCtxGetLimit(ctypes.byref(size), self.PERSISTING_L2)
        return size.value

    def finish(self) -> None:
        self._cuda.synchronize(self._device)


def cuda_driver() -> Any:
    """NVIDIA's driver library, or None where there is none or it is too old to know of persisting lines."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    driver.cuCtxSetLimit.argtypes = [ctypes.c_int, ctypes.c_size_t]
    return driver if hasattr(driver, "cuCtxResetPersistingL2Cache") else None


def clock_of(device: torch.device) -> Clock:
    """The clock for calls on `device`. Raises SettingError where `device` is neither a CPU nor a CUDA device."""
    if device.type == "cpu":
        return HostClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise SettingError(f"calls on {device} cannot be timed: use cpu or cuda")


def timer_of(clock: Clock) -> Callable[[], Any]:
    """`clock` as a function, with a name that pytest-benchmark can write into its results."""

    def timer() -> Any:
        return clock.now()

    timer.__name__ = clock.name
    return timer


@dataclass(frozen=True)
class TimedCall:
    """A call `run(*setup())`, of which only `run` is timed.

    Attributes:
        run: the function to time.
        setup: makes its arguments, before each call. The backward pass of a graph, for example, needs a new graph
            each time.
        fill: gives the inputs of the calls to come other contents, in the same memory.
    """

    run: Callable[..., Any]
    setup: Callable[[], tuple[Any, ...]] = tuple
    fill: Callable[[Any], None] = lambda contents: None

    def __call__(self) -> Any:
        """Set up and run once, not timed."""
        return self.run(*self.setup())

    def timed(self, arguments: tuple[Any, ...], clock: Clock) -> tuple[float, Any]:
        """Run once with arguments that `setup` made: how long the run took, and what it returned."""
        run = self.run
        with no_tracing():
            start = clock.now()
            result = run(*arguments)
            end = clock.now()
        return end - start, result


@contextmanager
def no_tracing() -> Iterator[None]:
    """Suspend Python's tracing and profiling hooks: under coverage they would slow down what is timed."""
    trace, profile = sys.gettrace(), sys.getprofile()
    sys.settrace(None)
    sys.setprofile(None)
    try:
        yield
    finally:
        if profile is None or callable(profile):  # cProfile's hook cannot be set from Python
            sys.setprofile(profile)
        sys.settrace(trace)


@contextmanager
def torch_threads(count: int = THREADS) -> Iterator[None]:
    """Within this context torch computes with `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
