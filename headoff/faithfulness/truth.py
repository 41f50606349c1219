"""True objects of an image, and which detections found them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from headoff.boxes import pairwise_iou
from headoff.detections import Detections
from headoff.errors import SettingError, error_line
from headoff.scenes.dataset import plan_scene

MATCH_IOU = 0.5
"""Least IoU of a detection with the true box of its class."""


@dataclass(frozen=True, eq=False)
class Truth:
    """The T true objects of an image.

    Attributes:
        boxes: (T, 4) float64, left, top, right, bottom in pixels of the original image.
        labels: (T,) int64, indices into the detector's `class_names`.
        masks: (T, H, W) bool, the visible pixels of each object; None where only boxes are known.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def digest(self) -> str:
        """SHA-256 of everything."""
        parts = [self.boxes.double(), self.labels, *(() if self.masks is None else (self.masks,))]
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()

    def match(self, found: Detections) -> Tensor:
        """(O,) int64: the true object of each detection, -1 where there is none.

        In the order of falling scores, a detection gets the object of its class with the greatest IoU that no other
        one has got; it must be at least `MATCH_IOU`.
        """
        iou = pairwise_iou(found.boxes.double(), self.boxes.double())
        iou = iou.masked_fill(found.labels[:, None] != self.labels[None], -1.0)
        matched = torch.full((len(found),), -1)
        for index in range(len(found) if len(self) else 0):
            best = int(iou[index].argmax())
            if float(iou[index, best]) >= MATCH_IOU:
                matched[index] = best
                iou[:, best] = -1.0
        return matched


def truth_of_scene(seed: int, size: int, split: str = "held_out") -> Truth:
    """The boxes and visible pixels of the objects of a scene; pixels of which it covers more than half are an object's.

    Boxes are those of whole objects, even where another one covers a part.
    """
    plan = plan_scene(seed, split)
    covered = plan.masks(size).astype(np.float64) / 255
    visible = np.ones((size, size))
    masks = np.zeros(covered.shape, dtype=bool)
    for index in reversed(range(len(covered))):  # later objects cover earlier ones
        masks[index] = covered[index] * visible > 0.5
        visible = visible * (1 - covered[index])
    boxes = torch.from_numpy(plan.boxes(size)).double()
    return Truth(boxes, torch.from_numpy(plan.labels()), torch.from_numpy(masks))


class Annotations:
    """True objects of image files in COCO's `instances` format.

    Objects that are crowds, or of classes that the detector does not know, are left out. Masks are read from polygons,
    and there are none for an image with an object that has no polygon.

    Args:
        path: the JSON file.
        class_names: of the detector.

    Raises:
        SettingError: the file is not such a file.
    """

    def __init__(self, path: str | Path, class_names: Sequence[str]) -> None:
        self.path = Path(path)
        try:
            contents = json.loads(self.path.read_text(encoding="utf-8"))
            names = {category["id"]: category["name"] for category in contents["categories"]}
            labels = {name: label for label, name in enumerate(class_names)}
            self._images: dict[str, Mapping[str, Any]] = {}
            by_id: dict[Any, list[tuple[int, Mapping[str, Any]]]] = {}
            for image in contents["images"]:
                self._images[Path(image["file_name"]).name] = image
            for annotation in contents["annotations"]:
                name = names[annotation["category_id"]]
                box = [float(side) for side in annotation["bbox"]]
                if len(box) != 4 or not all(math.isfinite(side) for side in box) or min(box[2:]) < 0:
                    raise ValueError(f"the box {box} is not left, top, width and height")
                if name in labels and not annotation.get("iscrowd"):
                    by_id.setdefault(annotation["image_id"], []).append((labels[name], annotation))
            self._objects = by_id
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SettingError(
                f"{path} cannot be read as annotations ({error_line(error)}): give a JSON file in COCO's `instances` "
                "format"
            ) from error
        if not by_id:
            raise SettingError(
                f"{path} has no object of a class that the detector knows: give annotations with its class names"
            )

    def of(self, image: Path) -> Truth | None:
        """The true objects of the image file of that name; None where the annotations do not have it."""
        known = self._images.get(image.name)
        if known is None:
            return None
        objects = self._objects.get(known["id"], [])
        boxes = torch.tensor([annotation["bbox"] for _, annotation in objects], dtype=torch.float64)
        boxes = boxes.reshape(-1, 4)
        boxes = torch.cat((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), dim=1)
        labels = torch.tensor([label for label, _ in objects], dtype=torch.long)
        polygons = [annotation.get("segmentation") for _, annotation in objects]
        masks = None
        if polygons and all(isinstance(polygon, list) and polygon for polygon in polygons):
            size = int(known["width"]), int(known["height"])
            masks = torch.stack([_filled(polygon, size) for polygon in polygons if polygon])
        return Truth(boxes, labels, masks)


def _filled(polygons: Sequence[Sequence[float]], size: tuple[int, int], finer: int = 4) -> Tensor:
    """(height, width) bool, the pixels of which COCO's polygons, each x, y, x, y, ..., cover more than half."""
    canvas = Image.new("L", (size[0] * finer, size[1] * finer), 0)
    pen = ImageDraw.Draw(canvas)
    for polygon in polygons:
        # Pillow's coordinates are those of pixels' centres, and COCO's those of their edges.
        pen.polygon([value * finer - 0.5 for value in polygon], fill=255)
    return torch.from_numpy(np.array(canvas.reduce(finer)) > 127)
