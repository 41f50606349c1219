"""One report for an image, or one for each of several images; an interrupted run over several can be continued."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from headoff.cli.images import ImageChoice, images_at
from headoff.cli.messages import error, left_out, note
from headoff.cli.progress import progress_bar
from headoff.errors import ImageError, SettingError
from headoff.figures.canvas import DPI
from headoff.files import lock
from headoff.images import load_image
from headoff.report import finished_file, folder_index, is_finished, remove_report
from headoff.report.drawing import Drawing
from headoff.wording import counted

WriteIndex = Callable[..., Path]
"""Writes the index of several reports: `headoff.report.folder_index`, or another one with the same arguments."""


@dataclass(frozen=True)
class ImageReport:
    """The report of one image, which a command has to write.

    Attributes:
        folder: where it goes.
        image: the file.
        picture: what is in it.
        provenance: what the report says of its origin.
        drawing: what it draws.
        alone: whether it is the only report: then progress is shown, and the summary is printed.
    """

    folder: Path
    image: Path
    picture: Image.Image
    provenance: Mapping[str, str]
    drawing: Drawing
    alone: bool

    def progress_bar(self, what: str, unit: str) -> AbstractContextManager[Callable[[int, int], None]]:
        """The progress of what is done for this image; nothing where the bar of the images is shown."""
        return progress_bar(what, unit, show=self.alone)

    def write(self, write: Callable[..., Path], *found: object, **more: object) -> None:
        """Call a function such as `headoff.report.write_report` with what was found in the image."""
        with self.progress_bar("drawing", "figure") as update:
            write(
                self.folder,
                self.picture,
                *found,
                provenance=self.provenance,
                progress=update,
                **asdict(self.drawing),
                **more,
            )


WriteReport = Callable[[ImageReport], str]
"""Write the report, return its summary."""


@dataclass(frozen=True)
class Reports:
    """The reports of a command.

    Attributes:
        images: a report for each of them.
        drawing: what they draw.
        out: the folder of the only report, or of all.
        again: whether to replace those of several that are finished.
    """

    images: ImageChoice
    drawing: Drawing
    out: Path
    again: bool

    @classmethod
    def of(cls, settings: argparse.Namespace) -> Reports:
        """Read the options of `add_report_options`. To be called before the weights are read.

        Raises:
            ImageError: there are no images.
            SettingError: --out is a file, or options of figures contradict each other.
        """
        images = images_at(settings.images, settings.out)
        if settings.out.exists() and not settings.out.is_dir():
            raise SettingError(f"--out {settings.out} is a file; name a folder")
        return cls(images, drawing_of(settings), settings.out, settings.again)

    def write(
        self, made_with: Mapping[str, str], write: WriteReport, write_index: WriteIndex = folder_index
    ) -> int:
        """Call `write` for every image and print where the results are. Returns the exit code.

        Of several images there are also an index and totals, by `write_index`.

        Args:
            made_with: the provenance of all reports, without the image and what is drawn.
            write: writes one report.
            write_index: see `WriteIndex`.

        Raises:
            OutputError: another process is writing to the same folder.
        """
        with lock(self.out):
            if self.images.common is not None:
                if is_finished(self.out):
                    note(f"the report of one image in {self.out} is replaced by those of {self.images.given}")
                    remove_report(self.out)
                return self._write_folder(made_with, write, write_index)
            (image,) = self.images.paths
            earlier = _provenance_of(self.out).get("image")
            if earlier not in (None, str(image)):
                note(f"the report of {earlier} in {self.out} is replaced")
            print(write(self._report(image, self.out, made_with)))
            drawn = self.drawing.figures != "none"
            print(f"report: {self.out / 'index.html' if drawn else finished_file(self.out)}")
            return 0

    def _write_folder(self, made_with: Mapping[str, str], write: WriteReport, write_index: WriteIndex) -> int:
        """Write a report for each image, in separate folders. Images that cannot be read are left out."""
        failed: dict[str, str] = {}
        done: list[Path] = []
        index = _Index(write_index, self.out, done, failed)
        with index, tqdm(self.images.paths, desc="working", unit="image") as bar:
            for image in bar:
                # The name with its suffix: street.jpg and street.png are two images.
                name = self.images.place(image).as_posix()
                folder = self.out / name
                bar.set_postfix_str(name)
                try:
                    if self.again or not _is_finished(folder, self._provenance(image, made_with)):
                        write(self._report(image, folder, made_with))
                    done.append(folder)
                except (ImageError, SettingError) as failure:
                    failed[name] = str(failure)
                    error(failure)
                index.refresh()
        if done:
            print(f"{counted(len(done), 'report')} in {self.out}, index: {self.out / 'index.html'}")
        return left_out(len(failed))

    def _report(self, image: Path, folder: Path, made_with: Mapping[str, str]) -> ImageReport:
        return ImageReport(
            folder,
            image,
            load_image(image),
            self._provenance(image, made_with),
            self.drawing,
            alone=self.images.common is None,
        )

    def _provenance(self, image: Path, made_with: Mapping[str, str]) -> dict[str, str]:
        return {"image": str(image), **made_with, **self.drawing.describe()}


def _provenance_of(folder: Path) -> dict[str, str]:
    """What the report in a folder says of its origin; empty where there is none."""
    finished = finished_file(folder)
    try:
        return {} if finished is None else dict(json.loads(finished.read_text())["provenance"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


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
