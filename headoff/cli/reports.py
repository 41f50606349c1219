"""One report per image: for an image, or for each of a folder's, where an interrupted run goes on."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from headoff.cli.options import columns, images_at
from headoff.errors import ImageError, SettingError
from headoff.figures.captions import counted
from headoff.outcomes import Status
from headoff.report import FINISHED, folder_index
from headoff.scenes.samples import sample_image
from headoff.sweeps import SweepResult

Work = Callable[[Path, Path, Mapping[str, str], bool], str]
"""(folder of the report, image, provenance, whether to show progress): write the report, return its summary."""


def add_report_options(parser: argparse.ArgumentParser, out: str) -> None:
    """IMAGE|FOLDER, --out, --again."""
    parser.add_argument(
        "image", nargs="?", type=Path, metavar="IMAGE|FOLDER", help="a bundled scene by default"
    )
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder (default {out})")
    parser.add_argument(
        "--again",
        action="store_true",
        help="in a folder, also work on the images whose reports are there already",
    )


def images_asked_for(settings: argparse.Namespace) -> list[Path]:
    """The images. Raises ImageError where there are none, SettingError where no report can go."""
    images = images_at(settings.image or sample_image(0))
    if settings.out.exists() and not settings.out.is_dir():
        raise SettingError(f"--out {settings.out} is a file; name a folder")
    return images


def write_reports(
    settings: argparse.Namespace, images: list[Path], made_with: Mapping[str, str], work: Work
) -> int:
    """Do the `work` for every image and say where the results are; returns the exit code."""
    if settings.image is not None and settings.image.is_dir():
        return _for_folder(settings, images, made_with, work)
    print(work(settings.out, images[0], {"image": str(images[0]), **made_with}, True))
    print(f"report: {settings.out / 'index.html'}")
    return 0


def _for_folder(
    settings: argparse.Namespace, images: list[Path], made_with: Mapping[str, str], work: Work
) -> int:
    """Every image of a folder, each into a folder of its own. One that cannot be read does not stop the others."""
    failed: dict[str, str] = {}
    done: list[Path] = []
    with tqdm(images, desc="working", unit="image") as bar:
        for image in bar:
            # The whole name: street.jpg and street.png are two images.
            folder = settings.out / image.name
            bar.set_postfix_str(image.name)
            provenance = {"image": str(image), **made_with}
            try:
                if settings.again or not _is_finished(folder, provenance):
                    work(folder, image, provenance, False)
                done.append(folder)
            except (ImageError, SettingError) as error:
                failed[image.name] = str(error)
                bar.write(f"headoff: error: {error}", file=sys.stderr)
            finally:
                if done:
                    folder_index(settings.out, done, failures=failed)
    if done:
        print(f"{counted(len(done), 'report')} in {settings.out}, index: {settings.out / 'index.html'}")
    if failed:
        print(f"{counted(len(failed), 'image')} left out, see above", file=sys.stderr)
    return 2 if failed else 0


def _is_finished(folder: Path, made_with: Mapping[str, str]) -> bool:
    """Whether the folder holds a whole report of the same image, detector and options."""
    try:
        earlier = json.loads((folder / FINISHED).read_text())["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    # The command may be worded in many ways that ask for the same.
    return {**earlier, "command": ""} == {**made_with, "command": ""}


def sweep_summary(image: Path, result: SweepResult) -> str:
    """What became of the objects, a line per configuration."""
    objects = ", ".join(f"#{number} {each.class_name}" for number, each in enumerate(result.baseline))
    title = f"{image}: {counted(len(result.baseline), 'object')} with nothing off" + (
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
    return f"{title}\n{table([header, *rows])}"


def table(rows: list[tuple[object, ...]]) -> str:
    """Rows in aligned columns under their header. 256 subsets are for the report; a terminal is for what fits on it."""
    shown = rows if len(rows) <= 61 else rows[:10]
    more = [] if shown is rows else [f"... and {len(rows) - len(shown)} more in the report"]
    return "\n".join([columns(shown), *more])
