"""Adapters: what differs between the types of detectors in transformers, by `model_type`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from headoff.errors import CheckpointError, did_you_mean
from headoff.images import Preprocessing
from headoff.scoring import Scoring

_MODULES = {
    "conditional_detr": "conditional_detr",
    "dab-detr": "dab_detr",
    "table-transformer": "table_transformer",
    "deformable_detr": "deformable_detr",
    "rt_detr": "rt_detr",
    "rt_detr_v2": "rt_detr",
    "d_fine": "d_fine",
    "lw_detr": "lw_detr",
    "rf_detr": "lw_detr",
}
"""The module of `headoff.family.types` in which a built-in adapter is registered."""


@dataclass(frozen=True)
class Adapter:
    """What headoff needs to know of a type of detector.

    Attributes:
        model_type: as in `config.json`.
        class_name: transformers' class for object detection, whose `model` has a `backbone` and a `decoder`.
        scoring: how scores are computed from logits, from the model's configuration.
        queries: the number of object queries, from the model's configuration.
        per_query: arguments of the decoder that have a row per object query, (B, Q, ...).
        encoder_attention, decoder_self, decoder_cross: the attention modules of each site, layer by layer.
        predict: (model, arguments of the decoder, output of the decoder) to logits (B, Q, columns) and boxes (B, Q, 4).
        encoder_is_attention: whether the encoder is attention from memory tokens to memory tokens, so that relevance
            goes through it. Otherwise relevance ends at the memory tokens.
        shapes: (h, w) of each level of the memory, from the output of the backbone and the arguments of the decoder.
        unread: linear layers of the decoder whose output `predict` does not read, and which need not be computed.
        preprocessing: how images become pixels where the checkpoint does not say it, from the model's configuration.
    """

    model_type: str
    class_name: str
    scoring: Callable[[Any], Scoring]
    queries: Callable[[Any], int]
    per_query: tuple[str, ...]
    encoder_attention: Callable[[Any], Sequence[nn.Module]]
    decoder_self: Callable[[Any], Sequence[nn.Module]]
    decoder_cross: Callable[[Any], Sequence[nn.Module]]
    predict: Callable[[Any, Mapping[str, Any], Any], tuple[Tensor, Tensor]]
    encoder_is_attention: bool
    shapes: Callable[[Any, Mapping[str, Any]], tuple[tuple[int, int], ...]]
    unread: Callable[[Any], Sequence[Any]] = lambda model: ()
    preprocessing: Callable[[Any], Preprocessing] = lambda config: Preprocessing(rounding="transformers")


_adapters: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> Adapter:
    """Register an adapter under its `model_type`; it replaces an earlier one."""
    _adapters[adapter.model_type] = adapter
    return adapter


def adapter_names() -> tuple[str, ...]:
    """The known values of `model_type`."""
    return tuple(dict.fromkeys((*_MODULES, *_adapters)))


def find_adapter(model_type: str) -> Adapter:
    """The adapter of a type.

    Raises:
        CheckpointError: the type is unknown; the message names similar ones.
    """
    if model_type not in _adapters and model_type in _MODULES:
        importlib.import_module(f"headoff.family.types.{_MODULES[model_type]}")
    if model_type not in _adapters:
        known = ("detr", *adapter_names())
        raise CheckpointError(
            f"config.json is of model type {model_type!r}{did_you_mean(model_type, known)}; headoff reads "
            f"{', '.join(known)}"
        )
    return _adapters[model_type]


def layers_of(stack: Any, attention: str) -> list[nn.Module]:
    """The submodule `attention` (`self_attn`, `cross_attn.cross_attn`) of every layer of an encoder or decoder."""
    return [layer.get_submodule(attention) for layer in stack.layers]


def shapes_of_levels(_: Any, arguments: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    """`Adapter.shapes` of decoders with deformable cross-attention."""
    return tuple((int(height), int(width)) for height, width in arguments["spatial_shapes_list"])
