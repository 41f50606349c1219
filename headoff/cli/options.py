"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from headoff.attention import AUTO, attention_label
from headoff.detr import Detector
from headoff.detr.checkpoints import load
from headoff.devices import DTYPES, chosen_device
from headoff.errors import ImageError
from headoff.images import find_images


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """--model, --attention, --device, --dtype, --threads."""
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--model",
        default="scenes",
        metavar="NAME|FILE|FOLDER",
        help="the bundled `scenes` (default); `detr-resnet-50`, `detr-resnet-50-dc5`, `detr-resnet-101` or "
        "`detr-resnet-101-dc5`, downloaded once; a .pth or .safetensors file; a Hugging Face folder or "
        "repository such as facebook/detr-resnet-50",
    )
    group.add_argument(
        "--attention",
        default=AUTO,
        metavar="NAME|PATCH",
        help="what computes attention: `auto` (default: `triton` on a GPU, `sdpa` elsewhere), `eager`, "
        "`package.module:name` or `path/to/file.py:name`",
    )
    group.add_argument(
        "--device", default=None, help="`cpu`, `cuda`, `cuda:1`; CUDA where there is one by default"
    )
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="of weights and activations")
    group.add_argument(
        "--threads",
        type=positive,
        default=None,
        metavar="N",
        help="CPU threads; torch's own choice by default",
    )


def add_confidence_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--confidence",
        type=probability,
        default=0.5,
        metavar="P",
        help="a query whose best class is more probable than this is a detection (default 0.5)",
    )


def load_detector(settings: argparse.Namespace) -> Detector:
    """The detector that `add_detector_options` describe."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return load(
        settings.model,
        attention=settings.attention,
        device=chosen_device(settings.device),
        dtype=DTYPES[settings.dtype],
    )


def provenance(settings: argparse.Namespace, detector: Detector) -> dict[str, str]:
    """What a result was made with, for reports."""
    from headoff import __version__

    made_with = {
        "command": " ".join(["headoff", *sys.argv[1:]]),
        "model": str(settings.model),
        "attention": attention_label(detector.attention),
        "device": str(detector.device),
        "dtype": str(detector.dtype).removeprefix("torch."),
        "headoff": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if detector.device.type == "cuda":
        made_with["gpu"] = torch.cuda.get_device_name(detector.device)
    return made_with


def images_at(path: Path) -> list[Path]:
    """The image at `path`, or the images in the folder there. Raises ImageError where there is none."""
    if path.is_dir():
        return find_images(path)
    if not path.exists():
        raise ImageError(f"there is no image or folder {path}; name one that exists")
    return [path]


def positive(text: str) -> int:
    """An argument that is a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def whole(text: str) -> int:
    """An argument that is a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def probability(text: str) -> float:
    """An argument from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no probability; give a number from 0 to 1")
    return value


def ratio(text: str) -> float:
    """An argument above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no ratio; give a number above 0, such as 1.1")
    return value


def columns(rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells as text with aligned columns."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[index]) for row in cells) for index in range(len(cells[0]))] if cells else []
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    )
