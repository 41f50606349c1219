"""The peak memory of a call: the most bytes that it held at once, on top of what was allocated before it.

On a GPU torch's allocator knows it. On a CPU it is summed up from the allocations that torch's profiler records: those
of tensors and of the operators' workspace. Neither includes what a call takes from elsewhere (numpy, malloc in an
extension, Triton's interpreter).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from headoff.timing.clocks import TimedCall

CPU_DEVICE_TYPE = 0
"""`Device Type` of the CPU in the profiler's records."""


def peak_bytes(call: TimedCall, device: torch.device, cuda: Any = torch.cuda) -> int | None:
    """Bytes that `call` holds at most, setup included: the graph of a backward pass is part of its price.

    Args:
        call: called once.
        device: the device whose memory counts.
        cuda: torch's module, or a substitute for tests.

    Returns:
        None where it cannot be measured: on a CPU with a torch that was built without its profiler.
    """
    if device.type == "cuda":
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
        before = cuda.memory_allocated(device)
        call()
        cuda.synchronize(device)
        return cuda.max_memory_allocated(device) - before
    if not torch.profiler.kineto_available():
        return None
    # The profiler logs to stderr unless this is set before it starts for the first time.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            call()
        profile.export_chrome_trace(str(trace))
        return peak_of(json.loads(trace.read_text())["traceEvents"])


def peak_of(events: Iterable[dict[str, Any]]) -> int:
    """The highest running sum of CPU allocations and frees in a trace of Chrome's format."""
    held = highest = 0
    of_memory = (event for event in events if event.get("name") == "[memory]")
    for event in sorted(of_memory, key=lambda event: event["ts"]):
        if event["args"]["Device Type"] == CPU_DEVICE_TYPE:
            held += event["args"]["Bytes"]
            highest = max(highest, held)
    return highest
