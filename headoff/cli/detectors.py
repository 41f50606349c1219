"""The detector that the options ask for."""

from __future__ import annotations

import argparse
import sys

import torch

from headoff.attention import attention_label
from headoff.cli.messages import note
from headoff.detector import Detector
from headoff.detr.checkpoints import ModelChoice, class_names_in
from headoff.devices import chosen_device, set_threads
from headoff.versions import versions


def load_detector(settings: argparse.Namespace, *, quiet: bool = False) -> Detector:
    """The detector that the options of `add_detector_options` describe; what was assumed of it goes to stderr unless
    `quiet`."""
    if settings.threads:
        set_threads(settings.threads)
    detector = model_choice(settings).load(
        attention=settings.attention, device=chosen_device(settings.device), dtype=settings.dtype
    )
    for assumption in () if quiet else detector.assumptions:
        note(f"{settings.model}: {assumption}")
    return detector


def model_choice(settings: argparse.Namespace) -> ModelChoice:
    """The model that the options of `add_model_options` name. Raises SettingError."""
    return ModelChoice(
        settings.model,
        heads=settings.heads_per_layer,
        dilated=settings.dc5,
        class_names=class_names_in(settings.classes),
        short_side=settings.short_side,
    )


def provenance(settings: argparse.Namespace, detector: Detector) -> dict[str, str]:
    """Command, model, attention, device, dtype and versions, for reports."""
    made_with = {
        "command": " ".join(["headoff", *sys.argv[1:]]),
        "model": str(settings.model),
        "heads": detector.head_layout.heads_text,
        **({"assumed": "; ".join(detector.assumptions)} if detector.assumptions else {}),
        "attention": attention_label(detector.attention),
        "device": str(detector.device),
        "dtype": str(detector.dtype).removeprefix("torch."),
        **versions(),
    }
    if detector.device.type == "cuda":
        made_with["gpu"] = torch.cuda.get_device_name(detector.device)
    return made_with
