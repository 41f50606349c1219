"""Files written completely or not at all, and folders that one process writes at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from headoff.errors import OutputError, error_line


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing, and rename it to `path` when the block ends without an error.

    Until then `path` is unchanged. After an error or Ctrl-C the temporary file is removed.

    Raises:
        OSError: the folder of `path` does not exist or cannot be written to.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read; results get the user's usual permissions.
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_file(path: Path, contents: bytes | str) -> None:
    """Write a file completely or not at all, and its folder if that does not exist.

    Raises:
        OutputError: it cannot be written.
    """
    data = contents.encode("utf-8", "replace") if isinstance(contents, str) else contents
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(data)


def write_new_file(path: Path, contents: bytes | str) -> None:
    """Write a file, unless there is one, perhaps another process's. It is never there in part.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with output_errors(path):
        try:
            write_file(part, contents)
            os.link(part, path)
        except FileExistsError:
            pass
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn an OSError into an OutputError that names `target`."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        reason = error_line(error)
        if isinstance(error.filename, str) and error.filename != str(target):
            reason += f": {error.filename!r}"
        raise OutputError(
            f"{str(target)!r} cannot be written ({reason}): choose another place, or free space and permissions there"
        ) from error


_locked: set[Path] = set()
"""Folders that this process has locked."""


@contextmanager
def lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Keep other processes of this user and machine from writing to a folder, which need not exist, in the meantime.

    With `shared`, only those whose lock is not shared. A process may lock a folder several times. The lock file is
    with the system's temporary files, and not in the folder; the system releases the lock of a process that ends, in
    whatever way.

    Raises:
        OutputError: another process has the lock; the message names it.
    """
    place = folder.resolve()
    if place in _locked:
        yield
        return
    name = hashlib.sha256(str(place).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"headoff-{os.getuid()}-{name}.lock"
    with path.open("a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise OutputError(
                f"process {file.read().strip() or '(unknown)'} is writing to {str(folder)!r}; wait for it, or name "
                "another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}")
        file.flush()
        _locked.add(place)
        try:
            yield
        finally:
            _locked.discard(place)


MARK = ".headoff"
"""In a folder whose pictures headoff may remove."""


def marked_folder(folder: Path) -> Path:
    """Make the folder, with the mark that `clear_marked_folder` asks for. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def clear_marked_folder(folder: Path) -> None:
    """Remove an earlier run's pictures from a marked folder; any other stays as it is."""
    if (folder / MARK).is_file():
        for picture in folder.glob("*.png"):
            picture.unlink(missing_ok=True)


def _umask() -> int:
    # The umask cannot be read without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
