"""Devices and dtypes by their names. Importing this module does not import torch."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from headoff.choices import DTYPES
from headoff.errors import SettingError, error_line

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "autocast", "chosen_device", "set_threads", "torch_dtype"]

MOST_THREADS = 8
"""Threads on a core that are not taken for a slip."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`.

    Raises:
        SettingError: the name is not in `DTYPES`.
    """
    import torch

    if name not in DTYPES:
        raise SettingError(f"dtype {name!r} is not known: use one of {', '.join(DTYPES)}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def set_threads(number: int) -> None:
    """Let torch compute with `number` CPU threads.

    Raises:
        SettingError: there are far fewer cores; thousands of threads would end the process.
    """
    import torch

    cores = os.cpu_count() or 1
    if number > MOST_THREADS * cores:
        raise SettingError(f"{number} threads are too many for {cores} cores: give a number up to {cores}")
    torch.set_num_threads(number)


def chosen_device(name: str | None) -> torch.device:
    """The torch device called `name`; for None, CUDA if it is available and the CPU otherwise.

    Raises:
        SettingError: this machine has no such device.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise NotImplementedError("tensors there have no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SettingError(
            f"device {name!r} cannot be used here ({error_line(error)}); try --device cpu"
        ) from error
    return device


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """`torch.autocast` to `dtype`; for None a null context, in which an autocast of the caller stays in effect."""
    if dtype is None:
        return nullcontext()
    import torch

    return torch.autocast(device.type, dtype)
