"""The two published layouts of DETR's weights, as rules that turn their tensor names into headoff's.

- **original**: facebookresearch/detr, and whatever was trained with it. Query, key and value projections are
  one tensor, as in `torch.nn.MultiheadAttention`.
- **Hugging Face**: `DetrForObjectDetection` of transformers (and Table Transformer, its pre-norm twin), in
  every generation of its names: backbones by timm or by transformers, `out_proj` or `o_proj`, `fc1` or
  `mlp.fc1`.

A detector inside something larger (segmentation models keep it under `detr.`, wrappers under `module.`) is
taken out, and the rest left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from headoff.errors import CheckpointError

Rule = tuple[str, str | Callable[[re.Match[str]], str]]


@dataclass(frozen=True)
class Layout:
    """A way of naming DETR's tensors.

    Attributes:
        name: for messages.
        anchor: a name that every checkpoint of this layout has, perhaps behind a prefix.
        rules: (pattern, replacement) pairs for `re.sub`, all applied in turn.
    """

    name: str
    anchor: str
    rules: tuple[Rule, ...]

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """What comes before the anchor in these names; None where the anchor is not among them."""
        found = [name.removesuffix(self.anchor) for name in names if ("." + name).endswith("." + self.anchor)]
        return min(found, key=len, default=None)

    def rename(self, name: str) -> str:
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def _box_head(found: re.Match[str]) -> str:
    # A ReLU without weights follows each linear layer.
    return f"box_head.{2 * int(found[1])}."


ORIGINAL = Layout(
    name="original",
    anchor="query_embed.weight",
    rules=(
        (r"^backbone\.0\.body\.", "backbone."),
        (r"^input_proj\.", "input_projection."),
        (r"^query_embed\.", "query_embedding."),
        (r"^class_embed\.", "class_head."),
        (r"^bbox_embed\.layers\.(\d+)\.", _box_head),
        (r"^transformer\.", ""),
        (r"\.self_attn\.", ".self_attention."),
        (r"\.multihead_attn\.", ".cross_attention."),
        (r"_attention\.out_proj\.", "_attention.output."),
        (r"\.linear1\.", ".feedforward.expand."),
        (r"\.linear2\.", ".feedforward.contract."),
        (r"\.norm1\.", ".self_residual.norm."),
        (r"^(encoder\..*)\.norm2\.", r"\1.feedforward_residual.norm."),
        (r"^(decoder\..*)\.norm2\.", r"\1.cross_residual.norm."),
        (r"\.norm3\.", ".feedforward_residual.norm."),
    ),
)

HUGGING_FACE = Layout(
    name="Hugging Face",
    anchor="model.query_position_embeddings.weight",
    rules=(
        # Around the ResNet: transformers' own wrapper, in its older and newer form, and timm's.
        (r"^model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?", "backbone."),
        (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.conv1."),
        (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.bn1."),
        (r"^backbone\.encoder\.stages\.(\d+)\.layers\.", lambda m: f"backbone.layer{int(m[1]) + 1}."),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
        (r"\.layer\.(\d+)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
        (r"\.layer\.(\d+)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
        (r"^model\.", ""),
        (r"^query_position_embeddings\.", "query_embedding."),
        (r"^class_labels_classifier\.", "class_head."),
        (r"^bbox_predictor\.layers\.(\d+)\.", _box_head),
        (r"\.self_attn\.", ".self_attention."),
        (r"\.encoder_attn\.", ".cross_attention."),
        (r"_attention\.q_proj\.", "_attention.query."),
        (r"_attention\.k_proj\.", "_attention.key."),
        (r"_attention\.v_proj\.", "_attention.value."),
        (r"_attention\.(o|out)_proj\.", "_attention.output."),
        (r"\.(mlp\.)?fc1\.", ".feedforward.expand."),
        (r"\.(mlp\.)?fc2\.", ".feedforward.contract."),
        (r"\.self_attn_layer_norm\.", ".self_residual.norm."),
        (r"\.encoder_attn_layer_norm\.", ".cross_residual.norm."),
        (r"\.final_layer_norm\.", ".feedforward_residual.norm."),
        (r"^(encoder|decoder)\.layernorm\.", r"\1.norm."),
    ),
)

# Telling parts of names, and what has them: most telling first.
_OTHERS = (
    ("sampling_offsets", "Deformable DETR or one of its descendants (DINO, RT-DETR)"),
    ("qcontent_proj", "Conditional DETR or DAB-DETR"),
    ("ref_point_head", "Conditional DETR or DAB-DETR"),
    ("roi_heads.", "a Faster or Mask R-CNN of torchvision"),
    ("rpn_head.", "a two-stage detector of mmdetection"),
    ("det_token", "YOLOS"),
    ("patch_embed", "a vision transformer"),
    ("row_embed", "a DETR with learned position embeddings"),
    ("row_embeddings", "a DETR with learned position embeddings"),
    ("query_position_embeddings", "a DETR without its detection heads"),
)


def looks_like(names: Iterable[str]) -> str | None:
    """The architecture that names of tensors tell, where it is a known one that headoff does not read."""
    names = set(names)
    for part, architecture in _OTHERS:
        if any(part in name for name in names if not name.endswith(HUGGING_FACE.anchor)):
            return architecture
    if {"conv1.weight", "layer1.0.conv1.weight"} <= names:
        return "a ResNet classifier"
    return None


def detect_layout(names: Iterable[str]) -> Layout:
    """The layout that tensors of these names are in.

    Raises CheckpointError, saying what else it looks like where that is known.
    """
    names = list(names)
    other = looks_like(names)
    if other is None:
        for layout in (HUGGING_FACE, ORIGINAL):
            if layout.prefix_in(names) is not None:
                return layout
        other = "no DETR that headoff knows"
    raise CheckpointError(
        f"the checkpoint looks like {other} (its tensors begin with {', '.join(names[:3])}); "
        "give a DETR in the original or the Hugging Face layout, or one that headoff saved"
    )


def translate(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors under headoff's names, as views of the given ones.

    Returns the tensors, and for each of them its name in `tensors`, for messages. Names that no rule knows
    are left as they are. Raises CheckpointError where two tensors would take the same name, or a joint
    projection cannot be split in three.
    """
    prefix = layout.prefix_in(tensors) or ""
    renamed: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for source, tensor in tensors.items():
        # Batch norm's counter of training steps plays no part in inference.
        if not source.startswith(prefix) or source.endswith("num_batches_tracked"):
            continue
        for name, part in _split(layout.rename(source.removeprefix(prefix)), tensor, source):
            if name in renamed:
                raise CheckpointError(
                    f"{source} and {sources[name]} are the same tensor of the detector; "
                    "the checkpoint mixes layouts, take one"
                )
            renamed[name], sources[name] = part, source
    return renamed, sources


def _split(name: str, tensor: Tensor, source: str) -> list[tuple[str, Tensor]]:
    joint = re.fullmatch(r"(.*_attention)\.in_proj_(weight|bias)", name)
    if not joint:
        return [(name, tensor)]
    if not tensor.ndim or not len(tensor) or len(tensor) % 3:
        raise CheckpointError(
            f"{source} has shape {tuple(tensor.shape)} and cannot be split into query, key and value; "
            "the checkpoint is of another architecture"
        )
    parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
    return [(f"{joint[1]}.{part}.{joint[2]}", piece) for part, piece in parts]
