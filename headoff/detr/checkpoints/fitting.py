"""Tensors under headoff's names to a detector: sizes are read from shapes, and every tensor is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headoff.attention import Attention, resolve_attention
from headoff.detr.config import BackboneConfig, DetrConfig
from headoff.detr.detector import Detr
from headoff.errors import CheckpointError
from headoff.images import Preprocessing
from headoff.wording import counted

DEFAULT_HEADS = 8
_SHOWN = 3


@dataclass(frozen=True)
class Hints:
    """What the shapes of a checkpoint's tensors do not tell; None where it is not known.

    Attributes:
        heads: heads of every attention.
        dilated: whether the backbone's last stage is dilated (DC5); its parameters are the same either way.
        class_names: one name per class.
        preprocessing: resizing and normalisation of the images.
        short_side: pixels of the short side, instead of what `preprocessing` says.
    """

    heads: int | None = None
    dilated: bool | None = None
    class_names: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    short_side: int | None = None

    def with_defaults(self, defaults: Hints) -> Hints:
        """These hints, and those of `defaults` where these are None."""
        return replace(defaults, **{name: value for name, value in vars(self).items() if value is not None})


NameInFile = Callable[[str], str]
"""From headoff's name of a tensor to its name in the checkpoint file, for messages."""


def infer_config(tensors: Mapping[str, Tensor], hints: Hints, name_in_file: NameInFile = str) -> DetrConfig:
    """The sizes of a detector, from the shapes of its tensors (named as in `Detector.state_dict`).

    Raises:
        CheckpointError: a tensor that determines a size is missing or has the wrong number of dimensions.
    """

    def shape(name: str, dimensions: int) -> torch.Size:
        return _shape(tensors, name, dimensions, name_in_file(name))

    queries, width = shape("query_embedding.weight", 2)
    if hints.heads is None and width % DEFAULT_HEADS:
        raise CheckpointError(
            f"a width of {width} cannot be split into {DEFAULT_HEADS} heads, and the file does not say how many there "
            "are; give heads= (--heads-per-layer)"
        )
    config = DetrConfig(
        backbone=_infer_backbone(tensors, bool(hints.dilated), shape),
        width=width,
        heads=DEFAULT_HEADS if hints.heads is None else hints.heads,
        encoder_layers=_count(tensors, r"encoder\.layers\.(\d+)\."),
        decoder_layers=_count(tensors, r"decoder\.layers\.(\d+)\."),
        feedforward=shape("decoder.layers.0.feedforward.expand.weight", 2)[0],
        queries=queries,
        classes=shape("class_head.weight", 2)[0] - 1,
        # Only pre-norm encoders end with a norm.
        pre_norm="encoder.norm.weight" in tensors,
    )
    preprocessing = hints.preprocessing or config.preprocessing
    if hints.short_side is not None:
        preprocessing = preprocessing.with_short_side(hints.short_side)
    return replace(config, preprocessing=preprocessing)


def _infer_backbone(
    tensors: Mapping[str, Tensor], dilated: bool, shape: Callable[[str, int], torch.Size]
) -> BackboneConfig:
    stages = range(1, _count(tensors, r"backbone\.layer(\d+)\.", start=1) + 1)
    if not stages:
        raise CheckpointError(
            "the checkpoint has no ResNet stages (backbone.layer1...); headoff reads ResNet DETRs"
        )
    return BackboneConfig(
        block="bottleneck" if "backbone.layer1.0.conv3.weight" in tensors else "basic",
        depths=tuple(_count(tensors, rf"backbone\.layer{stage}\.(\d+)\.") for stage in stages),
        widths=tuple(shape(f"backbone.layer{stage}.0.conv1.weight", 4)[0] for stage in stages),
        stem=shape("backbone.conv1.weight", 4)[0],
        dilate_last=dilated,
    )


def _shape(tensors: Mapping[str, Tensor], name: str, dimensions: int, label: str) -> torch.Size:
    if name not in tensors:
        raise CheckpointError(f"the checkpoint lacks {label}; it is incomplete or of another architecture")
    shape = tensors[name].shape
    if len(shape) != dimensions or not all(shape):
        raise CheckpointError(
            f"{label} has shape {tuple(shape)} where {dimensions} dimensions are needed; "
            "the checkpoint is of another architecture"
        )
    return shape


def _count(tensors: Iterable[str], pattern: str, start: int = 0) -> int:
    """How many consecutive numbers, from `start`, the group of `pattern` captures in the tensors' names."""
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
    name_in_file: NameInFile = str,
) -> Detr:
    """A detector in eval mode, with copies of `tensors` as its frozen weights.

    Args:
        config: its sizes.
        tensors: named as in `Detector.state_dict`, of any floating dtype.
        class_names: one per class, or None.
        attention: the attention callable or its name.
        device: the device of the weights.
        dtype: the dtype of the weights.
        name_in_file: for messages.

    Raises:
        CheckpointError: tensors are missing, unexpected, of a wrong shape or not floating point, or a weight is
            NaN or infinite, or becomes infinite in `dtype`.
        AttentionError: the attention cannot be found or called.
    """
    # Before `torch.device("meta")`: this may import a user's file, whose tensors belong on a real device.
    attention = resolve_attention(attention)
    with torch.device("meta"):
        detector = Detr(config, class_names, attention=attention)
    expected = detector.state_dict()
    _check_names(expected, tensors, name_in_file)
    weights = {}
    for name, parameter in expected.items():
        tensor, label = tensors[name], name_in_file(name)
        if tensor.shape != parameter.shape:
            raise CheckpointError(
                f"{label} has shape {tuple(tensor.shape)} where {tuple(parameter.shape)} is needed; "
                "the checkpoint is inconsistent or of another architecture"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{label} is {tensor.dtype} and not floating point; "
                "headoff does not read quantised checkpoints"
            )
        weights[name] = tensor.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        if not weights[name].isfinite().all():
            raise CheckpointError(not_finite_message(label, tensor, dtype))
    detector.load_state_dict(weights, assign=True)
    return detector.eval().requires_grad_(False)


def _check_names(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], name_in_file: NameInFile
) -> None:
    # A joint projection is one tensor of the file and three of the detector.
    missing = list(dict.fromkeys(name_in_file(name) for name in expected if name not in given))
    unexpected = list(dict.fromkeys(name_in_file(name) for name in given if name not in expected))
    problems = [
        f"{counted(len(names), 'tensor')} {'is' if len(names) == 1 else 'are'} {what} ({some_names(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"the checkpoint is not a complete DETR: {' and '.join(problems)}; give one of DETR's architecture"
        )


def some_names(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    return ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)


def not_finite_message(name: str, tensor: Tensor, dtype: torch.dtype) -> str:
    """What is wrong with a tensor that is not finite in `dtype`."""
    if tensor.isfinite().all():
        return f"{name} holds numbers that are too large for {dtype}; load it as torch.float32"
    what = "NaN" if tensor.isnan().any() else "infinity"
    return f"{name} holds {what}; the checkpoint is of a training run that diverged, take an earlier one"
