"""Devices and dtypes by their names."""

from __future__ import annotations

import torch

from headoff.errors import SettingError

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def chosen_device(name: str | None) -> torch.device:
    """The device of that name; without one, CUDA where there is one. Raises SettingError if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingError(f"device {name!r} cannot be used here ({reason}); try --device cpu") from error
    return device
