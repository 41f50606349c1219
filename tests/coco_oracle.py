"""Synthetic data sets and detections, and what public implementations of COCO's evaluation say of them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from headoff.evaluation.tables import DetectionTable, GroundTruth


def synthetic(
    seed: int,
    *,
    images: int = 30,
    classes: int = 5,
    objects: float = 6,
    detections: int = 30,
    crowds: float = 0.1,
    ties: bool = False,
    quality: float = 0.7,
    side: int = 200,
) -> tuple[GroundTruth, DetectionTable]:
    """Objects, and detections of which a share `quality` are near objects. `ties` rounds scores and boxes."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(objects, images)
    image = np.repeat(np.arange(images), counts)
    m = len(image)

    def boxes(n: int) -> np.ndarray:
        size = np.exp(rng.uniform(np.log(8), np.log(0.9 * side), (n, 2)))
        corner = rng.uniform(0, 1, (n, 2)) * (side - size)
        return np.concatenate([corner, corner + size], 1)

    truth_boxes = boxes(m)
    if ties:
        truth_boxes = np.round(truth_boxes / 16) * 16 + np.array([0, 0, 16, 16])
    labels = rng.integers(0, classes, m)
    sizes = truth_boxes[:, 2:] - truth_boxes[:, :2]
    truth = GroundTruth(
        class_names=tuple(f"class {k}" for k in range(classes)),
        image_ids=rng.permutation(images * 3)[:images].astype(np.int64),
        names=tuple(f"{i}.png" for i in range(images)),
        sizes=np.full((images, 2), side),
        image=image,
        boxes=truth_boxes,
        labels=labels,
        areas=sizes.prod(1) * rng.uniform(0.5, 1, m),
        crowd=rng.uniform(size=m) < crowds,
        annotation_ids=np.arange(1, m + 1),
    )
    numbers = rng.integers(0, detections + 1, images)
    where = np.repeat(np.arange(images), numbers)
    n = len(where)
    found, found_labels = boxes(n), rng.integers(0, classes, n)
    starts = np.searchsorted(image, np.arange(images + 1))
    for row in np.flatnonzero(rng.uniform(size=n) < quality):
        begin, end = starts[where[row]], starts[where[row] + 1]
        if end > begin:
            chosen = rng.integers(begin, end)
            wide = np.tile(sizes[chosen], 2)
            found[row] = truth_boxes[chosen] + rng.normal(size=4) * wide * rng.choice([0, 0.03, 0.1, 0.2])
            found_labels[row] = labels[chosen]
    found = np.concatenate([found[:, :2], np.maximum(found[:, 2:], found[:, :2])], 1)
    scores = rng.beta(1, 2, n)
    if ties:
        scores, found = np.round(scores, 1), np.round(found / 16) * 16
    return truth, DetectionTable(
        where,
        scores.astype(np.float32),
        found_labels,
        found.astype(np.float32),
        np.concatenate([np.arange(k) for k in numbers]).astype(np.int64) if n else where,
    )


def coco_dict(truth: GroundTruth) -> dict[str, Any]:
    """The ground truth in COCO's format."""
    corners = truth.boxes.tolist()
    return {
        "images": [
            {"id": int(i), "file_name": name, "height": int(h), "width": int(w)}
            for i, name, (h, w) in zip(truth.image_ids, truth.names, truth.sizes, strict=True)
        ],
        "annotations": [
            {
                "id": int(truth.annotation_ids[row]),
                "image_id": int(truth.image_ids[truth.image[row]]),
                "category_id": int(truth.labels[row]),
                "bbox": [left, top, right - left, bottom - top],
                "area": float(truth.areas[row]),
                "iscrowd": int(truth.crowd[row]),
            }
            for row, (left, top, right, bottom) in enumerate(corners)
        ],
        "categories": [{"id": label, "name": name} for label, name in enumerate(truth.class_names)],
    }


def coco_results(truth: GroundTruth, table: DetectionTable) -> list[dict[str, Any]]:
    """Detections in COCO's format."""
    return [
        {
            "image_id": int(truth.image_ids[table.image[row]]),
            "category_id": int(table.labels[row]),
            "bbox": [left, top, right - left, bottom - top],
            "score": float(table.scores[row]),
        }
        for row, (left, top, right, bottom) in enumerate(table.boxes.astype(np.float64).tolist())
    ]


def evaluated(
    module: ModuleType, evaluation: Callable[..., Any], truth: GroundTruth, results: list[dict[str, Any]]
) -> Any:
    """`evaluation` (COCOeval) of `module`, run."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = module.COCO() if module.__name__.startswith("pycocotools") else module.COCO(coco_dict(truth))
        if module.__name__.startswith("pycocotools"):
            coco.dataset = coco_dict(truth)
            coco.createIndex()
        judge = evaluation(coco, coco.loadRes(results), iouType="bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return judge
