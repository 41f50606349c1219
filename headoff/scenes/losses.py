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

from headoff.boxes import corners_of

CLASS_WEIGHT, L1_WEIGHT, GIOU_WEIGHT = 1.0, 5.0, 2.0
NO_OBJECT_WEIGHT = 0.1


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
    """The bipartite matching of minimum cost.

    Args:
        logits: (P, B, Q, classes + 1). boxes: (P, B, Q, 4).

    Returns:
        (P, B, M) int64: the query of each object; 0 for padding (mask it with `targets.valid`).
    """
    objects = targets.labels.shape[1]
    probability = logits.softmax(-1)
    index = targets.labels[None, :, None].expand(*probability.shape[:3], objects)
    cost = (
        (
            -CLASS_WEIGHT * probability.gather(-1, index)
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
    return torch.from_numpy(matched).to(logits.device)


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
    chosen = boxes.gather(2, matched[..., None].expand(-1, -1, -1, 4))[valid]
    goal = targets.boxes.expand(sets, -1, -1, -1)[valid]
    count = targets.valid.sum().clamp(min=1)
    box_loss = (
        L1_WEIGHT * F.l1_loss(chosen, goal, reduction="sum")
        + GIOU_WEIGHT * (1 - generalized_iou(chosen, goal)).sum()
    ) / count
    return CLASS_WEIGHT * class_loss + box_loss


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
    chosen = boxes[owned]
    count = owned.sum().clamp(min=1)
    box_loss = (
        L1_WEIGHT * F.l1_loss(chosen, goal, reduction="sum")
        + GIOU_WEIGHT * (1 - generalized_iou(chosen, goal)).sum()
    ) / count
    return CLASS_WEIGHT * class_loss + box_loss
