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
from collections.abc import Callable, Collection, Iterable, Mapping
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
        rules: (pattern, replacement) pairs for `re.sub`, applied in this order: from its names to headoff's.
        inverse: such rules from headoff's names to its names, for messages.
        spellings: (spelling of `inverse`, other spelling) of parts of names that differ between versions.
    """

    name: str
    anchor: str
    rules: tuple[Rule, ...]
    inverse: tuple[Rule, ...]
    spellings: tuple[tuple[str, str], ...] = ()

    def prefix_in(self, names: Iterable[str]) -> str | None:
        """The prefix of the anchor among these names; None if the anchor is not among them."""
        found = [name.removesuffix(self.anchor) for name in names if ("." + name).endswith("." + self.anchor)]
        return min(found, key=len, default=None)

    def rename(self, name: str) -> str:
        """headoff's name of a tensor; a name that no rule matches is returned unchanged."""
        return _apply(self.rules, name)

    def name_of(self, name: str, known: Collection[str]) -> str:
        """The layout's name of a tensor of headoff's, spelled as the `known` names of the same file are."""
        name = _apply(self.inverse, name)
        for usual, other in self.spellings:
            # One spelling may be part of the other.
            if any(other in one for one in known) and not any(
                usual in one.replace(other, "") for one in known
            ):
                name = name.replace(usual, other)
        return name


def _apply(rules: Iterable[Rule], name: str) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _box_head(found: re.Match[str]) -> str:
    # In headoff a ReLU, which has no weights, stands between the linear layers.
    return f"box_head.{2 * int(found[1])}."


def _box_layer(found: re.Match[str]) -> str:
    return f"layers.{int(found[1]) // 2}."


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
    inverse=(
        (r"^backbone\.", "backbone.0.body."),
        (r"^input_projection\.", "input_proj."),
        (r"^query_embedding\.", "query_embed."),
        (r"^class_head\.", "class_embed."),
        (r"^box_head\.(\d+)\.", lambda m: f"bbox_embed.{_box_layer(m)}"),
        (r"^(encoder|decoder)\.", r"transformer.\1."),
        (r"\.self_attention\.", ".self_attn."),
        (r"\.cross_attention\.", ".multihead_attn."),
        (r"_attn\.(?:query|key|value)\.", "_attn.in_proj_"),
        (r"_attn\.output\.", "_attn.out_proj."),
        (r"\.feedforward\.expand\.", ".linear1."),
        (r"\.feedforward\.contract\.", ".linear2."),
        (r"\.self_residual\.norm\.", ".norm1."),
        (r"\.cross_residual\.norm\.", ".norm2."),
        (r"(\.encoder\..*)\.feedforward_residual\.norm\.", r"\1.norm2."),
        (r"\.feedforward_residual\.norm\.", ".norm3."),
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
    inverse=(
        (r"^backbone\.", "model.backbone.conv_encoder.model."),
        (r"^(input_projection|encoder|decoder)\.", r"model.\1."),
        (r"^query_embedding\.", "model.query_position_embeddings."),
        (r"^class_head\.", "class_labels_classifier."),
        (r"^box_head\.(\d+)\.", lambda m: f"bbox_predictor.{_box_layer(m)}"),
        (r"\.self_attention\.", ".self_attn."),
        (r"\.cross_attention\.", ".encoder_attn."),
        (r"_attn\.(query|key|value)\.", lambda m: f"_attn.{m[1][0]}_proj."),
        (r"_attn\.output\.", "_attn.out_proj."),
        (r"\.feedforward\.expand\.", ".fc1."),
        (r"\.feedforward\.contract\.", ".fc2."),
        (r"\.self_residual\.norm\.", ".self_attn_layer_norm."),
        (r"\.cross_residual\.norm\.", ".encoder_attn_layer_norm."),
        (r"\.feedforward_residual\.norm\.", ".final_layer_norm."),
        (r"^model\.(encoder|decoder)\.norm\.", r"model.\1.layernorm."),
    ),
    spellings=(
        (".out_proj.", ".o_proj."),
        (".fc", ".mlp.fc"),
        ("model.backbone.conv_encoder.model.", "model.backbone.model."),
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


def translate(
    tensors: Mapping[str, Tensor], layout: Layout
) -> tuple[dict[str, Tensor], Callable[[str], str]]:
    """Rename tensors to headoff's names, and split joint projections.

    Returns:
        The tensors by headoff's names (views, not copies), and a function from headoff's name of a tensor to that in
        `tensors`, or to what it would be there, for messages. Names that no rule matches are unchanged.

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
    return renamed, lambda name: sources.get(name) or prefix + layout.name_of(name, tensors)


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
