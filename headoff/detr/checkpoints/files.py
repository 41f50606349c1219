"""Reading tensors from untrusted files.

Nothing in a checkpoint is ever executed. Pickles are read with torch's restricted unpickler, which allows tensors,
plain containers and, here, `argparse.Namespace` (DETR's training settings).
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headoff.errors import CheckpointError, error_line

_WEIGHTS_KEYS = ("model", "state_dict", "model_state_dict")
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorFile:
    """The content of a checkpoint file.

    Attributes:
        path: the file.
        tensors: by name, named as in the file.
        metadata: the metadata in a safetensors header.
        settings: the training settings stored together with the weights in a `.pth`, by name.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read_tensors(path: Path) -> TensorFile:
    """Read a safetensors file, or a file of `torch.save` (zip or the older plain pickle), to the CPU.

    The format is detected from the content, not from the suffix.

    Raises:
        CheckpointError: the file cannot be read, holds no named tensors, or asks for code to be run.
    """
    if not path.is_file():  # reading a pipe could block permanently
        raise CheckpointError(f"{str(path)!r} is not a regular file; give a checkpoint")
    try:
        with path.open("rb") as file:
            head = file.read(256)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error_line(error)}); check its permissions"
        ) from error
    kind = _kind(head, size)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "torch":
        return _read_torch(path)
    raise CheckpointError(f"{str(path)!r} {kind}")


def _kind(head: bytes, size: int) -> str:
    """`safetensors` or `torch`; for another file, a message without its subject: what it is, and what to do."""
    if not size:
        return "is empty; download or save it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights themselves; run 'git lfs pull' where it was cloned"
    # First: the length of a safetensors header fills the first 8 bytes, and may equal any other magic number.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _MAX_HEADER:
        return "safetensors"
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "torch"
    if head.lstrip().startswith(b"<"):
        return "is a web page and not a checkpoint; download the file itself"
    if head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf")):
        return "is a compressed archive; unpack it and give the checkpoint inside"
    if head.isascii() and b"\0" not in head:
        return "is a text file and not a checkpoint; give a .pth, .bin or .safetensors file"
    return "is not a checkpoint (neither safetensors nor a file of torch.save), or its beginning is damaged"


def _read_safetensors(path: Path) -> TensorFile:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(path)!r} is damaged or cut off ({error_line(error)}); download or save it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no tensors; give a detector's checkpoint")
    return TensorFile(path, tensors, metadata)


def _read_torch(path: Path) -> TensorFile:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch warns that a pickle which torch.save did not write may fail to load; the error is enough.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_unpickling_message(path, str(error))) from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{str(path)!r} is damaged or cut off ({error_line(error)}); download or save it again"
        ) from error
    settings: dict[str, Any] = {}
    weights = content
    if isinstance(content, Mapping):
        settings = _as_settings(content.get("args"))
        weights = next(
            (content[name] for name in _WEIGHTS_KEYS if isinstance(content.get(name), Mapping)), content
        )
    entries = weights.items() if isinstance(weights, Mapping) else ()
    tensors = {n: value for n, value in entries if isinstance(n, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{str(path)!r} holds no named tensors, neither at its top level nor under {', '.join(_WEIGHTS_KEYS)}; "
            "give a detector's state dict"
        )
    return TensorFile(path, tensors, settings=settings)


def _as_settings(args: Any) -> dict[str, Any]:
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return {str(name): value for name, value in args.items()} if isinstance(args, Mapping) else {}


def _unpickling_message(path: Path, reason: str) -> str:
    """One sentence on a pickle that the restricted unpickler rejected."""
    imported = re.search(r"GLOBAL (\S+)", reason)
    if imported:
        return (
            f"{str(path)!r} was rejected: its pickle asks for {imported[1]}, which is code and not weights, "
            "and none of it was run; if you trust its author, save its state dict alone and give that"
        )
    return f"{str(path)!r} is damaged or is no file of torch.save; download or save it again"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, or holds no JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as JSON ({error_line(error)}); download or save it again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a JSON {type(values).__name__} and not an object; check it"
        )
    return values
