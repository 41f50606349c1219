"""`headoff heads`: what every head contributes to every object."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headoff.choices import ABLATION_KINDS, MEASURES, VALUES
from headoff.cli.options import (
    add_confidence_option,
    add_detector_options,
    add_references_option,
    add_report_options,
    add_site_option,
    named_path,
    positive,
)

if TYPE_CHECKING:
    from headoff.choices import AblationKind
    from headoff.detector import Detector
    from headoff.importance import HeadImportance

DEFAULT_MEASURES = "removal,alone,gradient,shapley_columns"
DEFAULT_VALUES = "probability,logit,iou,found,duplicates"
SUMMARISED = (3, 2)
"""Heads of all layers, and of one layer, that the terminal names for each object; the report has them all."""

EPILOG = """\
measures: a positive score means that the head adds to the value.
  removal              the value with all heads on, less that without this head
  removal_columns      the same for the head in all layers
  alone                what the head adds as the only one of its layer
  gradient             the derivative with respect to the head's gate
  integrated_gradient  that derivative, along the way from all off to all on
  shapley_columns      exact Shapley value of each head in all layers, over all
                       subsets of heads, with interactions of pairs
  shapley_layers       exact Shapley value within the head's layer, too
  shapley              Shapley value among all layers x heads, sampled, with
                       standard errors

values: what is measured, for each object found with nothing off.
  probability, logit   of the object's class at its query
  iou                  of the box of its query with that with nothing off
  found                probability x IoU of the best query, which may change
  duplicates           further detections of the object; a head with a negative
                       score suppresses duplicates
  detections           all detections in the image
  unmatched            those that belong to no object

ablation: what a head that is off contributes. Zero shows what others can do
without it, but gives them an input that they never saw: report two kinds.

examples:
  headoff heads                       the bundled model on a bundled scene
  headoff heads street.jpg --model detr-resnet-50
  headoff heads street.jpg --model detr-resnet-50 --references coco.safetensors
  headoff heads photos/ --measure removal,shapley_columns --value found
  headoff heads street.jpg --site decoder_self --ablate zero,uniform
  headoff heads --measure shapley --pairs 100 --store shapley-values
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "heads",
        help="score what every head contributes to every object",
        description="""\
Score what every head of every layer contributes to every detected object, with a
sign, by several measures. The report has a page with a matrix of layers x heads and
a card for each head, heads.json, heads.csv, heads.safetensors and, with --figures all,
figures; that of several images also has their mean, with 95% intervals.""",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_report_options(parser, "headoff-heads")
    group = parser.add_argument_group("what to score")
    add_site_option(group, "the attention whose heads are scored")
    group.add_argument(
        "--measure",
        default=DEFAULT_MEASURES,
        metavar="NAMES",
        help=f"measures, with commas: {', '.join(MEASURES)} (default {DEFAULT_MEASURES})",
    )
    group.add_argument(
        "--value",
        default=DEFAULT_VALUES,
        metavar="NAMES",
        help=f"values, with commas: {', '.join(VALUES)} (default {DEFAULT_VALUES})",
    )
    group.add_argument(
        "--ablate",
        metavar="KINDS",
        help=f"what a head that is off contributes, with commas: {', '.join(ABLATION_KINDS)} (default zero,mean where "
        "there is a reference set for the model, else zero,uniform)",
    )
    add_references_option(group)
    group.add_argument(
        "--pairs",
        type=positive,
        metavar="N",
        help="for the measure shapley: pairs of permutations to sample (default 32)",
    )
    group.add_argument(
        "--store",
        type=named_path,
        metavar="FOLDER",
        help="keep the values of coalitions of heads here, so that a long run goes on where it was interrupted",
    )
    add_confidence_option(parser)
    add_detector_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.ablation import ablation_draws
    from headoff.cli.detectors import load_detector, provenance
    from headoff.cli.reports import ImageReport, Reports
    from headoff.encoded import EncodedImage
    from headoff.errors import SettingError
    from headoff.importance import HeadCards, Measure, SampledShapley, heads, resolve_measure
    from headoff.importance.measures import check_supported
    from headoff.report import heads_index, write_heads_report
    from headoff.values import resolve_value

    # Wrong options are reported before the weights are read.
    reports = Reports.of(settings)
    measures: list[Measure] = [resolve_measure(name) for name in _names(settings.measure, "--measure")]
    values = [resolve_value(name) for name in _names(settings.value, "--value")]
    check_supported(measures, values)
    asked = None if settings.ablate is None else _kinds(settings.ablate)
    if settings.pairs is not None:
        if not any(isinstance(measure, SampledShapley) for measure in measures):
            raise SettingError("--pairs is for the measure shapley: add it, as in --measure shapley")
        sampled = SampledShapley(settings.pairs)
        measures = [sampled if isinstance(measure, SampledShapley) else measure for measure in measures]
    detector = load_detector(settings)
    kinds = asked or _default_kinds(detector, settings.references)
    for kind in kinds:
        ablation_draws(kind, detector, settings.references)

    def write(report: ImageReport) -> str:
        encoded = EncodedImage.of(detector, report.picture)
        with report.progress_bar("scoring", "coalition") as update:
            importance = heads(
                detector,
                encoded,
                site=settings.site,
                measures=measures,
                values=[value.name for value in values],
                ablations=kinds,
                references=settings.references,
                confidence=settings.confidence,
                store=settings.store,
                progress=update,
            )
        cards = HeadCards.of(
            detector,
            encoded,
            importance,
            references=settings.references,
            confidence=settings.confidence,
        )
        report.write(write_heads_report, importance, cards=cards)
        return summary(report.image, importance)

    made_with = {
        **provenance(settings, detector),
        "site": settings.site,
        "measures": ", ".join(measure.name for measure in measures)
        + (f", {settings.pairs} pairs" if settings.pairs else ""),
        "values": ", ".join(value.name for value in values),
        "ablation": ", ".join(kinds) + (f", references {settings.references}" if settings.references else ""),
        "confidence": f"{settings.confidence:g}",
    }
    return reports.write(made_with, write, heads_index)


def summary(image: Path, importance: HeadImportance) -> str:
    """The heads that matter most to each object, by Shapley values in all layers and by removal, for each ablation."""
    from headoff.cli.tables import table
    from headoff.figures.importance import NOTHING_TO_SCORE, value_title
    from headoff.importance.result import Key
    from headoff.wording import counted

    layers, heads = importance.shape
    objects = len(importance.objects)
    lines = [f"{image}: {counted(objects, 'object')}, {counted(layers * heads, 'head')} of {importance.site}"]
    value = "probability" if "probability" in importance.values else importance.values[0]
    of_image = value in importance.image_values
    if not objects and not of_image:
        return "\n".join([*lines, NOTHING_TO_SCORE])
    for kind in importance.ablations:
        known = [name for name in importance.measures if Key(kind, name, value) in importance.scores]
        wanted = [name for name in ("shapley_columns", "removal") if name in known] or known[:2]
        if not wanted:
            continue
        found = [importance.get(name, value, kind).scores for name in wanted]
        rows: list[tuple[str, ...]] = []
        if of_image:
            rows.append(("image", *(_largest(scores[0].tolist(), layers) for scores in found)))
        else:
            mean = (_largest(scores.mean(0).tolist(), layers) for scores in found)
            rows.append(("mean", *mean))
            for index, name in enumerate(importance.object_names):
                rows.append((name, *(_largest(scores[index].tolist(), layers) for scores in found)))
        lines += ["", f"{value_title(value)}, {kind} ablation:", table(("object", *wanted), rows)]
    return "\n".join(lines)


def _largest(rows: Sequence[Sequence[float]], layers: int) -> str:
    """`H4 +0.36  H2 +0.25`: the scores that are largest in size."""
    from headoff.figures.importance import score_text

    places = [(layer, head) for layer in range(len(rows)) for head in range(len(rows[0]))]
    places.sort(key=lambda place: -abs(rows[place[0]][place[1]]))
    columns = len(rows) == 1 < layers
    texts = []
    for layer, head in places[: SUMMARISED[not columns]]:
        score = score_text(rows[layer][head], 2)
        if score != "0":
            texts.append(f"H{head} {score}" if columns else f"L{layer}H{head} {score}")
    return "  ".join(texts) or "none reaches 0.005"


def _names(text: str, option: str) -> list[str]:
    """`a,b` as names. Raises SettingError where there is none."""
    from headoff.errors import SettingError

    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SettingError(f"{option} {text!r} has no name: see `headoff heads --help` for those there are")
    return list(dict.fromkeys(names))


def _kinds(text: str) -> list[AblationKind]:
    from headoff.errors import SettingError, did_you_mean

    kinds: list[AblationKind] = []
    for name in _names(text, "--ablate"):
        kind = next((known for known in ABLATION_KINDS if known == name), None)
        if kind is None:
            raise SettingError(
                f"there is no ablation kind {name!r}{did_you_mean(name, ABLATION_KINDS)}: use one of "
                f"{', '.join(ABLATION_KINDS)}"
            )
        kinds.append(kind)
    return kinds


def _default_kinds(detector: Detector, references: Path | None) -> list[AblationKind]:
    """Zero, and mean where there is a reference set: one that was given, or the bundled model's."""
    from headoff.ablation import ablation_draws
    from headoff.errors import SettingError

    if references is None:
        try:
            ablation_draws("mean", detector)
        except SettingError:
            return ["zero", "uniform"]
    return ["zero", "mean"]
