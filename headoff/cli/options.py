"""Options that several commands share, and types of arguments.

Nothing here imports torch, so that `headoff COMMAND --help` is fast.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from headoff.choices import ABLATION_KINDS, DEFAULT_SITE, DTYPES, FIGURE_FORMATS, FIGURES, SITES, Site

LONGEST_NAME = 255
"""Bytes of the name of a file or folder, in all usual file systems."""
CONFIGURATION_SETS = ("cumulative", "single", "subsets")

NOTATION = """\
  --off takes one configuration and can be repeated; the baseline (none off) is always added:
    'first 3', 'last 3'   the first or last 3 heads of every decoder layer
    'H2'                  head 2 of every layer          'L5'       all heads of layer 5
    'L4H2,L5H0-3'         head 2 of layer 4 and heads 0 to 3 of layer 5; all counted from 0
    'only L5H2 on'        everything off except this head
    '0,1,0,1,1,0,0,0'     an off vector: heads 1, 3 and 4 off (0.5 is half off)
    'L4H2=0.5'            a gate between 0 (off) and 1 (on)
    'object 0: L5H2'      for the query of the best detection only; 'query 17: L5H2' by number
    'decoder_self L0H1'   in decoder self-attention instead of cross-attention
    'edges = L5H2,L5H7'   a name of your own
"""


def add_model_options(
    parser: argparse.ArgumentParser, default: str | None = "scenes"
) -> argparse._ArgumentGroup:
    """Add --model and what its file may not say, in a group of their own."""
    group = parser.add_argument_group("detector")
    group.add_argument(
        "--model",
        default=default,
        metavar="NAME|FILE|FOLDER",
        help=f"the bundled DETR `scenes`{' (default)' if default else ''} or RT-DETR `scenes-deformable`; "
        "`detr-resnet-50`, `detr-resnet-50-dc5`, `detr-resnet-101` or `detr-resnet-101-dc5`, downloaded once; a .pth "
        "or .safetensors file; a Hugging Face folder or repository such as facebook/detr-resnet-50",
    )
    group.add_argument(
        "--heads-per-layer",
        type=positive,
        metavar="N",
        help="heads of every attention, where the model's file does not say it (default: what it says, else 8)",
    )
    group.add_argument(
        "--dc5",
        action=argparse.BooleanOptionalAction,
        help="whether the backbone's last stage is dilated (default: what the file or its name says)",
    )
    group.add_argument(
        "--classes",
        type=named_path,
        metavar="FILE",
        help="names of the classes, one a line (default: those in the model's file, or COCO's)",
    )
    group.add_argument(
        "--short-side",
        type=positive,
        metavar="PIXELS",
        help="resize images to this short side; the limit of the long side is scaled with it (default: as the model "
        "was published)",
    )
    return group


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `add_model_options`, --attention, --device, --dtype and --threads."""
    group = add_model_options(parser)
    group.add_argument(
        "--attention",
        default="auto",
        metavar="NAME|PATCH",
        help="the attention implementation: `auto` (default, `sdpa`), `sdpa`, `eager`, `triton`, "
        " `package.module:name` or `path/to/file.py:name`",
    )
    group.add_argument(
        "--device", default=None, help="`cpu`, `cuda` or `cuda:1` (default: CUDA if available, else the CPU)"
    )
    group.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="dtype of weights and activations (default float32)",
    )
    group.add_argument(
        "--threads", type=positive, default=None, metavar="N", help="CPU threads (default: torch chooses)"
    )


def add_confidence_option(parser: argparse.ArgumentParser) -> None:
    """Add --confidence."""
    parser.add_argument(
        "--confidence",
        type=probability,
        default=0.5,
        metavar="P",
        help="a query counts as a detection if the probability of its best class exceeds P (default 0.5)",
    )


def add_autocast_option(parser: argparse.ArgumentParser) -> None:
    """Add --autocast."""
    parser.add_argument(
        "--autocast",
        choices=("bfloat16", "float16"),
        help="compute convolutions, linear layers and attention in this dtype; also run in full precision, and print "
        "what differs",
    )


def add_image_argument(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add IMAGE|FOLDER, any number of them, or at least one if `required`."""
    parser.add_argument(
        "images",
        nargs="+" if required else "*",
        type=named_path,
        metavar="IMAGE|FOLDER",
        help="images, and folders of images, with the folders in them"
        + ("" if required else "; default: a bundled scene"),
    )


def add_report_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add IMAGE|FOLDER, --out (`out` by default), --again, --figures, --format and --dpi."""
    add_image_argument(parser)
    add_out_option(parser, out, "folder of the report")
    parser.add_argument(
        "--again",
        action="store_true",
        help="for several images: also redo those that have a finished report",
    )
    add_drawing_options(parser.add_argument_group("what to draw"))


def add_out_option(parser: argparse.ArgumentParser, out: str, what: str = "folder") -> None:
    """Add --out, a folder, `out` by default; `what` begins its help."""
    parser.add_argument("--out", type=named_path, default=Path(out), help=f"{what} (default {out})")


def add_drawing_options(group: argparse._ArgumentGroup) -> None:
    """Add --figures, --format and --dpi, which `headoff.cli.reports.drawing_of` reads."""
    group.add_argument(
        "--figures",
        choices=FIGURES,
        help="`none`: numbers only; `page`: the page, which draws everything from data (default); `all`: also every "
        "figure as a file, for papers (default with --format or --dpi); maps are drawn of the 24 best objects",
    )
    group.add_argument(
        "--format", choices=FIGURE_FORMATS, help="format of the files of figures (default png)"
    )
    group.add_argument(
        "--dpi", type=positive, metavar="N", help="pixels an inch in the files of figures (default 150)"
    )


def add_configuration_options(
    parser: argparse.ArgumentParser, default: str | None
) -> argparse._ArgumentGroup:
    """Add --off, --set, --order and --site.

    Args:
        parser: the command's parser.
        default: the set used when none of the options is given; None for the baseline only.

    Returns:
        The group that the options are in, for options of one command only.
    """
    group = parser.add_argument_group("what to switch off")
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(
        "--off", action="append", metavar="CONFIGURATION", help="a configuration, see below; can be repeated"
    )
    exclusive.add_argument(
        "--set",
        choices=CONFIGURATION_SETS,
        default=default,
        help="the cumulative sweep, every single head of every layer, or all subsets of heads (default: "
        + (f"{default})" if default else "none off)"),
    )
    group.add_argument(
        "--order",
        metavar="ORDER",
        help="order of heads in the cumulative sweep: `7,6,5,4,3,2,1,0`, `reverse`, `random:SEED`, `importance` (the "
        "least important first, by Shapley values in the image) or `importance:most`",
    )
    add_site_option(group, "the attention that is gated")
    return group


def add_site_option(group: argparse._ArgumentGroup, what: str, sites: Sequence[Site] = SITES) -> None:
    """Add --site; `what` begins its help."""
    group.add_argument("--site", choices=sites, default=DEFAULT_SITE, help=f"{what} (default {DEFAULT_SITE})")


def add_ablation_options(group: argparse._ArgumentGroup) -> None:
    """Add --ablate and --references."""
    group.add_argument(
        "--ablate",
        choices=ABLATION_KINDS,
        default="zero",
        help="what a head that is off contributes: nothing (zero, default), its mean over a reference set, its "
        "context in another image (resample), attention spread evenly (uniform), or the constant that changes least "
        "(optimal)",
    )
    add_references_option(group)


def add_references_option(group: argparse._ArgumentGroup) -> None:
    """Add --references."""
    group.add_argument(
        "--references",
        type=named_path,
        metavar="FILE",
        help="the reference set of mean, resample and optimal, made by `headoff references` (default: the bundled "
        "model's)",
    )


def named_path(text: str) -> Path:
    """An argument that is a path; an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; name a file or folder, or . for the current folder")
    if "\0" in text or any(len(os.fsencode(part)) > LONGEST_NAME for part in text.split("/")):
        raise argparse.ArgumentTypeError(f"{text[:40]!r}... cannot be the name of a file; name another")
    return Path(text)


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
    value = _number(text)
    if value is None or not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a probability; give a number from 0 to 1")
    return value


def ratio(text: str) -> float:
    """An argument that is finite and above 0."""
    value = _number(text)
    if value is None or not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a ratio; give a number above 0, such as 1.1")
    return value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
