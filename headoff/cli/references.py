"""`headoff references`: gather what heads that are off may contribute."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from headoff.choices import VALUES
from headoff.cli.options import (
    add_confidence_option,
    add_detector_options,
    add_image_argument,
    add_site_option,
    named_path,
    positive,
)

EPILOG = """\
examples:
  headoff references train2017/ --model detr-resnet-50
  headoff references photos/ --model detr-resnet-50 --optimal --out photos.safetensors
  headoff sweep street.jpg --model detr-resnet-50 --ablate mean --references photos.safetensors

Take images like those that are judged, and other ones: optimal constants are rejected for an image that they were
fitted on, and resample never takes the judged image.
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "references",
        help="gather a reference set for mean, resample and optimal ablation",
        description="Run the detector on images with everything on, and store what every head contributes: its mean "
        "context, its contexts in some of the images and, with --optimal, the constant under which its removal changes "
        "least.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_image_argument(parser, required=True)
    parser.add_argument(
        "--out",
        type=named_path,
        default=Path("headoff-references.safetensors"),
        metavar="FILE",
        help="the file to write (default headoff-references.safetensors)",
    )
    parser.add_argument(
        "--samples", type=positive, default=16, metavar="N", help="images to store for resample (default 16)"
    )
    group = parser.add_argument_group("optimal constants")
    group.add_argument("--optimal", action="store_true", help="fit them, by gradient descent")
    add_site_option(group, "the attention that they are fitted for")
    group.add_argument(
        "--value",
        choices=VALUES[:4],
        default=VALUES[0],
        help=f"what is to change least, for every object (default {VALUES[0]})",
    )
    group.add_argument("--steps", type=positive, default=200, metavar="N", help="steps of Adam (default 200)")
    add_confidence_option(parser)
    add_detector_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    from headoff.ablation import fit_optimal, gather_references, load_references
    from headoff.cli.detectors import load_detector
    from headoff.cli.images import images_at
    from headoff.cli.progress import progress_bar
    from headoff.errors import SettingError
    from headoff.wording import counted

    # Wrong options are reported before the weights are read.
    if settings.out.is_dir():
        raise SettingError(f"--out {settings.out} is a folder; name a file")
    if settings.out.exists():
        try:
            load_references(settings.out)
        except SettingError:
            raise SettingError(
                f"--out {settings.out} exists and is no reference set, so it is not replaced; name another file"
            ) from None
    images = images_at(settings.images).paths
    detector = load_detector(settings)
    with progress_bar("gathering", "image") as update:
        references = gather_references(
            detector,
            images,
            samples=settings.samples,
            progress=update,
            provenance={"model": str(settings.model), "images": f"{len(images)} images"},
        )
    if settings.optimal:
        with progress_bar("fitting", "step") as update:
            references = fit_optimal(
                detector,
                images,
                references,
                site=settings.site,
                value=settings.value,
                steps=settings.steps,
                confidence=settings.confidence,
                progress=update,
            )
    references.save(settings.out)
    print(f"the reference set of {counted(len(images), 'image')} is in {settings.out}")
    return 0
