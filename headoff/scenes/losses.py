"""The set loss of DETR (Carion et al., ECCV 2020, section 3.1), for many predictions of one batch at once.

All functions take P sets of predictions (decoder layers x query groups) of B images with Q queries, and targets padded
to M objects. Only the assignment loops over images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from headoff.boxes import corners_of, iou_of

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
NO_OBJECT_WEIGHT = 0.1
FOCAL_COST_WEIGHT = 2.0


@dataclass(frozen=True)
class Targets:
    """Objects of B images, padded to M.

    Attributes:
        boxes: (B, M, 4) float32, cxcywh in 0..1.
        labels: (B, M) int64.
        valid: (B, M) bool, False for padding.
    """

    boxes: Tensor
    labels: Tensor
    valid: Tensor


def generalized_iou(first: Tensor, second: Tensor) -> Tensor:
    """GIoU (Rezatofighi et al., CVPR 2019) of cxcywh boxes, elementwise with broadcasting.

    torchvision only has all pairs of two lists, without batch dimensions.
    """
    a, b = corners_of(first), corners_of(second)
    overlap = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    )
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).prod(-1)
    union = first[..., 2:].prod(-1) + second[..., 2:].prod(-1) - overlap
    return overlap / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """The bipartite matching of minimum cost, for scores by softmax.

    Args:
        logits: (P, B, Q, classes + 1). boxes: (P, B, Q, 4).

    Returns:
        (P, B, M) int64: the query of each object; 0 for padding (mask it with `targets.valid`).
    """
    return _assign(-CLASS_WEIGHT * _of_labels(logits.softmax(-1), targets), boxes, targets)


@torch.no_grad()
def match_by_sigmoid(logits: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """The bipartite matching of minimum cost, for scores by sigmoid: Deformable DETR's, with a focal cost.

    Args:
        logits: (P, B, Q, classes). boxes: (P, B, Q, 4).

    Returns:
        As `match`.
    """
    logits = _of_labels(logits, targets)
    score = logits.sigmoid()
    # -log(score) and -log(1 - score), without cancellation
    positive, negative = F.softplus(-logits), F.softplus(logits)
    cost = 0.25 * (1 - score) ** 2 * positive - 0.75 * score**2 * negative
    return _assign(FOCAL_COST_WEIGHT * cost, boxes, targets)


def _of_labels(values: Tensor, targets: Targets) -> Tensor:
    """(P, B, Q, classes) to (P, B, Q, M): the value of each object's class."""
    index = targets.labels[None, :, None].expand(*values.shape[:3], -1)
    return values.gather(-1, index)


def _assign(class_cost: Tensor, boxes: Tensor, targets: Targets) -> Tensor:
    """The assignment of minimum cost, given the part (P, B, Q, M) that classes have in it."""
    objects = targets.labels.shape[1]
    cost = (
        (
            class_cost
            + L1_WEIGHT * (boxes[..., None, :] - targets.boxes[None, :, None]).abs().sum(-1)
            - GIOU_WEIGHT * generalized_iou(boxes[..., None, :], targets.boxes[None, :, None])
        )
        .cpu()
        .double()
        .numpy()
    )
    counts = targets.valid.sum(1).tolist()
    matched = np.zeros((*cost.shape[:2], objects), dtype=np.int64)
    for prediction in range(cost.shape[0]):
        for image, count in enumerate(counts):
            rows, columns = linear_sum_assignment(cost[prediction, image, :, :count])
            matched[prediction, image, columns] = rows
    return torch.from_numpy(matched).to(boxes.device)


def set_loss(logits: Tensor, boxes: Tensor, targets: Targets, matched: Tensor) -> Tensor:
    """Class, L1 and GIoU loss of matched predictions, summed over the P sets.

    Args:
        logits: (P, B, Q, classes + 1). boxes: (P, B, Q, 4). matched: (P, B, M), see `match`.
    """
    sets, batch, queries, classes = logits.shape
    valid = targets.valid.expand(sets, -1, -1)
    # Padding is written to an extra query, which is removed again, so that one scatter suffices.
    slot = torch.where(valid, matched, queries)
    wanted = torch.full((sets, batch, queries + 1), classes - 1, device=logits.device)
    wanted.scatter_(2, slot, targets.labels.expand(sets, -1, -1))
    weight = torch.ones(classes, device=logits.device)
    weight[-1] = NO_OBJECT_WEIGHT
    class_loss = sum(
        F.cross_entropy(one.flatten(0, 1), target[:, :queries].flatten(), weight)
        for one, target in zip(logits, wanted, strict=True)
    )
    chosen, goal = _matched_boxes(boxes, targets, matched)
    return CLASS_WEIGHT * class_loss + _box_loss(chosen, goal, targets.valid.sum())


def varifocal_set_loss(logits: Tensor, boxes: Tensor, targets: Targets, matched: Tensor) -> Tensor:
    """As `set_loss`, for scores by sigmoid, with RT-DETR's class loss (Zhang et al., VarifocalNet, CVPR 2021).

    A matched query must score its class as high as the IoU of its box is, the others zero; those weigh the less, the
    lower they score.

    Args:
        logits: (P, B, Q, classes). boxes: (P, B, Q, 4). matched: (P, B, M), see `match`.
    """
    chosen, goal = _matched_boxes(boxes, targets, matched)
    valid = targets.valid.expand(len(logits), -1, -1)
    one, image, _ = valid.nonzero(as_tuple=True)
    found = (one, image, matched[valid], targets.labels.expand(len(logits), -1, -1)[valid])
    wanted, weight = torch.zeros_like(logits), 0.75 * logits.detach().sigmoid() ** 2
    wanted[found] = weight[found] = iou_of(corners_of(chosen.detach()), corners_of(goal))
    count = targets.valid.sum()
    class_loss = F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum") / count.clamp(
        min=1
    )
    return class_loss + _box_loss(chosen, goal, count)


def _matched_boxes(boxes: Tensor, targets: Targets, matched: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted and the true boxes (n, 4) of all objects in all sets."""
    valid = targets.valid.expand(len(boxes), -1, -1)
    chosen = boxes.gather(2, matched[..., None].expand(-1, -1, -1, 4))[valid]
    return chosen, targets.boxes.expand(len(boxes), -1, -1, -1)[valid]


def _box_loss(chosen: Tensor, goal: Tensor, count: Tensor) -> Tensor:
    """L1 and GIoU loss of boxes (n, 4) for each of `count` objects."""
    return (
        L1_WEIGHT * F.l1_loss(chosen, goal, reduction="sum")
        + GIOU_WEIGHT * (1 - generalized_iou(chosen, goal)).sum()
    ) / count.clamp(min=1)


def dense_loss(logits: Tensor, boxes: Tensor, grid: tuple[int, int], targets: Targets) -> Tensor:
    """A loss of every image token, which must predict the object that it is in: its class, or "no object", and its box.

    The set loss alone is almost no signal for a newly initialised backbone; this loss is one for every token. A token
    is in an object if its centre is in the central 70% of the object's box; in the smallest object, if there are
    several.

    Args:
        logits: (B, h * w, classes + 1). boxes: (B, h * w, 4).
    """
    height, width = grid
    y, x = torch.meshgrid(
        (torch.arange(height, device=boxes.device) + 0.5) / height,
        (torch.arange(width, device=boxes.device) + 0.5) / width,
        indexing="ij",
    )
    centre = torch.stack((x, y), -1).flatten(0, 1)[None, :, None]
    offset = (centre - targets.boxes[:, None, :, :2]).abs() / targets.boxes[:, None, :, 2:].clamp(min=1e-6)
    inside = (offset.amax(-1) < 0.35) & targets.valid[:, None]
    area = targets.boxes[..., 2:].prod(-1)[:, None].expand_as(inside).masked_fill(~inside, torch.inf)
    owner = area.argmin(-1)
    owned = inside.any(-1)
    wanted = torch.where(owned, targets.labels.gather(1, owner), logits.shape[-1] - 1)
    weight = torch.ones(logits.shape[-1], device=logits.device)
    weight[-1] = NO_OBJECT_WEIGHT
    class_loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weight)
    goal = targets.boxes.gather(1, owner[..., None].expand(-1, -1, 4))[owned]
    return CLASS_WEIGHT * class_loss + _box_loss(boxes[owned], goal, owned.sum())
