"""Oracle results that take minutes, cached on disk: for whatever model and image the user brings.

A file is found by a hash of all that its content depends on: weights, image, configuration, method, and the source code
of the oracle. So nothing has to be cleared by hand, and a file that is damaged or about something else is made again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headoff.detr.checkpoints.published import cache_folder
from headoff.files import atomic_write

FORMAT = "headoff oracle 1"
FOLDER = "headoff-oracle"
"""In the folder of downloads."""

SOURCES = (
    "ablation",
    "attention",
    "boxes.py",
    "calls.py",
    "deformable",
    "detections.py",
    "detector.py",
    "detr",
    "encoded.py",
    "family",
    "gates",
    "harness/model",
    "harness/operator",
    "harness/reference",
    "harness/tolerance.py",
    "images.py",
    "importance",
    "outcomes.py",
    "relevance",
    "scoring.py",
    "sweeps.py",
    "values.py",
)
"""Files and folders of the package that expected results and tolerances are computed by."""

Arrays = dict[str, NDArray[np.float64]]


def cached(kind: str, key: Mapping[str, str], compute: Callable[[], Arrays]) -> Arrays:
    """`compute()`, computed once for all processes and days.

    Where the folder cannot be written, the result is used all the same.

    Args:
        kind: the beginning of the file's name.
        key: all that the result depends on, apart from the package's code.
    """
    full = {"format": FORMAT, "code": code_hash(), "kind": kind, **key}
    text = json.dumps(full, sort_keys=True)
    path = cache_folder() / FOLDER / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"
    result = _read(path, text)
    if result is None:
        result = compute()
        _write(path, text, result)
    return result


def print_progress(message: str) -> None:
    """A line on stderr about something that takes time, past pytest's capture."""
    print(f"headoff: {message}", file=sys.__stderr__ or sys.stderr, flush=True)


@functools.cache
def code_hash() -> str:
    """SHA-256 of all source code that cached results depend on: another version may have other results."""
    package = Path(str(importlib.resources.files("headoff")))
    total = hashlib.sha256()
    for name in SOURCES:
        source = package / name
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            total.update(file.read_bytes())
    return total.hexdigest()


def _read(path: Path, key: str) -> Arrays | None:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            if str(archive["key"]) == key:
                return {name: archive[name] for name in archive.files if name != "key"}
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever numpy and zipfile make of a damaged file
        print_progress(f"{path} cannot be read ({type(error).__name__}) and is made again")
    return None


def _write(path: Path, key: str, arrays: Arrays) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.savez_compressed(file, allow_pickle=False, key=np.array(key), **arrays)
    except OSError as error:
        print_progress(
            f"{path} cannot be written ({error.strerror or error}): it will be made again next time"
        )
