"""Tensors that go from the host to a device in one copy, which the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sent(tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None) -> list[Tensor]:
    """`tensors` on `device`, in `dtype` where one is given; those that are there already are returned as they are.

    A copy from pageable memory makes the host wait for all that it has launched. So what has to go to a GPU is laid
    end to end in pinned memory and sent at once, one copy for each dtype; torch keeps the pages until it is through.
    """
    found = [tensor if dtype is None else tensor.to(dtype) for tensor in tensors]
    away = [index for index, tensor in enumerate(found) if tensor.device != device]
    for kind in dict.fromkeys(found[index].dtype for index in away):
        some = [index for index in away if found[index].dtype == kind]
        for index, tensor in zip(some, _at_once([found[index] for index in some], device), strict=True):
            found[index] = tensor
    return found


def _at_once(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype, sent as one."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        # From one device to another: nothing to pin.
        return [tensor.to(device) for tensor in tensors]
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        packed = packed.pin_memory()
    there = packed.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(there, tensors, strict=True)]
