"""Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159): deformable attention to several levels in the encoder and
in the decoder's cross-attention. Queries are learned, or the best proposals of the encoder (two-stage).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headoff.family.adapter import Adapter, layers_of, register_adapter, shapes_of_levels
from headoff.family.boxes import refined
from headoff.scoring import Scoring


def _predict(model: Any, arguments: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    states = output.intermediate_hidden_states[:, -1]
    last = output.intermediate_hidden_states.shape[1] - 1
    # A layer's boxes are relative to the reference points that it started from.
    references = output.intermediate_reference_points[:, -2] if last else arguments["reference_points"]
    return model.class_embed[last](states), refined(model, model.bbox_embed[last](states), references)


register_adapter(
    Adapter(
        model_type="deformable_detr",
        class_name="DeformableDetrForObjectDetection",
        scoring=lambda config: Scoring("sigmoid", most=100),
        queries=lambda config: config.two_stage_num_proposals if config.two_stage else config.num_queries,
        per_query=("inputs_embeds", "object_queries_position_embeddings", "reference_points"),
        encoder_attention=lambda model: layers_of(model.model.encoder, "self_attn"),
        decoder_self=lambda model: layers_of(model.model.decoder, "self_attn"),
        decoder_cross=lambda model: layers_of(model.model.decoder, "encoder_attn"),
        predict=_predict,
        encoder_is_attention=True,
        shapes=shapes_of_levels,
    )
)
