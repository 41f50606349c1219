"""`headoff sweep`: switch heads off and report which detections survive."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from headoff.cli.options import (
    NOTATION,
    add_ablation_options,
    add_autocast_option,
    add_confidence_option,
    add_configuration_options,
    add_detector_options,
    add_report_options,
    positive,
    whole,
)

EPILOG = f"""\
what to switch off:
  Default: the cumulative sweep, none off, first 1 off, first 2 off, ... all heads off, in every decoder layer.
{NOTATION}
examples:
  headoff sweep                                      the bundled model on a bundled scene
  headoff sweep street.jpg --model detr-resnet-50 --confidence 0.7
  headoff sweep street.jpg --model detr-resnet-50 --object 0
  headoff sweep street.jpg --relevance
  headoff sweep photos/ --order random:7 --out random7
  headoff sweep day1/ day2/ extra.jpg                a report for each image, an index, totals
  headoff sweep --ablate mean                        heads that are off contribute their mean context
  headoff sweep street.jpg --autocast bfloat16
  headoff sweep --off 'L4H2,L5H0-3' --off 'only L5H2 on'
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "sweep",
        help="switch heads off and report which detections survive",
        description="Switch attention heads off, configuration by configuration, and report what is still detected, in "
        "pictures and numbers: index.html, figures, sweep.json, CSV tables.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(parser, "headoff-sweep")
    parser.add_argument(
        "--relevance",
        action="store_true",
        help="add relevance maps: which parts of the image detections depend on, under every configuration "
        "(`headoff explain` does the same with more options)",
    )
    group = add_configuration_options(parser, "cumulative")
    group.add_argument(
        "--object",
        type=whole,
        metavar="N",
        help="switch heads off for the query of this object only; objects are numbered from 0, as `headoff detect` "
        "lists them",
    )
    add_ablation_options(group)
    group.add_argument(
        "--draws",
        type=positive,
        default=1,
        metavar="N",
        help="with --ablate resample: how many other images heads take their context from, one after the other; the "
        "page shows the first, objects.csv and sweep.json have the mean over all (default 1)",
    )
    add_confidence_option(parser)
    add_detector_options(parser)
    add_autocast_option(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.cli.autocast import Autocast, check_autocast
    from headoff.cli.configurations import ConfigurationChoice
    from headoff.cli.detectors import load_detector, provenance
    from headoff.cli.progress import progress_bar
    from headoff.cli.relevance import RelevanceOptions
    from headoff.cli.reports import drawing_of, images_to_report, sweep_summary, write_reports
    from headoff.detr.graphs import DecodeGraphs
    from headoff.errors import SettingError
    from headoff.gates import order_of
    from headoff.images import load_image
    from headoff.report import write_report

    # Wrong options are reported before the weights are read.
    images = images_to_report(settings)
    if settings.draws > 1 and settings.ablate != "resample":
        raise SettingError("--draws is for --ablate resample: no other kind draws images")
    check_autocast(settings)
    choice = ConfigurationChoice.from_options(settings)
    drawing = drawing_of(settings)
    relevance = (
        RelevanceOptions(drawing=drawing, ablation=settings.ablate, references=settings.references)
        if settings.relevance
        else None
    )
    detector = load_detector(settings)
    autocast = Autocast(settings.autocast)
    # The images of a folder often have one size: on a GPU, CUDA graphs of their decodes are then replayed.
    graphs = DecodeGraphs() if len(images.paths) > 1 else None

    def write(folder: Path, image: Path, made_with: Mapping[str, str], progress: bool) -> str:
        picture = load_image(image)
        objects = () if settings.object is None else (settings.object,)
        configurations, curves = choice.for_image(detector, picture, settings, objects)
        result = autocast.sweep(
            detector,
            picture,
            configurations,
            object_index=settings.object,
            confidence=settings.confidence,
            ablation=settings.ablate,
            references=settings.references,
            draws=settings.draws,
            graphs=graphs,
        )
        if relevance is None:
            with progress_bar("drawing", "figure", show=progress) as update:
                write_report(
                    folder,
                    picture,
                    result,
                    provenance=made_with,
                    curves=curves,
                    progress=update,
                    **asdict(drawing),
                )
        else:
            autocast.write_report(relevance, folder, picture, detector, result, made_with, progress, curves)
        text = sweep_summary(image, result)
        if choice.by_importance is not None:
            order = ", ".join(map(str, order_of(configurations)))
            text += f"\nheads by importance, {choice.by_importance} important first: {order}"
        return autocast.summary(image, text, progress)

    made_with = {**provenance(settings, detector), **_describe(settings), **autocast.describe()}
    if relevance is not None:
        made_with |= relevance.describe()
    made_with |= drawing.describe()
    return write_reports(settings, images, made_with, write)


def _describe(settings: argparse.Namespace) -> dict[str, str]:
    """The options that decide what a sweep finds, as part of its report's provenance."""
    from headoff.cli.configurations import describe_ablation, describe_configurations

    options = {**describe_configurations(settings), "confidence": f"{settings.confidence:g}"}
    if settings.object is not None:
        options["object"] = f"only #{settings.object}"
    if settings.draws > 1:
        options["draws"] = str(settings.draws)
    return options | describe_ablation(settings)
