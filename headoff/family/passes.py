"""A pass through encoder or decoder, and what modules of transformers do in it in place of their own `forward`.

A pass that only encodes ends where the decoder is called; the backbone runs once, or not at all where its output is
given; and the modules of a decoder compute rows that all configurations have in common once. Shapes are those of
`headoff.family.detector`.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from headoff.choices import Site

ROWS = 1024
"""Rows of queries that the CPU computes at a time in modules of several layers."""


@dataclass
class Pass:
    """A pass through encoder or decoder, of which the modules within need to know.

    Attributes:
        gates: (G, layers, rows or 1, H) for each site, or None where everything is on.
        runs: G.
        is_padded: whether an image is padded.
        backbone: its output; None until it has run.
        stops: whether the pass ends where the decoder is called.
        rows: Q.
        first: see `FamilyPlan`; None from then on.
        tokens: of the memory.
        values: of `tokens`, by the modules that project them, as far as they are known.
    """

    gates: Mapping[Site, Tensor | None]
    runs: int
    is_padded: bool
    backbone: Any = None
    stops: bool = False
    rows: int = 0
    first: tuple[int, int] | None = None
    tokens: Tensor | None = None
    values: Mapping[nn.Module, Tensor] = field(default_factory=dict)


_OUTSIDE = Pass({}, 1, False)
_pass: ContextVar[Pass] = ContextVar("pass", default=_OUTSIDE)
"""The pass that this thread computes. Modules are those of all threads, and so have none of it."""


def current_pass() -> Pass:
    """The pass that this thread computes; outside of all, an empty one."""
    return _pass.get()


@contextmanager
def during(here: Pass) -> Iterator[None]:
    """Within this context, modules are called in that pass."""
    token = _pass.set(here)
    try:
        yield
    finally:
        _pass.reset(token)


def by_row(module: nn.Module, attention: Container[nn.Module]) -> Iterator[nn.Module]:
    """Modules whose output has a row for each row of their input: those in `attention`, and the outermost without."""
    for child in module.children():
        if child in attention:
            yield child
        elif isinstance(child, nn.ModuleList) or any(one in attention for one in child.modules()):
            yield from by_row(child, attention)
        else:
            yield child


def in_parts(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a module of several layers returns, computed for a few runs at a time on the CPU.

    What such a module keeps between its layers fits into a cache then, which it does not for all runs.
    """
    rows = current_pass().rows
    x = args[0] if len(args) == 1 and not kwargs else None
    if not rows or torch.is_grad_enabled() or not isinstance(x, Tensor) or x.ndim < 2 or x.shape[1] % rows:
        return forward(*args, **kwargs)
    size = rows * max(1, ROWS // rows)
    if x.shape[1] <= size or x.device.type != "cpu":
        return forward(x)
    parts = [forward(part) for part in x.split(size, 1)]
    return pytree.tree_map(lambda *outputs: torch.cat(outputs, 1), *parts)


def has_rows(x: Any) -> bool:
    """Whether it is a tensor that may be (B, rows, ...)."""
    return isinstance(x, Tensor) and x.ndim > 1


def repeated(x: Tensor, runs: int) -> Tensor:
    """(B, Q, ...) to (B, G * Q, ...)."""
    return x.repeat(1, runs, *(1,) * (x.ndim - 2))


class DecoderCalled(Exception):
    """The module was called with these arguments."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.arguments = arguments


def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the decoder: the end of a pass that only encodes."""
    if current_pass().stops:
        assert not args, "transformers calls its decoders with keyword arguments"
        raise DecoderCalled(kwargs)


def known_backbone(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of the backbone's `forward`, which runs once in a pass, or not at all where its output is given."""
    here = current_pass()
    if here is _OUTSIDE:
        return forward(*args, **kwargs)
    if here.backbone is None:
        here.backbone = forward(*args, **kwargs)
    return here.backbone


def unread(module: nn.Linear, forward: Callable[..., Any], x: Tensor) -> Tensor:
    """In place of the `forward` of a module whose output no `predict` reads: zeros that take no time."""
    return (
        forward(x)
        if current_pass() is _OUTSIDE
        else x.new_zeros(()).expand(*x.shape[:-1], module.out_features)
    )


def known_value(module: nn.Module, forward: Callable[..., Any], x: Tensor) -> Tensor:
    """In place of the `forward` of a projection of the memory's tokens, which may be known."""
    here = current_pass()
    known = here.values.get(module)
    return known if known is not None and x is here.tokens else forward(x)
