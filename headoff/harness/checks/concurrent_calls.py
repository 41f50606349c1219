"""Checks of calls at the same time: from two threads, and on two CUDA streams."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from headoff.harness.checks.candidate import Candidate, NotApplicable, Outcome, check, raised
from headoff.harness.contracts import DEFORMABLE
from headoff.harness.finding import Finding
from headoff.harness.operator.call import Results
from headoff.harness.operator.cases import Case
from headoff.harness.operator.side_effects import same

ROUNDS = 100
SECONDS = 2.0
"""Calls at once of each kind, and for how long there may be more of them: the first ones of an unlucky pair collide."""

PAUSE = 4e-4
"""The longest pause before a line, in seconds."""

SWITCH = 1e-5
"""Seconds after which Python lets the other thread run."""


def _cases(candidate: Candidate) -> Iterator[list[Case]]:
    """Two cases that differ in their numbers alone: what is kept by size is shared then.

    Large enough to overlap, small enough for many calls.
    """
    for fields in candidate.arguments:
        large = (
            {"batch": 2, "queries": 40} if candidate.contract is DEFORMABLE else {"batch": 4, "queries": 150}
        )
        yield [
            candidate.case(**fields, **large, heads=8, seed=candidate.seed + number) for number in range(2)
        ]


@check("threads")
def threads(candidate: Candidate) -> Outcome:
    """Two threads that call at once get the bits that each of them gets alone."""
    outcome = Outcome()
    rounds = 0
    for cases in _cases(candidate):
        calls = [_caller(candidate, case) for case in cases]
        # In threads as well, one after the other: a thread may have its own number of OpenMP's threads.
        alone = [_in_threads([call])[0] for call in calls]
        again = [_in_threads([call])[0] for call in calls]
        for result in (*alone, *again):
            if isinstance(result, BaseException):
                outcome.findings = [raised("threads", "called from a thread,", result, cases[0])]
                return outcome
        names = _steady(alone, again)
        end = time.monotonic() + SECONDS
        with _frequent_switches():
            for number in range(ROUNDS):
                rounds += 1
                together = _in_threads(calls, pauses=number % 2 == 0)
                for case, expected, found in zip(cases, alone, together, strict=True):
                    if wrong := _difference(case, expected, found, names):
                        outcome.findings = [wrong]
                        return outcome
                if time.monotonic() > end:
                    break
    outcome.remarks.append(
        f"threads: {rounds} pairs of calls from two threads at once had the bits of single calls"
    )
    return outcome


def _caller(candidate: Candidate, case: Case) -> Callable[[], Results]:
    tensors = candidate.tensors(case)
    return lambda: {name: one.detach() for name, one in candidate.call(candidate.attention, tensors).items()}


def _steady(alone: list[Results], again: list[Results]) -> list[str]:
    """The results that single calls give to the bit. Raises NotApplicable where the context is not one of them."""
    both = list(zip(alone, again, strict=True))
    names = [name for name in alone[0] if all(same(one[name], two[name]) for one, two in both)]
    if "context" not in names:
        raise NotApplicable("calls with the same inputs differ in their bits")
    return names


def _differing(names: list[str], expected: Results, found: Results) -> list[str]:
    return [name for name in names if not same(expected[name], found[name])]


def _difference(case: Case, expected: Results, found: Any, names: list[str]) -> Finding | None:
    when = "called from two threads at once,"
    if isinstance(found, BaseException):
        return raised("threads", when, found, case)
    wrong = _differing(names, expected, found)
    if not wrong:
        return None
    error = (expected[wrong[0]] - found[wrong[0]]).abs().max().item()
    message = f"{when} {' and '.join(wrong)} differ from those of a single call, by up to {error:.2g}"
    return Finding("threads", f"{message}: something is shared between calls", str(case))


def _in_threads(calls: list[Callable[[], Results]], *, pauses: bool = False) -> list[Any]:
    """The results of calls that begin at once, each in its thread, or what it raised.

    Args:
        pauses: whether threads wait a moment, at random, before lines of Python outside of torch: calls meet between
            any two of them then, also where all processors are busy.
    """
    results: list[Any] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(number: int) -> None:
        barrier.wait()
        if pauses:
            sys.settrace(_pause)  # of this thread, which ends with the call
        try:
            results[number] = calls[number]()
        except BaseException as error:
            results[number] = error

    workers = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def _pause(frame: FrameType, event: str, argument: Any) -> Any:
    if event == "line" and _RANDOM.random() < 0.5:
        time.sleep(PAUSE * _RANDOM.random())
    return None if frame.f_code.co_filename.startswith(_TORCH) else _pause


_RANDOM = random.Random(0)
_TORCH = f"{Path(torch.__file__).parent}/"


@contextmanager
def _frequent_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@check("streams")
def streams(candidate: Candidate) -> Outcome:
    """Calls on two streams that run at once have the bits of single calls."""
    if candidate.device.type != "cuda":
        raise NotApplicable("streams are CUDA's: use --device cuda")
    device = candidate.device
    outcome = Outcome()
    for cases in _cases(candidate):
        calls = [_caller(candidate, case) for case in cases]
        alone, again = ([call() for call in calls] for _ in range(2))
        torch.cuda.synchronize(device)
        names = _steady(alone, again)
        both = [torch.cuda.Stream(device) for _ in calls]
        end = time.monotonic() + SECONDS
        for _ in range(ROUNDS):
            for stream in both:
                stream.wait_stream(torch.cuda.current_stream(device))
            results = []
            for stream, call in zip(both, calls, strict=True):
                with torch.cuda.stream(stream):
                    results.append(call())
            torch.cuda.synchronize(device)
            for case, expected, found in zip(cases, alone, results, strict=True):
                if wrong := _differing(names, expected, found):
                    message = (
                        f"called on two CUDA streams at once, {' and '.join(wrong)} differ from single calls'"
                    )
                    outcome.findings = [
                        Finding("streams", f"{message}: work is on another stream", str(case))
                    ]
                    return outcome
            if time.monotonic() > end:
                break
    return outcome
