"""Deformable attentions by name: those in plain PyTorch, and those in a module or a file (`headoff.callables`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from headoff.callables import import_named, source_label
from headoff.deformable.contract import AdaptedDeformableAttention, DeformableAttention, Shapes, conform
from headoff.deformable.embedding_bag import embedding_bag_attention
from headoff.deformable.gather import gather_attention
from headoff.deformable.grid_sample import grid_sample_attention
from headoff.errors import AttentionError


def plain_deformable_attention(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    head_gate: Tensor | None = None,
) -> Tensor:
    """What detectors use by default: `embedding_bag` on a CPU; elsewhere, where it was never timed, `grid_sample`."""
    chosen = embedding_bag_attention if value.device.type == "cpu" else grid_sample_attention
    return chosen(value, spatial_shapes, sampling_locations, attention_weights, head_gate=head_gate)


_registered: dict[str, DeformableAttention] = {
    "plain": plain_deformable_attention,
    "grid_sample": grid_sample_attention,
    "gather": gather_attention,
    "embedding_bag": embedding_bag_attention,
}


def register_deformable_attention(name: str, attention: Callable[..., Any]) -> DeformableAttention:
    """Register a callable under a name, for `resolve_deformable_attention`.

    Args:
        name: replaces an earlier registration under this name.
        attention: the callable.

    Returns:
        The callable, adapted to the contract where necessary.

    Raises:
        AttentionError: the callable cannot be adapted, or the name is empty or contains a colon.
    """
    if not name or ":" in name:
        raise AttentionError(
            f"{name!r} cannot be the name of a deformable attention: use another word, without ':'."
        )
    _registered[name] = conform(attention, name)
    return _registered[name]


def deformable_attention_names() -> tuple[str, ...]:
    """The registered names in the order of registration."""
    return tuple(_registered)


def resolve_deformable_attention(spec: str | Callable[..., Any]) -> DeformableAttention:
    """The deformable attention that `spec` names, adapted to the contract where necessary.

    Args:
        spec: a callable, a registered name (`grid_sample`, `gather`, `embedding_bag`), `"package.module:name"` or
            `"path/to/file.py:name"`.

    Raises:
        AttentionError: there is none, it cannot be imported, or it cannot be adapted.
    """
    if not isinstance(spec, str):
        return conform(spec, deformable_attention_label(spec))
    if spec in _registered:
        return _registered[spec]
    return conform(import_named(spec, _registered, "deformable attention"), spec)


def deformable_attention_label(attention: Any) -> str:
    """The name of a callable in reports: the registered one, or else its module or file and its name."""
    for name, registered in _registered.items():
        if registered is attention:
            return name
    if isinstance(attention, AdaptedDeformableAttention):
        return attention.label
    if not callable(attention):
        return repr(attention)
    return source_label(attention if hasattr(attention, "__qualname__") else type(attention))
