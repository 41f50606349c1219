"""Attention callables by name: registered ones, and those in a module or a file (`headoff.callables`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from headoff.attention.contract import AdaptedAttention, Attention, conform
from headoff.attention.eager import eager
from headoff.attention.fused import triton_attention
from headoff.attention.sdpa import sdpa
from headoff.callables import import_named, source_label
from headoff.errors import AttentionError

AUTO = "auto"
"""The name of the default attention: `sdpa`, on every device.

The Triton kernels run only if they are asked for by name, until a measurement on a GPU shows that they are correct and
faster.
"""

_registered: dict[str, Attention] = {}

# By identity, because a callable need not be hashable. The callable is stored with its label so that it stays alive: a
# new object may get the identity of one that was deleted.
_labels: dict[int, tuple[Any, str]] = {}


def register_attention(name: str, attention: Callable[..., Any]) -> Attention:
    """Register an attention callable under a name, for `resolve_attention`.

    Args:
        name: replaces an earlier registration under this name.
        attention: the callable.

    Returns:
        The callable, adapted to the contract where necessary.

    Raises:
        AttentionError: the callable cannot be adapted, or the name is empty, `auto` or contains a colon.
    """
    if not name or ":" in name or name == AUTO:
        raise AttentionError(f"{name!r} cannot be the name of an attention: use another word, without ':'.")
    _registered[name] = _labelled(conform(attention, name), name)
    return _registered[name]


def attention_names() -> tuple[str, ...]:
    """The registered names in the order of registration."""
    return tuple(_registered)


def resolve_attention(spec: str | Callable[..., Any]) -> Attention:
    """The attention that `spec` names, adapted to the contract where necessary.

    `headoff.callables.import_named` says how modules and files are imported.

    Args:
        spec: a callable, a registered name, `"package.module:name"` or `"path/to/file.py:name"`, with a path
            relative to the current directory. `name` may contain dots.

    Raises:
        AttentionError: there is no such attention, it cannot be imported, or it cannot be adapted.
    """
    if not isinstance(spec, str):
        return conform(spec, attention_label(spec) if callable(spec) else repr(spec))
    if spec == AUTO:
        return sdpa
    if spec in _registered:
        return _registered[spec]
    return _labelled(conform(import_named(spec, _registered, "attention"), spec), spec)


def attention_label(attention: Callable[..., Any]) -> str:
    """The name of `attention` in reports: the one it was resolved by, or else its module or file and its name."""
    if id(attention) in _labels:
        return _labels[id(attention)][1]
    if isinstance(attention, AdaptedAttention):
        return attention.label
    partial_of = getattr(attention, "func", None)
    if callable(partial_of):
        return f"partial({attention_label(partial_of)})"
    return source_label(attention if hasattr(attention, "__qualname__") else type(attention))


def _labelled(attention: Attention, label: str) -> Attention:
    inner = attention.call if isinstance(attention, AdaptedAttention) else attention
    for known in (attention, inner):
        _labels.setdefault(id(known), (known, label))
    return attention


register_attention("eager", eager)
register_attention("sdpa", sdpa)
register_attention("triton", triton_attention)
register_attention("triton-tf32", functools.partial(triton_attention, precision="tf32"))
