"""`load`: from a name, a file or a folder to a detector that is ready to run."""

from __future__ import annotations

import importlib.resources
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from headoff.attention import AUTO, Attention
from headoff.detr.checkpoints.coco import COCO_CLASSES
from headoff.detr.checkpoints.files import TensorFile, read_tensors
from headoff.detr.checkpoints.fitting import Hints, assemble, infer_config
from headoff.detr.checkpoints.huggingface import (
    WEIGHTS,
    hints_beside,
    hub_checkpoint,
    is_repository,
    weights_in,
)
from headoff.detr.checkpoints.layouts import HUGGING_FACE, detect_layout, translate
from headoff.detr.checkpoints.native import is_native, read_native
from headoff.detr.checkpoints.published import ORIGINALS, published_checkpoint
from headoff.detr.detector import Detector
from headoff.errors import CheckpointError, SettingError, did_you_mean

BUNDLED = "scenes"
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def load(
    source: str | os.PathLike[str],
    *,
    attention: Attention | str = AUTO,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    dilated: bool | None = None,
    heads: int | None = None,
) -> Detector:
    """A detector in eval mode, its weights frozen (`detector.requires_grad_()` to train it on).

    Args:
        source: one of

            - `scenes`: the small model that comes with headoff;
            - `detr-resnet-50`, `detr-resnet-50-dc5`, `detr-resnet-101`, `detr-resnet-101-dc5`: the original
              checkpoints (Carion et al., 2020), downloaded once, see `headoff.detr.checkpoints.cache_folder`;
            - a file: `.pth` of the original code, `.bin` or `.safetensors` of Hugging Face, or headoff's own;
            - a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`;
            - `owner/name`: a repository of the Hugging Face hub, where there is no such folder here.

            The fixed names come before files of the same name: write `./scenes` for those.
        attention: the attention callable, or its name; `auto` (default) is `sdpa`.
        device, dtype: where and as what the weights are kept, whatever they are stored as.
        dilated: whether the backbone's last stage dilates (DC5), which no tensor tells. By default what the
            checkpoint's configuration says, or else whether its file name has a part `dc5`.
        heads: heads of every attention, which no tensor tells. By default what the
            configuration says, or else 8.

    Everything else (classes, queries, width, depth, backbone) is read from the shapes. Nothing in a
    checkpoint is executed: pickles are read with `weights_only=True`.

    Raises CheckpointError, or DownloadError, which is one; AttentionError for an attention that cannot be.
    """
    if not dtype.is_floating_point:
        raise SettingError(f"a detector cannot compute in {dtype}; give a floating point type")
    overrides = Hints(heads=heads, dilated=dilated)
    if source == BUNDLED:
        bundled = importlib.resources.files("headoff.scenes") / "weights" / "scenes.safetensors"
        if not bundled.is_file():
            raise CheckpointError(
                "the bundled weights are missing from this installation; install headoff again"
            )
        with importlib.resources.as_file(bundled) as path:
            return _from_file(path, overrides, attention, device, dtype)
    return _from_file(_locate(source), overrides, attention, device, dtype)


def _locate(source: str | os.PathLike[str]) -> Path:
    """The file that a source stands for, downloaded if need be."""
    if isinstance(source, str):
        if source in ORIGINALS:
            return published_checkpoint(source)
        if re.match(r"https?://", source):
            raise CheckpointError(f"{source} is an address; download the file and give its path")
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{str(source)[:200]!r} cannot be a path ({reason}); give another") from error
    if not exists and isinstance(source, str) and is_repository(source) and path.suffix not in SUFFIXES:
        path = hub_checkpoint(source)
    if path.is_dir():
        weights = weights_in(path)
        if weights is None:
            raise CheckpointError(_no_weights(path))
        return weights
    if not path.exists():
        raise CheckpointError(_not_there(str(source), path))
    return path


def _no_weights(folder: Path) -> str:
    try:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError as error:
        return f"the folder {str(folder)!r} cannot be read ({error.strerror}); check it"
    remedy = f"give one of its files by name: {', '.join(others[:5])}" if others else "give a checkpoint"
    return f"the folder {str(folder)!r} has no {' or '.join(WEIGHTS)}; {remedy}"


def _not_there(source: str, path: Path) -> str:
    names = [BUNDLED, *ORIGINALS]
    try:
        beside = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES]
    except OSError:
        beside = []
    meant = did_you_mean(path.name, [*names, *beside], most=3)
    return (
        f"there is no file, folder or model {source!r}{meant}; "
        f"give a checkpoint's path, owner/name on the Hugging Face hub, or one of {', '.join(names)}"
    )


def _from_file(
    path: Path, overrides: Hints, attention: Attention | str, device: torch.device | str, dtype: torch.dtype
) -> Detector:
    file = read_tensors(path)
    how: dict[str, Any] = {"attention": attention, "device": device, "dtype": dtype}
    try:
        return (
            _from_native(file, overrides, how) if is_native(file) else _from_published(file, overrides, how)
        )
    except CheckpointError as error:
        # What is wrong was found without knowing where.
        raise CheckpointError(f"{str(path)!r} cannot be loaded: {error}") from error


def _from_native(file: TensorFile, overrides: Hints, how: Mapping[str, Any]) -> Detector:
    config, class_names, tensors = read_native(file)
    # Checked against the shapes before anything is built from it: a configuration may ask for any size.
    told = Hints(config.heads, config.backbone.dilate_last, preprocessing=config.preprocessing)
    if infer_config(tensors, told) != config:
        raise CheckpointError("its configuration and its tensors disagree; save the detector again")
    return assemble(infer_config(tensors, overrides.over(told)), tensors, class_names, **how)


def _from_published(file: TensorFile, overrides: Hints, how: Mapping[str, Any]) -> Detector:
    layout = detect_layout(file.tensors)
    tensors, source_names = translate(file.tensors, layout)
    told = hints_beside(file.path) if layout is HUGGING_FACE else _hints_from_training(file.settings)
    hints = overrides.over(told).over(Hints(dilated=_named_dc5(file.path)))
    config = infer_config(tensors, hints)
    class_names = hints.class_names
    if class_names is None or len(class_names) != config.classes:
        class_names = COCO_CLASSES if config.classes == len(COCO_CLASSES) else None
    return assemble(config, tensors, class_names, **how, source_names=source_names)


def _hints_from_training(settings: Mapping[str, Any]) -> Hints:
    """From the command line arguments that the original code's training stores in its checkpoints."""
    heads, dilation = settings.get("nheads"), settings.get("dilation")
    return Hints(
        heads=heads if isinstance(heads, int) else None,
        dilated=dilation if isinstance(dilation, bool) else None,
    )


def _named_dc5(path: Path) -> bool:
    return "dc5" in re.split(r"[^a-z0-9]+", f"{path.parent.name} {path.name}".lower())
