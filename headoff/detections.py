"""Detections from class logits and boxes, as in the postprocessing of the published DETR models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from headoff.boxes import corners_of
from headoff.detector import Detector
from headoff.errors import NonFiniteError, SettingError
from headoff.images import ImageSource, load_image
from headoff.scoring import SOFTMAX, Scoring


@dataclass(frozen=True)
class Detection:
    """One detection. `box` is (left, top, right, bottom) in pixels of the original image."""

    query: int
    label: int
    class_name: str
    score: float
    box: tuple[float, float, float, float]

    def as_dict(self) -> dict[str, Any]:
        """As a dict of JSON types."""
        return {
            "query": self.query,
            "label": self.label,
            "class_name": self.class_name,
            "score": self.score,
            "box": list(self.box),
        }


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """The n detections of one image under one configuration, by falling score. All tensors are on the CPU.

    Attributes:
        queries: (n,) int64, the object query of each detection. With softmax they are all different; with sigmoid a
            query may detect several classes.
        labels: (n,) int64, indices into `class_names`.
        scores: (n,) float32, the probability of that class, 0..1.
        boxes: (n, 4) float32, left, top, right, bottom in pixels of the original image, clipped to it.
        image_size: (height, width) of the original image in pixels.
        class_names: names by label; gaps in a checkpoint's numbering are "N/A".
        scoring: how the detector's scores are computed from its logits.

    Raises:
        SettingError: the shapes do not agree, or two detections have the same query and label.
    """

    queries: torch.Tensor
    labels: torch.Tensor
    scores: torch.Tensor
    boxes: torch.Tensor
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    scoring: Scoring = SOFTMAX

    def __post_init__(self) -> None:
        n = len(self.queries)
        shapes = {"queries": (n,), "labels": (n,), "scores": (n,), "boxes": (n, 4)}
        for name, shape in shapes.items():
            given = tuple(getattr(self, name).shape)
            if given != shape:
                raise SettingError(f"{name} of {n} detections have shape {given}: they must have {shape}")
        if len(set(zip(self.queries.tolist(), self.labels.tolist(), strict=True))) < n:
            raise SettingError("two detections have the same query and label: give detections that differ")

    def __len__(self) -> int:
        return len(self.queries)

    def __repr__(self) -> str:
        best = [
            f"{self.class_names[int(label)]} {score:.2f}"
            for label, score in zip(self.labels, self.scores, strict=True)
        ]
        found = ", ".join(best[:3] + ["..."] * (len(best) > 3))
        return f"<Detections: {len(self)}{f' ({found})' if found else ''}>"

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

    def subset(self, indices: Sequence[int]) -> Detections:
        """Some of the detections, by their indices."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return replace(
            self,
            queries=self.queries[chosen],
            labels=self.labels[chosen],
            scores=self.scores[chosen],
            boxes=self.boxes[chosen],
        )

    def of_query(self, query: int) -> Detection | None:
        """The detection of `query`; None if it has none."""
        return next(
            (self[index] for index, other in enumerate(self.queries.tolist()) if other == query), None
        )

    def rows(self) -> list[dict[str, Any]]:
        """One dict of JSON types per detection."""
        return [detection.as_dict() for detection in self]

    def as_dict(self) -> dict[str, Any]:
        """Everything but the class names, as a dict of JSON types."""
        height, width = self.image_size
        return {"image_size": {"height": height, "width": width}, "detections": self.rows()}


def detections_from(
    logits: torch.Tensor,
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
    confidence: float = 0.5,
    scoring: Scoring = SOFTMAX,
) -> Detections:
    """The detections in a detector's output for one image.

    A query detects a class whose probability exceeds `confidence`; with softmax its most likely class only.
    Detections are sorted by falling score, and by query if scores are equal. Boxes are clipped to the image.
    Probabilities and boxes are computed in float64.

    Args:
        logits: (Q, columns), see `Scoring`; any floating dtype and device.
        boxes: (Q, 4), centre x, centre y, width, height as fractions of the image; any floating dtype and device.
        image_size: (height, width) of the original image in pixels.
        class_names: K names.
        confidence: 0..1.
        scoring: how scores are computed from logits.

    Raises:
        SettingError: the confidence is outside 0..1, or the shapes do not agree.
        NonFiniteError: a logit or box is NaN or infinite; the message names the first query.
    """
    if not 0 <= confidence <= 1:
        raise SettingError(f"confidence {confidence} is not a probability: give a number from 0 to 1")
    check_output(logits, boxes, len(class_names), scoring)
    probabilities = class_probabilities(logits, scoring)
    # Rounded before comparing and sorting, so that the stored scores exceed the confidence and are sorted.
    scores = probabilities.float()
    found = (scoring.detected(probabilities, confidence) & (scores > confidence)).nonzero()
    order = torch.sort(scores[found[:, 0], found[:, 1]], descending=True, stable=True).indices
    queries, labels = found[order, 0], found[order, 1]
    return _detections(queries, labels, scores, boxes, image_size, class_names, scoring)


def predictions_of(
    queries: Sequence[int],
    logits: torch.Tensor,
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
    scoring: Scoring = SOFTMAX,
) -> Detections:
    """The most likely class and the box of each query, whatever the score; see `detections_from`."""
    check_output(logits, boxes, len(class_names), scoring)
    scores = class_probabilities(logits, scoring)
    chosen = torch.tensor(list(queries), dtype=torch.long)
    labels = scores[chosen].argmax(-1)
    return _detections(chosen, labels, scores.float(), boxes, image_size, class_names, scoring)


def _detections(
    queries: torch.Tensor,
    labels: torch.Tensor,
    scores: torch.Tensor,
    boxes: torch.Tensor,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
    scoring: Scoring,
) -> Detections:
    height, width = image_size
    if height < 1 or width < 1:
        raise SettingError(
            f"an image of {height} x {width} pixels is empty: give (height, width) of the original image"
        )
    scale = torch.tensor([width, height, width, height], dtype=torch.float64)
    corners = corners_of(_float64_on_cpu(boxes)[queries]) * scale
    corners = corners.clamp(min=torch.zeros(4, dtype=torch.float64), max=scale)
    return Detections(
        queries=queries,
        labels=labels,
        scores=scores[queries, labels],
        boxes=corners.float(),
        image_size=(int(height), int(width)),
        class_names=tuple(class_names),
        scoring=scoring,
    )


def detect(detector: Detector, image: ImageSource, confidence: float = 0.5) -> Detections:
    """The detections of `detector` in `image` (a path, a `PIL.Image` or an array), with all heads on.

    Raises:
        ImageError: the image cannot be read.
        SettingError, NonFiniteError: as `detections_from` does.
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
        detector.scoring,
    )


def class_probabilities(logits: torch.Tensor, scoring: Scoring = SOFTMAX) -> torch.Tensor:
    """Probabilities (..., K) of the classes, without "no object", in float64 on the CPU."""
    return scoring.probabilities(_float64_on_cpu(logits))


def check_output(
    logits: torch.Tensor, boxes: torch.Tensor | None, classes: int, scoring: Scoring = SOFTMAX
) -> None:
    """Check that `logits` are (Q, columns), see `Scoring`, `boxes` (Q, 4) or None, and both finite.

    Raises:
        SettingError: a shape is wrong.
        NonFiniteError: a value is NaN or infinite; the message names the first query.
    """
    columns = scoring.columns(classes)
    if logits.ndim != 2 or logits.shape[1] != columns:
        what = ', the last column for "no object"' if columns > classes else ""
        raise SettingError(
            f"logits of shape {tuple(logits.shape)} do not fit {classes} class names: "
            f"give (queries, {columns}){what}"
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


def _float64_on_cpu(values: torch.Tensor) -> torch.Tensor:
    # float64 costs little for a hundred rows, and makes results independent of the device's softmax.
    return values.detach().to(device="cpu", dtype=torch.float64)
