"""LW-DETR (Chen et al., arXiv 2406.03459) and RF-DETR (Robinson et al., arXiv 2511.09554): a vision transformer and a
convolutional projector in place of the encoder, and cross-attention with more heads than self-attention.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headoff.family.adapter import Adapter, layers_of, register_adapter, shapes_of_levels
from headoff.images import Preprocessing
from headoff.scoring import Scoring


def _predict(model: Any, arguments: Mapping[str, Any], output: Any) -> tuple[Tensor, Tensor]:
    states = output.last_hidden_state
    refine = sys.modules[type(model).__module__].refine_bboxes
    return model.class_embed(states), refine(arguments["reference_points"], model.bbox_embed(states))


def _square(config: Any) -> tuple[int, int]:
    size = config.backbone_config.image_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _adapter(model_type: str, class_name: str, scoring: Any) -> Adapter:
    return Adapter(
        model_type=model_type,
        class_name=class_name,
        scoring=scoring,
        queries=lambda config: config.num_queries,
        per_query=("inputs_embeds", "reference_points"),
        encoder_attention=lambda model: [],
        decoder_self=lambda model: layers_of(model.model.decoder, "self_attn"),
        decoder_cross=lambda model: layers_of(model.model.decoder, "cross_attn"),
        predict=_predict,
        encoder_is_attention=False,
        shapes=shapes_of_levels,
        # The vision transformer's windows must fit the image.
        preprocessing=lambda config: Preprocessing(size=_square(config), rounding="transformers"),
    )


register_adapter(_adapter("lw_detr", "LwDetrForObjectDetection", lambda config: Scoring("sigmoid", most=100)))
register_adapter(
    _adapter(
        "rf_detr", "RfDetrForObjectDetection", lambda config: Scoring("sigmoid", most=config.num_queries)
    )
)
