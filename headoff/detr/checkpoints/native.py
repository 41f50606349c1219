"""headoff's checkpoint layout: one safetensors file with weights, configuration and class names.

Tensors are named as in `Detector.state_dict`. The metadata in the header has four entries: `format` (`headoff`),
`version` (of the layout), `config` (JSON of `DetrConfig.as_dict`) and `class_names` (a JSON list).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from headoff.detr.checkpoints.files import TensorFile
from headoff.detr.config import DetrConfig
from headoff.detr.detector import Detr
from headoff.errors import CheckpointError, SettingError
from headoff.files import write_file

FORMAT = "headoff"
VERSION = 1


def save_native(detector: Detr, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
    """Write `detector` to one safetensors file, atomically. The same weights give the same bytes.

    Weights are stored in `dtype`, batch norm's running mean and variance always in float32, since variances may
    exceed the range of float16. The batch counters of `nn.BatchNorm2d` are not stored.

    Raises:
        CheckpointError: a weight is NaN, infinite or too large for `dtype`.
        OutputError: the file cannot be written.
        SettingError: `dtype` is not floating point.
    """
    if not dtype.is_floating_point:
        raise SettingError(f"weights cannot be stored as {dtype}; give a floating point type")
    tensors = {}
    for name, tensor in detector.state_dict().items():
        if name.endswith(".num_batches_tracked"):
            continue
        stored_as = torch.float32 if name.endswith((".running_mean", ".running_var")) else dtype
        tensors[name] = tensor.detach().to("cpu", stored_as).contiguous()
        if not tensors[name].isfinite().all():
            reason = f"too large for {stored_as}" if tensor.isfinite().all() else "NaN or infinite"
            raise CheckpointError(f"the detector cannot be saved: numbers in {name} are {reason}; "
                                  "save it as torch.float32, or check its training")  # fmt: skip
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "config": json.dumps(detector.config.as_dict()),
        "class_names": json.dumps(list(detector.class_names), ensure_ascii=False),
    }
    write_file(Path(path), _with_sorted_metadata(safetensors.torch.save(tensors, metadata)))


def _with_sorted_metadata(content: bytes) -> bytes:
    """A safetensors file with sorted metadata; the library writes it in random order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def is_native(file: TensorFile) -> bool:
    """Whether a file is in headoff's layout."""
    return file.metadata.get("format") == FORMAT


def read_native(file: TensorFile) -> tuple[DetrConfig, tuple[str, ...], Mapping[str, Tensor]]:
    """Configuration, class names and tensors of a file in headoff's layout.

    Raises:
        CheckpointError: the version of the layout is too new, or the metadata cannot be read.
    """
    version = file.metadata.get("version", "")
    if not version.isdecimal() or int(version) > VERSION:
        raise CheckpointError(
            f"{str(file.path)!r} has version {version!r} of headoff's layout, and this headoff reads versions "
            f"up to {VERSION}; install a newer headoff"
        )
    try:
        config = json.loads(file.metadata["config"])
        class_names = json.loads(file.metadata["class_names"])
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the metadata of {str(file.path)!r} cannot be read ({error}); save the detector again"
        ) from error
    if (
        not isinstance(config, dict)
        or not isinstance(class_names, list)
        or not all(isinstance(name, str) for name in class_names)
    ):
        raise CheckpointError(
            f"the metadata of {str(file.path)!r} lacks a configuration or a list of class names; "
            "save the detector again"
        )
    return DetrConfig.from_dict(config), tuple(class_names), file.tensors
