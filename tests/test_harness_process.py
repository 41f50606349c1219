"""Code in another process: how its end is told, its time limit, and that nothing of it is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import headoff
from headoff.harness import process
from headoff.harness.process import Ended, run_in_process

TARGETS = """
import os, signal, subprocess, sys, threading, time
from headoff.harness.process import emit, is_watched, limited

def counts(numbers):
    assert is_watched()
    for number in numbers:
        with limited(f"number {number}"):
            emit({"number": number, "text": "x" * 100_000})
    return 7

def exits(code):
    with limited("its exit"):
        emit({"number": 1})
        os._exit(code)

def killed(number):
    os.kill(os.getpid(), number)

def raises(_):
    raise RuntimeError("a traceback")

def cut(_):
    os.write(int(__import__("headoff.harness.process").harness.process._fd), b'{"number": 1')
    os._exit(0)

def exits_in_a_thread(_):
    threading.Timer(0.1, os._exit, [0]).start()
    with limited("waiting"):
        time.sleep(60)

def loops(_):
    with limited("short"):
        pass
    with limited("a loop"):
        while True:
            pass

def leaves_a_child(file):
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    with open(file, "w") as out:
        out.write(f"{os.getpid()} {child.pid}")
    with limited("waiting"):
        time.sleep(60)

def reads(_):
    with limited("reading"):
        emit({"read": sys.stdin.read()})
    return 0

def returns_and_leaves_a_child(file):
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    with open(file, "w") as out:
        out.write(str(child.pid))
    return 0
"""


@pytest.fixture
def targets(tmp_path, monkeypatch):
    (tmp_path / "targets.py").write_text(TARGETS)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(function: str, argument=None, limit: float = 30.0, **options) -> tuple[Ended, list[dict]]:
    events: list[dict] = []
    ended = run_in_process(f"targets:{function}", argument, events.append, limit=limit, quiet=True, **options)
    return ended, events


def test_nobody_is_asked_for_keys(targets):
    """Where the terminal of the parent says nothing, the child waits for nothing."""
    reading, writing = os.pipe()
    terminal = os.dup(0)
    try:
        os.dup2(reading, 0)
        ended, events = run("reads", limit=20)
    finally:
        os.dup2(terminal, 0)
        for descriptor in (reading, writing, terminal):
            os.close(descriptor)
    assert (ended.code, events) == (0, [{"read": ""}])


def is_alive(pid: int) -> bool:
    """Zombies, which only wait for somebody to look at their exit code, are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.05)
    return not is_alive(pid)


def test_events_arrive_whole_and_in_order(targets):
    ended, events = run("counts", [3, 1, 2])
    assert ended == Ended(7, [])
    assert [event["number"] for event in events] == [3, 1, 2]
    assert all(len(event["text"]) == 100_000 for event in events)


@pytest.mark.parametrize(
    "function, argument, how",
    [
        ("exits", 0, "ended its process with exit code 0 during its exit: debug it"),
        ("exits", 3, "ended its process with exit code 3 during its exit: debug it"),
        ("killed", signal.SIGABRT, "ended its process by SIGABRT: debug it"),
        ("killed", signal.SIGKILL, "ended its process by SIGKILL (out of memory?): debug it"),
        ("raises", None, "ended its process with exit code 1: debug it"),
        ("cut", None, "ended its process with exit code 0: debug it"),
        ("exits_in_a_thread", None, "ended its process with exit code 0 during waiting: debug it"),
    ],
)
def test_how_it_ended(targets, function, argument, how):
    ended, events = run(function, argument)
    assert ended.how == how
    assert events == ([{"number": 1}] if function == "exits" else [])


def test_what_takes_too_long_is_announced_and_ended(targets, monkeypatch):
    monkeypatch.setattr(process, "NOTICE", 0.3)
    notices: list[str] = []
    ended, _ = run("loops", limit=1.0, notice=notices.append)
    assert ended.timed_out == "a loop" and ended.code == -signal.SIGKILL
    assert ended.how.startswith("did not come back from a loop within 1 s")
    assert [notice for notice in notices if not notice.startswith("a loop has taken")] == []
    assert len(notices) == 1 and "--timeout" in notices[0]


def test_nothing_is_left_behind(targets):
    ended, _ = run("returns_and_leaves_a_child", str(targets / "pid"))
    assert ended.code == 0
    assert gone(int((targets / "pid").read_text()))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_child_ends_with_its_parent(targets, number):
    program = (
        # A shell that runs tests in the background ignores Ctrl-C, and its children inherit that.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from headoff.harness.process import run_in_process as run\n"
        "ended = run('targets:leaves_a_child', sys.argv[1], print, limit=60)\n"
        "sys.exit(130 if ended.interrupted else 1)"
    )
    environment = os.environ | {"PYTHONPATH": f"{targets}:{Path(headoff.__file__).parents[1]}"}
    file = targets / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], env=environment, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 30
    while not (file.exists() and " " in file.read_text()) and time.monotonic() < end:
        time.sleep(0.05)
    pids = [int(text) for text in file.read_text().split()]
    assert all(map(is_alive, pids))
    parent.send_signal(number)
    assert parent.wait(30) == (130 if number == signal.SIGINT else -number)
    assert all(map(gone, pids))
