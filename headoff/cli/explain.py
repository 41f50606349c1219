"""`headoff explain`: where each detection draws its evidence from."""

from __future__ import annotations

import argparse
import math
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
from headoff.cli.relevance import Wanted, layers_of
from headoff.cli.reports import add_report_options, images_asked_for, table, write_reports
from headoff.figures.captions import counted
from headoff.figures.colouring import SCALES
from headoff.images import load_image
from headoff.relevance import BOX_COORDINATES, Explanation, method_names
from headoff.relevance.explanations import PICKS

EPILOG = f"""\
what to switch off:
  By default nothing is: the objects are explained as they are detected.
{NOTATION}
examples:
  headoff explain                                    the bundled model on a bundled scene
  headoff explain street.jpg --model detr-resnet-50 --overlay
  headoff explain street.jpg --set cumulative        with nothing off, first 1 head off, ... all heads off
  headoff explain street.jpg --off 'L5H2' --object 0 --heads
  headoff explain street.jpg --target w --layers last --cmap magma
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="draw where each detection draws its evidence from",
        description="Relevance maps of the image, for every detected object, after every decoder layer, under every "
        "configuration: index.html, figures, maps.npz, relevance.csv, and all that `headoff sweep` writes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(parser, "headoff-explain")
    what = parser.add_argument_group("what to explain")
    one = what.add_mutually_exclusive_group()
    one.add_argument(
        "--object",
        type=whole,
        action="append",
        metavar="N",
        help="this object alone, as `headoff detect` numbers them; can be repeated; all of them by default",
    )
    one.add_argument(
        "--query",
        type=whole,
        action="append",
        metavar="N",
        help="this object query, whatever it detects; can be repeated",
    )
    what.add_argument(
        "--target",
        default="class",
        metavar="TARGET",
        help=f"of each: its `class` logit (default) or a coordinate of its box, {', '.join(BOX_COORDINATES)}",
    )
    what.add_argument(
        "--pick",
        choices=PICKS,
        default="baseline",
        help="under heads off, query and class: those with nothing off (default); the query's own likeliest class; or "
        "the query that finds the object",
    )
    what.add_argument(
        "--method", default="chefer", metavar="METHOD", help=f"{', '.join(method_names())} (default chefer)"
    )
    what.add_argument(
        "--layers", default="all", metavar="LAYERS", help="decoder layers: all (default), last, or 0,5"
    )
    what.add_argument("--heads", action="store_true", help="add the attention of every head of every layer")
    look = parser.add_argument_group("how to draw it (the page lets you choose again)")
    look.add_argument(
        "--scale",
        choices=SCALES,
        help="full colour is the greatest relevance of each map, of each object, or of the whole sweep (default for "
        "more than one configuration; for one it is map)",
    )
    over = look.add_mutually_exclusive_group()
    over.add_argument("--overlay", action="store_true", help="maps on the image")
    over.add_argument("--plain", action="store_false", dest="overlay", help="maps alone (default)")
    look.add_argument(
        "--cmap", metavar="NAME", help="matplotlib's colour map (Blues_r by default, inferno on the image)"
    )
    parser.add_argument(
        "--maps", choices=("npz", "safetensors"), default="npz", help="file of the raw maps (default npz)"
    )
    add_configuration_options(parser, None)
    add_confidence_option(parser)
    add_detector_options(parser)
    add_autocast_option(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    # What can be refused is refused before the weights are read.
    images = images_asked_for(settings)
    check_autocast(settings)
    choice = Choice.of(settings)
    wanted = Wanted(
        method=settings.method,
        target=settings.target,
        layers=layers_of(settings.layers),
        pick=settings.pick,
        queries=tuple(dict.fromkeys(settings.query or ())),
        objects=tuple(dict.fromkeys(settings.object or ())),
        heads=settings.heads,
        scale=settings.scale,
        overlay=settings.overlay,
        cmap=settings.cmap,
        maps=settings.maps,
    )
    detector = load_detector(settings)
    wanted.check(detector.head_layout)
    configurations = choice.configurations(detector)
    autocast = Autocast(settings.autocast)

    def work(folder: Path, image: Path, made_with: Mapping[str, str], progress: bool) -> str:
        picture = load_image(image)
        result = autocast.sweep(detector, picture, configurations, confidence=settings.confidence)
        explanation = autocast.write(wanted, folder, picture, detector, result, made_with, progress)
        return autocast.summary(image, _summary(image, explanation), progress)

    asked = {**configurations_asked_for(settings), "confidence": f"{settings.confidence:g}"}
    made_with = {**provenance(settings, detector), **asked, **autocast.words(), **wanted.words()}
    return write_reports(settings, images, made_with, work)


def _summary(image: Path, explanation: Explanation) -> str:
    """A line per configuration and object, about the last layer."""
    objects = explanation.objects
    if not len(objects):
        return f"{image}: no object with nothing off, nothing to explain"
    title = (
        f"{image}: {counted(len(objects), 'object')} explained, relevance ({explanation.method}) "
        f"after decoder layer {explanation.layers[-1]}"
    )
    rows: list[tuple[object, ...]] = [
        ("configuration", "query", "class", "score", "mass", "in its box", "status")
    ]
    shares, masses, scores = explanation.box_shares, explanation.masses, explanation.scores
    for c, configuration in enumerate(explanation.configurations):
        for o, each in enumerate(objects):
            label = int(explanation.labels[c, o])
            share = float(shares[c, o, -1])
            rows.append(
                (
                    configuration.name,
                    each.query if label < 0 else int(explanation.queries[c, o]),
                    objects.class_names[each.label if label < 0 else label],
                    "" if label < 0 else f"{float(scores[c, o]):.3f}",
                    "" if label < 0 else f"{float(masses[c, o, -1]):.3g}",
                    "" if math.isnan(share) else f"{share:.0%}",
                    explanation.statuses[c][o][-1].value,
                )
            )
    return f"{title}\n{table(rows)}"
