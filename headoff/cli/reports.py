"""One report for an image, or one for each of several images; an interrupted run over several can be continued."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from headoff.cli.images import ImageChoice, images_at
from headoff.cli.tables import table
from headoff.errors import ImageError, SettingError
from headoff.figures.canvas import DPI
from headoff.files import lock
from headoff.outcomes import Status
from headoff.report import finished_file, folder_index, is_finished, remove_report
from headoff.report.drawing import Drawing
from headoff.sweeps import SweepResult
from headoff.wording import counted

MOST_NAMED = 12
"""Objects that the terminal names; the report has them all."""

WriteReport = Callable[[Path, Path, Mapping[str, str], bool], str]
"""(folder of the report, image, provenance, whether to show progress): write the report, return its summary."""

WriteIndex = Callable[..., Path]
"""Writes the index of several reports: `headoff.report.folder_index`, or another one with the same arguments."""


def images_to_report(settings: argparse.Namespace) -> ImageChoice:
    """The images that were asked for.

    Raises:
        ImageError: there are none.
        SettingError: --out is a file.
    """
    images = images_at(settings.images, settings.out)
    if settings.out.exists() and not settings.out.is_dir():
        raise SettingError(f"--out {settings.out} is a file; name a folder")
    return images


def drawing_of(settings: argparse.Namespace) -> Drawing:
    """What the reports draw.

    Raises:
        SettingError: --dpi is too large.
    """
    files = settings.format is not None or settings.dpi is not None
    if files and settings.figures in ("none", "page"):
        raise SettingError(
            f"--format and --dpi are of the files of --figures all: leave them out, or --figures {settings.figures}"
        )
    return Drawing(
        settings.figures or ("all" if files else "page"), settings.format or "png", settings.dpi or DPI
    )


def write_reports(
    settings: argparse.Namespace,
    images: ImageChoice,
    provenance: Mapping[str, str],
    write: WriteReport,
    write_index: WriteIndex = folder_index,
) -> int:
    """Call `write` for every image and print where the results are. Returns the exit code.

    Of several images there are also an index and totals, by `write_index`.

    Raises:
        OutputError: another process is writing to the same folder.
    """
    with lock(settings.out):
        if images.common is not None:
            if is_finished(settings.out):
                _note(f"the report of one image in {settings.out} is replaced by those of {images.given}")
                remove_report(settings.out)
            return _write_folder(settings, images, provenance, write, write_index)
        (image,) = images.paths
        earlier = _provenance_of(settings.out).get("image")
        if earlier not in (None, str(image)):
            _note(f"the report of {earlier} in {settings.out} is replaced")
        print(write(settings.out, image, {"image": str(image), **provenance}, True))
        drawn = drawing_of(settings).figures != "none"
        print(f"report: {settings.out / 'index.html' if drawn else finished_file(settings.out)}")
        return 0


def _note(text: str) -> None:
    print(f"headoff: note: {text}", file=sys.stderr)


def _provenance_of(folder: Path) -> dict[str, str]:
    """What the report in a folder says of its origin; empty where there is none."""
    finished = finished_file(folder)
    try:
        return {} if finished is None else dict(json.loads(finished.read_text())["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_folder(
    settings: argparse.Namespace,
    images: ImageChoice,
    provenance: Mapping[str, str],
    write: WriteReport,
    write_index: WriteIndex,
) -> int:
    """Write a report for each image, in separate folders. Images that cannot be read are left out."""
    failed: dict[str, str] = {}
    done: list[Path] = []
    index = _Index(write_index, settings.out, done, failed)
    with index, tqdm(images.paths, desc="working", unit="image") as bar:
        for image in bar:
            # The name with its suffix: street.jpg and street.png are two images.
            name = images.place(image).as_posix()
            folder = settings.out / name
            bar.set_postfix_str(name)
            made_with = {"image": str(image), **provenance}
            try:
                if settings.again or not _is_finished(folder, made_with):
                    write(folder, image, made_with, False)
                done.append(folder)
            except (ImageError, SettingError) as error:
                failed[name] = str(error)
                bar.write(f"headoff: error: {error}", file=sys.stderr)
            index.refresh()
    if done:
        print(f"{counted(len(done), 'report')} in {settings.out}, index: {settings.out / 'index.html'}")
    if failed:
        print(f"{counted(len(failed), 'image')} left out, see above", file=sys.stderr)
    return 2 if failed else 0


class _Index:
    """The index of the finished reports, and of why others failed; both lists grow.

    All reports are read each time it is written, so it is written when the block ends, in whatever way, and meanwhile
    so rarely that this takes little time.
    """

    def __init__(
        self, write_index: WriteIndex, folder: Path, done: list[Path], failed: dict[str, str]
    ) -> None:
        self.write_index = write_index
        self.folder, self.done, self.failed = folder, done, failed
        self.due = time.monotonic()

    def refresh(self) -> None:
        if self.done and time.monotonic() >= self.due:
            self.write()

    def write(self) -> None:
        started = time.monotonic()
        self.write_index(self.folder, self.done, failures=self.failed)
        ended = time.monotonic()
        self.due = ended + max(5.0, 20 * (ended - started))

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self.done:
            self.write()


def _is_finished(folder: Path, provenance: Mapping[str, str]) -> bool:
    """Whether the folder holds a complete report of the same image, detector and options."""
    # Different command lines can ask for the same report.
    return {**_provenance_of(folder), "command": ""} == {**provenance, "command": ""}


def sweep_summary(image: Path, result: SweepResult) -> str:
    """What became of the objects: one line for each configuration, and what loses objects at all."""
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
