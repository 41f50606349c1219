"""`faithfulness`: measures of relevance methods over many images, in one or several processes, and resumable."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from headoff.ablation.references import hash_of_image
from headoff.callables import failure_in_callable
from headoff.choices import DEAR_METHODS, DEFAULT_FAITHFULNESS
from headoff.detector import Detector
from headoff.detr.detector import Detr
from headoff.errors import AttentionError, ImageError, SettingError, did_you_mean
from headoff.faithfulness.controls import CONTROLS, check_methods, known_methods
from headoff.faithfulness.explained import MEMORY_BUDGET, ExplainedImage
from headoff.faithfulness.measures import Measure, Scores, resolve_measure
from headoff.faithfulness.result import Faithfulness
from headoff.faithfulness.sources import Source, sources_of
from headoff.faithfulness.store import ImageRecord, RecordStore, context_of
from headoff.gates import Configuration, read_configurations

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """What is the same for all images; see `faithfulness`."""

    measures: tuple[Measure, ...]
    configuration: Configuration
    confidence: float
    seed: int
    store: Path | None
    memory_budget: int


Job = tuple[Source, list[tuple[str, str]]]
"""An image, and the methods and measures to compute for it, by their names."""


def faithfulness(
    detector: Detector,
    images: Iterable[Any] | Any,
    methods: str | Sequence[str] | None = None,
    measures: str | Measure | Sequence[str | Measure] | None = None,
    *,
    off: Configuration | str = "none",
    most: Mapping[str, int] | None = None,
    annotations: str | Path | None = None,
    confidence: float = 0.5,
    seed: int = 0,
    store: str | Path | None = None,
    workers: int = 1,
    load: Callable[[], Detector] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Callable[[int, int], None] | None = None,
) -> Faithfulness:
    """Measure whether relevance maps say what the detector looks at.

    Args:
        detector: see `headoff.load`.
        images: one or several: paths, pictures or arrays; `"scenes:100"` for held-out scenes of the bundled data set,
            whose objects are known to the pixel (`"scenes:100:5000"`: from seed 5000 on).
        methods: relevance methods (`headoff.relevance.method_names()`) and controls (`random`, `box`, `edges`); by
            default all that suit the detector but `headoff.choices.DEAR_METHODS`.
        measures: see `headoff.faithfulness.measure_names()`; by default
            `headoff.choices.DEFAULT_FAITHFULNESS`, as far as true objects are known.
        off: the configuration that is explained: objects, maps and curves are those with these heads off.
        most: for methods and measures that are dear, how many of the images they get, the first ones, and for a method
            by a measure, which may be none: `{"d_rise": 100, "pixels_grey": 50, "d_rise/causal": 0}`.
        annotations: true objects of image files, a JSON file in COCO's `instances` format.
        confidence: a query counts as a detection if its score exceeds this. Detections are the objects.
        seed: of all random numbers, which depend on nothing else but the image.
        store: a folder of results of images, one file each. What it has is not computed again.
        workers: processes, each with one thread of torch if there are several.
        load: loads the detector in another process; by default the detector is sent there.
        memory_budget: limit of the activations of a batch of changed images, in bytes. It changes results by rounding
            at most.
        progress: called with (number of finished images, number of images).

    Returns:
        A `Faithfulness`. Images that cannot be read are left out, see `Faithfulness.failures`.

    Raises:
        SettingError: a method, measure or another argument is invalid, a measure needs true objects that are not known,
            or nothing is detected in any image.
        GateError: the configuration does not fit the detector.
        ImageError: no image can be read.
        OutputError: the store cannot be written.

    Example:
        >>> found = faithfulness(load("scenes"), "scenes:20", ["chefer", "raw", "random"], "tokens_removed")
        >>> print(found.table())
    """
    chosen = _methods(methods, detector)
    sources = sources_of(images, detector, annotations)
    resolved = _measures(measures, sources, detector)
    for measure in resolved:
        measure.check(detector)
    (configuration,) = read_configurations(off)
    configuration.check(detector.head_layout)
    if workers < 1:
        raise SettingError(f"{workers} workers can measure nothing: give at least 1")
    limit = limits_of(most or {}, resolved)
    setup = Setup(
        tuple(resolved),
        configuration,
        confidence,
        seed,
        None if store is None else Path(store),
        memory_budget,
    )
    jobs: list[Job] = [
        (
            source,
            [
                (method, measure.name)
                for measure in resolved
                for method in chosen
                if index < limit(method, measure.name, len(sources))
            ],
        )
        for index, source in enumerate(sources)
    ]
    records: list[ImageRecord] = []
    failures: dict[str, str] = {}
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(jobs))

    for found in _run(detector, setup, jobs, workers, load, advance):
        if isinstance(found, ImageRecord):
            records.append(found)
        else:
            failures[found[0]] = found[1]
    if not records:
        raise ImageError(next(iter(failures.values())))
    return Faithfulness(tuple(records), chosen, tuple(resolved), failures, configuration, seed)


def limits_of(most: Mapping[str, int], measures: Sequence[Measure]) -> Callable[[str, str, int], int]:
    """(method, measure, number of images) -> how many of them the method gets by that measure.

    Raises:
        SettingError: a name is unknown, or a number is too small.
    """
    methods, names = known_methods(), [measure.name for measure in measures]
    pairs = [f"{method}/{name}" for method in methods for name in names]
    for name, limit in most.items():
        known = pairs if "/" in name else [*methods, *names]
        if name not in known:
            raise SettingError(
                f"{name!r}{did_you_mean(name, known)} in most is neither a method nor a measure that is computed, nor "
                "METHOD/MEASURE"
            )
        if limit < ("/" not in name):
            raise SettingError(f"{name} cannot get {limit} images: give at least 1")

    def limit_of(method: str, measure: str, images: int) -> int:
        return min(most.get(name, images) for name in (method, measure, f"{method}/{measure}"))

    return limit_of


def measure_image(
    detector: Detector, context: Mapping[str, str], setup: Setup, job: Job
) -> ImageRecord | tuple[str, str]:
    """The record of one image, of which the store gives what it has; or its name and why it cannot be read."""
    source, pairs = job
    try:
        picture, truth = source.load()
    except ImageError as error:
        return source.name, str(error)
    stored: RecordStore | None = None
    if setup.store is not None:
        about = {
            **context,
            "image": hash_of_image(picture),
            "truth": None if truth is None else truth.digest,
            "configuration": setup.configuration.text,
            "confidence": setup.confidence,
            "seed": setup.seed,
        }
        stored = RecordStore(setup.store, about)
    known: dict[tuple[str, str], Scores] = {}
    if stored is not None and stored.objects is not None:
        by_name = {measure.name: measure for measure in setup.measures}
        for method, name in pairs:
            scores = stored.find(method, by_name[name])
            if scores is not None:
                known[method, name] = scores
        if len(known) == len(pairs):
            return ImageRecord(source.name, stored.objects, known)
    image = ExplainedImage.of(
        detector,
        picture,
        setup.configuration,
        truth=truth,
        confidence=setup.confidence,
        seed=setup.seed,
        memory_budget=setup.memory_budget,
    )
    seconds: dict[str, float] = {}
    for measure in setup.measures:
        missing = [method for method, of in pairs if of == measure.name and (method, of) not in known]
        if not missing:
            continue
        for method in missing:
            if method not in seconds and len(image):
                seconds[method] = _timed(partial(image.maps, method))[1]
        found, taken = _timed(partial(scores_of, measure, image, missing))
        seconds[measure.name] = taken / len(missing)
        for method, scores in found.items():
            known[method, measure.name] = scores
            if stored is not None:
                stored.add(method, measure, scores)
    objects = [
        {
            "query": detection.query,
            "label": detection.label,
            "class": detection.class_name,
            "score": detection.score,
            "box": list(detection.box),
            "truth": int(image.matched[index]),
        }
        for index, detection in enumerate(image.objects.detections)
    ]
    if stored is not None:
        stored.objects = objects
        stored.write()
    return ImageRecord(source.name, objects, {pair: known[pair] for pair in pairs}, seconds)


def scores_of(measure: Measure, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
    """The scores of a measure, all NaN where the true objects that it needs are not known.

    Raises:
        SettingError: the measure returned something else than scores of all methods and objects.
    """
    shape = len(image), len(measure.quantities)
    lacks = measure.needs and (
        image.truth is None or (measure.needs == "masks" and image.truth.masks is None)
    )
    if not len(image) or lacks:
        empty = torch.full(shape, torch.nan, dtype=torch.float64)
        points = measure.points
        curves = None if points is None else torch.full((*shape, len(points)), torch.nan, dtype=torch.float64)
        return {method: Scores(empty.clone(), curves) for method in methods}
    found = measure.scores(image, methods)
    for method in methods:
        if method not in found or tuple(found[method].values.shape) != shape:
            raise SettingError(
                f"the measure {measure.name!r} gave no scores of shape {shape} for the method {method!r}: return one "
                "row for each object and one column for each quantity"
            )
    return found


def _timed(compute: Callable[[], T]) -> tuple[T, float]:
    """The result, and the seconds of the processor that it took, which do not depend on what else is running."""
    start = time.process_time()
    result = compute()
    return result, time.process_time() - start


def default_methods(detector: Detector) -> tuple[str, ...]:
    """All methods that suit the detector, and the controls, but those that take very long."""
    return tuple(name for name in known_methods(detector) if name not in DEAR_METHODS)


def _methods(methods: str | Sequence[str] | None, detector: Detector) -> tuple[str, ...]:
    if methods is None:
        return default_methods(detector)
    chosen = (methods,) if isinstance(methods, str) else tuple(methods)
    if not chosen:
        raise SettingError("there are no methods to measure: give at least one")
    check_methods(chosen)
    # Controls come last in all tables.
    return tuple(sorted(chosen, key=lambda name: name in CONTROLS))


def _measures(
    measures: str | Measure | Sequence[str | Measure] | None, sources: Sequence[Source], detector: Detector
) -> list[Measure]:
    """The measures; by default those for which enough is known of the true objects."""
    known = max((_KNOWN.index(source.knows) for source in sources), default=0)
    if measures is None:
        names: tuple[str, ...] = DEFAULT_FAITHFULNESS
        if not isinstance(detector, Detr):  # whose tokens cannot be removed
            names = tuple("tokens_mean" if name == "tokens_removed" else name for name in names)
        found = [resolve_measure(name) for name in names]
        return [measure for measure in found if _KNOWN.index(measure.needs) <= known]
    several = [measures] if isinstance(measures, str | Measure) else list(measures)
    resolved = [resolve_measure(spec) for spec in several]
    if not resolved:
        raise SettingError("there are no measures: give at least one")
    given = [measure.name for measure in resolved]
    if len(set(given)) < len(given):
        raise SettingError(f"the measures {', '.join(given)} are not all different: name each only once")
    for measure in resolved:
        if _KNOWN.index(measure.needs) > known:
            raise SettingError(
                f"the measure {measure.name} needs true {measure.needs}, which are not known of these images: give "
                "annotations that have them, or scenes:N"
            )
    return resolved


_KNOWN = ("", "boxes", "masks")


def _run(
    detector: Detector,
    setup: Setup,
    jobs: Sequence[Job],
    workers: int,
    load: Callable[[], Detector] | None,
    advance: Callable[[], None],
) -> list[ImageRecord | tuple[str, str]]:
    """`measure_image` of each job; `advance` is called when one is done."""
    context = context_of(detector)
    found = []
    if workers == 1:
        for job in jobs:
            found.append(measure_image(detector, context, setup, job))
            advance()
        return found
    processes = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, processes, _begin, (load or _Same(detector), context, setup))
    try:
        futures = [pool.submit(_measure_in_worker, job) for job in jobs]
        for future in as_completed(futures):
            future.result()
            advance()
        return [pickle.loads(future.result()) for future in futures]
    except BrokenProcessPool as error:
        raise SettingError(
            "a worker ended before it was done, perhaps for want of memory: use fewer workers, or 1 to see why"
        ) from error
    except BaseException:
        # Files are written whole, so what a worker has not finished is all that is lost. Waiting for it could hang.
        for process in list(pool._processes.values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@dataclass(frozen=True)
class _Same:
    """Gives the detector that was sent to the process."""

    detector: Detector

    def __call__(self) -> Detector:
        return self.detector


_worker: tuple[Detector, Mapping[str, str], Setup]


def _begin(load: Callable[[], Detector], context: Mapping[str, str], setup: Setup) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process
    torch.set_num_threads(1)
    _worker = load(), context, setup


def _measure_in_worker(job: Job) -> bytes:
    """What `measure_image` returns, pickled here: torch keeps a file open for every tensor that it sends."""
    detector, context, setup = _worker
    try:
        return pickle.dumps(measure_image(detector, context, setup, job))
    except (Exception, SystemExit) as error:
        # Told here, as the first process sees no more than the text of the traceback.
        reason = failure_in_callable(error)
        if reason is None:
            raise
        raise AttentionError(reason) from None
