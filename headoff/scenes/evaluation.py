"""Average precision (COCO's definition) on held-out scenes under every configuration.

The computation of AP is faster-coco-eval's (a C++ rewrite of pycocotools), not our own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.boxes import corners_of
from headoff.detector import Detector
from headoff.errors import SettingError
from headoff.evaluation.candidates import candidates
from headoff.gates import Configuration, cumulative, stack
from headoff.images import load_image
from headoff.scenes.dataset import CLASS_NAMES, SceneDataset
from headoff.scenes.samples import coco_annotations
from headoff.sweeps import decode_all


@dataclass(frozen=True)
class Precision:
    """Average precision under one configuration, 0..1, and detections per scene at confidence 0.5."""

    configuration: str
    ap: float
    ap50: float
    ap75: float
    detections_per_scene: float


def evaluate(
    detector: Detector,
    *,
    count: int = 1000,
    first_seed: int = 0,
    configurations: Iterable[Configuration] | None = None,
    batch: int = 16,
    progress: Callable[[int], object] | None = None,
) -> tuple[Precision, ...]:
    """AP of `detector` on `count` held-out scenes, one `Precision` per configuration (the cumulative sweep).

    Detections are those of the models' own evaluations: the best class of every query, whatever its score; with scores
    by sigmoid the pairs of query and class with the highest scores, as many as the model has queries or chooses.
    `progress` is called with the number of scenes done after every batch.

    Raises:
        SettingError: the detector has other classes, `count` is below 1, or faster-coco-eval is not installed.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise SettingError(
            "average precision needs faster-coco-eval: pip install 'headoff[scenes]'"
        ) from error
    if detector.class_names != CLASS_NAMES:
        raise SettingError(
            f"this detector knows {len(detector.class_names)} other classes; only one trained on the scenes "
            "can be evaluated on them"
        )
    if count < 1:
        raise SettingError(f"{count} scenes cannot be evaluated; give 1 or more")
    chosen = tuple(configurations) if configurations is not None else cumulative(detector.head_layout.heads)
    gates = stack(chosen, detector.head_layout)
    side, _ = detector.preprocessing.resized_size(1, 1)  # scenes are square
    scenes = SceneDataset(side, count, "held_out", first_seed)
    results: list[list[dict]] = [[] for _ in chosen]
    confident = [0] * len(chosen)
    truth = []
    for start in range(0, count, batch):
        drawn = [scenes[index] for index in range(start, min(start + batch, count))]
        truth += [(start + index, f"{start + index}.png", scene) for index, scene in enumerate(drawn)]
        with torch.inference_mode():
            pixel_values, _ = detector.preprocess([load_image(scene.image) for scene in drawn])
            output = decode_all(detector, detector.features(pixel_values), gates)
            scores, labels, boxes, _ = candidates(
                detector.scoring, output.logits.double(), output.boxes.double()
            )
            corners = (corners_of(boxes) * side).clamp(0, side)
            boxes = torch.cat((corners[..., :2], corners[..., 2:] - corners[..., :2]), -1)
        for index, rows in enumerate(results):
            confident[index] += int((scores[index] > 0.5).sum())
            rows += _rows(start, scores[index], labels[index], boxes[index])
        if progress:
            progress(len(drawn))
    annotations = coco_annotations(truth)
    precisions = []
    for configuration, rows, number in zip(chosen, results, confident, strict=True):
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(annotations)
            judge = COCOeval_faster(coco, coco.loadRes(rows), iouType="bbox")
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        ap, ap50, ap75 = (max(0.0, float(value)) for value in judge.stats[:3])
        precisions.append(Precision(configuration.name, ap, ap50, ap75, number / count))
    return tuple(precisions)


def _rows(first_image: int, scores: Tensor, labels: Tensor, boxes: Tensor) -> list[dict]:
    """COCO results of a batch: (B, n) scores and labels, (B, n, 4) boxes."""
    return [
        {"image_id": first_image + image, "category_id": label, "bbox": box, "score": score}
        for image, per_image in enumerate(zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True))
        for score, label, box in zip(*per_image, strict=True)
    ]


def table(precisions: Sequence[Precision]) -> str:
    """The figures as a Markdown table."""
    lines = ["| heads off | AP | AP50 | AP75 | detections per scene |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {p.configuration} | {p.ap:.3f} | {p.ap50:.3f} | {p.ap75:.3f} | {p.detections_per_scene:.1f} |"
        for p in precisions
    ]
    return "\n".join(lines)
