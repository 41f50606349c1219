"""`headoff sweep`: switch heads off step by step and report which detections survive."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from headoff.cli.options import (
    add_confidence_option,
    add_detector_options,
    columns,
    images_at,
    load_detector,
    plural,
    provenance,
    whole,
)
from headoff.detr import Detector
from headoff.errors import HeadoffError, ImageError, SettingError
from headoff.gates import (
    DEFAULT_SITE,
    SITES,
    Configuration,
    all_subsets,
    cumulative,
    none_off,
    single_heads,
)
from headoff.images import load_image
from headoff.notation import parse_configuration, parse_order
from headoff.outcomes import Status
from headoff.report import FINISHED, folder_index, write_report
from headoff.scenes.samples import sample_image
from headoff.sweeps import SweepResult, sweep

EXAMPLES = """\
what to switch off:
  By default the cumulative sweep: nothing off, first 1 head off, ... all heads off, in every decoder layer.
  --off takes one configuration and can be repeated; nothing off is always shown beside them:
    'first 3'             the first 3 heads of every decoder layer
    'H2'                  head 2 of every layer          'L5'       all heads of layer 5
    'L4H2,L5H0-3'         head 2 of layer 4 and heads 0 to 3 of layer 5; all counted from 0
    'only L5H2 on'        everything off but this one
    '0,1,0,1,1,0,0,0'     an off vector: heads 1, 3 and 4 off (0.5 is half off)
    'L4H2=0.5'            a gate between 0 (off) and 1 (on)
    'query 17: L5H2'      for object query 17 alone
    'decoder_self L0H1'   in decoder self-attention instead of cross-attention

examples:
  headoff sweep                                      the bundled model on a bundled scene
  headoff sweep street.jpg --model detr-resnet-50 --confidence 0.7
  headoff sweep street.jpg --model detr-resnet-50 --object 0
  headoff sweep photos/ --order random:7 --out random7
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
    parser.add_argument(
        "image", nargs="?", type=Path, metavar="IMAGE|FOLDER", help="a bundled scene by default"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("headoff-sweep"), help="folder (default headoff-sweep)"
    )
    what = parser.add_argument_group("what to switch off")
    one = what.add_mutually_exclusive_group()
    one.add_argument("--off", action="append", metavar="CONFIGURATION", help="see below; can be repeated")
    one.add_argument(
        "--set",
        choices=("cumulative", "single", "subsets"),
        default="cumulative",
        help="cumulative (default), every single head of every layer, or all subsets of heads",
    )
    what.add_argument(
        "--order",
        metavar="ORDER",
        help="order of heads in the cumulative sweep: `7,6,5,4,3,2,1,0`, `reverse`, `random:SEED`",
    )
    what.add_argument(
        "--site", choices=SITES, default=DEFAULT_SITE, help=f"attention to gate (default {DEFAULT_SITE})"
    )
    what.add_argument(
        "--object",
        type=whole,
        metavar="N",
        help="switch heads off for this one object's query alone; objects are what is detected with nothing off, "
        "counted from 0 as `headoff detect` lists them",
    )
    add_confidence_option(parser)
    add_detector_options(parser)
    parser.add_argument(
        "--again",
        action="store_true",
        help="in a folder, also sweep the images whose reports are there already",
    )
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    images = images_at(settings.image or sample_image(0))
    # What can be refused is refused before the weights are read.
    order = parse_order(settings.order) if settings.order else None
    asked = [parse_configuration(text) for text in settings.off or ()]
    if order and (asked or settings.set != "cumulative"):
        raise SettingError("--order belongs to the cumulative sweep; leave out --off and --set")
    if asked and settings.site != DEFAULT_SITE:
        raise SettingError(
            f"--site does not apply to --off; write the site in it: --off '{settings.site} ...'"
        )
    if settings.out.exists() and not settings.out.is_dir():
        raise SettingError(f"--out {settings.out} is a file; name a folder")
    detector = load_detector(settings)
    configurations = _configurations(settings, detector, asked, order)
    made_with = {**provenance(settings, detector), **_asked_for(settings)}
    if settings.image is not None and settings.image.is_dir():
        return _run_folder(settings, images, detector, configurations, made_with)
    result = _sweep_to(settings.out, images[0], settings, detector, configurations, made_with)
    print(_summary(images[0], result))
    print(f"report: {settings.out / 'index.html'}")
    return 0


def _configurations(
    settings: argparse.Namespace, detector: Detector, asked: list[Configuration], order: Any
) -> tuple[Configuration, ...]:
    layout = detector.head_layout
    if asked:
        return (none_off(), *asked)
    if settings.set == "single":
        return (none_off(), *single_heads(layout.layers(settings.site), layout.heads, site=settings.site))
    if settings.set == "subsets":
        return all_subsets(layout.heads, site=settings.site)
    return cumulative(layout.heads, order(layout.heads) if order else None, site=settings.site)


def _sweep_to(
    folder: Path,
    image: Path,
    settings: argparse.Namespace,
    detector: Detector,
    configurations: tuple[Configuration, ...],
    made_with: Mapping[str, str],
) -> SweepResult:
    result = sweep(
        detector, image, configurations, object_index=settings.object, confidence=settings.confidence
    )
    write_report(folder, load_image(image), result, provenance={"image": str(image), **made_with})
    return result


def _run_folder(
    settings: argparse.Namespace,
    images: list[Path],
    detector: Detector,
    configurations: tuple[Configuration, ...],
    made_with: Mapping[str, str],
) -> int:
    """Every image of a folder, each into a folder of its own. One that cannot be read does not stop the others."""
    failed: list[HeadoffError] = []
    done = []
    with tqdm(images, desc="sweeping", unit="image") as bar:
        for image in bar:
            # The whole name: street.jpg and street.png are two images.
            folder = settings.out / image.name
            bar.set_postfix_str(image.name)
            try:
                if settings.again or not _is_finished(folder, {"image": str(image), **made_with}):
                    _sweep_to(folder, image, settings, detector, configurations, made_with)
                done.append(folder)
            except (ImageError, SettingError) as error:
                failed.append(error)
                bar.write(f"headoff: error: {error}", file=sys.stderr)
            finally:
                if done:
                    folder_index(settings.out, done)
    print(
        f"{plural(len(done), 'report')} in {settings.out}, index: {settings.out / 'index.html'}"
        if done
        else ""
    )
    if failed:
        print(f"{plural(len(failed), 'image')} left out, see above", file=sys.stderr)
    return 2 if failed else 0


def _asked_for(settings: argparse.Namespace) -> dict[str, str]:
    """The options that decide what a sweep finds, for the report and for knowing it again."""
    what = (
        "; ".join(f"'{text}'" for text in settings.off)
        if settings.off
        else f"{settings.set} at {settings.site}"
    )
    asked = {"configurations": what, "confidence": f"{settings.confidence:g}"}
    if settings.order:
        asked["order"] = settings.order
    if settings.object is not None:
        asked["object"] = f"only #{settings.object}"
    return asked


def _is_finished(folder: Path, made_with: Mapping[str, str]) -> bool:
    """Whether the folder holds a whole report of the same image, detector and options."""
    try:
        earlier = json.loads((folder / FINISHED).read_text())["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # The command may be worded in many ways that ask for the same.
    return {**earlier, "command": ""} == {**made_with, "command": ""}


def _summary(image: Path, result: SweepResult) -> str:
    objects = ", ".join(f"#{number} {each.class_name}" for number, each in enumerate(result.baseline))
    title = f"{image}: {plural(len(result.baseline), 'object')} with nothing off" + (
        f" ({objects})" if objects else ""
    )
    header = ("configuration", "found", *(status.value for status in Status), "of nothing")
    rows = [
        (
            configuration.name,
            len(detections),
            *outcome.counts.values(),
            len(outcome.of_nothing),
        )
        for configuration, detections, outcome in zip(
            result.configurations, result.detections, result.outcomes, strict=True
        )
    ]
    # 256 subsets are for the report; a terminal is for what fits on it.
    shown = rows if len(rows) <= 60 else rows[:9]
    more = [] if shown is rows else [f"... and {len(rows) - len(shown)} more in the report"]
    return "\n".join([title, columns([header, *shown]), *more])
