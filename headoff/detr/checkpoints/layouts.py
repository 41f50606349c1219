"""The two published layouts of DETR's weights, as rules that translate their tensor names to headoff's.

- **original**: facebookresearch/detr, and models trained with it. Query, key and value projections are one
  tensor, as in `torch.nn.MultiheadAttention`.
- **Hugging Face**: `DetrForObjectDetection` of transformers, and the pre-norm Table Transformer. All versions
  of its names are known: backbones of timm and of transformers, `out_proj` and `o_proj`, `fc1` and `mlp.fc1`.

Where the detector is a part of a larger model (segmentation models have it under `detr.`, wrappers under
`module.`), the tensors under its prefix are read and the others ignored.
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
        anchor: a tensor name that every checkpoint of this layout has, possibly after a prefix.
        rules: (pattern, replacement) pairs for `re.sub`, applied in this order.
    """

    name: str
    anchor: str
    rules: tuple[Rule, ...]

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """The prefix of the anchor among these names; None if the anchor is not among them."""
        found = [name.removesuffix(self.anchor) for name in names if ("." + name).endswith("." + self.anchor)]
        return min(found, key=len, default=None)

    def rename(self, name: str) -> str:
        """headoff's name of a tensor; a name that no rule matches is returned unchanged."""
        for pattern, replacement in self.rules:
            name = re.sub(pattern, replacement, name)
        return name


def _box_head(found: re.Match[str]) -> str:
    # In headoff a ReLU, which has no weights, stands between the linear layers.
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
        # Wrappers of the ResNet: those of transformers, older and newer, and timm's.
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

# Parts of tensor names by which other architectures are recognised, the most specific first.
_OTHER_ARCHITECTURES = (
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


def other_architecture(names: Iterable[str]) -> str | None:
    """A known architecture that headoff does not read, recognised by its tensor names; None for any other."""
    names = set(names)
    for part, architecture in _OTHER_ARCHITECTURES:
        if any(part in name for name in names if not name.endswith(HUGGING_FACE.anchor)):
            return architecture
    if {"conv1.weight", "layer1.0.conv1.weight"} <= names:
        return "a ResNet classifier"
    return None


def detect_layout(names: Iterable[str]) -> Layout:
    """The layout that has tensors of these names.

    Raises:
        CheckpointError: neither layout has them; the message names the architecture if it is a known one.
    """
    names = list(names)
    other = other_architecture(names)
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
    """Rename tensors to headoff's names, and split joint projections.

    Returns:
        The tensors by headoff's names (views, not copies), and their names in `tensors`, for messages. Names
        that no rule matches are unchanged.

    Raises:
        CheckpointError: two tensors get the same name, or a joint projection cannot be split in three.
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
                    "the checkpoint mixes layouts; give one in a single layout"
                )
            renamed[name], sources[name] = part, source
    return renamed, sources


def _split(name: str, tensor: Tensor, source: str) -> list[tuple[str, Tensor]]:
    """A joint projection as the names and tensors of query, key and value; any other tensor as it is."""
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
