"""`headoff sweep`: switch heads off step by step and report which detections survive."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headoff.cli.autocast import Autocast, add_autocast_option, check_autocast
from headoff.cli.configurations import (
    NOTATION,
    Choice,
    add_configuration_options,
    configurations_asked_for,
)
from headoff.cli.options import (
    add_confidence_option,
    add_detector_options,
    load_detector,
    provenance,
    whole,
)
from headoff.cli.relevance import Wanted
from headoff.cli.reports import add_report_options, images_asked_for, sweep_summary, write_reports
from headoff.detr.graphs import DecodeGraphs
from headoff.images import load_image
from headoff.report import write_report

EXAMPLES = f"""\
what to switch off:
  By default the cumulative sweep: nothing off, first 1 head off, ... all heads off, in every decoder layer.
{NOTATION}
examples:
  headoff sweep                                      the bundled model on a bundled scene
  headoff sweep street.jpg --model detr-resnet-50 --confidence 0.7
  headoff sweep street.jpg --model detr-resnet-50 --object 0
  headoff sweep street.jpg --relevance
  headoff sweep photos/ --order random:7 --out random7
  headoff sweep street.jpg --autocast bfloat16
  headoff sweep --off 'L4H2,L5H0-3' --off 'only L5H2 on'
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "sweep",
        help="switch heads off and report which detections survive",
        description="Switch attention heads off, configuration by configuration, and write pictures and numbers "
        "of what is still detected: index.html, figures, sweep.json, CSV tables.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(parser, "headoff-sweep")
    parser.add_argument(
        "--relevance",
        action="store_true",
        help="add relevance maps: where each detection draws its evidence from, under every configuration "
        "(`headoff explain` does the same with more options)",
    )
    what = add_configuration_options(parser, "cumulative")
    what.add_argument(
        "--object",
        type=whole,
        metavar="N",
        help="switch heads off for this one object's query alone; objects are what is detected with nothing off, "
        "counted from 0 as `headoff detect` lists them",
    )
    add_confidence_option(parser)
    add_detector_options(parser)
    add_autocast_option(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    # What can be refused is refused before the weights are read.
    images = images_asked_for(settings)
    check_autocast(settings)
    choice = Choice.of(settings)
    wanted = Wanted() if settings.relevance else None
    detector = load_detector(settings)
    configurations = choice.configurations(detector)
    autocast = Autocast(settings.autocast)
    # A folder's images are often of one size: on a GPU their decodes are then replayed.
    graphs = DecodeGraphs() if len(images) > 1 else None

    def work(folder: Path, image: Path, made_with: Mapping[str, str], progress: bool) -> str:
        picture = load_image(image)
        result = autocast.sweep(
            detector,
            picture,
            configurations,
            object_index=settings.object,
            confidence=settings.confidence,
            graphs=graphs,
        )
        if wanted is None:
            write_report(folder, picture, result, provenance=made_with)
        else:
            autocast.write(wanted, folder, picture, detector, result, made_with, progress)
        return autocast.summary(image, sweep_summary(image, result), progress)

    made_with = {**provenance(settings, detector), **_asked_for(settings), **autocast.words()}
    if wanted is not None:
        made_with |= wanted.words()
    return write_reports(settings, images, made_with, work)


def _asked_for(settings: argparse.Namespace) -> dict[str, str]:
    """The options that decide what a sweep finds, for the report and for knowing it again."""
    asked = {**configurations_asked_for(settings), "confidence": f"{settings.confidence:g}"}
    if settings.object is not None:
        asked["object"] = f"only #{settings.object}"
    return asked
