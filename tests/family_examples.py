"""Small models of transformers with random weights, one for each type that headoff knows, made once in a process."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

import headoff
from headoff.gates import Gates

transformers = pytest.importorskip("transformers")

QUERIES, CLASSES, LAYERS = 7, 5, 3

KINDS = (
    "conditional_detr",
    "dab-detr",
    "table-transformer",
    "deformable_detr",
    "deformable_detr two-stage",
    "rt_detr",
    "rt_detr_v2",
    "d_fine",
    "lw_detr",
    "rf_detr",
)
"""A `model_type`, and for some a variant of it."""

# Its decoder makes float32 tensors in the middle.
IN_FLOAT64 = tuple(kind for kind in KINDS if kind != "dab-detr")

DEFORMABLE = KINDS[3:]


def _resnet(outputs=("stage2", "stage3", "stage4"), kind="ResNetConfig"):
    return getattr(transformers, kind)(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=list(outputs),
    )


def config_of(kind):
    """transformers' configuration of a small model."""
    model_type, _, variant = kind.partition(" ")
    common = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": LAYERS,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "num_labels": CLASSES,
        "num_queries": QUERIES,
    }
    resnet = {"use_timm_backbone": False, "backbone": None, "use_pretrained_backbone": False}
    if model_type == "deformable_detr":
        stages = (
            dict(two_stage=True, with_box_refine=True, two_stage_num_proposals=QUERIES) if variant else {}
        )
        levels = 4 if variant else 3
        return transformers.DeformableDetrConfig(
            **common, **resnet, **stages, num_feature_levels=levels, backbone_config=_resnet()
        )
    if model_type in ("conditional_detr", "dab-detr", "table-transformer"):
        if model_type == "dab-detr":
            common["hidden_size"] = common.pop("d_model")
        if model_type == "table-transformer":
            # With headoff's own DETR otherwise.
            common["activation_function"] = "gelu"
        names = {
            "conditional_detr": "ConditionalDetr",
            "dab-detr": "DabDetr",
            "table-transformer": "TableTransformer",
        }
        config = getattr(transformers, f"{names[model_type]}Config")
        return config(**common, **resnet, backbone_config=_resnet(["stage4"]))
    if model_type in ("rt_detr", "rt_detr_v2", "d_fine"):
        name = {"rt_detr": "RTDetr", "rt_detr_v2": "RTDetrV2", "d_fine": "DFine"}[model_type]
        own = {"decoder_n_points": [3, 4, 2], "eval_idx": -1} if model_type == "d_fine" else {}
        return getattr(transformers, f"{name}Config")(
            **common,
            **own,
            backbone_config=_resnet(kind="RTDetrResNetConfig"),
            encoder_hidden_dim=32,
            encoder_in_channels=[16, 16, 32],
            decoder_in_channels=[32, 32, 32],
            num_denoising=3,
        )
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
    windows = {"patch_size": 16, "out_indices": [1], "window_block_indices": [0]}
    own = {
        "d_model": 32,
        "num_labels": CLASSES,
        "num_queries": QUERIES,
        "decoder_layers": LAYERS,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 8,
        "decoder_ffn_dim": 40,
        "group_detr": 2,
    }
    if model_type == "lw_detr":
        backbone = transformers.LwDetrViTConfig(**sizes, **windows, pretrain_image_size=64, num_windows=4)
        return transformers.LwDetrConfig(backbone_config=backbone, projector_scale_factors=[1.0], **own)
    backbone = transformers.RfDetrDinov2Config(**sizes, **windows, num_windows=2)
    return transformers.RfDetrConfig(backbone_config=backbone, **own)


@torch.no_grad()
def _randomise(model):
    """Weights with which every part of the model matters, and no number grows out of bounds."""
    for name, value in model.named_parameters():
        if name.endswith(("reg_scale", ".up", "lambda1", "lambda2")):
            continue
        if "sampling_offsets" in name:
            value.add_(torch.randn_like(value), alpha=0.3)
        elif value.dim() > 1:
            value.normal_(0, 1 / value[0].numel() ** 0.5)
        else:
            value.add_(torch.randn_like(value), alpha=0.1)
    for name, value in model.named_buffers():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.1)


@functools.cache
def folder_of(kind) -> Path:
    """The folder of a saved model, which nobody may change."""
    torch.manual_seed(3)
    config = config_of(kind)
    model = transformers.AutoModelForObjectDetection.from_config(config)
    _randomise(model)
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.eval().save_pretrained(folder)
    return folder


@functools.cache
def reference(kind, dtype=torch.float32):
    """transformers' own model."""
    # transformers' eager attention of this type computes in float32, whatever the dtype.
    attention = "sdpa" if kind == "lw_detr" else "eager"
    model = transformers.AutoModelForObjectDetection.from_pretrained(
        folder_of(kind), dtype=dtype, attn_implementation=attention
    )
    return model.eval().requires_grad_(False)


@functools.cache
def loaded(kind, dtype=torch.float64) -> headoff.Detector:
    """The same model as headoff loads it; nobody may change it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # no preprocessor_config.json
        return headoff.load(folder_of(kind), dtype=dtype)


def batch(dtype=torch.float64):
    """Pixels and mask of two images of 64 x 96, the second one narrower, padded."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.randn(2, 3, 64, 96, generator=generator, dtype=torch.float64)
    mask = torch.ones(2, 64, 96, dtype=torch.bool)
    mask[1, :, 64:] = False
    return (pixels * mask[:, None]).to(dtype), mask


def gates_at(detector, site, gate, *, layers=slice(None), heads=slice(None), queries=None) -> Gates:
    """One configuration with `gate` at some heads of a site."""
    layout = detector.head_layout
    rows = 1 if queries is None else layout.queries
    values = torch.ones(1, layout.layers(site), rows, layout.heads_at(site))
    values[:, layers, slice(None) if queries is None else queries, heads] = gate
    return Gates(("gated",), **{site: values})
