"""The choices of arguments and command-line options. Importing this module does not import torch."""

from typing import Literal, get_args

Site = Literal["encoder_self", "decoder_self", "decoder_cross"]
SITES: tuple[Site, ...] = get_args(Site)
DEFAULT_SITE: Site = "decoder_cross"

DTYPES = ("float32", "float64", "bfloat16", "float16")

AblationKind = Literal["zero", "mean", "resample", "uniform", "optimal"]
ABLATION_KINDS: tuple[AblationKind, ...] = get_args(AblationKind)
"""What a head that is off contributes; see `headoff.ablation`."""

VALUES = ("probability", "logit", "iou", "found", "duplicates", "detections", "unmatched")
"""What the importance of heads is measured by; see `headoff.values`."""

MEASURES = (
    "removal",
    "removal_columns",
    "alone",
    "gradient",
    "integrated_gradient",
    "shapley_columns",
    "shapley_layers",
    "shapley",
)
"""The measures of importance; see `headoff.importance.measures`."""

METHODS = (
    "chefer",
    "chefer_no_normalisation",
    "chefer_no_self_attention",
    "chefer_no_aggregation",
    "chefer_centred",
    "raw",
    "rollout",
    "attention_gradcam",
    "d_rise",
    "gradient_input",
    "integrated_gradients",
    "gradcam_backbone",
    "chefer_lrp",
    "transformer_attribution",
    "partial_lrp",
    "attn_lrp",
)
"""The built-in relevance methods, the default first; `register_method` adds others."""

FAITHFULNESS_MEASURES = (
    "tokens_removed",
    "tokens_zero",
    "tokens_mean",
    "pixels_grey",
    "pixels_blur",
    "pixels_surroundings",
    "detected_box",
    "true_box",
    "true_mask",
    "segmentation",
    "randomisation",
    "targets",
    "causal",
)
"""The built-in measures of `headoff.faithfulness`."""

DEFAULT_FAITHFULNESS = ("tokens_removed", "detected_box", "true_box", "true_mask", "segmentation")
"""Those of them that are computed unless others are asked for."""

DEAR_METHODS = ("d_rise",)
"""Relevance methods that take so long that `headoff.faithfulness` measures them only where they are named."""

CONTROLS = ("random", "box", "edges")
"""Maps that no method made, which relevance methods are compared with; see `headoff.faithfulness`."""

BEST_METHOD = "chefer_no_self_attention"
"""What the relevance method `best` is; docs/faithfulness.md says why."""

BOX_COORDINATES = ("cx", "cy", "w", "h")
"""The columns of `DetectorOutput.boxes`."""

Pick = Literal["baseline", "class", "object"]
PICKS: tuple[Pick, ...] = get_args(Pick)
"""Which query and class are explained when heads are off; see `headoff.explain`."""

Scale = Literal["map", "object", "sweep"]
SCALES: tuple[Scale, ...] = get_args(Scale)
"""Which maps share one colour scale; see `headoff.MapStyle`."""

Figures = Literal["none", "page", "all"]
FIGURES: tuple[Figures, ...] = get_args(Figures)
"""What a report draws; see `headoff.write_report`."""

FigureFormat = Literal["png", "svg", "pdf"]
FIGURE_FORMATS: tuple[FigureFormat, ...] = get_args(FigureFormat)
