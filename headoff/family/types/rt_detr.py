"""RT-DETR (Zhao et al., CVPR 2024, arXiv 2304.08069) and RT-DETRv2 (arXiv 2407.17140): self-attention on the coarsest
level, convolutions that fuse the levels, queries chosen from the memory, deformable cross-attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from headoff.family.adapter import Adapter, layers_of, register_adapter, shapes_of_levels
from headoff.images import Preprocessing
from headoff.scoring import Scoring


def encoder_attention(model: Any) -> list[nn.Module]:
    """The self-attention modules of the hybrid encoder."""
    if not model.config.encoder_layers:
        return []
    return [module for stack in model.model.encoder.aifi for module in layers_of(stack, "self_attn")]


def predict(model: Any, arguments: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    """Logits and boxes of the last layer, which the decoder computes."""
    return output.intermediate_logits[:, -1], output.intermediate_reference_points[:, -1]


def _unread(model: Any) -> list[nn.Module]:
    """The class heads of all layers but the last."""
    return list(model.model.decoder.class_embed)[:-1]


def adapter(
    model_type: str, class_name: str, unread: Callable[[Any], Sequence[Any]] = lambda model: ()
) -> Adapter:
    """The adapter of a type that has RT-DETR's encoder and decoder."""
    return Adapter(
        model_type=model_type,
        class_name=class_name,
        scoring=lambda config: Scoring("sigmoid", most=config.num_queries),
        queries=lambda config: config.num_queries,
        per_query=("inputs_embeds", "reference_points"),
        encoder_attention=encoder_attention,
        decoder_self=lambda model: layers_of(model.model.decoder, "self_attn"),
        decoder_cross=lambda model: layers_of(model.model.decoder, "encoder_attn"),
        predict=predict,
        encoder_is_attention=False,
        unread=unread,
        shapes=shapes_of_levels,
        # transformers' image processor for these types does not normalise.
        preprocessing=lambda config: Preprocessing(
            size=(640, 640), mean=(0, 0, 0), std=(1, 1, 1), rounding="transformers"
        ),
    )


register_adapter(adapter("rt_detr", "RTDetrForObjectDetection", _unread))
register_adapter(adapter("rt_detr_v2", "RTDetrV2ForObjectDetection", _unread))
