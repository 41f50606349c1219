"""`headoff faithfulness`: which relevance methods say what the detector looks at."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headoff.choices import DEAR_METHODS, DEFAULT_FAITHFULNESS, METHODS
from headoff.cli.messages import error
from headoff.cli.options import (
    add_confidence_option,
    add_detector_options,
    add_out_option,
    named_path,
    positive,
    whole,
)

if TYPE_CHECKING:
    from headoff.faithfulness import Faithfulness, Measure

EPILOG = f"""\
methods (those of headoff explain):
{textwrap.fill(", ".join(METHODS), 80, initial_indent="  ", subsequent_indent="  ")}
controls, which no method made and every method has to beat:
  random      random numbers
  box         a Gaussian at the detected box
  edges       edges of the image

measures (docs/faithfulness.md has equations and caveats):
  deletion and insertion curves, by what fills the place of what is taken away:
  tokens_removed       nothing: image tokens are removed from attention
  tokens_zero          zeros in the place of image tokens
  tokens_mean          the mean of the image's tokens
  pixels_grey          the mean colour that images are normalised with
  pixels_blur          the blurred image
  pixels_surroundings  the mean colour of what is left around
    Areas under two curves: deletion (the most relevant first is taken away; lower
    is better) and insertion (it is given back to nothing; higher is better), of
    the object's class probability at its query, and of `found`, the best
    probability x IoU of any query. Deletion is also called positive perturbation,
    and insertion, read backwards, negative perturbation.
  where the relevance is, its share inside and the pointing game:
  detected_box         the box that the detector found
  true_box, true_mask  the true object's box, and its visible pixels
  segmentation         average precision of thresholded maps as masks
  sanity checks, which rank nothing:
  randomisation        similarity to the map of a model with random weights
  targets              similarity to the maps of another class and other objects
  heads:
  causal               does the map lose relevance where switching heads off loses
                       the detection?

images: files, folders, or scenes:N[:FIRST], N held-out scenes of the bundled data
set, whose objects are known to the pixel. Results of images are kept in the
output folder: the same command goes on where it was interrupted, and another
one computes what is missing.

examples:
  headoff faithfulness                    the bundled model on 20 held-out scenes
  headoff faithfulness scenes:200 --method chefer,raw,box --measure all --workers 2
  headoff faithfulness scenes:1000 --most pixels_grey=50,d_rise=100 --estimate
  headoff faithfulness scenes:100 --off "first 4"
  headoff faithfulness val2017/ --model detr-resnet-50 --annotations instances.json
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "faithfulness",
        help="measure which relevance methods say what the detector looks at",
        description="""\
Measure over images how faithful relevance methods are: what becomes of an object
when what a map calls relevant is taken away, and more. Writes a table with 95%
intervals and pairwise significance (a page, table.md, faithfulness.json), numbers of
every object (objects.csv), and figures.""",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "images",
        nargs="*",
        default=["scenes:20"],
        type=_source,
        metavar="IMAGE|FOLDER|scenes:N",
        help="images, folders of images, or held-out scenes (default scenes:20)",
    )
    add_out_option(parser, "headoff-faithfulness")
    group = parser.add_argument_group("what to measure")
    group.add_argument(
        "--method",
        metavar="NAMES",
        help=f"methods and controls, with commas, or all (default all but {', '.join(DEAR_METHODS)})",
    )
    group.add_argument(
        "--measure",
        metavar="NAMES",
        help=f"measures, with commas, or all (default {','.join(DEFAULT_FAITHFULNESS)}, as far as true objects are "
        "known)",
    )
    group.add_argument(
        "--most",
        action="append",
        default=[],
        metavar="NAME=N,...",
        help="only so many images, the first ones, for a method or measure that is dear, or for METHOD/MEASURE; can be "
        "repeated",
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="steps of deletion and insertion curves (default 20)"
    )
    group.add_argument(
        "--off",
        default="none",
        metavar="CONFIGURATION",
        help="explain the detector with these heads off, such as 'first 4' (see headoff sweep --help)",
    )
    group.add_argument(
        "--annotations",
        type=named_path,
        metavar="FILE",
        help="true objects of image files: JSON in COCO's `instances` format",
    )
    group.add_argument("--seed", type=whole, default=0, help="of all random numbers (default 0)")
    add_confidence_option(parser)
    run_group = parser.add_argument_group("how to run")
    run_group.add_argument(
        "--workers", type=positive, default=1, metavar="N", help="processes (default 1; one per core is best)"
    )
    run_group.add_argument(
        "--estimate",
        action="store_true",
        help="measure two images, print what each method and measure takes and how long all images will, and stop",
    )
    run_group.add_argument(
        "--figures", choices=("none", "all"), default="all", help="whether to draw figures (default all)"
    )
    add_detector_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.cli.detectors import load_detector, model_choice, provenance
    from headoff.cli.progress import progress_bar
    from headoff.devices import chosen_device
    from headoff.faithfulness import ExplainedImage, faithfulness
    from headoff.faithfulness.controls import check_methods, known_methods
    from headoff.faithfulness.sources import sources_of
    from headoff.files import lock
    from headoff.report.faithfulness import write_faithfulness

    # Wrong options are reported before the weights are read.
    methods = None
    if settings.method is not None:
        methods = known_methods() if settings.method == "all" else _names(settings.method, "--method")
        check_methods(methods)
    measures = _measures(settings)
    most = _limits(settings.most)
    images = _images(settings.images, settings.out)
    detector = load_detector(settings)
    if settings.method == "all":
        methods = known_methods(detector)
    sources = sources_of(images, detector, settings.annotations)
    common: dict[str, Any] = {
        "off": settings.off,
        "confidence": settings.confidence,
        "seed": settings.seed,
    }
    if settings.estimate:
        return _estimate(detector, sources, methods, measures, most, settings.workers, common)
    load = partial(
        model_choice(settings).load,
        attention=settings.attention,
        device=chosen_device(settings.device),
        dtype=settings.dtype,
    )
    with lock(settings.out):
        with progress_bar("measuring", "image") as update:
            found = faithfulness(
                detector,
                sources,
                methods,
                measures,
                most=most,
                store=settings.out / "images",
                workers=settings.workers,
                load=load,
                progress=update,
                **common,
            )
        made_with = {
            **provenance(settings, detector),
            "images": str(len(found.records)),
            "off": settings.off,
            "confidence": f"{settings.confidence:g}",
            "seed": str(settings.seed),
        }
        example = None
        shown = _example(found)
        if shown is not None and settings.figures != "none":
            by_name = {source.name: source for source in sources}
            picture, truth = by_name[found.records[shown].name].load()
            del common["off"]
            example = shown, ExplainedImage.of(detector, picture, settings.off, truth=truth, **common)
        write_faithfulness(settings.out, found, made_with, example, figures=settings.figures != "none")
    print(found.table())
    print(_costs(found))
    for name, reason in found.failures.items():
        error(f"{name} is left out: {reason}")
    page = "table.md" if settings.figures == "none" else "index.html"
    print(f"report: {settings.out / page}, all numbers: {settings.out / 'faithfulness.json'}")
    return 2 if found.failures else 0


def _names(text: str, option: str) -> tuple[str, ...]:
    from headoff.errors import SettingError

    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise SettingError(f"{option} {text!r} names nothing: give names with commas")
    return names


def _measures(settings: argparse.Namespace) -> list[Measure] | None:
    """The measures, with --steps; None for the default."""
    from headoff.faithfulness import Perturbation, measure_names, resolve_measure

    if settings.measure is None and settings.steps is None:
        return None
    names: Sequence[str] = DEFAULT_FAITHFULNESS
    if settings.measure is not None:
        names = measure_names() if settings.measure == "all" else _names(settings.measure, "--measure")
    found = [resolve_measure(name) for name in names]
    if settings.steps is None:
        return found
    return [
        Perturbation(one.place, one.fill, settings.steps) if isinstance(one, Perturbation) else one
        for one in found
    ]


def _limits(texts: Sequence[str]) -> dict[str, int]:
    """`["d_rise=100,pixels_grey=50"]` as numbers by name."""
    from headoff.errors import SettingError

    limits = {}
    for part in ",".join(texts).split(","):
        if not part.strip():
            continue
        name, _, number = part.partition("=")
        if not number.strip().isdecimal():
            raise SettingError(f"--most {part!r} is no number of images: give NAME=N, such as pixels_grey=50")
        limits[name.strip()] = int(number)
    return limits


def _source(text: str) -> str | Path:
    """An argument that names scenes, or is a path."""
    return text if text.startswith("scenes:") else named_path(text)


def _images(given: Sequence[str | Path], out: Path) -> list[str | Path]:
    """Names of scenes as they are, and the images of files and folders."""
    from headoff.cli.images import images_at

    found: list[str | Path] = []
    for one in given:
        found += [one] if isinstance(one, str) else images_at([one], out).paths
    return list(dict.fromkeys(found))


def _example(found: Faithfulness) -> int | None:
    """The number of the first record with at least two objects, else with one."""
    for least in (2, 1):
        for number, record in enumerate(found.records):
            if len(record.objects) >= least:
                return number
    return None


def _costs(found: Faithfulness) -> str:
    """Mean seconds of what was computed in this run; empty where everything was known."""
    from headoff.wording import format_seconds

    taken: dict[str, list[float]] = {}
    for record in found.records:
        for name, seconds in record.seconds.items():
            taken.setdefault(name, []).append(seconds)
    parts = [f"{name} {format_seconds(sum(of) / len(of))}" for name, of in taken.items()]
    return "\n".join(_wrapped("an image took, of the processor: " + ", ".join(parts))) + "\n" if parts else ""


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 100, subsequent_indent="  ")


def _estimate(
    detector: Any,
    sources: Sequence[Any],
    methods: Sequence[str] | None,
    measures: Any,
    most: dict[str, int],
    workers: int,
    common: dict[str, Any],
) -> int:
    """Print what the first images take with one thread, and what all of them will."""
    from headoff.cli.progress import progress_bar
    from headoff.cli.tables import columns
    from headoff.faithfulness import faithfulness
    from headoff.faithfulness.runner import default_methods, limits_of
    from headoff.timing import torch_threads
    from headoff.wording import counted, format_seconds

    chosen = methods or default_methods(detector)
    count = len(sources)
    maps: dict[str, float] = {}
    pairs: dict[tuple[str, str], float] = {}
    with progress_bar("measuring", "method") as update, torch_threads(1):
        for done, method in enumerate(chosen, start=1):
            found = faithfulness(detector, sources[:2], method, measures, most=most, **common)
            for record in found.records:
                for name, seconds in record.seconds.items():
                    if name == method:
                        maps[name] = maps.get(name, 0.0) + seconds / len(found.records)
                    else:
                        pairs[method, name] = pairs.get((method, name), 0.0) + seconds / len(found.records)
            update(done, len(chosen))
    limit = limits_of(most, found.measures)
    rows: list[tuple[str, str, str, str]] = [("", "CPU seconds an image", "images", "CPU in all")]
    total = 0.0
    for method in chosen:
        images = max(limit(method, measure.name, count) for measure in found.measures)
        seconds = maps.get(method, 0.0)
        total += seconds * images
        rows.append((f"maps of {method}", f"{seconds:.3f}", f"{images:,}", format_seconds(seconds * images)))
    for measure in found.measures:
        limits = {method: limit(method, measure.name, count) for method in chosen}
        seconds = sum(pairs.get((method, measure.name), 0.0) for method in chosen)
        whole = sum(pairs.get((method, measure.name), 0.0) * images for method, images in limits.items())
        total += whole
        rows.append((f"{measure.name}", f"{seconds:.3f}", f"{max(limits.values()):,}", format_seconds(whole)))
    print(columns(rows))
    print(
        f"{counted(count, 'image')}: about {format_seconds(total / workers)} with {counted(workers, 'worker')} of one "
        f"thread, each on a core of its own; measured on {counted(found.objects, 'object')} in "
        f"{counted(len(found.records), 'image')}"
    )
    return 0
