"""Detectors of transformers from folders in Hugging Face's layout.

headoff reads the files itself, as safely as those of a DETR, and gives configuration and tensors to transformers, which
knows the names of all versions. So nothing is downloaded, and no code of a checkpoint runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headoff.attention import resolve_attention
from headoff.detr.checkpoints.files import TensorFile, read_json
from headoff.detr.checkpoints.fitting import Hints, not_finite_message, some_names
from headoff.detr.checkpoints.huggingface import (
    CONFIG,
    PREPROCESSOR,
    hints_from_config,
    preprocessing_from_config,
)
from headoff.errors import CheckpointError, SettingError, error_line
from headoff.family.adapter import Adapter, find_adapter
from headoff.family.detector import FamilyDetector
from headoff.images import Preprocessing
from headoff.wording import counted

OLDEST = "5.9"
"""The oldest transformers that has all types; as in the extra `family` of pyproject.toml."""

_EXTRA = "pip install 'headoff[family]'"

# Entries of config.json that say where and how to run a model, and not what it is. Names of attention implementations
# may be repositories of kernels, which transformers would download and run.
_IGNORED = (
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "auto_map",
    "torch_dtype",
    "dtype",
    "_name_or_path",
    "transformers_version",
)

_BOOKKEEPING = ("num_batches_tracked",)
"""Ends of names of tensors that no detector computes with. Files of all types with a ResNet have some."""


def is_of_family(path: Path) -> bool:
    """Whether `config.json`, in the folder of the weights at `path`, describes a model that headoff has from
    transformers. It has a DETR of its own, which also is a Table Transformer with a usual configuration.

    Raises:
        CheckpointError: the file cannot be read.
    """
    config_path = path.with_name(CONFIG)
    if not config_path.is_file():
        return False
    config = read_json(config_path)
    model_type = config.get("model_type", "detr")
    if model_type != "table-transformer":
        return bool(model_type != "detr")
    try:
        hints_from_config(config)
    except CheckpointError:
        return True
    return False


def load_family(file: TensorFile, overrides: Hints, placement: Mapping[str, Any]) -> FamilyDetector:
    """A detector in eval mode with frozen weights, from the tensors of a file and the JSON files in its folder.

    Args:
        file: the tensors.
        overrides: class names and short side, where the caller wants others than the checkpoint's.
        placement: `attention`, `device` and `dtype`.

    Raises:
        CheckpointError: transformers is missing or too old, the model is of an unknown type or not a detector, or
            configuration and tensors do not fit.
        SettingError: `overrides` has heads or dilation, which these checkpoints say themselves.
    """
    values = read_json(file.path.with_name(CONFIG))
    adapter = find_adapter(str(values["model_type"]))
    if overrides.heads is not None or overrides.dilated is not None:
        raise SettingError(
            "heads= (--heads-per-layer) and dilated= (--dc5, --no-dc5) are for files that do not say them, and the "
            f"{CONFIG} of this {adapter.model_type} does: leave them out"
        )
    architectures = values.get("architectures") or [adapter.class_name]
    if adapter.class_name not in architectures:
        raise CheckpointError(
            f"{CONFIG} is of a {', '.join(map(str, architectures))}, which is not a detector; give a checkpoint of "
            f"{adapter.class_name}"
        )
    attention = resolve_attention(placement["attention"])
    with _quiet():
        config = _configuration(values, adapter)
        model = _model(adapter, config, file.tensors, placement["dtype"])
    preprocessing, assumptions = _preprocessing(file.path.with_name(PREPROCESSOR), adapter, config)
    if overrides.short_side is not None:
        preprocessing = preprocessing.with_short_side(overrides.short_side)
    names = overrides.class_names or tuple(str(config.id2label[index]) for index in range(config.num_labels))
    detector = FamilyDetector(model, adapter, names, preprocessing, attention=attention)
    detector.assumptions = assumptions
    detector.to(placement["device"])
    detector.eval().requires_grad_(False)
    return detector


def _preprocessing(path: Path, adapter: Adapter, config: Any) -> tuple[Preprocessing, tuple[str, ...]]:
    """Preprocessing, and what was assumed of it."""
    default = adapter.preprocessing(config)
    if path.is_file():
        return preprocessing_from_config(read_json(path), default), ()
    sides = (
        f"{default.size[0]} x {default.size[1]}" if default.size else f"a short side of {default.short_side}"
    )
    return default, (
        f"images resized and normalised as is usual for {adapter.model_type} ({sides} pixels) assumed, for there is no "
        f"{PREPROCESSOR}: put the file there, or give short_side= (--short-side)",
    )


def transformers_module() -> Any:
    """The package transformers.

    Raises:
        CheckpointError: it is missing or too old.
    """
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            f"detectors of this type need the package transformers ({error_line(error)}): {_EXTRA}"
        ) from error
    if _version(transformers.__version__) < _version(OLDEST):
        raise CheckpointError(
            f"detectors of this type need transformers {OLDEST} or newer, and {transformers.__version__} is installed: "
            f"{_EXTRA}"
        )
    return transformers


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _configuration(values: Mapping[str, Any], adapter: Adapter) -> Any:
    """transformers' configuration of a detector. It is made without the network."""
    if values.get("quantization_config"):
        raise CheckpointError("config.json is of a quantised model, which headoff does not read")
    model_class = getattr(transformers_module(), adapter.class_name)
    values = {name: value for name, value in values.items() if name not in _IGNORED}
    _name_backbone(values)
    try:
        return model_class.config_class.from_dict(values)
    except Exception as error:  # of many types: transformers checks some values, and computes with others
        raise CheckpointError(
            f"config.json cannot be used by transformers ({error_line(error)}); correct it, or download it again"
        ) from error


def _name_backbone(values: dict[str, Any]) -> None:
    """Describe a backbone that `config.json` names as older versions do, so that transformers does not look for it on
    the hub.
    """
    name, how = values.get("backbone"), values.get("backbone_kwargs")
    if values.get("backbone_config") is not None:
        values["backbone"] = None
    elif name is not None and not values.get("use_timm_backbone", True):
        raise CheckpointError(
            f"config.json names the backbone {name!r} of another repository; save the model again with a newer "
            "transformers, which describes it"
        )
    elif how:
        timm = {"model_type": "timm_backbone", "backbone": name or "resnet50", "features_only": True}
        channels = how.get("in_chans", how.get("num_channels", 3))
        known = {key: how[key] for key in ("out_indices", "output_stride") if key in how}
        values["backbone_config"] = {**timm, "num_channels": channels, **known}
        values["backbone"] = None
    if values.get("dilation", False) is None:  # as transformers 4 writes it for a described backbone
        del values["dilation"]
    values.pop("backbone_kwargs", None)
    values["use_pretrained_backbone"] = False


def _model(adapter: Adapter, config: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """transformers' model with these weights.

    Raises:
        CheckpointError: tensors are missing, unexpected or do not fit.
    """
    _check_numbers(tensors, dtype)
    model_class = getattr(transformers_module(), adapter.class_name)
    try:
        model, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=_with_tied(model_class, tensors),
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are reported
            output_loading_info=True,
            local_files_only=True,
        )
    except ImportError as error:
        # timm, in particular, which computes the backbones of many published checkpoints.
        raise CheckpointError(
            f"transformers lacks a package for this model ({error_line(error)}): {_EXTRA}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot make a {adapter.class_name} of its configuration and its tensors "
            f"({error_line(error)}); download it again, or give another"
        ) from error
    problems = []
    for kind, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "of another shape"),
    ):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in found[kind])
        names = [name for name in names if not name.endswith(_BOOKKEEPING) and not _is_copy(name, tensors)]
        if names:
            problems.append(
                f"{counted(len(names), 'tensor')} {'is' if len(names) == 1 else 'are'} {what} ({some_names(names)})"
            )
    if problems:
        raise CheckpointError(
            f"the checkpoint is not a complete {adapter.model_type}: {' and '.join(problems)}; download it again, or "
            f"give a checkpoint of {adapter.class_name}"
        )
    return model


def _with_tied(model_class: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under both names where a model has two for one module, such as the box head and the decoder's.

    Published files have one of them. Where it is not the one that transformers 5.9 expects, as with DAB-DETR, it leaves
    random numbers in the module, and reports nothing.
    """
    both = dict(tensors)
    for pair in (getattr(model_class, "_tied_weights_keys", None) or {}).items():
        if any(
            set(name) & set("\\^$()[]") for name in pair
        ):  # a pattern, of layers that some configurations share
            continue
        for here, there in (pair, pair[::-1]):
            for name, tensor in tensors.items():
                if name.startswith(f"{here}."):
                    both.setdefault(there + name.removeprefix(here), tensor)
    return both


def _is_copy(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the file has a tensor's numbers under a longer or shorter name as well.

    Files that torch wrote have both names of a shared module (`class_embed` and `model.decoder.class_embed`), and not
    every version of a model has both.
    """
    return any(
        (other.endswith(f".{name}") or name.endswith(f".{other}")) and torch.equal(tensor, tensors[name])
        for other, tensor in tensors.items()
        if name in tensors
    )


def _check_numbers(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype in (torch.int8, torch.uint8):
            raise CheckpointError(f"{name} is {tensor.dtype}; headoff does not read quantised checkpoints")
        if tensor.is_floating_point() and not tensor.to(dtype).isfinite().all():
            raise CheckpointError(not_finite_message(name, tensor, dtype))


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this context transformers prints neither progress nor warnings, and does not use the network."""
    logging = transformers_module().utils.logging
    from huggingface_hub import constants

    verbosity, bars, offline = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        constants.HF_HUB_OFFLINE,
    )
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    constants.HF_HUB_OFFLINE = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        constants.HF_HUB_OFFLINE = offline
