"""What `headoff sweep` and `headoff explain` share: a sweep of every image, explained or not, and its report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headoff.cli.autocast import Autocast, check_autocast
from headoff.cli.configurations import ConfigurationChoice
from headoff.cli.detectors import load_detector, provenance
from headoff.cli.relevance import RelevanceOptions
from headoff.cli.reports import ImageReport, Reports
from headoff.detr.graphs import DecodeGraphs
from headoff.relevance import Explanation
from headoff.report import write_report
from headoff.sweeps import SweepResult

Summary = Callable[[Path, SweepResult, Explanation | None], str]
"""(image, sweep, explanation of the first method): what the terminal says of it."""


def report_sweeps(
    settings: argparse.Namespace,
    relevance: RelevanceOptions | None,
    described: Mapping[str, str],
    summary: Summary,
    *,
    objects: Sequence[int] = (),
    **options: Any,
) -> int:
    """Write a report on every image. Returns the exit code.

    Args:
        settings: the options, with those about reports, configurations, ablation, confidence, detector and autocast.
        relevance: what to explain; None for nothing.
        described: the options that decide what is found, as part of a report's provenance.
        summary: see `Summary`.
        objects: those whose heads an order by importance is of; all if empty.
        options: further arguments of `headoff.sweep`.
    """
    # Wrong options are reported before the weights are read.
    reports = Reports.of(settings)
    check_autocast(settings)
    choice = ConfigurationChoice.from_options(settings)
    detector = load_detector(settings)
    explained = None if relevance is None else relevance.of(detector)
    autocast = Autocast(settings.autocast)
    # The images of a folder often have one size: on a GPU, CUDA graphs of their decodes are then replayed.
    graphs = DecodeGraphs() if len(reports.images.paths) > 1 else None

    def write(report: ImageReport) -> str:
        configurations, curves = choice.for_image(detector, report.picture, settings, objects)
        result = autocast.sweep(
            detector,
            report.picture,
            configurations,
            confidence=settings.confidence,
            ablation=settings.ablate,
            references=settings.references,
            graphs=graphs,
            **options,
        )
        explanation: Explanation | None = None
        maps: dict[str, Any] = {}
        if explained is not None:
            explanation, *others = autocast.explain(explained, detector, result, report)
            maps = {"explanation": explanation, "others": others}
            maps |= {"style": explained.style, "maps": explained.maps}
        report.write(write_report, result, curves=curves, **maps)
        return autocast.summary(summary(report.image, result, explanation), report)

    made_with = {**provenance(settings, detector), **described, **autocast.describe()}
    if explained is not None:
        made_with |= explained.describe()
    return reports.write(made_with, write)
