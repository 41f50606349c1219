"""Checkpoints that are stored in several files, of which an index says which tensor is where."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from headoff.detr.checkpoints.files import TensorFile, read_json, read_tensors
from headoff.errors import CheckpointError

INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


def read_checkpoint(path: Path) -> TensorFile:
    """Read a file with tensors; or, of an index (`model.safetensors.index.json`), all files that it names.

    Raises:
        CheckpointError: a file cannot be read, is missing, or lacks a tensor; or it is one of several.
    """
    if path.name.endswith(INDEX_SUFFIX):
        return _read_shards(path)
    shard = _SHARD.fullmatch(path.name)
    index = path.with_name(f"{shard[1]}{shard[3]}{INDEX_SUFFIX}") if shard else None
    if shard and index and index.is_file():
        raise CheckpointError(
            f"{str(path)!r} is one of {int(shard[2])} files of a checkpoint; give their folder, or {index.name}"
        )
    return read_tensors(path)


def shard_places(index: Path) -> dict[str, str]:
    """The files of an index by the names of their tensors; all of them are names of files in the index's folder.

    Raises:
        CheckpointError: it cannot be read, or names a file elsewhere.
    """
    places = read_json(index).get("weight_map")
    if (
        not isinstance(places, dict)
        or not places
        or not all(isinstance(file, str) and file for file in places.values())
    ):
        raise CheckpointError(
            f"{str(index)!r} has no weight_map from tensors to files; download or save it again"
        )
    for name in places.values():
        if name in (".", "..") or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{str(index)!r} names a file outside its folder, {name!r}, which was not read; check where it is from"
            )
    return places


def _read_shards(index: Path) -> TensorFile:
    places = shard_places(index)
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        path = index.with_name(name)
        if not path.exists():
            raise CheckpointError(f"{str(index)!r} names {name!r}, which is missing; download it as well")
        shard = read_tensors(path).tensors
        wanted = [tensor for tensor, file in places.items() if file == name]
        missing = [tensor for tensor in wanted if tensor not in shard]
        if missing:
            raise CheckpointError(
                f"{str(path)!r} lacks {missing[0]}, which {index.name} says it has; download both again"
            )
        tensors |= {tensor: shard[tensor] for tensor in wanted}
    return TensorFile(index, tensors)
