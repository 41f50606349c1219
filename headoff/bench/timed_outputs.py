"""What the timed calls of a benchmark returned, and whether their times mean anything.

An attention that is timed can find out that it is, and answer from a memory, late, or not at all. So

- every timed call has inputs that no call had before, in the memory of the call before: a result that is remembered by
  address, or by a few numbers of the input, is a wrong one;
- every result of the patch is copied as soon as the call returns, and compared with what the baseline computes from the
  same inputs *afterwards*: no tensor with the right answer exists while the patch runs;
- the result that differs most from the baseline's is compared with the float64 oracle, which runs after all timing;
- results that are not plain tensors, and threads that work on while a call is timed, are wrong whatever the numbers
  are.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import process_time, thread_time
from typing import Any

import torch

from headoff.bench.outputs import ExpectedOutputs
from headoff.bench.workloads import Output, Workload
from headoff.harness.finding import Finding
from headoff.timing import TimedCall, Watch

BASELINE, PATCH = 0, 1
"""Places of the calls in a round."""

MOST_ELSEWHERE = 0.2
"""The share of a call's processor time that all other threads of the process may work for meanwhile."""

LEAST_ELSEWHERE = 2e-3
"""Seconds of such work that are noticed at all."""

LATE, LATEST = 0.2, 5.0
"""Seconds after which work that a call left unfinished is done, if no thread works then; and at the latest."""

Outputs = dict[str, Output]


@dataclass(frozen=True)
class Timed:
    """A timed call of the patch: the number of its inputs, and copies of what it returned."""

    inputs: int
    outputs: Outputs


class TimedOutputs(Watch):
    """Watches the calls of `headoff.timing.Turns`: first the baseline, last the patch.

    Args:
        workload: what is computed.
        calls: of the baseline and of the patch, made by `workload`.
        device: where they compute.
    """

    def __init__(self, workload: Workload, calls: Sequence[TimedCall], device: torch.device) -> None:
        self.workload = workload
        self.calls = calls
        self._device = device
        self._inputs = 0
        self._pending: deque[Timed] = deque()
        self._worst: tuple[float, Timed] | None = None
        self._kinds: set[str] = set()
        self._threads = (0.0, 0.0)
        # By call: processor seconds of the thread that calls it, and of all others meanwhile.
        self._own, self._others = [0.0, 0.0], [0.0, 0.0]

    def before(self, index: int) -> None:
        """Fill in inputs: new ones for the patch, those of the patch's earlier calls for the baseline."""
        new = index == PATCH or not self._pending
        self._inputs = secrets.randbits(48) if new else self._pending[0].inputs
        self._fill(index, self._inputs)

    def ready(self, index: int) -> None:
        self._threads = process_time(), thread_time()

    def after(self, index: int, result: Any) -> None:
        others, own = process_time() - self._threads[0], thread_time() - self._threads[1]
        self._own[index] += own
        self._others[index] += max(0.0, others - own)
        if index == PATCH:
            self._kinds |= unusual_kinds(result)
            self._pending.append(Timed(self._inputs, self._copied(result)))
        elif self._pending and self._pending[0].inputs == self._inputs:
            self._compare(self._pending.popleft(), self._copied(result))

    def _fill(self, index: int, inputs: int) -> None:
        self.calls[index].fill(self.workload.varied(inputs))

    def _copied(self, result: Any) -> Outputs:
        outputs = self.workload.outputs(result)
        return {name: replace(one, rows=one.rows.detach().clone()) for name, one in outputs.items()}

    def _compare(self, timed: Timed, expected: Outputs) -> None:
        differs = max(difference(timed.outputs[name], one) for name, one in expected.items())
        if self._worst is None or differs > self._worst[0]:
            self._worst = differs, timed

    def findings(self, attention: Any) -> list[Finding]:
        """What is wrong with what was timed. To be called when all rounds are over."""
        while self._pending:
            timed = self._pending.popleft()
            self._fill(BASELINE, timed.inputs)
            self._compare(timed, self._copied(self.calls[BASELINE]()))
        case = self.workload.name
        findings = [Finding("timing", f"{case}: {what}", case) for what in self._unfair()]
        if self._worst is not None:
            timed = self._worst[1]
            expected = ExpectedOutputs(self.workload.varied(timed.inputs))
            if wrong := expected.findings_of(timed.outputs, attention):
                if why := self._why(timed, expected, attention):
                    findings.append(Finding("timing", f"{case}: {why}", case))
                findings += wrong
        return findings

    def _unfair(self) -> list[str]:
        """What makes the times mean something else, whatever the numbers are."""
        found = []
        if self._kinds:
            found.append(
                f"it returned {' and '.join(sorted(self._kinds))} instead of a plain tensor: what is computed when "
                "that is used is not timed"
            )
        for index, what in enumerate(("the baseline", "it")):
            own, others = self._own[index], self._others[index]
            if self._device.type == "cpu" and others > max(MOST_ELSEWHERE * own, LEAST_ELSEWHERE):
                share = others / max(own, 1e-9)
                found.append(
                    f"while {what} is timed, other threads of the process work for {share:.0%} of the time of the one "
                    "that is; compute within the call, on as many threads as torch.get_num_threads() says"
                )
        return found

    def _why(self, timed: Timed, expected: ExpectedOutputs, attention: Any) -> str | None:
        """Why a timed result is wrong, by experiments with calls that are not timed.

        None where these are wrong as well: then the numbers say what is wrong.
        """

        def wrong(result: Any) -> bool:
            return bool(expected.findings_of(self._copied(result), attention))

        self._fill(PATCH, secrets.randbits(48))
        earlier = self._copied(self.calls[PATCH]())
        self._fill(PATCH, timed.inputs)
        result = self.calls[PATCH]()
        at_once = self._copied(result)
        if not expected.findings_of(at_once, attention):
            return "its timed result is wrong, and right for the same inputs when it is not timed"
        wait_for_threads()
        if not wrong(result):
            return "it returns before its result is written: the work that follows is not timed"
        if all(difference(at_once[name], one) == 0 for name, one in earlier.items()):
            return "it gives the same result again for inputs with other contents in the same memory"
        return None


def wait_for_threads() -> None:
    """Return when the other threads of the process have had `LATE` seconds and did not work, or after `LATEST` seconds.

    Calls that leave their work to threads can have left that of many calls, and a busy machine does it late.
    """
    latest = time.monotonic() + LATEST
    worked = math.inf
    while worked > LEAST_ELSEWHERE and time.monotonic() < latest:
        before = process_time()
        time.sleep(LATE)
        worked = process_time() - before


def difference(found: Output, expected: Output) -> float:
    """The largest difference relative to the peak of its row; infinite where shapes differ and with NaN.

    In the outputs' own precision, for it is computed in every round, and only says which round is looked at.
    """
    if found.rows.shape != expected.rows.shape:
        return math.inf
    gap = (found.rows - expected.rows).abs().amax(-1)
    relative = torch.where(gap == 0, 0, gap / expected.rows.abs().amax(-1))
    return float(relative.nan_to_num(nan=math.inf).amax())


def unusual_kinds(result: Any) -> set[str]:
    """Descriptions of returned tensors that may compute later: of a subclass, or with methods of their own."""
    tensors = [one for one in result if isinstance(one, torch.Tensor)] if isinstance(result, tuple) else []
    found = {f"a {type(one).__name__}" for one in tensors if type(one) is not torch.Tensor}
    # torch.compile leaves notes on its tensors; what is called in the place of a method is something else.
    own = {"a tensor with methods of its own" for one in tensors if any(map(callable, vars(one).values()))}
    return found | own
