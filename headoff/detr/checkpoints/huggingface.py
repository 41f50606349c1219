"""Hugging Face checkpoints: downloading from the hub, and reading the JSON files in their folders."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headoff.detr.checkpoints.download import NotOnServer, download
from headoff.detr.checkpoints.files import read_json, read_tensors
from headoff.detr.checkpoints.fitting import Hints
from headoff.detr.checkpoints.published import cache_folder
from headoff.detr.checkpoints.shards import INDEX_SUFFIX, shard_places
from headoff.errors import CheckpointError, DownloadError, SettingError
from headoff.images import RESAMPLING, Preprocessing

HUB_URL = "https://huggingface.co"
CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order of preference
FOLDER_FILES = tuple(f"{name}{suffix}" for name in WEIGHTS for suffix in ("", INDEX_SUFFIX))

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODEL_TYPES = ("detr", "table-transformer")


def is_repository(name: str) -> bool:
    """Whether `name` has the form of a hub repository's name, `owner/name`."""
    return _REPOSITORY.fullmatch(name) is not None


def find_weights(folder: Path) -> Path | None:
    """The weights file in a checkpoint folder, or the index of several; None if there is neither."""
    return next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)


def hub_checkpoint(repository: str, *, url: str | None = None, folder: Path | None = None) -> Path:
    """The folder with the files of a hub repository: in Hugging Face's cache, or else downloaded once.

    Of weights in several files those that are complete are not downloaded again after an interruption. The hub
    publishes no hash to compare with, so only the length is checked, and that the files can be read.

    Args:
        repository: `owner/name`.
        url: the server; `$HF_ENDPOINT` or `HUB_URL` by default.
        folder: where to download to; `cache_folder()` by default.

    Raises:
        DownloadError: a file cannot be downloaded, or what was downloaded cannot be read.
    """
    cached = _in_hub_cache(repository)
    if cached is not None:
        return cached
    base = (url or os.environ.get("HF_ENDPOINT") or HUB_URL).rstrip("/")
    base = f"{base}/{repository}/resolve/main"
    target = (cache_folder() if folder is None else folder) / repository.replace("/", "--")
    if find_weights(target) is not None:  # downloaded last, so the other files are there too
        return target
    _download_readable(f"{base}/{CONFIG}", target / CONFIG, read_json)
    try:
        _download_readable(f"{base}/{PREPROCESSOR}", target / PREPROCESSOR, read_json)
    except NotOnServer:
        pass  # optional; the default is the published models' preprocessing
    missing: list[NotOnServer] = []
    for name in FOLDER_FILES:
        try:
            if name.endswith(INDEX_SUFFIX):
                _download_shards(base, target, name)
            else:
                _download_readable(f"{base}/{name}", target / name, read_tensors)
            return target
        except NotOnServer as error:
            missing.append(error)
    raise missing[0]


def _download_shards(base: str, folder: Path, index: str) -> None:
    """Download an index and all files that it names. It gets its name last: where it is, everything is."""
    unfinished = folder / f"unfinished-{index}"
    unfinished.unlink(missing_ok=True)  # of an interrupted download, perhaps of another version
    _download_readable(f"{base}/{index}", unfinished, shard_places)
    for name in sorted(set(shard_places(unfinished).values())):
        try:
            _download_readable(f"{base}/{name}", folder / name, read_tensors)
        except NotOnServer as error:
            # Not as NotOnServer, which would mean that there is no index.
            raise DownloadError(f"{index} names {name!r}, and {error}") from error
    unfinished.replace(folder / index)


def _download_readable(url: str, target: Path, read: Callable[[Path], object]) -> None:
    """Download a file without a known hash, and delete it if `read` fails (on a login page, for example)."""
    download(url, target)
    try:
        read(target)
    except CheckpointError as error:
        target.unlink(missing_ok=True)
        raise DownloadError(f"the download from {url} was removed: {error}") from error


def _in_hub_cache(repository: str) -> Path | None:
    """The folder of the `main` snapshot that huggingface_hub downloaded; None if it is missing or incomplete."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    hub = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    folder = hub / f"models--{repository.replace('/', '--')}"
    try:
        snapshot = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    weights = find_weights(snapshot)
    if weights is None or not (snapshot / CONFIG).is_file():
        return None
    if weights.name.endswith(INDEX_SUFFIX):
        try:
            shards = set(shard_places(weights).values())
        except CheckpointError:
            return None
        if not all((snapshot / shard).is_file() for shard in shards):
            return None
    return snapshot


def hints_from_folder(weights: Path) -> Hints:
    """Hints from `config.json` and `preprocessor_config.json` in the folder of the weights, if they exist.

    Raises:
        CheckpointError: they cannot be read, or ask for something that headoff's DETR does not support.
    """
    config_path, preprocessor_path = weights.with_name(CONFIG), weights.with_name(PREPROCESSOR)
    hints = hints_from_config(read_json(config_path)) if config_path.is_file() else Hints()
    if preprocessor_path.is_file():
        preprocessing = preprocessing_from_config(read_json(preprocessor_path))
        hints = hints.with_defaults(Hints(preprocessing=preprocessing))
    return hints


def hints_from_config(config: Mapping[str, Any]) -> Hints:
    """Hints from the content of a `config.json`.

    Raises:
        CheckpointError: it describes something that headoff's DETR does not support.
    """
    model_type = config.get("model_type", "detr")
    if model_type not in _MODEL_TYPES:
        raise CheckpointError(
            f"config.json is of model type {model_type!r}; headoff reads {' and '.join(_MODEL_TYPES)}"
        )
    backbone = _mapping(config.get("backbone_config"))
    heads = config.get("encoder_attention_heads")
    for values, name, supported in (
        (config, "position_embedding_type", "sine"),
        (config, "activation_function", "relu"),
        (config, "decoder_attention_heads", heads),
        (backbone, "hidden_act", "relu"),
        (backbone, "downsample_in_bottleneck", False),
        (backbone, "downsample_in_first_stage", False),
    ):
        if values.get(name, supported) != supported:
            raise CheckpointError(
                f"config.json has {name} = {values[name]!r}, and headoff's DETR supports only {supported!r}; "
                "give another checkpoint"
            )
    if heads is not None and not isinstance(heads, int):
        raise CheckpointError(
            f"config.json has encoder_attention_heads = {heads!r}, which is not a whole number; correct it"
        )
    # What a configuration leaves out has the default of transformers' DetrConfig.
    return Hints(
        heads=8 if heads is None else heads,
        dilated=_is_dilated(config, backbone),
        class_names=_class_names(config.get("id2label")),
    )


def _is_dilated(config: Mapping[str, Any], backbone: Mapping[str, Any]) -> bool:
    strides = (backbone.get("output_stride"), _mapping(config.get("backbone_kwargs")).get("output_stride"))
    return bool(config.get("dilation")) or 16 in strides


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _class_names(labels: Any) -> tuple[str, ...] | None:
    """The names in `id2label`, ordered by id; None if ids are missing."""
    if not isinstance(labels, Mapping):
        return None
    names = tuple(labels.get(str(index)) for index in range(len(labels)))
    return names if all(isinstance(name, str) for name in names) else None  # type: ignore[return-value]


def preprocessing_from_config(
    values: Mapping[str, Any], default: Preprocessing | None = None
) -> Preprocessing:
    """Preprocessing from the content of a `preprocessor_config.json`.

    `size` may be a number, with `max_size` (older transformers), have `shortest_edge` and `longest_edge`, the latter
    alone, or `height` and `width`.

    Args:
        values: the content.
        default: what applies where it says nothing; that of the published DETR models by default.

    Raises:
        CheckpointError: its values are invalid, or ask for something that headoff does not do.
    """
    default = default or Preprocessing()
    for name, supported in (("do_resize", True), ("pad_size", None), ("do_center_crop", False)):
        if values.get(name, supported) not in (supported, None):
            raise CheckpointError(
                f"{PREPROCESSOR} has {name} = {values[name]!r}, and headoff supports only {supported!r}; correct or "
                "remove it"
            )
    try:
        sides = _sides(values.get("size"), values.get("max_size"), default)
        return replace(default, **sides, **_normalisation(values, default), resample=_filter(values, default))
    except (KeyError, TypeError, ValueError, SettingError) as error:
        raise CheckpointError(f"{PREPROCESSOR} cannot be used ({error!r}); correct or remove it") from error


def _sides(size: Any, most: Any, default: Preprocessing) -> dict[str, Any]:
    """The fields of `Preprocessing` that `size` and `max_size` decide."""
    if size is None:
        return {}
    if not isinstance(size, Mapping):
        size = {"shortest_edge": size, "longest_edge": default.long_side if most is None else most}
    if size.get("height") and size.get("width"):
        return {"size": (int(size["height"]), int(size["width"]))}
    # The longest edge alone: every image is as long as that.
    short = size.get("shortest_edge") or size["longest_edge"]
    return {"size": None, "short_side": int(short), "long_side": int(size["longest_edge"])}


def _normalisation(values: Mapping[str, Any], default: Preprocessing) -> dict[str, Any]:
    """Mean and standard deviation of pixels in 0..1 that do what the file says to pixels in 0..255."""
    plain = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    is_normalised = values.get("do_normalize")
    if is_normalised is None:
        is_normalised = (default.mean, default.std) != plain
    mean, std = plain
    if is_normalised:
        usual = Preprocessing() if (default.mean, default.std) == plain else default
        mean = tuple(float(v) for v in values.get("image_mean") or usual.mean)  # type: ignore[assignment]
        std = tuple(float(v) for v in values.get("image_std") or usual.std)  # type: ignore[assignment]
    factor = float(values.get("rescale_factor") or 1 / 255) if values.get("do_rescale", True) else 1.0
    if abs(factor * 255 - 1) < 1e-6:
        return {"mean": mean, "std": std}
    # (x f - m) / s is (x / 255 - m / 255 f) / (s / 255 f).
    return {name: tuple(v / (255 * factor) for v in by) for name, by in (("mean", mean), ("std", std))}


def _filter(values: Mapping[str, Any], default: Preprocessing) -> str:
    """The name of the resampling filter, which the file gives as Pillow's number."""
    number = values.get("resample")
    if number is None:
        return default.resample
    names = {int(value): name for name, value in RESAMPLING.items()}
    if number not in names:
        raise SettingError(f"resample = {number!r} is none of Pillow's filters {', '.join(names.values())}")
    return names[number]
