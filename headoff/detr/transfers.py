"""Copying tensors from the host to a device: one asynchronous copy for many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_to_device(
    tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """`tensors` on `device`, converted to `dtype` if given; tensors that need no copy are returned as they are.

    A copy from pageable memory makes the host wait for all kernels that it has launched. So tensors for a GPU are
    concatenated in pinned memory, one copy per dtype, and copied asynchronously. torch frees the pinned memory after
    the copy.
    """
    result = [tensor if dtype is None else tensor.to(dtype) for tensor in tensors]
    elsewhere = [index for index, tensor in enumerate(result) if tensor.device != device]
    for copied_dtype in dict.fromkeys(result[index].dtype for index in elsewhere):
        indices = [index for index in elsewhere if result[index].dtype == copied_dtype]
        copies = _copy_as_one([result[index] for index in indices], device)
        for index, copy in zip(indices, copies, strict=True):
            result[index] = copy
    return result


def _copy_as_one(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype, copied to `device` as one tensor."""
    if any(tensor.device.type != "cpu" for tensor in tensors):
        # A copy between devices needs no pinned memory.
        return [tensor.to(device) for tensor in tensors]
    packed = torch.cat([tensor.flatten() for tensor in tensors])
    if device.type == "cuda":
        packed = packed.pin_memory()
    parts = packed.to(device, non_blocking=True).split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
