"""Multi-scale deformable attention: the contract, three formulations in plain PyTorch, and the registry of names."""

from headoff.deformable.contract import (
    AdaptedDeformableAttention,
    DeformableAttention,
    Shapes,
    conform,
    host_shapes,
    level_tensors,
)
from headoff.deformable.embedding_bag import embedding_bag_attention
from headoff.deformable.gather import corners, gather_attention
from headoff.deformable.grid_sample import grid_sample_attention
from headoff.deformable.registry import (
    deformable_attention_label,
    deformable_attention_names,
    plain_deformable_attention,
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
    "embedding_bag_attention",
    "gather_attention",
    "grid_sample_attention",
    "host_shapes",
    "level_tensors",
    "plain_deformable_attention",
    "register_deformable_attention",
    "resolve_deformable_attention",
]
