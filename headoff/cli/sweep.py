"""`headoff sweep`: switch heads off and report which detections survive."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from headoff.cli.tables import table
from headoff.wording import counted

if TYPE_CHECKING:
    from headoff.sweeps import SweepResult

MOST_NAMED = 12
"""Objects that the terminal names; the report has them all."""

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
    from headoff.cli.configurations import read_order
    from headoff.cli.relevance import RelevanceOptions
    from headoff.cli.sweeps import report_sweeps
    from headoff.errors import SettingError
    from headoff.gates import order_of

    if settings.draws > 1 and settings.ablate != "resample":
        raise SettingError("--draws is for --ablate resample: no other kind draws images")

    def summary(image: Path, result: SweepResult, _: object) -> str:
        text = _summary(image, result)
        _, by_importance = read_order(settings.order)
        if by_importance is not None:
            order = ", ".join(map(str, order_of(result.configurations)))
            text += f"\nheads by importance, {by_importance} important first: {order}"
        return text

    return report_sweeps(
        settings,
        RelevanceOptions(ablation=settings.ablate, references=settings.references)
        if settings.relevance
        else None,
        _describe(settings),
        summary,
        objects=() if settings.object is None else (settings.object,),
        object_index=settings.object,
        draws=settings.draws,
    )


def _describe(settings: argparse.Namespace) -> dict[str, str]:
    """The options that decide what a sweep finds, as part of its report's provenance."""
    from headoff.cli.configurations import describe_ablation, describe_configurations

    options = {**describe_configurations(settings), "confidence": f"{settings.confidence:g}"}
    if settings.object is not None:
        options["object"] = f"only #{settings.object}"
    if settings.draws > 1:
        options["draws"] = str(settings.draws)
    return options | describe_ablation(settings)


def _summary(image: Path, result: SweepResult) -> str:
    """What became of the objects: one line for each configuration, and what loses objects at all."""
    from headoff.outcomes import Status

    names = [f"#{number} {detection.class_name}" for number, detection in enumerate(result.baseline)]
    more = f", and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    header = ("configuration", "found", *(status.value for status in Status), "unmatched")
    rows = [
        (configuration.name, len(detections), *outcome.counts.values(), len(outcome.unmatched))
        for configuration, detections, outcome in zip(
            result.configurations, result.detections, result.outcomes, strict=True
        )
    ]
    losing = sum(bool(outcome.counts[Status.LOST]) for outcome in result.outcomes)
    return "\n".join(
        [
            f"{image}: {counted(len(names), 'object')} with none off",
            *textwrap.wrap(
                ", ".join(names[:MOST_NAMED]) + more, 80, initial_indent="  ", subsequent_indent="  "
            ),
            table(header, rows),
            f"{losing} of {counted(len(rows), 'configuration')} lose an object",
        ]
    )
