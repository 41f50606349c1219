"""Value functions: what a head's importance is measured by.

A value is a number for each object of the baseline, computed from the detector's output under a configuration; or one
number for the image. Shapes: C configurations, Q queries, K classes, O objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.boxes import corners_of, iou_of
from headoff.choices import VALUES
from headoff.detections import Detections
from headoff.errors import SettingError, did_you_mean
from headoff.outcomes import KEEP_IOU, TOUCH_IOU
from headoff.scoring import Scoring


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of an image: the detections of the baseline.

    Attributes:
        detections: the O objects.
        boxes: (O, 4), the baseline's boxes at their queries, cxcywh as fractions of the image, unclipped.
        confidence: the score above which a prediction is a detection.
    """

    detections: Detections
    boxes: Tensor
    confidence: float

    @classmethod
    def of(cls, detections: Detections, boxes: Tensor, confidence: float) -> Objects:
        """From the baseline's detections and its boxes (Q, 4)."""
        return cls(detections, boxes[detections.queries].cpu(), confidence)

    @property
    def scoring(self) -> Scoring:
        return self.detections.scoring

    def __len__(self) -> int:
        return len(self.detections)


ValueFunction = Callable[[Objects, Tensor, Tensor], Tensor]
"""(objects, logits (C, Q, columns), boxes (C, Q, 4)) -> (C, O), or (C, 1) for a value of the image."""


@dataclass(frozen=True)
class Value:
    """A value function.

    Attributes:
        name: for reports.
        title: for axes of figures.
        function: computes it.
        differentiable: whether it has a gradient.
        peaks_at_baseline: whether its maximum, without a derivative, is the baseline itself.
        of_image: whether it is one number for the image.
    """

    name: str
    title: str
    function: ValueFunction
    differentiable: bool = True
    peaks_at_baseline: bool = False
    of_image: bool = False

    def __call__(self, objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
        """(C, O), or (C, 1) for a value of the image."""
        return self.function(objects, logits, boxes)


Scalar = Callable[[Tensor, Tensor], Tensor]
"""(logits (Q, columns), boxes (Q, 4)) -> a tensor of one element."""

ValueSpec = str | Scalar
"""A name, or a function of logits (Q, columns) and boxes (Q, 4) that returns a scalar tensor, as for
`headoff.explain`."""


def _probability(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    at_query = objects.scoring.probabilities(logits[:, objects.detections.queries.to(logits.device)])
    return at_query[:, torch.arange(len(objects)), objects.detections.labels]


def _logit(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return logits[:, objects.detections.queries, objects.detections.labels]


def _iou(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return iou_of(corners_of(boxes[:, objects.detections.queries]), corners_of(objects.boxes.to(boxes)))


def _found(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return (_of_label(objects, logits) * _iou_with_all(objects, boxes)).amax(-1)


def _duplicates(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    iou = _iou_with_all(objects, boxes)
    has_it = _detected_of_label(objects, logits) & (iou >= TOUCH_IOU)
    return (has_it.sum(-1) - 1).clamp(min=0).to(logits.dtype)


def _detections(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return _detected(objects, logits).sum((-2, -1))[:, None].to(logits.dtype)


def _unmatched(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    """Detections that neither are of an object's label and touch it, nor are in an object's place."""
    iou = _iou_with_all(objects, boxes)
    detected = _detected(objects, logits)
    labels = torch.arange(detected.shape[-1], device=logits.device)
    same_label = (objects.detections.labels.to(logits.device)[:, None] == labels)[:, None]
    belongs = ((iou >= TOUCH_IOU)[..., None] & same_label) | (iou >= KEEP_IOU)[..., None]
    return (detected & ~belongs.any(1)).sum((-2, -1))[:, None].to(logits.dtype)


def _detected(objects: Objects, logits: Tensor) -> Tensor:
    """bool (C, Q, K), True where a query detects a class."""
    return objects.scoring.detected(objects.scoring.probabilities(logits), objects.confidence)


def _detected_of_label(objects: Objects, logits: Tensor) -> Tensor:
    """bool (C, O, Q), True where a query detects the object's label."""
    return _detected(objects, logits)[..., objects.detections.labels.to(logits.device)].transpose(-1, -2)


def _of_label(objects: Objects, logits: Tensor) -> Tensor:
    """Probability of each object's label at every query: (C, O, Q)."""
    return objects.scoring.probabilities(logits)[..., objects.detections.labels].transpose(-1, -2)


def _iou_with_all(objects: Objects, boxes: Tensor) -> Tensor:
    """IoU of each object's box with the box of every query: (C, O, Q)."""
    return iou_of(corners_of(boxes[:, None]), corners_of(objects.boxes[:, None].to(boxes)))


_REGISTERED = {
    value.name: value
    for value in (
        Value("probability", "class probability at the object's query", _probability),
        Value("logit", "class logit at the object's query", _logit),
        Value("iou", "IoU of the query's box with the baseline's", _iou, peaks_at_baseline=True),
        Value("found", "best probability x IoU over all queries", _found, peaks_at_baseline=True),
        Value("duplicates", "other detections of the object", _duplicates, differentiable=False),
        Value("detections", "detections in the image", _detections, differentiable=False, of_image=True),
        Value(
            "unmatched",
            "detections that belong to no object",
            _unmatched,
            differentiable=False,
            of_image=True,
        ),
    )
}
assert tuple(_REGISTERED) == VALUES


def resolve_value(spec: ValueSpec) -> Value:
    """The value that `spec` names, or that a function of (logits, boxes) computes.

    Raises:
        SettingError: the name is unknown.
    """
    if callable(spec):
        name = getattr(spec, "__name__", type(spec).__name__)

        def of_each(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
            found = [spec(logit, box) for logit, box in zip(logits, boxes, strict=True)]
            if not all(isinstance(value, Tensor) and value.numel() == 1 for value in found):
                raise SettingError(f"the value {name!r} must be one number: return a tensor of one element")
            return torch.stack([value.reshape(1) for value in found])

        return Value(name, name, of_each, of_image=True)
    if spec not in _REGISTERED:
        raise SettingError(
            f"there is no value {spec!r}{did_you_mean(spec, VALUES)}: use one of {', '.join(VALUES)}, or a function "
            "of (logits, boxes)"
        )
    return _REGISTERED[spec]
