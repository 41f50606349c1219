"""Run code that may crash, hang or end its process in another process, and say how that one ended.

The child reports what it does as events, one JSON object a line, through a pipe of their own. `begin` and `end` bound
what has a time limit; all other events are the caller's. Nothing that the child runs can end, block or fool the parent:
it trusts events and the exit status alone. The child and all that it started are killed with the parent.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

POLL = 0.2
"""Seconds between two looks at the child."""

NOTICE = 60.0
"""Seconds after which the person who waits is told what for."""

GRACE = 10.0
"""Seconds that the child gets to end after Ctrl-C."""

Event = dict[str, Any]


@dataclass
class Ended:
    """How the child ended.

    Attributes:
        code: its exit code, or minus the signal that ended it.
        running: what had begun and not ended, the oldest first.
        timed_out: that of `running` which took longer than `limit` seconds; None where the child ended by itself.
        interrupted: whether Ctrl-C ended it.
    """

    code: int
    running: list[str] = field(default_factory=list)
    timed_out: str | None = None
    limit: float = 0.0
    interrupted: bool = False

    @property
    def how(self) -> str:
        """`ended its process with exit code 0 during the import`: continues a sentence about what it ran."""
        if self.timed_out:
            return (
                f"did not come back from {self.timed_out} within {self.limit:g} s: look for a deadlock or for a loop "
                "that does not end, or give it more time with --timeout"
            )
        during = f" during {self.running[-1]}" if self.running else ""
        return f"ended its process {_status(self.code)}{during}: debug it"


def _status(code: int) -> str:
    if code >= 0:
        return f"with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def run_in_process(
    target: str,
    arguments: Any,
    take: Callable[[Event], None],
    *,
    limit: float,
    notice: Callable[[str], None] | None = None,
    quiet: bool = False,
    interactive: bool = False,
) -> Ended:
    """Call a function in a new process of this interpreter, and wait until it ends.

    Args:
        target: `module:function`. It gets `arguments`, and returns the exit code.
        arguments: of types that JSON knows.
        take: gets each event of the child but `begin` and `end`.
        limit: seconds that anything between `begin` and `end` may take.
        notice: gets a sentence on what takes long, once for each; None for no notices.
        quiet: whether what the child prints is dropped.
        interactive: whether the child reads from the terminal (a debugger): no limits then, and Ctrl-C is its own.
    """
    events, child_end = os.pipe()
    command = [sys.executable, "-c", _PROGRAM, json.dumps([target, arguments, child_end, sys.path])]
    output = subprocess.DEVNULL if quiet else None
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, events)
        child = subprocess.Popen(
            command,
            pass_fds=[child_end],
            # Code under test that reads from the terminal would wait for keys without saying so.
            stdin=None if interactive else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=None if interactive else 0,
        )
        os.close(child_end)
        if not interactive:
            stack.enter_context(_killed_with_this_process(child.pid))
        return _Watch(child, events, take, notice, math.inf if interactive else limit).wait()


@contextlib.contextmanager
def _killed_with_this_process(group: int) -> Iterator[None]:
    """Kill a process group when the block ends, and also if this process is killed, by any signal.

    A shell waits for that: it reads from a pipe that the kernel closes together with this process.
    """
    guard = subprocess.Popen(
        ["sh", "-c", 'read -r line || kill -s KILL -- "-$1"', "sh", str(group)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield
    finally:
        _signal_group(group, signal.SIGKILL)  # what the child started and left behind
        guard.communicate(b"done\n")


def _signal_group(group: int, number: signal.Signals) -> None:
    """Nothing where the group has ended."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


@dataclass
class _Watch:
    child: subprocess.Popen[bytes]
    events: int
    take: Callable[[Event], None]
    notice: Callable[[str], None] | None
    limit: float
    begun: dict[str, float] = field(default_factory=dict)
    noticed: set[str] = field(default_factory=set)
    rest: bytes = b""

    def wait(self) -> Ended:
        interrupted_at: float | None = None
        while True:
            try:
                code = self.child.poll()
                self._read(POLL if code is None else 0.0)
                if code is not None:
                    return Ended(code, list(self.begun), interrupted=interrupted_at is not None)
                if interrupted_at is not None and time.monotonic() - interrupted_at > GRACE:
                    return self._kill(interrupted=True)
                for what, since in self.begun.items():
                    seconds = time.monotonic() - since
                    if seconds > self.limit:
                        return self._kill(timed_out=what)
                    if seconds > NOTICE and what not in self.noticed and self.notice:
                        self.noticed.add(what)
                        self.notice(
                            f"{what} has taken {seconds:.0f} s; --timeout ends it after {self.limit:g} s"
                        )
            except KeyboardInterrupt:
                if interrupted_at is not None:
                    return self._kill(interrupted=True)
                interrupted_at = time.monotonic()
                # Without a limit it is in the terminal's foreground, and has got Ctrl-C as well.
                if self.limit < math.inf:
                    _signal_group(self.child.pid, signal.SIGINT)

    def _kill(self, timed_out: str | None = None, interrupted: bool = False) -> Ended:
        _signal_group(self.child.pid, signal.SIGKILL)
        code = self.child.wait()
        self._read(0.0)
        return Ended(code, list(self.begun), timed_out, self.limit, interrupted)

    def _read(self, seconds: float) -> None:
        """Take what the child has written, waiting for it for some seconds."""
        while select.select([self.events], [], [], seconds)[0]:
            block = os.read(self.events, 1 << 16)
            if not block:  # the child has closed it; whether it has ended is another question
                time.sleep(seconds)
                return
            *lines, self.rest = (self.rest + block).split(b"\n")
            for line in lines:
                self._take(line)
            seconds = 0.0

    def _take(self, line: bytes) -> None:
        try:
            event = json.loads(line)
        except ValueError:
            return  # a line cut by the end of the child
        if "begin" in event:
            self.begun[event["begin"]] = time.monotonic()
        elif "end" in event:
            self.begun.pop(event["end"], None)
        else:
            self.take(event)


# In the child

_fd: int | None = None
_PROGRAM = (
    "import json, sys; job = json.loads(sys.argv[1]); sys.path[:] = job[3]; sys.argv[:] = ['headoff']; "
    "from headoff.harness.process import serve; serve(*job[:3])"
)


def serve(target: str, arguments: Any, fd: int) -> None:
    """Run a target of `run_in_process`, and exit with its code."""
    global _fd
    _fd = fd
    os.set_inheritable(fd, False)
    module, _, function = target.partition(":")
    sys.exit(getattr(importlib.import_module(module), function)(arguments))


def is_watched() -> bool:
    """Whether this process was started by `run_in_process`."""
    return _fd is not None


def emit(event: Event) -> None:
    """Tell the parent; nothing where there is none."""
    if _fd is None:
        return
    data = json.dumps(event).encode() + b"\n"
    while data:
        data = data[os.write(_fd, data) :]


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    """Name what runs in the block to the parent, which limits its time."""
    emit({"begin": what})
    try:
        yield
    finally:
        emit({"end": what})
