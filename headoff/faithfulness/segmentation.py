"""Weak segmentation: average precision of masks that are thresholded relevance maps, as in the DETR table of Chefer,
Gur, Wolf (ICCV 2021, section 5.3).

Every detection gets a mask: its map, scaled from its minimum and maximum to 0..255 and cut to integers, is
thresholded by Otsu's method, enlarged bilinearly to the resized picture, and from there to the picture by nearest
neighbours. Masks and scores are evaluated as COCO's instance segmentation.

The published code gives masks of 0 and 255 to DETR's postprocessing, which applies a sigmoid and keeps what is above
0.5, as if they were logits. So every pixel is kept whose bilinear interpolation touches a cell of the mask at all:
masks grow by almost a cell to every side. Two numbers for the same maps:

- `ap_published`, `ap50_published`: as that code measures, the numbers to compare with the paper's.
- `ap`, `ap50`: the same with masks of 0 and 1, of which what is above 0.5 is kept. This is what the map says.

What the published code submits besides, empty masks of the queries below the confidence, can match nothing and comes
after all others, so it changes no precision and is left out. Images without a detection are left out as well.

Shapes: O objects, T true objects, h x w cells, H x W pixels, V = 2 variants (corrected, published).
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headoff.detector import Detector
from headoff.errors import SettingError
from headoff.faithfulness.explained import ExplainedImage
from headoff.faithfulness.measures import Measure, Quantity, Scores, register_measure

_CACHED = 256
"""Results of `pooled` that are kept: comparisons of methods in pairs ask for the same ones again and again."""


class Segmentation(Measure):
    """AP of masks that are thresholded maps; see the module."""

    name = "segmentation"
    summary = "average precision of thresholded maps as masks"
    quantities = (
        Quantity("ap", "AP of masks", "higher", "AP", of_object="mask IoU"),
        Quantity(
            "ap_published",
            "AP of masks as the published code enlarges them",
            "higher",
            "AP",
            of_object="published",
        ),
        Quantity("ap50", "AP of masks at IoU 0.5", "higher", "AP", of_object="mask IoU"),
        Quantity(
            "ap50_published",
            "AP of masks as the published code enlarges them, at IoU 0.5",
            "higher",
            "AP",
            of_object="published",
        ),
    )
    needs = "masks"
    is_mean = False

    def __init__(self) -> None:
        self._pooled: dict[Any, tuple[Sequence[Scores], np.ndarray]] = {}

    def check(self, detector: Detector) -> None:
        if find_spec("scipy") is None:
            raise SettingError("average precision of masks needs scipy: pip install 'headoff[evaluate]'")

    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        """Values of an object are the IoU of its masks with the mask of the true object that it found."""
        assert image.truth is not None and image.truth.masks is not None
        truth = image.truth.masks.flatten(1).double()
        size = image.picture.height, image.picture.width
        detections = image.objects.detections
        found = {}
        for method in methods:
            cells = otsu_masks(image.maps(method))
            masks = torch.stack(
                [enlarged(cells, image.encoded.resized, size, published) for published in (False, True)]
            )
            flat = masks.flatten(2).double()  # (V, O, pixels)
            overlap = flat @ truth.T
            union = flat.sum(-1)[..., None] + truth.sum(-1) - overlap
            iou = overlap / union.clamp(min=1)
            values = torch.full((len(image), 4), torch.nan, dtype=torch.float64)
            if len(image.truth):
                own = iou.gather(2, image.matched.clamp(min=0)[None, :, None].expand(2, -1, -1))[..., 0]
                own = own.masked_fill(image.matched < 0, torch.nan)
                values = own.T.repeat(1, 2)
            found[method] = Scores(
                values,
                parts={
                    "iou": iou,
                    "areas": flat.sum(-1),
                    "scores": detections.scores.double(),
                    "labels": detections.labels,
                    "true_labels": image.truth.labels,
                    "true_areas": truth.sum(-1),
                },
            )
        return found

    def pooled(self, images: Sequence[Scores], draws: np.ndarray) -> np.ndarray:
        key = (*map(id, images), draws.shape, hash(draws.tobytes()))
        if key not in self._pooled:
            if len(self._pooled) >= _CACHED:
                self._pooled.pop(next(iter(self._pooled)))
            # The images are kept, for their ids may not be used again.
            self._pooled[key] = images, _average_precision(images, draws)
        return self._pooled[key][1]

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pooled = {}


def otsu_masks(maps: Tensor) -> Tensor:
    """Maps (O, h, w) as bool masks (O, h, w): scaled to 0..255, cut to integers, and thresholded by Otsu's method.

    A constant map has an empty mask.
    """
    masks = []
    for one in maps.double():
        least, greatest = one.min(), one.max()
        span = greatest - least
        grey = ((one - least) / span * 255 if span > 0 else torch.zeros_like(one)).to(torch.uint8)
        masks.append(grey > otsu_threshold(grey))
    return torch.stack(masks) if masks else maps.bool()


def otsu_threshold(grey: Tensor) -> int:
    """The threshold that separates numbers 0..255 (uint8) best: what is above it is foreground.

    It maximises q1 q2 (mu1 - mu2)^2, with the shares q and means mu of both sides (Otsu 1979); of equal ones the first.
    """
    share = np.bincount(grey.flatten().numpy(), minlength=256) / grey.numel()
    below = np.cumsum(share)
    moment = np.cumsum(share * np.arange(256))
    above = 1 - below
    tiny = np.finfo(np.float32).eps
    valid = (np.minimum(below, above) >= tiny) & (np.maximum(below, above) <= 1 - tiny)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (moment / below - (moment[-1] - moment) / above) ** 2
    return int(np.where(valid, between, 0.0).argmax())


def enlarged(
    cells: Tensor, resized: tuple[int, int], size: tuple[int, int], published: bool = False
) -> Tensor:
    """Masks of cells (O, h, w) as masks of pixels (O, H, W) of the picture.

    Args:
        cells: bool.
        resized: (height, width) of the resized picture.
        size: (H, W).
        published: as the published code does, see the module.
    """
    if not len(cells):
        return torch.zeros(0, *size, dtype=torch.bool)
    scaled = cells[:, None].float() * (255.0 if published else 1.0)
    large = F.interpolate(scaled, size=resized, mode="bilinear", align_corners=False)
    kept = (large.sigmoid() if published else large) > 0.5
    return F.interpolate(kept.float(), size=size, mode="nearest")[:, 0] > 0.5


def _average_precision(images: Sequence[Scores], draws: np.ndarray) -> np.ndarray:
    """`Segmentation.quantities` in samples of a bootstrap, (R, 4); images whose masks are not known have no part."""
    known = [index for index, one in enumerate(images) if "iou" in one.parts]
    images, draws = [images[index] for index in known], draws[:, known]
    if not images:
        return np.full((len(draws), len(Segmentation.quantities)), np.nan)
    from headoff.evaluation.matching import TrueObjects, match
    from headoff.evaluation.precision import METRICS, Resamples, resample
    from headoff.evaluation.tables import DetectionTable, GroundTruth

    def joined(name: str) -> np.ndarray:
        return np.concatenate([one.parts[name].numpy() for one in images])

    counts = [len(one.parts["labels"]) for one in images]
    true_counts = [len(one.parts["true_labels"]) for one in images]
    labels, true_labels = joined("labels"), joined("true_labels")
    classes = 1 + max(labels.max(initial=0), true_labels.max(initial=0))
    truth = GroundTruth(
        class_names=tuple(map(str, range(classes))),
        image_ids=np.arange(len(images)),
        names=tuple(map(str, range(len(images)))),
        sizes=np.ones((len(images), 2), np.int64),
        image=np.repeat(np.arange(len(images)), true_counts),
        boxes=np.zeros((len(true_labels), 4)),
        labels=true_labels,
        areas=joined("true_areas"),
        crowd=np.zeros(len(true_labels), bool),
        annotation_ids=np.arange(1, len(true_labels) + 1),
    )
    detections = DetectionTable(
        image=np.repeat(np.arange(len(images)), counts),
        scores=joined("scores").astype(np.float32),
        labels=labels,
        boxes=np.zeros((len(labels), 4), np.float32),
        queries=np.zeros(len(labels), np.int64),
    )
    first = np.cumsum([0, *counts])[detections.image]  # the first detection of each one's image
    first_true = np.cumsum([0, *true_counts])[truth.image]
    objects = TrueObjects.of(truth)
    samples = Resamples.weighted(objects, draws.T)
    columns = []
    for variant in range(2):
        matrices = [one.parts["iou"][variant].numpy() for one in images]

        def iou(rows: np.ndarray, targets: np.ndarray, matrices: list[np.ndarray] = matrices) -> np.ndarray:
            return np.array(
                [
                    matrices[detections.image[row]][row - first[row], target - first_true[target]]
                    for row, target in zip(rows, targets, strict=True)
                ]
            )

        areas = np.concatenate([one.parts["areas"][variant].numpy() for one in images])
        found = resample(objects, match(objects, detections, iou=iou, areas=areas), samples)
        columns.append(found.metrics[[METRICS.index("AP"), METRICS.index("AP50")]])
    return np.stack(columns, axis=1).reshape(-1, draws.shape[0]).T


register_measure(Segmentation.name, Segmentation)
