"""`load`: a detector from the name of a model, a file or a folder."""

from __future__ import annotations

import importlib.resources
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from headoff.attention import AUTO, Attention
from headoff.detector import Detector
from headoff.detr.checkpoints.coco import COCO_CLASSES
from headoff.detr.checkpoints.files import TensorFile
from headoff.detr.checkpoints.fitting import Hints, assemble, infer_config
from headoff.detr.checkpoints.huggingface import (
    FOLDER_FILES,
    WEIGHTS,
    find_weights,
    hints_from_folder,
    hub_checkpoint,
    is_repository,
)
from headoff.detr.checkpoints.layouts import HUGGING_FACE, detect_layout, translate
from headoff.detr.checkpoints.native import is_native, read_native
from headoff.detr.checkpoints.published import ORIGINALS, published_checkpoint
from headoff.detr.checkpoints.shards import read_checkpoint
from headoff.detr.config import DetrConfig
from headoff.devices import chosen_device, torch_dtype
from headoff.errors import CheckpointError, SettingError, did_you_mean, error_line

BUNDLED = "scenes"
BUNDLED_FAMILY = "scenes-deformable"
_BUNDLED_WEIGHTS = {BUNDLED: "scenes.safetensors", BUNDLED_FAMILY: "scenes-deformable/model.safetensors"}
"""The models that are part of headoff, and their files in `headoff/scenes/weights`."""

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def load(
    source: str | os.PathLike[str],
    *,
    attention: Attention | str = AUTO,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    dilated: bool | None = None,
    heads: int | None = None,
    class_names: Sequence[str] | None = None,
    short_side: int | None = None,
) -> Detector:
    """Load a detector, in eval mode and with frozen weights (`detector.requires_grad_()` unfreezes them).

    Sizes (classes, queries, width, depth, backbone) are read from the shapes of the tensors. Nothing in a checkpoint
    is executed: pickles are read with `weights_only=True`.

    Args:
        source: one of

            - `scenes`, `scenes-deformable`: the small models that are part of headoff, a DETR and an RT-DETR;
            - `detr-resnet-50`, `detr-resnet-50-dc5`, `detr-resnet-101`, `detr-resnet-101-dc5`: the original
              checkpoints (Carion et al., 2020), downloaded once, see `headoff.detr.checkpoints.cache_folder`;
            - a file: `.pth` of the original code, `.bin` or `.safetensors` of Hugging Face, or saved by headoff;
            - a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, in one file or in several
              with an index;
            - `owner/name`: a repository of the Hugging Face hub, unless there is a folder of that path.

            A model's name takes precedence over a file of that name: write `./scenes` for the file.
        attention: the attention callable, or its name; `auto` (default) is `sdpa`.
        device: the device of the weights.
        dtype: the dtype of the weights or its name, whatever dtype they are stored in.
        dilated: whether the backbone's last stage is dilated (DC5), which shapes do not tell. By default taken from
            the checkpoint's configuration, or else true if its file name contains `dc5`.
        heads: heads of every attention, which shapes do not tell. By default taken from the checkpoint's
            configuration, or else 8.
        class_names: one per class, without "no object". By default taken from the checkpoint, or else COCO's where
            their number fits.
        short_side: pixels that the short side of an image is resized to; the limit of the long side is scaled with
            it. By default as the checkpoint says.

    Returns:
        The detector. `Detector.assumptions` says what was assumed because the checkpoint does not say it.

    Warns:
        UserWarning: something was assumed.

    Raises:
        CheckpointError: the checkpoint does not exist, cannot be read or is of another architecture.
        DownloadError: it cannot be downloaded.
        AttentionError: the attention cannot be found or called.
        SettingError: `dtype` is not floating point, or this machine has no such device.
    """
    if isinstance(dtype, str):
        dtype = torch_dtype(dtype)
    if not dtype.is_floating_point:
        raise SettingError(f"a detector cannot compute in {dtype}; give a floating point type")
    if not isinstance(source, str | os.PathLike):
        raise CheckpointError(
            f"a detector cannot be loaded from a {type(source).__name__}; give the name of a model, or a path"
        )
    device = chosen_device(str(device))
    names = None if class_names is None else tuple(class_names)
    overrides = Hints(heads=heads, dilated=dilated, class_names=names, short_side=short_side)
    if isinstance(source, str) and source in _BUNDLED_WEIGHTS:
        bundled = importlib.resources.files("headoff.scenes") / "weights" / _BUNDLED_WEIGHTS[source]
        if not bundled.is_file():
            raise CheckpointError(
                "the bundled weights are missing from this installation; install headoff again"
            )
        with importlib.resources.as_file(bundled) as path:
            return _from_file(path, overrides, attention, device, dtype)
    return _from_file(_locate(source), overrides, attention, device, dtype)


def is_of_family(source: str | os.PathLike[str]) -> bool:
    """Whether `load` would give a detector of transformers (`headoff.family`) for `source`, which is located, and
    downloaded if necessary.

    Raises:
        CheckpointError, DownloadError: as `load` does.
    """
    from headoff.family.loading import is_of_family as is_of_family_at

    if source in _BUNDLED_WEIGHTS or source in ORIGINALS:
        return source == BUNDLED_FAMILY
    path = _locate(source)
    return _is_in_folder(path) and is_of_family_at(path)


def _is_in_folder(path: Path) -> bool:
    """Whether the JSON files next to the weights are about them: those of the original code are named otherwise."""
    return path.name in FOLDER_FILES or path.suffix in (".safetensors", ".bin")


def _locate(source: str | os.PathLike[str]) -> Path:
    """The checkpoint file that `source` names, downloaded if necessary."""
    if isinstance(source, str):
        if source in ORIGINALS:
            return published_checkpoint(source)
        if re.match(r"https?://", source):
            raise CheckpointError(f"{source} is a URL; download the file and give its path")
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(source)[:200]!r} is not a valid path ({error_line(error)}); give another"
        ) from error
    if not exists and isinstance(source, str) and is_repository(source) and path.suffix not in SUFFIXES:
        path = hub_checkpoint(source)
    if path.is_dir():
        weights = find_weights(path)
        if weights is None:
            raise CheckpointError(_no_weights_message(path))
        return weights
    if not path.exists():
        raise CheckpointError(_not_found_message(str(source), path))
    return path


def _no_weights_message(folder: Path) -> str:
    try:
        others = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
    except OSError as error:
        return f"the folder {str(folder)!r} cannot be read ({error_line(error)}); check its permissions"
    remedy = f"give one of its files by name: {', '.join(others[:5])}" if others else "give a checkpoint"
    return f"the folder {str(folder)!r} has no {' or '.join(WEIGHTS)}; {remedy}"


def _not_found_message(source: str, path: Path) -> str:
    names = [*_BUNDLED_WEIGHTS, *ORIGINALS]
    try:
        siblings = [other.name for other in path.parent.iterdir() if other.suffix in SUFFIXES]
    except OSError:
        siblings = []
    suggestion = did_you_mean(path.name, [*names, *siblings], most=3)
    return (
        f"there is no file, folder or model {source!r}{suggestion}; "
        f"give a checkpoint's path, owner/name on the Hugging Face hub, or one of {', '.join(names)}"
    )


def _from_file(
    path: Path, overrides: Hints, attention: Attention | str, device: torch.device | str, dtype: torch.dtype
) -> Detector:
    file = read_checkpoint(path)
    placement: dict[str, Any] = {"attention": attention, "device": device, "dtype": dtype}
    try:
        detector = _reader(file)(file, overrides, placement)
    except CheckpointError as error:
        # The functions below do not know the path.
        raise CheckpointError(f"{str(path)!r} cannot be loaded: {error}") from error
    for assumption in detector.assumptions:
        warnings.warn(f"{path.name}: {assumption}", UserWarning, stacklevel=3)
    return detector


def _reader(file: TensorFile) -> Callable[[TensorFile, Hints, Mapping[str, Any]], Detector]:
    """What makes a detector of a file."""
    if is_native(file):
        return _from_native
    from headoff.family.loading import is_of_family, load_family

    return load_family if _is_in_folder(file.path) and is_of_family(file.path) else _from_published


def _from_native(file: TensorFile, overrides: Hints, placement: Mapping[str, Any]) -> Detector:
    config, class_names, tensors = read_native(file)
    # Compared with the shapes before a detector is built: a damaged configuration may ask for terabytes.
    stored = Hints(config.heads, config.backbone.dilate_last, preprocessing=config.preprocessing)
    if infer_config(tensors, stored) != config:
        raise CheckpointError("its configuration and its tensors disagree; save the detector again")
    config = infer_config(tensors, overrides.with_defaults(stored))
    return assemble(config, tensors, overrides.class_names or class_names, **placement)


def _from_published(file: TensorFile, overrides: Hints, placement: Mapping[str, Any]) -> Detector:
    layout = detect_layout(file.tensors)
    tensors, name_in_file = translate(file.tensors, layout)
    stored = hints_from_folder(file.path) if layout is HUGGING_FACE else _hints_from_training(file.settings)
    hints = overrides.with_defaults(stored)
    by_name = _name_contains_dc5(file.path)
    config = infer_config(tensors, hints.with_defaults(Hints(dilated=by_name)), name_in_file)
    class_names = hints.class_names
    if overrides.class_names is None and (class_names is None or len(class_names) != config.classes):
        class_names = COCO_CLASSES if config.classes == len(COCO_CLASSES) else None
    detector = assemble(config, tensors, class_names, **placement, name_in_file=name_in_file)
    is_original = file.path.name in ORIGINALS.values()
    if hints.heads is None and not is_original and not _has_published_sizes(config):
        detector.assumptions += (
            f"{config.heads} heads assumed, for the file does not say how many: give heads= (--heads-per-layer)",
        )
    if hints.dilated is None and not is_original:
        what = "dilated (DC5), as its name says," if by_name else "not dilated (DC5)"
        detector.assumptions += (
            f"a backbone {what} assumed, for the file does not say: give dilated= (--dc5 or --no-dc5)",
        )
    return detector


def _has_published_sizes(config: DetrConfig) -> bool:
    """Whether a transformer has the sizes of the published models, which have 8 heads; queries may differ."""
    published = DetrConfig()
    names = ("width", "encoder_layers", "decoder_layers", "feedforward", "pre_norm")
    return all(getattr(config, name) == getattr(published, name) for name in names)


def _hints_from_training(settings: Mapping[str, Any]) -> Hints:
    """Hints from the training arguments that the original code stores in its checkpoints."""
    heads, dilation = settings.get("nheads"), settings.get("dilation")
    return Hints(
        heads=heads if isinstance(heads, int) else None,
        dilated=dilation if isinstance(dilation, bool) else None,
    )


def _name_contains_dc5(path: Path) -> bool:
    return "dc5" in re.split(r"[^a-z0-9]+", f"{path.parent.name} {path.name}".lower())
