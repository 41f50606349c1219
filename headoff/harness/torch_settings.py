"""Torch's global settings: what a patch must leave as it was, for all that is computed after it depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

DENORMAL = torch.full((1,), 1e-40, dtype=torch.float32, device="cpu")
"""There is no function that says whether such numbers are flushed to zero: one has to be multiplied."""

READERS: dict[str, Callable[[], Any]] = {
    "default dtype": torch.get_default_dtype,
    "default device": torch.get_default_device,
    "gradient mode": torch.is_grad_enabled,
    "float32 matmul precision": torch.get_float32_matmul_precision,
    "cuda.matmul.allow_tf32": lambda: torch.backends.cuda.matmul.allow_tf32,
    "cuda.matmul.allow_bf16_reduced_precision_reduction": (
        lambda: torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    ),
    "cuda.matmul.allow_fp16_reduced_precision_reduction": (
        lambda: torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    ),
    "cudnn.allow_tf32": lambda: torch.backends.cudnn.allow_tf32,
    "cudnn.benchmark": lambda: torch.backends.cudnn.benchmark,
    "cudnn.deterministic": lambda: torch.backends.cudnn.deterministic,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "number of threads": torch.get_num_threads,
    "anomaly detection": torch.is_anomaly_enabled,
    "autocast on the CPU": lambda: torch.is_autocast_enabled("cpu"),
    "autocast on CUDA": lambda: torch.is_autocast_enabled("cuda"),
    "autocast dtype on the CPU": lambda: torch.get_autocast_dtype("cpu"),
    "autocast dtype on CUDA": lambda: torch.get_autocast_dtype("cuda"),
    "denormal numbers": lambda: "flushed" if float(DENORMAL * 1) == 0 else "kept",
    "oneDNN": lambda: torch.backends.mkldnn.enabled,
    "fast path of MultiheadAttention": torch.backends.mha.get_fastpath_enabled,
    "flash SDPA": torch.backends.cuda.flash_sdp_enabled,
    "memory-efficient SDPA": torch.backends.cuda.mem_efficient_sdp_enabled,
    "math SDPA": torch.backends.cuda.math_sdp_enabled,
    "cuDNN SDPA": torch.backends.cuda.cudnn_sdp_enabled,
}
"""Settings by name, as people know them, and how each is read."""


def _set(owner: Any, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(owner, name, value)


WRITERS: dict[str, Callable[[Any], Any]] = {
    "default dtype": torch.set_default_dtype,
    "default device": torch.set_default_device,
    "gradient mode": torch.set_grad_enabled,
    "float32 matmul precision": torch.set_float32_matmul_precision,
    "cuda.matmul.allow_tf32": _set(torch.backends.cuda.matmul, "allow_tf32"),
    "cuda.matmul.allow_bf16_reduced_precision_reduction": _set(
        torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"
    ),
    "cuda.matmul.allow_fp16_reduced_precision_reduction": _set(
        torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"
    ),
    "cudnn.allow_tf32": _set(torch.backends.cudnn, "allow_tf32"),
    "cudnn.benchmark": _set(torch.backends.cudnn, "benchmark"),
    "cudnn.deterministic": _set(torch.backends.cudnn, "deterministic"),
    "deterministic algorithms": torch.use_deterministic_algorithms,
    "number of threads": torch.set_num_threads,
    "anomaly detection": torch.autograd.set_detect_anomaly,
    "autocast on the CPU": lambda value: torch.set_autocast_enabled("cpu", value),
    "autocast on CUDA": lambda value: torch.set_autocast_enabled("cuda", value),
    "autocast dtype on the CPU": lambda value: torch.set_autocast_dtype("cpu", value),
    "autocast dtype on CUDA": lambda value: torch.set_autocast_dtype("cuda", value),
    "denormal numbers": lambda value: torch.set_flush_denormal(value == "flushed"),
    "oneDNN": _set(torch.backends.mkldnn, "enabled"),
    "fast path of MultiheadAttention": torch.backends.mha.set_fastpath_enabled,
    "flash SDPA": torch.backends.cuda.enable_flash_sdp,
    "memory-efficient SDPA": torch.backends.cuda.enable_mem_efficient_sdp,
    "math SDPA": torch.backends.cuda.enable_math_sdp,
    "cuDNN SDPA": torch.backends.cuda.enable_cudnn_sdp,
}


def read_settings() -> dict[str, Any]:
    """Their values now."""
    return {name: _read(reader) for name, reader in READERS.items()}


def _read(reader: Callable[[], Any]) -> Any:
    # Torch refuses to name one TF32 setting by its old name where another was set by its new one.
    try:
        return reader()
    except RuntimeError as error:
        return str(error)


@contextmanager
def watched_settings() -> Iterator[list[str]]:
    """A list that has, after the body, a clause for each setting that the body changed; all are as before then."""
    changes: list[str] = []
    before = read_settings()
    try:
        yield changes
    finally:
        after = read_settings()
        for name, value in before.items():
            if after[name] != value:
                changes.append(f"torch's {name} from {value} to {after[name]}")
                WRITERS[name](value)


@contextmanager
def as_before(settings: dict[str, Any]) -> Iterator[None]:
    """Within this context torch's settings are those that `read_settings` gave earlier."""
    now = read_settings()
    changed = [name for name, value in settings.items() if now[name] != value]
    for name in changed:
        WRITERS[name](settings[name])
    try:
        yield
    finally:
        for name in changed:
            WRITERS[name](now[name])
