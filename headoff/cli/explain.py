"""`headoff explain`: relevance maps of the detections."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headoff.choices import BEST_METHOD, BOX_COORDINATES, METHODS, PICKS, SCALES
from headoff.cli.options import (
    NOTATION,
    add_ablation_options,
    add_autocast_option,
    add_confidence_option,
    add_configuration_options,
    add_detector_options,
    add_report_options,
    whole,
)
from headoff.cli.tables import table
from headoff.wording import counted

if TYPE_CHECKING:
    from headoff.relevance import Explanation

EPILOG = f"""\
what to switch off:
  Default: nothing, which explains the detections of the unchanged detector.
{NOTATION}
examples:
  headoff explain                                    the bundled model on a bundled scene
  headoff explain street.jpg --model detr-resnet-50 --smooth
  headoff explain street.jpg --set cumulative        with none off, first 1 off, ... all heads off
  headoff explain street.jpg --off 'L5H2' --object 0 --heads
  headoff explain street.jpg --target w --layers last --cmap magma
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "explain",
        help="draw relevance maps: which parts of the image detections depend on",
        description="Relevance maps of the image for every detected object, after every decoder layer, under every "
        "configuration: index.html, figures, maps.npz, relevance.csv, and everything that `headoff sweep` writes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(parser, "headoff-explain")
    group = parser.add_argument_group("what to explain")
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--object",
        type=whole,
        action="append",
        metavar="N",
        help="only this object, numbered as `headoff detect` lists them; can be repeated (default: all objects)",
    )
    exclusive.add_argument(
        "--query",
        type=whole,
        action="append",
        metavar="N",
        help="this object query, whatever it detects; can be repeated",
    )
    group.add_argument(
        "--target",
        default="class",
        metavar="TARGET",
        help="the number that is explained: the `class` logit of the object (default) or a coordinate of its box, "
        + ", ".join(BOX_COORDINATES),
    )
    group.add_argument(
        "--pick",
        choices=PICKS,
        default="baseline",
        help="the query and class explained when heads are off: those of the baseline (default), the most likely "
        "class of the same query, or the query that detects the same object",
    )
    group.add_argument(
        "--method",
        default=METHODS[0],
        metavar="METHODS",
        help=f"{', '.join(METHODS)} (default {METHODS[0]}); best: "
        f"{BEST_METHOD}, see docs/faithfulness.md; several, with commas, or "
        "all: the first is that of the report, and the others can be chosen on its page",
    )
    group.add_argument(
        "--layers", default="all", metavar="LAYERS", help="decoder layers: all (default), last, or 0,5"
    )
    group.add_argument("--heads", action="store_true", help="add the attention of every head of every layer")
    style = parser.add_argument_group("how to draw it (can also be changed on the page)")
    style.add_argument(
        "--scale",
        choices=SCALES,
        default="object",
        help="full colour is the greatest relevance of each object (default), of the whole sweep, or of each map",
    )
    background = style.add_mutually_exclusive_group()
    background.add_argument(
        "--overlay", action="store_true", default=True, help="draw the maps on the image (default)"
    )
    background.add_argument("--plain", action="store_false", dest="overlay", help="draw the maps alone")
    style.add_argument(
        "--smooth",
        action="store_true",
        help="interpolate between the cells of a map, which are the image tokens",
    )
    style.add_argument(
        "--cmap", metavar="NAME", help="colour map of matplotlib (default: inferno, with --plain Blues_r)"
    )
    parser.add_argument(
        "--maps",
        choices=("npz", "safetensors"),
        default="npz",
        help="format of the file of raw maps (default npz)",
    )
    add_ablation_options(add_configuration_options(parser, None))
    add_confidence_option(parser)
    add_detector_options(parser)
    add_autocast_option(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.cli.configurations import describe_ablation, describe_configurations
    from headoff.cli.relevance import RelevanceOptions, parse_layers, parse_methods
    from headoff.cli.sweeps import report_sweeps
    from headoff.figures.colouring import MapStyle

    relevance = RelevanceOptions(
        methods=parse_methods(settings.method),
        target=settings.target,
        layers=parse_layers(settings.layers),
        pick=settings.pick,
        queries=tuple(dict.fromkeys(settings.query or ())),
        objects=tuple(dict.fromkeys(settings.object or ())),
        heads=settings.heads,
        style=MapStyle(settings.scale, settings.overlay, settings.cmap, settings.smooth),
        maps=settings.maps,
        ablation=settings.ablate,
        references=settings.references,
    )
    described = {
        **describe_configurations(settings),
        **describe_ablation(settings),
        "confidence": f"{settings.confidence:g}",
    }
    return report_sweeps(settings, relevance, described, _summary, objects=relevance.objects)


def _summary(image: Path, _: object, explanation: Explanation | None) -> str:
    """The relevance after the last layer, one line for each configuration and object."""
    assert explanation is not None
    objects = explanation.objects
    if not len(objects):
        return f"{image}: no object is detected with none off, so there is nothing to explain"
    title = (
        f"{image}: {counted(len(objects), 'object')} explained, relevance ({explanation.method}) "
        f"after decoder layer {explanation.layers[-1]}"
    )
    header = ("configuration", "query", "class", "score", "mass", "in its box", "status")
    rows: list[tuple[object, ...]] = []
    shares, masses, scores = explanation.box_shares, explanation.masses, explanation.scores
    for c, configuration in enumerate(explanation.configurations):
        for o, detection in enumerate(objects):
            label = int(explanation.labels[c, o])
            share = float(shares[c, o, -1])
            rows.append(
                (
                    configuration.name,
                    detection.query if label < 0 else int(explanation.queries[c, o]),
                    objects.class_names[detection.label if label < 0 else label],
                    "" if label < 0 else f"{float(scores[c, o]):.3f}",
                    "" if label < 0 else f"{float(masses[c, o, -1]):.3g}",
                    "" if math.isnan(share) else f"{share:.0%}",
                    explanation.statuses[c][o][-1].value,
                )
            )
    return f"{title}\n{table(header, rows)}"
