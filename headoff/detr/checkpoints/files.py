"""Reading tensors from files that may be anything, and writing checkpoints that are whole or absent.

A checkpoint comes from a stranger: nothing in it is ever executed. Pickles are read with torch's restricted
unpickler, which knows tensors, plain containers and, here, `argparse.Namespace` (DETR's training settings).
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

from headoff.errors import CheckpointError, OutputError
from headoff.files import written_atomically

_CONTAINERS = ("model", "state_dict", "model_state_dict")
_MAX_HEADER = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorFile:
    """What a checkpoint file holds.

    Attributes:
        path: the file.
        tensors: by name, in whatever layout the file has.
        metadata: the texts in a safetensors header.
        settings: the training settings stored beside the weights in a `.pth`, by name.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def read_tensors(path: Path) -> TensorFile:
    """Read a safetensors file, or one of `torch.save` (zip or the older plain pickle), to the CPU.

    What it is, is told by the content; suffixes lie. Raises CheckpointError for whatever cannot be read,
    holds no named tensors, or asks for code to be run.
    """
    if not path.is_file():  # reading a pipe could block permanently
        raise CheckpointError(f"{str(path)!r} is not a regular file; give a checkpoint")
    try:
        with path.open("rb") as file:
            head = file.read(256)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read ({error.strerror or error}); check it"
        ) from error
    kind = _kind(head, size)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "torch":
        return _read_torch(path)
    raise CheckpointError(f"{str(path)!r} {kind}")


def _kind(head: bytes, size: int) -> str:
    """`safetensors`, `torch`, or the rest of a sentence that says why the file is neither, and the remedy."""
    if not size:
        return "is empty; download or save it again"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer and not the weights themselves; run 'git lfs pull' where it was cloned"
    # Before the others: a header's length, its first 8 bytes, may look like any magic number.
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
            f"{str(path)!r} is damaged or cut off ({_first_line(error)}); download or save it again"
        ) from error
    if not tensors:
        raise CheckpointError(f"{str(path)!r} holds no tensors; give a detector's checkpoint")
    return TensorFile(path, tensors, metadata)


def _read_torch(path: Path) -> TensorFile:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # Pickles that torch.save did not write: it warns that reading them may fail, and then it does.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refusal(path, str(error))) from error
    except Exception as error:  # a damaged pickle may raise anything at all
        raise CheckpointError(
            f"{str(path)!r} is damaged or cut off ({_first_line(error)}); download or save it again"
        ) from error
    settings: dict[str, Any] = {}
    weights = content
    if isinstance(content, Mapping):
        settings = _as_settings(content.get("args"))
        weights = next(
            (content[name] for name in _CONTAINERS if isinstance(content.get(name), Mapping)), content
        )
    entries = weights.items() if isinstance(weights, Mapping) else ()
    tensors = {n: value for n, value in entries if isinstance(n, str) and isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{str(path)!r} holds no named tensors, neither at its top nor under {', '.join(_CONTAINERS)}; "
            "give a detector's state dict"
        )
    return TensorFile(path, tensors, settings=settings)


def _as_settings(args: Any) -> dict[str, Any]:
    if isinstance(args, argparse.Namespace):
        return dict(vars(args))
    return {str(name): value for name, value in args.items()} if isinstance(args, Mapping) else {}


def _refusal(path: Path, message: str) -> str:
    """One sentence for a pickle that the restricted unpickler gave up on."""
    wanted = re.search(r"GLOBAL (\S+)", message)
    if wanted:
        return (
            f"{str(path)!r} was refused: its pickle asks for {wanted[1]}, which is code and not weights, "
            "and nothing of it was run; if you trust whoever made it, save its state dict alone and give that"
        )
    return f"{str(path)!r} is damaged or is no file of torch.save; download or save it again"


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip(".;: ")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises CheckpointError where it is unreadable or is no object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read as JSON ({_first_line(error)}); download or save it again"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{str(path)!r} holds a JSON {type(values).__name__} and not an object; check it"
        )
    return values


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file or none. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            file.write(content)
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} cannot be written ({error.strerror or error}); "
            "check the folder and the free space"
        ) from error
