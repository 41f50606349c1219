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

    def __len__(self) -> int:
        return len(self.detections)


ValueFunction = Callable[[Objects, Tensor, Tensor], Tensor]
"""(objects, logits (C, Q, K + 1), boxes (C, Q, 4)) -> (C, O), or (C, 1) for a value of the image."""


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
"""(logits (Q, K + 1), boxes (Q, 4)) -> a tensor of one element."""

ValueSpec = str | Scalar
"""A name, or a function of logits (Q, K + 1) and boxes (Q, 4) that returns a scalar tensor, as for
`headoff.explain`."""


def _probability(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    at_query = logits[:, objects.detections.queries.to(logits.device)].softmax(-1)
    return at_query[:, torch.arange(len(objects)), objects.detections.labels]


def _logit(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return logits[:, objects.detections.queries, objects.detections.labels]


def _iou(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return iou_of(corners_of(boxes[:, objects.detections.queries]), corners_of(objects.boxes.to(boxes)))


def _found(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return (_of_label(objects, logits) * _iou_with_all(objects, boxes)).amax(-1)


def _duplicates(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    probability, iou = _of_label(objects, logits), _iou_with_all(objects, boxes)
    is_likeliest = logits[..., :-1].argmax(-1)[:, None] == objects.detections.labels[:, None].to(
        logits.device
    )
    has_it = is_likeliest & (probability > objects.confidence) & (iou >= TOUCH_IOU)
    return (has_it.sum(-1) - 1).clamp(min=0).to(logits.dtype)


def _detections(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    return _detected(objects, logits).sum(-1, keepdim=True).to(logits.dtype)


def _unmatched(objects: Objects, logits: Tensor, boxes: Tensor) -> Tensor:
    """Detections that neither are of an object's label and touch it, nor are in an object's place."""
    iou = _iou_with_all(objects, boxes)
    same_label = logits[..., :-1].argmax(-1)[:, None] == objects.detections.labels[:, None].to(logits.device)
    belongs = ((iou >= TOUCH_IOU) & same_label) | (iou >= KEEP_IOU)
    return (_detected(objects, logits) & ~belongs.any(1)).sum(-1, keepdim=True).to(logits.dtype)


def _detected(objects: Objects, logits: Tensor) -> Tensor:
    """(C, Q) bool."""
    return logits.softmax(-1)[..., :-1].amax(-1) > objects.confidence


def _of_label(objects: Objects, logits: Tensor) -> Tensor:
    """Probability of each object's label at every query: (C, O, Q)."""
    return logits.softmax(-1)[..., objects.detections.labels].transpose(-1, -2)


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
