"""Results of images in files, one for each image, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headoff.attention import attention_label
from headoff.detector import Detector
from headoff.faithfulness.controls import CONTROLS
from headoff.faithfulness.measures import Measure, Scores
from headoff.files import write_file
from headoff.relevance.methods import resolve_method

FORMAT = "headoff faithfulness 1"


@dataclass(eq=False)
class ImageRecord:
    """What is known of an image.

    Attributes:
        name: of the image; not stored, as the same image may be in another file.
        objects: for each object `query`, `label`, `class`, `score`, `box` (left, top, right, bottom; pixels), and
            `truth`, the number of the true object or -1.
        scores: by method and measure.
        seconds: of the processor, for what was computed in this run: for a method its maps, for a measure the mean of
            its methods.
    """

    name: str
    objects: list[dict[str, Any]]
    scores: dict[tuple[str, str], Scores] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def digest_of(about: Mapping[str, Any]) -> str:
    """24 characters of the SHA-256 of values of JSON types."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]


def context_of(detector: Detector) -> dict[str, str]:
    """What numbers depend on, of a detector: all its weights, its dtype and its attention."""
    total = hashlib.sha256()
    for name, tensor in sorted(detector.state_dict().items()):
        numbers = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + numbers.tobytes())
    return {
        "model": total.hexdigest(),
        "attention": attention_label(detector.attention),
        "deformable_attention": attention_label(detector.deformable_attention),
    }


class RecordStore:
    """The file of one image.

    It is keyed by everything that its numbers depend on: model, image, truth, configuration, confidence and seed in
    the file's name; method and measure with their settings in the names of its entries. A file that is damaged is
    as one that does not exist.

    Args:
        folder: of all files.
        about: what is in the file's name.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.about = {"format": FORMAT, **about}
        self.path = folder / f"{digest_of(self.about)}.safetensors"
        self.objects: list[dict[str, Any]] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._read()

    def find(self, method: str, measure: Measure) -> Scores | None:
        """The scores that were stored; None where there are none."""
        key = _key(method, measure)
        if f"{key}.values" not in self._tensors:
            return None
        parts = {
            name.removeprefix(f"{key}.part."): tensor
            for name, tensor in self._tensors.items()
            if name.startswith(f"{key}.part.")
        }
        return Scores(self._tensors[f"{key}.values"], self._tensors.get(f"{key}.curves"), parts)

    def add(self, method: str, measure: Measure, scores: Scores) -> None:
        """Add scores, for `write`."""
        key = _key(method, measure)
        self._tensors[f"{key}.values"] = scores.values
        if scores.curves is not None:
            self._tensors[f"{key}.curves"] = scores.curves
        self._tensors |= {f"{key}.part.{name}": part for name, part in scores.parts.items()}

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        tensors = {name: tensor.contiguous().clone() for name, tensor in self._tensors.items()}
        metadata = {
            "about": json.dumps(self.about, sort_keys=True),
            "objects": json.dumps(self.objects),
            "sha256": _checksum(tensors),
        }
        write_file(self.path, safetensors.torch.save(tensors, metadata))

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if metadata.get("sha256") != _checksum(tensors):
                return
            self.objects = json.loads(metadata["objects"])
        except (OSError, SafetensorError, ValueError, KeyError):
            return
        self._tensors = tensors


def _key(method: str, measure: Measure) -> str:
    about: dict[str, Any] = {"method": method, "measure": measure.name, "settings": measure.settings}
    if method not in CONTROLS:
        about["method_settings"] = resolve_method(method).settings
    return digest_of(about)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        flat = tensors[name].contiguous().flatten().view(torch.uint8)
        total.update(f"{name} {tuple(tensors[name].shape)}".encode() + flat.numpy().tobytes())
    return total.hexdigest()
