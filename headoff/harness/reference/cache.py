"""Truth that takes minutes to make, kept on disk: of whatever model and image somebody brings.

A file is found by a hash of all that it was made of: weights, image, configuration, method, and the code of the oracle.
So there is nothing to clear by hand, and a file that cannot be read, or is about something else, is made again.
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
from headoff.files import written_atomically

FORMAT = "headoff truth 1"
FOLDER = "headoff-truths"
"""In the folder of downloads."""

SOURCES = (
    "attention",
    "detections.py",
    "detr",
    "gates",
    "harness/model",
    "harness/reference",
    "harness/tolerance.py",
    "images.py",
    "relevance",
    "sweeps.py",
)
"""Files and folders of the package that expected results and tolerances are computed by."""

Arrays = dict[str, NDArray[np.float64]]


def kept(kind: str, about: Mapping[str, str], make: Callable[[], Arrays]) -> Arrays:
    """What `make` gives, made once for all processes and days; `about` is everything that it depends on.

    Where the folder cannot be written the truth is made and used all the same. Says on stderr when it makes something.
    """
    full = {"format": FORMAT, "code": code_hash(), "kind": kind, **about}
    text = json.dumps(full, sort_keys=True)
    path = cache_folder() / FOLDER / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"
    found = _read(path, text)
    if found is None:
        found = make()
        _write(path, text, found)
    return found


def say(message: str) -> None:
    """A line on stderr about something that takes time, past pytest's capture."""
    print(f"headoff: {message}", file=sys.__stderr__ or sys.stderr, flush=True)


@functools.cache
def code_hash() -> str:
    """SHA-256 of the source of all that the truth comes out of: another version may have another truth."""
    package = Path(str(importlib.resources.files("headoff")))
    total = hashlib.sha256()
    for name in SOURCES:
        source = package / name
        for file in sorted(source.rglob("*.py")) if source.is_dir() else [source]:
            total.update(file.read_bytes())
    return total.hexdigest()


def _read(path: Path, about: str) -> Arrays | None:
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as archive:
            if str(archive["about"]) == about:
                return {name: archive[name] for name in archive.files if name != "about"}
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever numpy and zipfile make of a damaged file
        say(f"{path} cannot be read ({type(error).__name__}) and is made again")
    return None


def _write(path: Path, about: str, arrays: Arrays) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_atomically(path) as file:
            np.savez_compressed(file, allow_pickle=False, about=np.array(about), **arrays)
    except OSError as error:
        say(f"{path} cannot be written ({error.strerror or error}): the truth will be made again next time")
