"""Class logits and boxes to detections, the way the published DETR models are read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchvision.ops import box_convert

from headoff.detr.detector import Detector
from headoff.errors import NonFiniteError, SettingError
from headoff.images import ImageSource, load_image


@dataclass(frozen=True)
class Detection:
    """One detection. `box` is (left, top, right, bottom) in pixels of the original image."""

    query: int
    label: int
    class_name: str
    score: float
    box: tuple[float, float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """The same, of types that JSON knows."""
        return {
            "query": self.query,
            "label": self.label,
            "class_name": self.class_name,
            "score": self.score,
            "box": list(self.box),
        }


@dataclass(frozen=True, eq=False)
class Detections:
    """The n detections of one image under one configuration, by falling score. All tensors are on the CPU.

    - `queries` (n,) int64: the object query that made each; no query makes two
    - `labels` (n,) int64: index into `class_names`
    - `scores` (n,) float32: probability of that class, 0..1
    - `boxes` (n, 4) float32: left, top, right, bottom in pixels of the original image, within it
    - `image_size`: (height, width) of the original image in pixels
    - `class_names`: names by label; gaps in a checkpoint's numbering are "N/A"

    Raises `SettingError` where these shapes do not agree.
    """

    queries: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    image_size: tuple[int, int]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        n = len(self.queries)
        shapes = {"queries": (n,), "labels": (n,), "scores": (n,), "boxes": (n, 4)}
        for name, shape in shapes.items():
            given = tuple(getattr(self, name).shape)
            if given != shape:
                raise SettingError(f"{name} of {n} detections cannot be of shape {given}: give {shape}")
        if len(set(self.queries.tolist())) < n:
            raise SettingError("a query makes one detection at most: give queries that differ")

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: int) -> Detection:
        label = int(self.labels[index])
        left, top, right, bottom = self.boxes[index].tolist()
        return Detection(
            query=int(self.queries[index]),
            label=label,
            class_name=self.class_names[label],
            score=float(self.scores[index]),
            box=(left, top, right, bottom),
        )

    def __iter__(self) -> Iterator[Detection]:
        return (self[index] for index in range(len(self)))

    def of_query(self, query: int) -> Detection | None:
        """The detection that `query` made; None when it made none."""
        return next(
            (self[index] for index, other in enumerate(self.queries.tolist()) if other == query), None
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per detection, of types that JSON knows."""
        return [detection.as_dict() for detection in self]

    def as_dict(self) -> dict[str, Any]:
        """All of it but the table of class names, of types that JSON knows."""
        height, width = self.image_size
        return {"image_size": {"height": height, "width": width}, "detections": self.rows()}


def detections_from(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
    confidence: float = 0.5,
) -> Detections:
    """The detections in a detector's output for one image.

    `logits` (Q, K+1): one column per class name and, last, one for "no object". `boxes` (Q, 4): centre x,
    centre y, width, height in 0..1 of the image. Both may be of any floating point dtype and on any device;
    probabilities and boxes are computed in float64. `image_size`: (height, width) of the original
    image in pixels.

    A query counts when the probability of its likeliest class ("no object" left out) is above `confidence`,
    0..1. Detections are sorted by falling score, equal scores by query; boxes are clipped to the image.

    Raises `SettingError` for a confidence outside 0..1 or shapes that do not fit, `NonFiniteError`, naming
    the first query, for NaN or infinity in logits or boxes.
    """
    if not 0 <= confidence <= 1:
        raise SettingError(f"confidence {confidence} is no probability: give a number from 0 to 1")
    logits, boxes = _wide(logits), _wide(boxes)
    check_output(logits, boxes, len(class_names))
    height, width = image_size
    if height < 1 or width < 1:
        raise SettingError(
            f"an image of {height} x {width} pixels is empty: give (height, width) of the original image"
        )

    probabilities, labels = class_probabilities(logits)[:, :-1].max(dim=-1)
    # Rounded before anything is compared: so what is stored is above the confidence, and in order.
    scores = probabilities.float()
    order = torch.sort(scores, descending=True, stable=True).indices
    queries = order[scores[order] > confidence]

    scale = torch.tensor([width, height, width, height], dtype=torch.float64)
    corners = box_convert(boxes[queries], in_fmt="cxcywh", out_fmt="xyxy") * scale
    corners = corners.clamp(min=torch.zeros(4, dtype=torch.float64), max=scale)
    return Detections(
        queries=queries,
        labels=labels[queries],
        scores=scores[queries],
        boxes=corners.float(),
        image_size=(int(height), int(width)),
        class_names=tuple(class_names),
    )


def detect(detector: Detector, image: ImageSource, confidence: float = 0.5) -> Detections:
    """What `detector` finds in `image` (a path, a `PIL.Image` or an array), all heads on.

    Raises `ImageError` for an image that cannot be read, and what `detections_from` raises.
    """
    picture = load_image(image)
    with torch.inference_mode():
        pixel_values, _ = detector.preprocess([picture])
        output = detector(pixel_values)
    return detections_from(
        output.logits[0, 0],
        output.boxes[0, 0],
        (picture.height, picture.width),
        detector.class_names,
        confidence,
    )


def class_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Softmax over the last dimension in float64, on the CPU; same shape as `logits`."""
    return _wide(logits).softmax(dim=-1)


def check_output(logits: torch.Tensor, boxes: torch.Tensor | None, classes: int) -> None:
    """Refuse an output that is not finite, or other than `logits` (Q, classes + 1) and `boxes` (Q, 4).

    Raises `SettingError` for shapes, `NonFiniteError`, naming the first query, for NaN and infinity.
    """
    if logits.ndim != 2 or logits.shape[1] != classes + 1:
        raise SettingError(
            f"logits of shape {tuple(logits.shape)} do not fit {classes} class names: "
            f'give (queries, {classes + 1}), the last column for "no object"'
        )
    if boxes is not None and tuple(boxes.shape) != (len(logits), 4):
        raise SettingError(
            f"boxes of shape {tuple(boxes.shape)} do not fit {len(logits)} queries: give (queries, 4)"
        )
    for name, values in (("logits", logits), ("box", boxes)):
        if values is None:
            continue
        bad = (~torch.isfinite(values)).any(dim=-1).nonzero()
        if len(bad):
            raise NonFiniteError(
                f"NaN or infinity in the {name} of query {int(bad[0])}, the first of {len(bad)}: "
                "check the attention, the weights and the picture for numbers too large"
            )


def _wide(values: torch.Tensor) -> torch.Tensor:
    # A hundred rows are small: float64 costs nothing and makes results independent of the device's softmax.
    return values.detach().to(device="cpu", dtype=torch.float64)
