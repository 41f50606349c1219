"""`--autocast`: mixed precision, always with what it changes beside full precision, measured in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from headoff.cli.relevance import Wanted
from headoff.detr import Detector
from headoff.devices import DTYPES
from headoff.effects import effect_on_detections, effect_on_maps
from headoff.errors import SettingError
from headoff.gates import Configuration
from headoff.relevance import Explanation, explain
from headoff.sweeps import SweepResult, sweep


def add_autocast_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        help="compute convolutions, linear layers and attention in this dtype; the same is done in full precision as "
        "well, and what differs is printed",
    )


def check_autocast(settings: argparse.Namespace) -> None:
    """Raise SettingError, before the weights are read, where the other options leave nothing to cast."""
    if settings.autocast and settings.dtype != "float32":
        raise SettingError(
            f"--autocast is for weights of float32: leave out --dtype {settings.dtype}, or leave out --autocast"
        )


class Autocast:
    """Sweeps and explanations as the option asks for them, and sentences on what it changed.

    - `said`: the sentences of the last image
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.dtype: torch.dtype | None = DTYPES[name] if name else None
        self.said: list[str] = []

    def words(self) -> dict[str, str]:
        """For the report, and for knowing it again."""
        return {"autocast": self.name} if self.name else {}

    def sweep(
        self,
        detector: Detector,
        picture: Image.Image,
        configurations: Iterable[Configuration],
        **options: Any,
    ) -> SweepResult:
        """`headoff.sweep`."""
        self.said = []
        full = sweep(detector, picture, configurations, **options)
        if self.dtype is None:
            return full
        # One object's query is found in full precision, and the same heads are switched off in both.
        options.pop("object_index", None)
        result = sweep(detector, picture, full.configurations, autocast=self.dtype, **options)
        self.said.append(effect_on_detections(full, result).sentence(f"autocast to {self.name}"))
        return result

    def write(
        self,
        wanted: Wanted,
        folder: Path,
        picture: Image.Image,
        detector: Detector,
        result: SweepResult,
        made_with: Mapping[str, str],
        progress: bool,
    ) -> Explanation:
        """`Wanted.write`. Under autocast the forward passes are; relevance is computed in float32 of what they left."""
        with detector.autocasting(self.dtype):
            found = wanted.write(folder, picture, detector, result, made_with, progress)
        if self.dtype is not None:
            full = explain(
                detector,
                picture,
                result.configurations,
                found.objects.queries.tolist(),
                wanted.method,
                wanted.layers,  # type: ignore[arg-type]
                target=wanted.target,
                pick=wanted.pick,
                confidence=result.confidence,
            )
            self.said.append(effect_on_maps(full, found).sentence(f"autocast to {self.name}"))
        return found

    def summary(self, image: Path, text: str, alone: bool) -> str:
        """`text` and the sentences; where the image is one of a folder's, whose summaries are not shown, these are."""
        if not alone:
            for each in self.said:
                tqdm.write(f"{image}: {each}")
        return "\n".join([text, *self.said])
