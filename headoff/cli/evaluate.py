"""`headoff evaluate`: what heads off cost over a data set."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from headoff.choices import DEFAULT_SITE, METHODS, SITES, VALUES, Site
from headoff.cli.messages import note
from headoff.cli.options import (
    CONFIGURATION_SETS,
    NOTATION,
    add_ablation_options,
    add_detector_options,
    add_drawing_options,
    add_out_option,
    named_path,
    positive,
    probability,
    whole,
)
from headoff.errors import SettingError

if TYPE_CHECKING:
    from headoff.cli.configurations import ConfigurationChoice
    from headoff.detector import Detector
    from headoff.evaluation.engines import Engine
    from headoff.evaluation.orders import ImportanceOrder
    from headoff.evaluation.results import Results
    from headoff.evaluation.run import DataSet
    from headoff.gates import Configuration

ENGINES = ("local", "ray")
MOST_NAMED = 20
"""Images left out that the terminal names; summary.json has them all."""

EPILOG = f"""\
what to switch off:
  Default: the cumulative sweep. --set and --off can be repeated and combined; nothing off is always the first, and
  what is asked for twice is computed once.
{NOTATION}
how it runs:
  Images are read by processes of their own while the model computes, in batches of like sizes; an image is encoded
  once for all configurations. Detections go to OUT/detections batch by batch. After Ctrl-C, a crash or a full disk the
  same command goes on from there; another command in the same folder is rejected. An image that cannot be read is left
  out and named at the end, unless --strict, and tried again by the next run.
  Machines that share a folder: one command each, with --shard 1/4 to --shard 4/4; afterwards once without --shard.
  On a Ray cluster: --engine ray --address auto. Both engines find the same, bit for bit, on the same kind of device
  with the same --threads and --batch.

exit codes:
  0 all images were evaluated; 1 some were left out, see the names; 2 an option or a file is invalid; 130 interrupted

examples:
  headoff evaluate scenes:1000                                  held-out scenes, which need no files
  headoff evaluate scenes:1000 --set cumulative --set single --set subsets --out results
  headoff evaluate scenes:1000 --order importance --relevance 40 --faithfulness 20
  headoff evaluate instances_val2017.json val2017/ --model detr-resnet-50 --set cumulative --set single
  headoff evaluate instances_val2017.json val2017/ --model detr-resnet-50 --limit 500
  headoff evaluate boxes.json photos/ --model mine.pth --classes names.txt --off 'only L5H2 on' --ablate uniform
  headoff evaluate instances_train2017.json train2017/ --model detr-resnet-50 --engine ray --address auto
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "evaluate",
        help="what heads off cost over a data set: average precision and outcomes, on this machine or a cluster",
        description="""\
Detect the objects of a data set under every configuration, and report average
precision with intervals, differences to nothing off, and what became of the objects:
a page, summary.json, CSV tables, and all detections in Parquet.""",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "annotations",
        metavar="ANNOTATIONS",
        help="a file in COCO's `instances` format; or scenes:N or scenes:N:FIRST, N held-out scenes from seed FIRST",
    )
    parser.add_argument(
        "images", nargs="?", type=named_path, metavar="IMAGES", help="folder of the images; none for scenes"
    )
    add_out_option(parser, "headoff-evaluate", "folder of the results")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N images only")
    parser.add_argument(
        "--strict",
        action="store_true",
        help="stop at an image that cannot be read, instead of leaving it out",
    )
    comes = parser.add_argument_group("what comes out")
    add_drawing_options(comes)
    comes.add_argument(
        "--resamples",
        type=whole,
        default=200,
        metavar="N",
        help="samples of the bootstrap over images, for intervals; 0 for none (default 200)",
    )
    comes.add_argument(
        "--confidence",
        type=probability,
        default=0.5,
        metavar="P",
        help="detections above P are counted as kept, lost, ...; AP takes all (default 0.5)",
    )
    comes.add_argument(
        "--relevance",
        type=whole,
        default=0,
        metavar="N",
        help="also explain the objects of N images: share of relevance in the box, mass (default 0)",
    )
    comes.add_argument(
        "--faithfulness",
        type=whole,
        default=0,
        metavar="N",
        help="also measure on N images whether relevance is faithful: deletion and insertion of image tokens, 80 "
        "passes through encoder and decoder for each object and configuration (default 0)",
    )
    comes.add_argument(
        "--relevance-method",
        default=METHODS[0],
        metavar="NAME",
        help=f"of both: {', '.join(METHODS)}, or best (default {METHODS[0]})",
    )
    comes.add_argument(
        "--relevance-configurations",
        metavar="WHICH",
        help=f"configurations of both: all, {', '.join(CONFIGURATION_SETS)}, or N, the first N (default: all of up to "
        "16, of more the cumulative sweep, or the first 16)",
    )
    group = parser.add_argument_group("what to switch off")
    group.add_argument(
        "--off", action="append", metavar="CONFIGURATION", help="a configuration, see below; can be repeated"
    )
    group.add_argument(
        "--set",
        action="append",
        choices=CONFIGURATION_SETS,
        help="the cumulative sweep, every single head of every layer, or all subsets of heads; can be repeated "
        "(default: cumulative, without --off)",
    )
    group.add_argument(
        "--order",
        metavar="ORDER",
        help="order of heads in the cumulative sweep: `7,6,5,4,3,2,1,0`, `reverse`, `random:SEED`, `importance` (the "
        "least important first, by mean Shapley values) or `importance:most`, see --importance",
    )
    group.add_argument(
        "--importance",
        type=named_path,
        metavar="FOLDER",
        help="results of `headoff heads` over other images, whose Shapley values make the order by importance "
        "(default: they are measured on a sample of these images, which favours the order)",
    )
    group.add_argument(
        "--importance-images",
        type=positive,
        metavar="N",
        help="images of that sample, always the same ones (default 32)",
    )
    group.add_argument(
        "--importance-value",
        choices=(*VALUES, "AP"),
        help="what heads contribute to (default found: class probability x IoU of the box; AP: of a folder of `headoff "
        "evaluate --set subsets`)",
    )
    group.add_argument(
        "--site",
        action="append",
        choices=SITES,
        help=f"the attention that --set gates; can be repeated (default {DEFAULT_SITE})",
    )
    add_ablation_options(group)
    run = parser.add_argument_group("how to run")
    run.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="this process (default), or Ray Data (headoff[ray])",
    )
    run.add_argument(
        "--address",
        help="of a Ray cluster, `auto` for the one of this machine (default: a Ray that ends with the command)",
    )
    run.add_argument(
        "--batch", type=positive, default=8, metavar="N", help="images that are computed together (default 8)"
    )
    run.add_argument(
        "--workers",
        type=whole,
        metavar="N",
        help="local: processes that read images (default: as many as suit the device); ray: actors that hold the model "
        "(default: one on each GPU, or on --threads CPUs)",
    )
    run.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="every N-th batch from the I-th, counted from 1, and no summary",
    )
    add_detector_options(parser)
    parser.set_defaults(run=run_evaluate)


def run_evaluate(settings: argparse.Namespace) -> int:
    """Run the command."""
    from tqdm import tqdm

    from headoff.cli.configurations import describe_ablation
    from headoff.cli.detectors import load_detector, provenance
    from headoff.cli.progress import progress_bar
    from headoff.cli.reports import drawing_of
    from headoff.evaluation.relevance import explained
    from headoff.evaluation.run import chosen_configurations, evaluate, open_data_set
    from headoff.evaluation.shards import pyarrow_parquet
    from headoff.evaluation.summary import summarise
    from headoff.files import lock
    from headoff.wording import counted

    pyarrow_parquet()
    engine = _engine(settings)
    choices = _choices(settings)
    drawing = drawing_of(settings)
    _check_relevance(settings)
    # Actors put the model where it is computed.
    here = (
        settings if settings.engine == "local" else argparse.Namespace(**{**vars(settings), "device": "cpu"})
    )
    detector = load_detector(here)
    data = open_data_set(settings.annotations, settings.images, detector, settings.limit)
    for text in data.notes:
        note(text)
    made_with = {
        **provenance(settings, detector),
        "annotations": str(settings.annotations),
        **({"images": str(settings.images)} if settings.images else {}),
        "engine": settings.engine,
        **describe_ablation(settings),
    }
    try:
        # The summary is of what nobody writes to in the meantime.
        with lock(settings.out, shared=settings.shard is not None):
            configurations = chosen_configurations(
                detector, _configurations(choices, settings, detector, data)
            )
            explained(configurations, settings.relevance_configurations)
            with _progress() as update:
                results = evaluate(
                    detector,
                    data,
                    configurations=configurations,
                    out=settings.out,
                    ablation=settings.ablate,
                    references=settings.references,
                    engine=engine,
                    batch=settings.batch,
                    shard=settings.shard,
                    strict=settings.strict,
                    threads=settings.threads,
                    progress=update,
                    provenance=made_with,
                )
            print(
                f"{len(results.done):,} of {counted(len(results.truth), 'image')} under "
                f"{counted(len(results.configurations), 'configuration')}: {settings.out / 'detections'}"
            )
            if settings.shard is None:
                total = len(results.configurations)
                with (
                    tqdm(total=total, desc="scoring", unit="configuration", leave=False) as bar,
                    progress_bar("explaining", "image", show=settings.relevance > 0) as explaining,
                    progress_bar("faithfulness", "image", show=settings.faithfulness > 0) as measuring,
                ):
                    written = summarise(
                        settings.out,
                        pictures=data.source,
                        **asdict(drawing),
                        resamples=settings.resamples,
                        confidence=settings.confidence,
                        progress=bar.update,
                        relevance=settings.relevance,
                        detector=detector,
                        references=settings.references,
                        relevance_progress=explaining,
                        faithfulness=settings.faithfulness,
                        faithfulness_progress=measuring,
                        method=settings.relevance_method,
                        relevance_of=settings.relevance_configurations,
                    )
                print(f"summary: {written}")
            else:
                print("When all shards are done, the same command without --shard makes the summary.")
    except KeyboardInterrupt:
        print(
            f"\nheadoff: interrupted; what is finished is in {settings.out}, and the same command goes on from there",
            file=sys.stderr,
        )
        return 130
    return _left_out(results)


def _left_out(results: Results) -> int:
    """Name the images that were left out; the exit code."""
    from headoff.wording import counted

    skipped = list(results.skipped.values())
    if not skipped:
        return 0
    print(f"headoff: {counted(len(skipped), 'image')} left out:", file=sys.stderr)
    for reason in skipped[:MOST_NAMED]:
        print(f"  {reason}", file=sys.stderr)
    if len(skipped) > MOST_NAMED:
        print(f"  and {len(skipped) - MOST_NAMED:,} more", file=sys.stderr)
    return 1


def _engine(settings: argparse.Namespace) -> Engine:
    """The engine that the options ask for. Raises SettingError where they contradict each other."""
    if settings.engine == "ray":
        from headoff.evaluation.ray_engine import RayEngine

        device = None if settings.device is None else settings.device.partition(":")[0]
        return RayEngine(settings.address, settings.workers or None, device)
    from headoff.evaluation.engines import LocalEngine

    if settings.address:
        raise SettingError("--address is that of a Ray cluster: give --engine ray as well")
    return LocalEngine(settings.workers)


def _check_relevance(settings: argparse.Namespace) -> None:
    """Raise SettingError where options of relevance are unknown, or of nothing."""
    from headoff.relevance.methods import resolve_method

    resolve_method(settings.relevance_method)
    given = settings.relevance_method != METHODS[0] or settings.relevance_configurations is not None
    if given and not (settings.relevance or settings.faithfulness):
        raise SettingError(
            "--relevance-method and --relevance-configurations are of images that are explained: give --relevance N or "
            "--faithfulness N as well"
        )


def _choices(settings: argparse.Namespace) -> list[ConfigurationChoice]:
    """What makes the configurations, once the detector is known.

    Raises:
        GateError: a configuration or an order cannot be read.
        SettingError: options contradict each other.
    """
    from headoff.cli.configurations import ConfigurationChoice, read_order
    from headoff.gates import parse_configuration

    off = tuple(parse_configuration(text) for text in settings.off or ())
    sets = settings.set or ([] if off else ["cumulative"])
    if settings.order and "cumulative" not in sets:
        raise SettingError("--order is that of the cumulative sweep: give --set cumulative as well")
    if settings.site and not sets:
        raise SettingError("--site says where --set switches heads off: give --set as well")
    order, by_importance = read_order(settings.order)
    if by_importance is None and (
        settings.importance or settings.importance_images or settings.importance_value
    ):
        raise SettingError("--importance makes an order by importance: give --order importance as well")
    if settings.importance and settings.importance_images:
        raise SettingError(
            "--importance-images are a sample of these images, and --importance is of others: leave one of them out"
        )
    if settings.importance_value == "AP" and not settings.importance:
        raise SettingError(
            "AP is of a data set and not of an image: evaluate others with --set subsets, and give that folder as "
            "--importance"
        )
    # What is equal has the name of the first, and the cumulative sweep is known by its names.
    names = sorted(dict.fromkeys(sets), key=lambda name: name != "cumulative")
    chosen = [
        ConfigurationChoice(name, site, (), order, by_importance)
        if name == "cumulative"
        else ConfigurationChoice(name, site, (), None)
        for site in dict.fromkeys(settings.site or [DEFAULT_SITE])
        for name in names
    ]
    return [*chosen, ConfigurationChoice(None, DEFAULT_SITE, off, None)]


def _configurations(
    choices: Sequence[ConfigurationChoice], settings: argparse.Namespace, detector: Detector, data: DataSet
) -> list[Configuration]:
    """The configurations, of which a cumulative sweep by importance has the order that the folder is bound to."""
    from headoff.cli.progress import progress_bar
    from headoff.evaluation.orders import IMAGES, STORE, VALUE, bound_orders, measured_order, read_order

    by_site = {choice.site: choice.by_importance for choice in choices if choice.by_importance is not None}
    orders: dict[Site, tuple[int, ...]] = {}
    if by_site:
        count = settings.importance_images or IMAGES
        about = {
            "first": by_site,
            "ablation": settings.ablate,
            "value": settings.importance_value,
            "folder": str(settings.importance or ""),
            "images": 0 if settings.importance else count,
        }

        def measure() -> list[ImportanceOrder]:
            if settings.importance:
                return [
                    read_order(settings.importance, *one, settings.ablate, settings.importance_value)
                    for one in by_site.items()
                ]
            with progress_bar("measuring importance", "image") as update:
                return [
                    measured_order(
                        detector,
                        data,
                        *one,
                        images=count,
                        value=settings.importance_value or VALUE,
                        ablation=settings.ablate,
                        references=settings.references,
                        confidence=settings.confidence,
                        store=settings.out / STORE,
                        progress=update,
                    )
                    for one in by_site.items()
                ]

        for found in bound_orders(settings.out, about, measure):
            orders[found.site] = found.heads
            note(found.describe())
    return [
        one
        for choice in choices
        for one in (
            choice if choice.by_importance is None else choice.ordered(orders[choice.site])
        ).configurations(detector)
    ]


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar with images a second and the time that is left, which starts at what an earlier run has done."""
    from tqdm import tqdm

    with tqdm(desc="evaluating", unit="image", leave=False, smoothing=0.1) as bar:

        def update(done: int, total: int) -> None:
            if bar.total is None:
                bar.reset(total)
                bar.initial = bar.n = done
                bar.refresh()
            else:
                bar.update(done - bar.n)

        yield update


def _shard(text: str) -> tuple[int, int]:
    """An argument such as 2/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no shard; give one such as 1/8, up to 8/8")
    return int(found[1]), int(found[2])
