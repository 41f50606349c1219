"""Attention callables by name: registered ones, those in a module, those in a file.

What fails here fails because of a typing mistake or a broken kernel file. So every failure is an
`AttentionError` of one sentence that says what was asked for, where it failed and what
to do.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from headoff.attention.contract import AdaptedAttention, Attention, conform
from headoff.attention.eager import eager
from headoff.attention.fused import triton_attention
from headoff.attention.sdpa import sdpa
from headoff.errors import AttentionError, did_you_mean

AUTO = "auto"
"""Stands for the attention that is used unless another one is asked for by name: `sdpa`, on every device.

The Triton kernels have to be asked for: no measurement on a GPU shows yet that they are right and faster there.
"""

FORMS = "'package.module:name' or 'path/to/file.py:name'"

_registered: dict[str, Attention] = {}

# By identity, because a callable need not be hashable. The callable is kept with its label: the identity of an
# object that no longer exists may be that of a new one.
_labels: dict[int, tuple[Any, str]] = {}

# The modules made of files: time of modification and size when the file was executed, path as it was written.
_stamps: dict[str, tuple[int, int]] = {}
_paths: dict[str, str] = {}


def register_attention(name: str, attention: Callable[..., Any]) -> Attention:
    """Let `resolve_attention` find `attention` as `name`; returns it, adapted where it needs to be.

    A name that is taken is given to the new callable. Raises `AttentionError` for a callable that does
    not conform, and for a name that could be mistaken for a module's or a file's.
    """
    if not name or ":" in name or name == AUTO:
        raise AttentionError(f"{name!r} cannot be the name of an attention: use another word, without ':'.")
    _registered[name] = _labelled(conform(attention, name), name)
    return _registered[name]


def attention_names() -> tuple[str, ...]:
    """The registered names in the order of registration."""
    return tuple(_registered)


def resolve_attention(spec: str | Callable[..., Any]) -> Attention:
    """The attention that `spec` stands for, adapted to the contract where it needs to be.

    `spec` is a callable, a registered name, `"package.module:name"` or `"path/to/file.py:name"` with a
    path relative to the current directory; `name` may have dots. While it is imported, the folder of the
    file (for a module, the current directory) comes first on `sys.path`, so that other modules in that folder can be
    imported; afterwards last, for what a function imports when it is called. A file is executed once, and
    again when it has changed since. Raises `AttentionError`.
    """
    if not isinstance(spec, str):
        return conform(spec, attention_label(spec) if callable(spec) else repr(spec))
    if spec == AUTO:
        return sdpa
    if spec in _registered:
        return _registered[spec]
    source, _, name = spec.rpartition(":")
    if spec.endswith(".py"):  # before the colon is looked at: it may be that of a drive, C:\kernels\mine.py
        raise AttentionError(f"{spec!r} does not say which function of the file: write '{spec}:name'.")
    if not source or not name:
        raise AttentionError(
            f"there is no attention {spec!r}{did_you_mean(spec, _registered)}: write one of "
            f"{', '.join(_registered)}, or {FORMS}."
        )
    is_file = source.endswith(".py") or "/" in source or "\\" in source
    module = _import_file(source) if is_file else _import_module(source)
    return _labelled(conform(_member(module, name, source), spec), spec)


def attention_label(attention: Callable[..., Any]) -> str:
    """The name of `attention` in reports: what it was resolved by, else its module or file, and name."""
    if id(attention) in _labels:
        return _labels[id(attention)][1]
    if isinstance(attention, AdaptedAttention):
        return attention.label
    partial_of = getattr(attention, "func", None)
    if callable(partial_of):
        return f"partial({attention_label(partial_of)})"
    named = attention if hasattr(attention, "__qualname__") else type(attention)
    module = getattr(named, "__module__", None) or ""
    return f"{_paths.get(module, module)}:{named.__qualname__}".removeprefix(":")


def _labelled(attention: Attention, label: str) -> Attention:
    inner = attention.call if isinstance(attention, AdaptedAttention) else attention
    for known in (attention, inner):
        _labels.setdefault(id(known), (known, label))
    return attention


def _member(module: ModuleType, dotted: str, source: str) -> Any:
    found: Any = module
    for name in dotted.split("."):
        if not hasattr(found, name):
            public = [known for known in dir(found) if not known.startswith("_")]
            candidates = [known for known in public if callable(getattr(found, known, None))]
            own = [known for known in candidates if _is_of(module, getattr(found, known))]
            there = f"; it defines {', '.join(own)}" if own else ""
            hint = did_you_mean(name, candidates) or there
            raise AttentionError(f"{source} has no {name!r}{hint}: correct the name.")
        found = getattr(found, name)
    return found


def _is_of(module: ModuleType, member: Any) -> bool:
    """Whether `member` was defined in `module`, not imported there; a partial, say, does not tell."""
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
        raise AttentionError(_failure(name, error)) from error


def _import_file(text: str) -> ModuleType:
    path = Path(text).expanduser()
    if not path.is_file() or path.suffix != ".py":
        raise AttentionError(_no_file(path))
    path = path.resolve()
    # A name that no other file has, not even one of the same name elsewhere, and that is the same in every
    # run, for caches of compiled kernels are keyed by it.
    name = f"headoff_attention_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    stamp = (path.stat().st_mtime_ns, path.stat().st_size)
    if name in sys.modules and _stamps.get(name) == stamp:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # there is a loader for .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = (
        module  # before it is executed: dataclasses and Triton look their module up by its name
    )
    try:
        with _first_on_path(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise AttentionError(_failure(text, error, path)) from error
    _stamps[name], _paths[name] = stamp, text
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    """The folder is looked into before all others, and from then on, where nothing fails, after them."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        # By value, not by position: what was imported may have changed the path itself.
        if entry in sys.path:
            sys.path.remove(entry)
    if entry not in sys.path:
        sys.path.append(entry)


def _no_file(path: Path) -> str:
    if path.exists():
        return f"{path} is not a Python file: name a file that ends in .py."
    if not path.parent.is_dir():
        return f"{path} does not exist, nor does its folder: correct the path (from {Path.cwd()})."
    near = did_you_mean(path.name, (entry.name for entry in path.parent.glob("*.py")))
    return f"{path} does not exist{near}: correct the path (from {Path.cwd()})."


def _failure(source: str, error: BaseException, path: Path | None = None) -> str:
    """One sentence on an import that failed: the file, the line where known, what was raised, the remedy."""
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
    return f"{source}{_where(error, path)} raised {what} while it was imported: {remedy}."


def _where(error: BaseException, path: Path | None) -> str:
    """Where in the file at `path` the error was raised or passed; with no `path`, the innermost place."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    if path is not None:
        frames = [frame for frame in frames if frame.filename == str(path)]
        return f", line {frames[-1].lineno}," if frames else ""
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


register_attention("eager", eager)
register_attention("sdpa", sdpa)
register_attention("triton", triton_attention)
register_attention("triton-tf32", functools.partial(triton_attention, precision="tf32"))
