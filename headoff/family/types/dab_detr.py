"""DAB-DETR (Liu et al., ICLR 2022, arXiv 2201.12329): queries are boxes, which every layer refines; keys and queries of
the cross-attention are twice as wide as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headoff.family.adapter import Adapter, layers_of, register_adapter
from headoff.family.boxes import refined
from headoff.scoring import Scoring


def _predict(model: Any, arguments: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    states = output.intermediate_hidden_states[-1]
    boxes = refined(model, model.bbox_predictor(states), output.reference_points[-1])
    return model.class_embed(states), boxes


register_adapter(
    Adapter(
        model_type="dab-detr",
        class_name="DabDetrForObjectDetection",
        scoring=lambda config: Scoring("sigmoid", most=100),
        queries=lambda config: config.num_queries * max(1, config.num_patterns),
        per_query=("inputs_embeds", "query_position_embeddings"),
        encoder_attention=lambda model: layers_of(model.model.encoder, "self_attn"),
        decoder_self=lambda model: layers_of(model.model.decoder, "self_attn.self_attn"),
        decoder_cross=lambda model: layers_of(model.model.decoder, "cross_attn.cross_attn"),
        predict=_predict,
        encoder_is_attention=True,
        shapes=lambda features, arguments: (tuple(features[0][-1][0].shape[-2:]),),
    )
)
