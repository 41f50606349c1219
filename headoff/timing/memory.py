"""The most memory that a call holds at once, beside what was there before it.

On a GPU it is what torch's allocator says of the device. On a CPU it is added up from the allocations that torch's
profiler records: those of tensors and of the operators' own workspace. What a patch takes elsewhere (numpy, malloc in
its own extension, a simulator of GPU kernels) is in neither.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from headoff.timing.sides import Side

HOST = 0
"""`Device Type` of the CPU in the profiler's records."""


def peak_bytes(side: Side, device: torch.device, cuda: Any = torch.cuda) -> int | None:
    """Bytes that `side` needs, preparation included: the graph of a backward pass is part of its price.

    None where it cannot be measured: a CPU and a torch that was built without its profiler.
    """
    if device.type == "cuda":
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
        before = cuda.memory_allocated(device)
        side.call(*side.prepare())
        cuda.synchronize(device)
        return cuda.max_memory_allocated(device) - before
    if not torch.profiler.kineto_available():
        return None
    # The profiler would write a log of its own to stderr, among progress and results. It looks when it starts first.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            side.call(*side.prepare())
        profile.export_chrome_trace(str(trace))
        return peak_of(json.loads(trace.read_text())["traceEvents"])


def peak_of(events: Iterable[dict[str, Any]]) -> int:
    """The highest sum of allocations less frees, on the CPU, of events in the format of Chrome's tracing tool."""
    held = highest = 0
    for event in sorted(
        (each for each in events if each.get("name") == "[memory]"), key=lambda each: each["ts"]
    ):
        if event["args"]["Device Type"] == HOST:
            held += event["args"]["Bytes"]
            highest = max(highest, held)
    return highest
