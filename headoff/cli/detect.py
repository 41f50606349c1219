"""`headoff detect`: detections with all heads on."""

from __future__ import annotations

import argparse
from typing import Any

from headoff.cli.options import add_confidence_option, add_detector_options, add_image_argument


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "detect",
        help="list detections with all heads on",
        description="List the detections in images, or in all images of folders, with all heads on.",
        epilog="example: headoff detect street.jpg --model detr-resnet-50 --confidence 0.7",
    )
    add_image_argument(parser)
    add_confidence_option(parser)
    parser.add_argument(
        "--json", action="store_true", help="print JSON instead of a table, one object per image"
    )
    add_detector_options(parser)
    parser.set_defaults(run=run)


def run(settings: argparse.Namespace) -> int:
    """Run the command."""
    import json

    from headoff.cli.detectors import load_detector
    from headoff.cli.images import images_at
    from headoff.cli.messages import error, left_out
    from headoff.cli.tables import columns
    from headoff.detections import detect
    from headoff.errors import ImageError
    from headoff.wording import counted

    images = images_at(settings.images)
    detector = load_detector(settings)
    failed = 0
    for path in images.paths:
        try:
            detections = detect(detector, path, settings.confidence)
        except ImageError as failure:
            if images.common is None:
                raise
            error(failure)
            failed += 1
            continue
        if settings.json:
            print(json.dumps({"image": str(path), **detections.as_dict()}))
            continue
        print(f"{path}: {counted(len(detections), 'detection')} above confidence {settings.confidence:g}")
        rows = [
            (
                f"  #{number}",
                detection.class_name,
                f"{detection.score:.3f}",
                f"query {detection.query}",
                _corners(detection.box),
            )
            for number, detection in enumerate(detections)
        ]
        if rows:
            print(columns(rows))
    return left_out(failed)


def _corners(box: tuple[float, float, float, float]) -> str:
    left, top, right, bottom = box
    return f"({left:.1f}, {top:.1f}) to ({right:.1f}, {bottom:.1f})"
