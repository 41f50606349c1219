"""From tensors in headoff's own names to a detector: sizes are read off shapes, every tensor is checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headoff.attention import Attention, resolve_attention
from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detector
from headoff.errors import CheckpointError
from headoff.images import Preprocessing

DEFAULT_HEADS = 8
_SHOWN = 3


@dataclass(frozen=True)
class Hints:
    """What shapes do not tell; None where it is not known.

    Attributes:
        heads: heads of every attention.
        dilated: the backbone's last stage dilates (DC5). It has the same parameters either way.
        class_names: one per class.
        preprocessing: how pixels were prepared.
    """

    heads: int | None = None
    dilated: bool | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None

    def over(self, other: Hints) -> Hints:
        """These, and what they leave open from `other`."""
        return replace(other, **{name: value for name, value in vars(self).items() if value is not None})


def infer_config(tensors: Mapping[str, Tensor], hints: Hints) -> DetrConfig:
    """Read the sizes of a detector off its tensors, named as `Detector.state_dict` names them.

    Raises CheckpointError where a tensor that tells a size is missing or has the wrong number of dimensions.
    """
    queries, width = _shape(tensors, "query_embedding.weight", 2)
    config = DetrConfig(
        backbone=_infer_backbone(tensors, bool(hints.dilated)),
        width=width,
        heads=DEFAULT_HEADS if hints.heads is None else hints.heads,
        encoder_layers=_count(tensors, r"encoder\.layers\.(\d+)\."),
        decoder_layers=_count(tensors, r"decoder\.layers\.(\d+)\."),
        feedforward=_shape(tensors, "decoder.layers.0.feedforward.expand.weight", 2)[0],
        queries=queries,
        classes=_shape(tensors, "class_head.weight", 2)[0] - 1,
        # Post-norm encoders have nothing to normalise at their end.
        pre_norm="encoder.norm.weight" in tensors,
    )
    return config if hints.preprocessing is None else replace(config, preprocessing=hints.preprocessing)


def _infer_backbone(tensors: Mapping[str, Tensor], dilated: bool) -> BackboneConfig:
    stages = range(1, _count(tensors, r"backbone\.layer(\d+)\.", start=1) + 1)
    if not stages:
        raise CheckpointError(
            "the checkpoint has no ResNet stages (backbone.layer1...); headoff reads ResNet DETRs"
        )
    return BackboneConfig(
        block="bottleneck" if "backbone.layer1.0.conv3.weight" in tensors else "basic",
        depths=tuple(_count(tensors, rf"backbone\.layer{stage}\.(\d+)\.") for stage in stages),
        widths=tuple(_shape(tensors, f"backbone.layer{stage}.0.conv1.weight", 4)[0] for stage in stages),
        stem=_shape(tensors, "backbone.conv1.weight", 4)[0],
        dilate_last=dilated,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int) -> torch.Size:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint lacks {name}; it is incomplete or of another architecture")
    shape = tensors[name].shape
    if len(shape) != dimensions or not all(shape):
        raise CheckpointError(
            f"{name} has shape {tuple(shape)} where {dimensions} dimensions are needed; "
            "the checkpoint is of another architecture"
        )
    return shape


def _count(tensors: Iterable[str], pattern: str, start: int = 0) -> int:
    """How many numbers from `start` on, without a gap, the pattern finds in names."""
    numbers = {int(found[1]) for found in (re.match(pattern, name) for name in tensors) if found}
    count = 0
    while start + count in numbers:
        count += 1
    return count


def assemble(
    config: DetrConfig,
    tensors: Mapping[str, Tensor],
    class_names: Sequence[str] | None,
    *,
    attention: Attention | str,
    device: torch.device | str,
    dtype: torch.dtype,
    source_names: Mapping[str, str] | None = None,
) -> Detector:
    """A detector of `config` with `tensors` as its frozen weights: in `dtype`, on `device`, in eval mode.

    Args:
        tensors: named as `Detector.state_dict` names them, of any floating dtype; copied.
        source_names: what the file calls them, for messages.

    Raises CheckpointError where tensors are missing, left over, misshapen or not floating point, and where a
    weight is NaN or infinite, or becomes so in `dtype`; AttentionError for an attention that cannot be.
    """
    called = source_names or {}
    # First, as it may import a file of the user's, whose tensors are not to be made on the meta device.
    attention = resolve_attention(attention)
    with torch.device("meta"):
        detector = Detector(config, class_names, attention=attention)
    wanted = detector.state_dict()
    _check_names(wanted, tensors, called)
    placed = {}
    for name, place in wanted.items():
        tensor, label = tensors[name], called.get(name, name)
        if tensor.shape != place.shape:
            raise CheckpointError(
                f"{label} has shape {tuple(tensor.shape)} where {tuple(place.shape)} is needed; "
                "the checkpoint is inconsistent or of another architecture"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{label} is {tensor.dtype} and not floating point; "
                "headoff does not read quantised checkpoints"
            )
        placed[name] = tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if not placed[name].isfinite().all():
            raise CheckpointError(_not_finite(label, tensor, dtype))
    detector.load_state_dict(placed, assign=True)
    return detector.eval().requires_grad_(False)


def _check_names(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], called: Mapping[str, str]
) -> None:
    missing = [name for name in wanted if name not in given]
    left_over = [called.get(name, name) for name in given if name not in wanted]
    problems = [
        f"{len(names)} tensors are {what} ({', '.join(names[:_SHOWN])}{', ...' * (len(names) > _SHOWN)})"
        for what, names in (("missing", missing), ("left over", left_over))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint is no complete DETR: {' and '.join(problems)}; give one of DETR's architecture"
        )


def _not_finite(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    if tensor.isfinite().all():
        return f"{name} holds numbers that are too large for {dtype}; load it as torch.float32"
    what = "NaN" if tensor.isnan().any() else "infinity"
    return f"{name} holds {what}; the checkpoint is of a training run that diverged, take an earlier one"
