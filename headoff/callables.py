"""Callables of users, by name: those in a module, those in a file.

Failures here come from typing mistakes or broken kernel files. Every one is an `AttentionError` of one sentence that
says what was asked for, where it failed and what to do.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from headoff.errors import AttentionError, did_you_mean

FORMS = "'package.module:name' or 'path/to/file.py:name'"

# Of modules made from files: modification time and size when the file was executed, and the path as given.
_stamps: dict[str, tuple[int, int]] = {}
_paths: dict[str, str] = {}

# How callables that were imported here were named, by the files that they are in.
_named: dict[str, str] = {}


def import_named(spec: str, registered: Collection[str], kind: str) -> Any:
    """What `spec` names in a module or a file.

    While a module or file is imported, its folder (for a module, the current directory) is the first entry of
    `sys.path`, so that it can import its neighbours; afterwards the last, for imports inside functions. A file is
    executed once, and again after it has changed.

    Args:
        spec: `"package.module:name"` or `"path/to/file.py:name"`, with a path relative to the current directory.
            `name` may contain dots.
        registered: names that could be meant instead, for the message.
        kind: what is looked for, `attention`, `deformable attention`.

    Raises:
        AttentionError: there is no such thing, or it cannot be imported.
    """
    source, _, name = spec.rpartition(":")
    if spec.endswith(".py"):  # checked first, as its colon may be that of a drive: C:\\kernels\\mine.py
        raise AttentionError(f"{spec!r} does not say which function of the file: write '{spec}:name'.")
    if not source or not name:
        raise AttentionError(
            f"there is no {kind} {spec!r}{did_you_mean(spec, registered)}: write one of "
            f"{', '.join(registered)}, or {FORMS}."
        )
    is_file = source.endswith(".py") or "/" in source or "\\" in source
    module = _import_file(source) if is_file else _import_module(source)
    found = _find_member(module, name, source)
    if module.__file__ is not None:
        _named[module.__file__] = spec
    return found


def failure_in_callable(error: BaseException) -> str | None:
    """One sentence on an exception that a callable of `import_named` raised in a call; None if none of them did."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in _named]
    if not frames:
        return None
    last = frames[-1]
    if isinstance(error, SystemExit):
        return f"{_named[last.filename]} ended the program (line {last.lineno}, sys.exit): an attention must return"
    message = " ".join(str(error).split())[:300].rstrip(".:; ")
    raised = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return f"{_named[last.filename]} raised {raised} (line {last.lineno}): correct it"


def source_label(named: Any) -> str:
    """`path/to/file.py:name` or `module:name` of something with a `__qualname__`."""
    module = getattr(named, "__module__", None) or ""
    return f"{_paths.get(module, module)}:{named.__qualname__}".removeprefix(":")


def is_from_file(module: ModuleType) -> bool:
    """Whether `import_named` made a module from a file that was named by its path."""
    return module.__name__ in _paths


def _find_member(module: ModuleType, dotted: str, source: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            candidates = [known for known in public if callable(getattr(found, known, None))]
            defined = [known for known in candidates if _is_defined_in(module, getattr(found, known))]
            listed = f"; it defines {', '.join(defined)}" if defined else ""
            hint = did_you_mean(name, candidates) or listed
            raise AttentionError(f"{source} has no {name!r}{hint}: correct the name.")
        found = getattr(found, name)
    return found


def _is_defined_in(module: ModuleType, member: Any) -> bool:
    """Whether `member` is known to be defined in `module`, and not imported into it."""
    return getattr(member, "__module__", None) == module.__name__


def _import_module(name: str) -> ModuleType:
    try:
        with _first_on_path(Path.cwd()):
            return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise AttentionError(
                f"there is no module {error.name!r}, neither in the current directory nor installed: correct "
                f"the name, or write 'path/to/file.py:name' for a file."
            ) from None
        raise AttentionError(_import_failure(name, error)) from error


def _import_file(text: str) -> ModuleType:
    path = Path(text).expanduser()
    if not path.is_file() or path.suffix != ".py":
        raise AttentionError(_not_found_message(path))
    path = path.resolve()
    # The module's name depends on the file's path, so that two files do not share one, and is the same in every run,
    # because caches of compiled kernels are keyed by it.
    name = f"headoff_attention_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    if name in sys.modules and _stamps.get(name) == stamp:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # there is a loader for .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = (
        module  # before it is executed, because dataclasses and Triton look up their module by name
    )
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise AttentionError(_import_failure(text, error, path)) from error
    _stamps[name], _paths[name] = stamp, text
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """Make the folder the first entry of `sys.path` within this context, and the last one after it."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        # By value, not by position, as the imported module may have changed sys.path.
        if entry in sys.path:
            sys.path.remove(entry)
    if entry not in sys.path:
        sys.path.append(entry)


def _not_found_message(path: Path) -> str:
    if path.exists():
        return f"{path} is not a Python file: name a file that ends in .py."
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder: correct the path (from {Path.cwd()})."
    suggestion = did_you_mean(path.name, (entry.name for entry in path.parent.glob("*.py")))
    return f"{path} does not exist{suggestion}: correct the path (from {Path.cwd()})."


def _import_failure(source: str, error: BaseException, path: Path | None = None) -> str:
    """One sentence on a failed import: the file, its line if known, the error, the remedy."""
    kind = type(error).__name__
    if isinstance(error, SyntaxError) and error.lineno is not None:
        where = source if path is not None and error.filename == str(path) else error.filename
        return f"{where}, line {error.lineno}: {kind}: {error.msg}: correct the file."
    message = " ".join(str(error).split())
    remedy = "correct the file"
    if isinstance(error, ModuleNotFoundError):
        remedy = f"install {error.name}, or put it next to the file"
    elif isinstance(error, ImportError) and "relative import" in message:
        remedy = "name a file that belongs to a package as 'package.module:name'"
    what = f"{kind}: {message}" if message else kind
    return f"{source}{_location(error, path)} raised {what} while it was imported: {remedy}."


def _location(error: BaseException, path: Path | None) -> str:
    """The innermost line of the file at `path` in the traceback; without `path`, the innermost line of any file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    if path is not None:
        frames = [frame for frame in frames if frame.filename == str(path)]
        return f", line {frames[-1].lineno}," if frames else ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
