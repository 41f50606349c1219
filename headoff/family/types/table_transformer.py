"""Table Transformer (Smock et al., CVPR 2022, arXiv 2110.00061): DETR with layer norms before the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headoff.family.adapter import Adapter, layers_of, register_adapter
from headoff.scoring import Scoring


def _predict(model: Any, arguments: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    states = output.last_hidden_state
    return model.class_labels_classifier(states), model.bbox_predictor(states).sigmoid()


register_adapter(
    Adapter(
        model_type="table-transformer",
        class_name="TableTransformerForObjectDetection",
        scoring=lambda config: Scoring("softmax"),
        queries=lambda config: config.num_queries,
        per_query=("inputs_embeds", "query_position_embeddings"),
        encoder_attention=lambda model: layers_of(model.model.encoder, "self_attn"),
        decoder_self=lambda model: layers_of(model.model.decoder, "self_attn"),
        decoder_cross=lambda model: layers_of(model.model.decoder, "encoder_attn"),
        predict=_predict,
        encoder_is_attention=True,
        shapes=lambda features, arguments: (tuple(features[0][-1][0].shape[-2:]),),
    )
)
