"""A small data set in COCO's format, for tests of evaluation: files of several sizes, with what real files have."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

from PIL import Image

from headoff.scenes.dataset import draw_scene

SIZES = ((192, 192), (150, 200), (200, 150), (150, 200), (120, 220), (192, 192), (150, 200))
"""(height, width) of the images; the detector resizes them."""

NAMES = ("0.png", "straße é.png", "folder/2.png", "3.jpg", "4.png", "nothing.png", "6.png")
CATEGORIES = ({"id": 3, "name": "Star"}, {"id": 90, "name": "zebra"}, {"id": 17, "name": "circle"})


def coco_data_set(folder: Path) -> tuple[Path, Path]:
    """Write it; the paths of annotations and images.

    Category ids have gaps, and the detector of scenes does not know one of them. The second image's name has a composed
    accent in the annotations and a decomposed one on disk. The sixth image has no annotation.
    """
    images = folder / "images"
    (images / "folder").mkdir(parents=True)
    for index, (name, (height, width)) in enumerate(zip(NAMES, SIZES, strict=True)):
        picture = Image.fromarray(draw_scene(index, 256, "held_out").image).resize((width, height))
        picture.save(images / unicodedata.normalize("NFD", name))
    path = folder / "instances.json"
    path.write_text(json.dumps(coco_contents()), encoding="utf-8")
    return path, images


def coco_contents() -> dict[str, Any]:
    """The annotation file."""
    annotations = [
        # Not by image; polygons, which have an area of their own.
        {"image_id": 40, "category_id": 17, "bbox": [10.5, 20, 30, 40], "area": 700.25, "iscrowd": 0,
         "segmentation": [[10.5, 20, 40.5, 20, 40.5, 60]]},
        {"image_id": 10, "category_id": 3, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
        # A crowd, by run lengths of columns.
        {"image_id": 20, "category_id": 17, "bbox": [0, 0, 2, 150], "area": 300, "iscrowd": 1,
         "segmentation": {"size": [150, 200], "counts": [0, 300, 29700]}},
        {"image_id": 20, "category_id": 90, "bbox": [5, 5, 5, 5], "area": 25, "iscrowd": 0},
        # No box, no area, no iscrowd: of a polygon, and of run lengths.
        {"image_id": 30, "category_id": 3, "segmentation": [[1, 2, 11, 2, 11, 8], [4, 4, 21, 4, 4, 9]]},
        {"image_id": 70, "category_id": 3, "segmentation": {"size": [150, 200], "counts": [160, 20, 29820]}},
    ]  # fmt: skip
    return {
        "images": [
            {"id": 10 * (index + 1), "file_name": name, "height": height, "width": width}
            for index, (name, (height, width)) in enumerate(zip(NAMES, SIZES, strict=True))
        ],
        "annotations": [{"id": 100 + index, **one} for index, one in enumerate(annotations)],
        "categories": [dict(one) for one in CATEGORIES],
    }
