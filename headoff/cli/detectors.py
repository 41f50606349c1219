"""The detector and the images that the options ask for."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import torch

from headoff import __version__
from headoff.attention import attention_label
from headoff.detr import Detector
from headoff.detr.checkpoints import load
from headoff.devices import chosen_device, torch_dtype
from headoff.errors import ImageError
from headoff.images import find_images
from headoff.scenes.samples import sample_image


def load_detector(settings: argparse.Namespace) -> Detector:
    """The detector that the options of `add_detector_options` describe."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return load(
        settings.model,
        attention=settings.attention,
        device=chosen_device(settings.device),
        dtype=torch_dtype(settings.dtype),
    )


def provenance(settings: argparse.Namespace, detector: Detector) -> dict[str, str]:
    """Command, model, attention, device, dtype and versions, for reports."""
    made_with = {
        "command": " ".join(["headoff", *sys.argv[1:]]),
        "model": str(settings.model),
        "attention": attention_label(detector.attention),
        "device": str(detector.device),
        "dtype": str(detector.dtype).removeprefix("torch."),
        "headoff": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if detector.device.type == "cuda":
        made_with["gpu"] = torch.cuda.get_device_name(detector.device)
    return made_with


def images_at(path: Path | None) -> list[Path]:
    """The image at `path`, or the images in that folder; a bundled scene for None.

    Raises:
        ImageError: there is no image.
    """
    if path is None:
        return [sample_image(0)]
    if path.is_dir():
        return find_images(path)
    if not path.exists():
        raise ImageError(f"there is no image or folder {path}; name one that exists")
    return [path]
