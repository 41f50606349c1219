"""Detections of a data set under every configuration, into a folder, from where an interrupted run goes on."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from headoff.ablation import References
from headoff.ablation.kinds import NEEDS_REFERENCES, references_for
from headoff.choices import AblationKind
from headoff.detector import Detector
from headoff.errors import HeadoffError, ImageError, SettingError
from headoff.evaluation import manifest
from headoff.evaluation.annotations import read_annotations, scene_truth
from headoff.evaluation.batches import make_batches, shard_of
from headoff.evaluation.engines import Engine, LocalEngine
from headoff.evaluation.results import Results
from headoff.evaluation.shards import FOLDER, pyarrow_parquet, read_shards
from headoff.evaluation.sources import Files, Scenes, Source
from headoff.evaluation.tables import GroundTruth
from headoff.evaluation.work import Work
from headoff.files import lock, output_errors
from headoff.gates import Configuration, cumulative, none_off, read_configurations, stack
from headoff.scenes.held_out import held_out_scenes
from headoff.sweeps import MEMORY_BUDGET
from headoff.versions import versions
from headoff.wording import counted

BATCH = 8
"""Images that are computed together."""
CHECKED = 64
"""Images of an earlier run that are compared with what they are now."""


@dataclass(frozen=True)
class DataSet:
    """Images with their ground truth.

    Attributes:
        truth: their annotations.
        source: the images.
        notes: what is to be noted, a sentence each.
    """

    truth: GroundTruth
    source: Source
    notes: tuple[str, ...] = ()


def open_data_set(
    annotations: str | Path, images: str | Path | None, detector: Detector, limit: int | None = None
) -> DataSet:
    """A data set by its names.

    Args:
        annotations: a file in COCO's `instances` format, see `headoff.evaluation.annotations.read_annotations`; or
            `scenes:N` or `scenes:N:FIRST`, N held-out scenes from the seed FIRST (0), which need no files.
        images: the folder of the images; None for scenes.
        detector: whose classes are annotated.
        limit: the number of images, of those at the beginning; None for all.

    Raises:
        SettingError: as `read_annotations` does; a folder is missing or superfluous; `limit` is below 1; the detector
            knows other classes than those of scenes.
        ImageError: there is no such folder, or it has none of the images.
    """
    if limit is not None and limit < 1:
        raise SettingError(f"{limit} images cannot be evaluated: give 1 or more")
    scenes = held_out_scenes(str(annotations), detector)
    if scenes is not None:
        if images is not None:
            raise SettingError(
                f"{annotations} are drawn, and need no folder of images: leave {str(images)!r} out"
            )
        count = scenes.count if limit is None else min(scenes.count, limit)
        return DataSet(scene_truth(count, scenes.first, scenes.side), Scenes(scenes.first, scenes.side))
    if images is None:
        raise SettingError(f"the folder of the images of {str(annotations)!r} is missing: name it as well")
    folder = Path(images)
    if not folder.is_dir():
        raise ImageError(f"there is no folder of images {str(folder)!r}: check the path")
    truth, notes = read_annotations(annotations, detector.class_names, limit)
    source = Files(folder.absolute(), truth.names, truth.sizes)
    missing = _missing(source)
    if len(missing) == len(truth):
        raise ImageError(
            f"folder {str(folder)!r} has none of the {counted(len(truth), 'image')} of {str(annotations)!r}, such as "
            f"{truth.names[0]!r}: name the folder that they are in"
        )
    if missing:
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        notes.append(f"{folder} lacks {truth.names[missing[0]]}{more} of {counted(len(truth), 'image')}")
    return DataSet(truth, source, tuple(notes))


def evaluate(
    detector: Detector,
    annotations: str | Path | DataSet,
    images: str | Path | None = None,
    configurations: Configuration | str | Iterable[Configuration | str] | None = None,
    *,
    out: str | Path,
    ablation: AblationKind = "zero",
    references: References | str | Path | None = None,
    engine: Engine | Literal["local", "ray"] = "local",
    batch: int = BATCH,
    limit: int | None = None,
    shard: tuple[int, int] | None = None,
    strict: bool = False,
    threads: int | None = None,
    memory_budget: int = MEMORY_BUDGET,
    progress: Callable[[int, int], object] | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Results:
    """The detections of a data set's images under every configuration.

    They are written to a folder, batch by batch. Where that has results of an earlier run with the same arguments, only
    what is missing is computed. An image that cannot be read is left out, see `Results.skipped`, and tried again by the
    next run.

    Args:
        detector: see `headoff.load`.
        annotations, images: see `open_data_set`; or a `DataSet`.
        configurations: configurations, or their text (`"first 3"`). By default the cumulative sweep. Nothing off is
            always the first, and what is equal is computed once.
        out: the folder.
        ablation, references: what heads that are off contribute, see `headoff.sweep`.
        engine: who computes: `local` is this process, with others that read images; `ray` is Ray Data, see
            `headoff.evaluation.ray_engine`. Both find the same.
        batch: images that are computed together. It changes detections by rounding.
        limit: the number of images, of those at the beginning; None for all.
        shard: (i, n) for every n-th batch from the i-th, counted from 1: n runs, on machines that share the folder,
            compute all of it.
        strict: whether an image that cannot be read is an error.
        threads: of torch on the CPU, which change detections by rounding. By default those of the run that is
            continued, or as many as torch has.
        memory_budget: see `headoff.sweep`.
        progress: called with (finished images, images) of this run's share, at the beginning and after each batch.
        provenance: what reports say of the run.

    Raises:
        SettingError: an argument is invalid, the folder has results of another run or of other images, or a package is
            not installed.
        GateError: a configuration cannot be read, does not fit the detector, or names objects.
        ImageError: there are no images; or `strict`, and one cannot be read.
        NonFiniteError: the detector's output is not finite.
        OutputError: another process is writing to the folder, or it cannot be written.

    Example:
        >>> results = headoff.evaluate(headoff.load("scenes"), "scenes:100", out="results")
        >>> results.detections(0).scores.max()
    """
    pyarrow_parquet()
    chosen = chosen_configurations(detector, configurations)
    computes = _engine(engine)
    data = (
        annotations
        if isinstance(annotations, DataSet)
        else open_data_set(annotations, images, detector, limit)
    )
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise SettingError(f"{str(folder)!r} is a file: name a folder for the results")
    work = Work(
        source=data.source,
        names=data.truth.names,
        sizes=data.truth.sizes,
        batches=make_batches(data.truth.sizes, detector.preprocessing, batch),
        preprocessing=detector.preprocessing,
        configurations=chosen,
        ablation=ablation,
        references=references_for(ablation, detector, references) if ablation in NEEDS_REFERENCES else None,
        threads=threads or manifest.threads_of(folder) or torch.get_num_threads(),
        memory_budget=memory_budget,
        strict=strict,
    )
    share = shard_of(len(work.batches), shard)
    with ExitStack() as contexts:
        contexts.enter_context(lock(folder, shared=shard is not None))
        if shard is not None:
            contexts.enter_context(lock(folder / f"shard {shard[0]} of {shard[1]}"))
        else:
            manifest.remove_unused(folder)
        device = contexts.enter_context(computes.connected(detector))
        about = manifest.identity(work, detector, device, data.truth)
        manifest.bind(folder, about, data.truth, [one.name for one in chosen], provenance or versions())
        _remove_parts(folder, work, share)
        missing, finished = _missing_batches(folder, work, share)
        total = sum(len(work.batches[number]) for number in share)
        if progress is not None:
            progress(finished, total)
        if missing:
            for done in computes.run(work, detector, missing, folder):
                finished += len(work.batches[done.number])
                if progress is not None:
                    progress(finished, total)
    return Results(folder)


def chosen_configurations(
    detector: Detector, configurations: Configuration | str | Iterable[Configuration | str] | None = None
) -> tuple[Configuration, ...]:
    """Nothing off, and these configurations, none of them twice; by default the cumulative sweep.

    Raises:
        GateError: one cannot be read, does not fit the detector, or names objects.
    """
    layout = detector.head_layout
    given = cumulative(layout.heads) if configurations is None else read_configurations(configurations)
    # Equal ones have the name of the first.
    chosen = tuple(dict.fromkeys((none_off(), *given)))
    stack(chosen, layout)  # raises what would otherwise be raised after the folder has been written to
    return chosen


def _engine(engine: Engine | str) -> Engine:
    if engine == "ray":
        from headoff.evaluation.ray_engine import RayEngine

        return RayEngine()
    if engine == "local":
        return LocalEngine()
    if isinstance(engine, str):
        raise SettingError(f"there is no engine {engine!r}: use 'local' or 'ray'")
    return engine


def _missing(source: Files) -> list[int]:
    """Indices of the images that are not there."""
    # Listing a folder once is much faster than asking for a hundred thousand files over a network.
    try:
        there = {unicodedata.normalize("NFC", entry.name) for entry in os.scandir(source.folder)}
    except OSError:
        there = set()
    return [
        index
        for index, name in enumerate(source.names)
        if unicodedata.normalize("NFC", name) not in there and not source.path(index).is_file()
    ]


def _remove_parts(folder: Path, work: Work, share: Sequence[int]) -> None:
    """Remove what processes that were killed have left behind of the batches of `share`."""
    parts = list((folder / FOLDER).glob(".batch-*.part"))
    for part in parts:
        number = part.name.removeprefix(".batch-").partition(".")[0]
        if number.isdecimal() and int(number) in share:
            with output_errors(part):
                part.unlink(missing_ok=True)


def _missing_batches(folder: Path, work: Work, share: Sequence[int]) -> tuple[list[int], int]:
    """The batches of `share` that are still to be computed, and the number of images of the others.

    A batch that lacks images is computed again where one of them can now be read.

    Raises:
        SettingError: an image is another one than the one that was computed.
    """
    done = {found.number: found for found in read_shards(folder) if found.number in share}
    computed = [
        (index, digest)
        for found in done.values()
        for index, digest in zip(found.images, found.digests, strict=True)
    ]
    for index, digest in computed[:: max(1, len(computed) // CHECKED)]:
        try:
            now = work.source.load(index)[1]
        except HeadoffError as error:
            raise SettingError(
                f"image {work.names[index]!r} was evaluated by an earlier run and cannot be read now ({error}); "
                "restore it, or name another folder for the results"
            ) from error
        if now != digest:
            raise SettingError(
                f"image {work.names[index]!r} is another one than the one that was evaluated in {str(folder)!r}: name "
                "the same images, or another folder for the results"
            )
    again = {
        number
        for number, found in done.items()
        if found.skipped and (work.strict or any(map(work.can_read, found.skipped)))
    }
    missing = [number for number in share if number not in done or number in again]
    absent = set(missing)
    return missing, sum(len(work.batches[number]) for number in share if number not in absent)
