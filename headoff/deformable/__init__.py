"""Multi-scale deformable attention: the contract, two formulations in plain PyTorch, and the registry of names."""

from headoff.deformable.contract import (
    AdaptedDeformableAttention,
    DeformableAttention,
    Shapes,
    conform,
    host_shapes,
    level_tensors,
)
from headoff.deformable.gather import corners, gather_attention
from headoff.deformable.grid_sample import grid_sample_attention
from headoff.deformable.registry import (
    deformable_attention_label,
    deformable_attention_names,
    register_deformable_attention,
    resolve_deformable_attention,
)

__all__ = [
    "AdaptedDeformableAttention",
    "DeformableAttention",
    "Shapes",
    "conform",
    "corners",
    "deformable_attention_label",
    "deformable_attention_names",
    "gather_attention",
    "grid_sample_attention",
    "host_shapes",
    "level_tensors",
    "register_deformable_attention",
    "resolve_deformable_attention",
]
