"""`--autocast`: mixed precision, always compared with full precision in the same run."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from PIL import Image
from tqdm import tqdm

from headoff.cli.relevance import RelevanceOptions
from headoff.cli.reports import ImageReport
from headoff.detector import Detector
from headoff.devices import torch_dtype
from headoff.effects import effect_on_detections, effect_on_maps
from headoff.errors import SettingError
from headoff.gates import Configuration
from headoff.relevance import Explanation, explain
from headoff.sweeps import SweepResult, sweep


def check_autocast(settings: argparse.Namespace) -> None:
    """Raise SettingError if --dtype leaves nothing to cast. To be called before the weights are read."""
    if settings.autocast and settings.dtype != "float32":
        raise SettingError(
            f"--autocast needs float32 weights: leave out --dtype {settings.dtype}, or leave out --autocast"
        )


class Autocast:
    """Sweeps and explanations under `--autocast`, and sentences on what it changed.

    Args:
        name: name of a dtype, or None for no autocast.

    Attributes:
        messages: what autocast changed for the last image, one sentence for each result.
    """

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.dtype = torch_dtype(name) if name else None
        self.messages: list[str] = []

    def describe(self) -> dict[str, str]:
        """The option as part of a report's provenance."""
        return {"autocast": self.name} if self.name else {}

    def sweep(
        self,
        detector: Detector,
        picture: Image.Image,
        configurations: Iterable[Configuration],
        **options: Any,
    ) -> SweepResult:
        """`headoff.sweep`, under autocast and, for comparison, without."""
        self.messages = []
        full = sweep(detector, picture, configurations, **options)
        if self.dtype is None:
            return full
        # One object's query is found in full precision, and the same heads are switched off in both.
        options.pop("object_index", None)
        result = sweep(detector, picture, full.configurations, autocast=self.dtype, **options)
        self.messages.append(effect_on_detections(full, result).sentence(f"autocast to {self.name}"))
        return result

    def explain(
        self, options: RelevanceOptions, detector: Detector, result: SweepResult, report: ImageReport
    ) -> list[Explanation]:
        """`RelevanceOptions.explain`; only the forward passes run under autocast, relevance is float32."""
        with detector.autocasting(self.dtype):
            found = options.explain(detector, result, report)
        if self.dtype is not None:
            full = explain(
                detector,
                report.picture,
                result.configurations,
                found[0].objects,
                options.methods[0],
                options.layers,  # type: ignore[arg-type]
                target=options.target,
                pick=options.pick,
                confidence=result.confidence,
                ablation=options.ablation,
                references=options.references,
            )
            self.messages.append(effect_on_maps(full, found[0]).sentence(f"autocast to {self.name}"))
        return found

    def summary(self, text: str, report: ImageReport) -> str:
        """`text` and the messages. For one image of several, whose texts are not printed, print the messages."""
        if not report.alone:
            for message in self.messages:
                tqdm.write(f"{report.image}: {message}")
        return "\n".join([text, *self.messages])
