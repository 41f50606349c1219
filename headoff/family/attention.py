"""How headoff stands in the attention modules of transformers.

`intercept` gives a module a `Place`: from then on its attention call is computed by `Place.dense` or `Place.sample`,
and so by `Detector.context_of`. The module's projections stay where they are. There are four kinds of modules:

- those that call transformers' `AttentionInterface`: headoff registers an attention and a mask function there;
- those that compute attention in their `forward` (DAB-DETR, Table Transformer): their `forward` is replaced;
- deformable attention with the sampling in a submodule or an attribute, which is replaced;
- deformable attention that calls a function of its Python module (RT-DETRv2): its `forward` runs with another function
  of that name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headoff.calls import AttentionAddress
from headoff.deformable import host_shapes
from headoff.errors import CheckpointError

if TYPE_CHECKING:
    from headoff.family.detector import FamilyDetector

INTERFACE = "headoff"
"""The name of headoff's attention in transformers' registries."""

_SAMPLING = "multi_scale_deformable_attention_v2"


@dataclass
class Place:
    """The detector that computes a module's attention, and the module's address."""

    detector: FamilyDetector
    address: AttentionAddress

    def dense(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
    ) -> Tensor:
        """The context (B, T, H, D) of queries (B, H, T, E), keys (B, H, S, E) and values (B, H, S, D)."""
        natural = query.shape[-1] ** -0.5
        if scaling is not None and abs(scaling / natural - 1) > 1e-6:
            query = query * (scaling / natural)
        return self.detector.dense_context(self.address, query, key, value, mask).transpose(1, 2)

    def sample(
        self,
        value: Tensor,
        spatial_shapes: Any,
        locations: Tensor,
        weights: Tensor,
        points: Sequence[int] | None = None,
        method: str = "default",
    ) -> Tensor:
        """The context (B, T, H * D), heads merged, of values (B, S, H, D).

        Locations (B, T, H, L, P, 2) and weights (B, T, H, L, P); or, with the number of points of each level,
        (B, T, H, all points, 2) and (B, T, H, all points).

        Raises:
            CheckpointError: `method` is not bilinear sampling.
        """
        if method != "default":
            raise CheckpointError(
                f"this model samples with the method {method!r}, and headoff knows bilinear sampling ('default'): set "
                "decoder_method in its config.json"
            )
        if points is not None:
            locations, weights = _by_level(locations, points, -2), _by_level(weights, points, -1)
        context = self.detector.sampled_context(
            self.address, value, host_shapes(spatial_shapes), locations, weights
        )
        return context.transpose(1, 2).flatten(2)


def intercept(module: Any, place: Place) -> None:
    """Let headoff compute the attention calls of a module.

    Raises:
        CheckpointError: the module is not written as headoff knows it, as in another version of transformers.
    """
    forward = inspect.unwrap(type(module).forward)
    module.headoff_place = place
    if hasattr(module, "ms_deformable_attn_core"):
        module.ms_deformable_attn_core = place.sample
    elif isinstance(getattr(module, "attn", None), nn.Module):
        module.attn = _Sampling(place)
    elif _SAMPLING in forward.__code__.co_names:
        module.forward = MethodType(_with_sampling, module)
    elif type(module).__name__ in _FORWARDS:
        module.forward = MethodType(_FORWARDS[type(module).__name__], module)
    elif "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        raise CheckpointError(
            f"headoff does not know transformers' {type(module).__name__}: use a version of transformers that "
            "`pip install 'headoff[family]'` allows"
        )


class _Sampling(nn.Module):
    """In place of transformers' `MultiScaleDeformableAttention`."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.place = place

    def forward(
        self,
        value: Tensor,
        spatial_shapes: Tensor,
        spatial_shapes_list: Any,
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        return self.place.sample(value, spatial_shapes_list, sampling_locations, attention_weights)


def _with_sampling(module: Any, *args: Any, **kwargs: Any) -> Any:
    """The module's `forward`, with `Place.sample` in place of the sampling function of its Python module."""
    forward = inspect.unwrap(type(module).forward)
    names = {**forward.__globals__, _SAMPLING: module.headoff_place.sample}
    here = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    here.__kwdefaults__ = forward.__kwdefaults__
    return here(module, *args, **kwargs)


def _by_level(x: Tensor, points: Sequence[int], dim: int) -> Tensor:
    """Split the dimension of all points into levels and points; levels with fewer are filled up with zeros."""
    most = max(points)
    if min(points) == most:
        return x.unflatten(dim, (len(points), most))
    parts = x.split(list(points), dim)
    after = 0 if dim == -1 else 1
    padded = [nn.functional.pad(part, (0, 0) * after + (0, most - part.shape[dim])) for part in parts]
    return torch.stack(padded, dim - 1)


@cache
def register_interface() -> None:
    """Register headoff's attention with transformers: before a model's attention is named `INTERFACE`, of any kind, as
    its mask is made by what is registered under that name.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(INTERFACE, _attend)
    # Without a mask function of the same name, an attention is given no mask, and padding would be ignored.
    AttentionMaskInterface.register(INTERFACE, sdpa_mask)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    place = getattr(module, "headoff_place", None)
    if place is None:  # in the backbone, which shares the configuration
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    return place.dense(query, key, value, attention_mask, scaling).contiguous(), None


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, T, H * D) to (B, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _add(x: Tensor, positions: Tensor | None) -> Tensor:
    return x if positions is None else x + positions


def _dab_encoder(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    object_queries: Tensor | None = None,
    key_value_states: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    placed = _add(hidden_states, object_queries)
    query, key, value = module.q_proj(placed), module.k_proj(placed), module.v_proj(hidden_states)
    query, key, value = (_split(x, module.num_heads) for x in (query, key, value))
    context = module.headoff_place.dense(query, key, value, attention_mask, None)
    return module.out_proj(context.flatten(2)), None


def _dab_decoder(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    key_states: Tensor | None = None,
    value_states: Tensor | None = None,
    output_attentions: bool | None = None,
) -> tuple[Tensor, None]:
    assert key_states is not None and value_states is not None
    query, key, value = (_split(x, module.attention_heads) for x in (hidden_states, key_states, value_states))
    context = module.headoff_place.dense(query, key, value, attention_mask, None)
    return module.output_proj(context.flatten(2)), None


def _table_transformer(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    object_queries: Tensor | None = None,
    key_value_states: Tensor | None = None,
    spatial_position_embeddings: Tensor | None = None,
    output_attentions: bool = False,
) -> tuple[Tensor, None]:
    placed = _add(hidden_states, object_queries)
    source = hidden_states if key_value_states is None else key_value_states
    keys_from = placed if key_value_states is None else _add(source, spatial_position_embeddings)
    query, key, value = module.q_proj(placed), module.k_proj(keys_from), module.v_proj(source)
    query, key, value = (_split(x, module.num_heads) for x in (query, key, value))
    context = module.headoff_place.dense(query, key, value, attention_mask, None)
    return module.out_proj(context.flatten(2)), None


_FORWARDS: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "DetrAttention": _dab_encoder,
    "DabDetrAttention": _dab_decoder,
    "TableTransformerAttention": _table_transformer,
}
