"""Peak memory of this process, for benchmarks that start a fresh one for each thing they measure."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def peak_mib(device: str) -> float:
    """MiB: of torch's allocator on a GPU, of the whole process on a CPU.

    Linux: not getrusage's maxrss, which a new process inherits from the one it was forked from.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)
