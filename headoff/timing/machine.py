"""The machine that times were measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NVIDIA_SMI = {
    "driver": "driver_version",
    "sm_clock": "clocks.sm",
    "memory_clock": "clocks.mem",
    "max_sm_clock": "clocks.max.sm",
    "max_memory_clock": "clocks.max.mem",
    "power_limit": "power.limit",
    "temperature": "temperature.gpu",
}
"""Our names of what nvidia-smi is asked for: clocks in MHz, power in W, temperature in degrees Celsius."""


def describe_machine(device: torch.device | str = "cpu", threads: int | None = None) -> dict[str, Any]:
    """What times measured on `device` depend on, as JSON types.

    Args:
        device: the device of the timed calls.
        threads: CPU threads that torch computes with while it is timed; by default as many as now.

    Returns:
        `device`: `cpu` or `cuda`; `system`, `python`, `torch`, and `cuda`, the version torch was built with or None;
        `cpu`: its `model`, the `cores` that this process may use, `threads`; `gpu`: None on a CPU, else `name`,
        `capability`, `memory_bytes`, `l2_bytes`, `multiprocessors`, and driver and clocks as nvidia-smi reports them,
        None where it does not.
    """
    device = torch.device(device)
    return {
        "device": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cpu": {
            "model": cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads() if threads is None else threads,
        },
        "gpu": gpu(device) if device.type == "cuda" else None,
    }


def cpu_model() -> str:
    """The processor's name, as the system reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def gpu(device: torch.device, cuda: Any = torch.cuda) -> dict[str, Any]:
    """Describe one GPU. What cannot be found out is None."""
    properties = cuda.get_device_properties(device)
    uuid = getattr(properties, "uuid", None)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        **ask_nvidia_smi(None if uuid is None else f"GPU-{uuid}"),
    }


def ask_nvidia_smi(identifier: str | None) -> dict[str, str | None]:
    """The values of `NVIDIA_SMI` for the GPU of this UUID, which means the same GPU under CUDA_VISIBLE_DEVICES."""
    unknown: dict[str, str | None] = dict.fromkeys(NVIDIA_SMI)
    if identifier is None:
        return unknown
    command = ["nvidia-smi", f"--id={identifier}", f"--query-gpu={','.join(NVIDIA_SMI.values())}"]
    try:
        answer = subprocess.run(
            [*command, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return unknown
    values = [value.strip() for value in answer.stdout.splitlines()[0].split(",")] if answer.stdout else []
    if len(values) != len(NVIDIA_SMI):
        return unknown
    return {
        name: None if value.startswith("[") else value for name, value in zip(NVIDIA_SMI, values, strict=True)
    }


def processor(described: Mapping[str, Any]) -> str:
    """The processor of a machine that `describe_machine` described, as text: the GPU, or the CPU and its threads."""
    if described["device"] == "cuda":
        return str(described["gpu"]["name"])
    return f"{described['cpu']['model']}, threads: {described['cpu']['threads']}"
