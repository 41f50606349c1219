"""Conditional DETR (Meng et al., ICCV 2021, arXiv 2108.06152): DETR whose cross-attention compares content and position
separately. So keys and queries are twice as wide as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headoff.family.adapter import Adapter, layers_of, register_adapter
from headoff.family.boxes import refined
from headoff.scoring import Scoring


def _predict(model: Any, arguments: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    states = output.last_hidden_state
    references = output.reference_points.transpose(0, 1)
    return model.class_labels_classifier(states), refined(model, model.bbox_predictor(states), references)


register_adapter(
    Adapter(
        model_type="conditional_detr",
        class_name="ConditionalDetrForObjectDetection",
        scoring=lambda config: Scoring("sigmoid", most=100),
        queries=lambda config: config.num_queries,
        per_query=("inputs_embeds", "object_queries_position_embeddings"),
        encoder_attention=lambda model: layers_of(model.model.encoder, "self_attn"),
        decoder_self=lambda model: layers_of(model.model.decoder, "self_attn"),
        decoder_cross=lambda model: layers_of(model.model.decoder, "encoder_attn"),
        predict=_predict,
        encoder_is_attention=True,
        shapes=lambda features, arguments: (tuple(features[-1][0].shape[-2:]),),
    )
)
