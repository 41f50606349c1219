"""Boxes in the formats of DETR (cxcywh) and of pictures (left, top, right, bottom).

torchvision has the same, but to import it takes as long as to import torch (0.23 and later import torch's compiler).
"""

import torch
from torch import Tensor


def corners_of(boxes: Tensor) -> Tensor:
    """(..., 4) boxes as centre, width and height to left, top, right, bottom."""
    cx, cy, width, height = boxes.unbind(-1)
    return torch.stack((cx - 0.5 * width, cy - 0.5 * height, cx + 0.5 * width, cy + 0.5 * height), dim=-1)


def iou_of(boxes: Tensor, others: Tensor) -> Tensor:
    """IoU of boxes (..., 4) and others (..., 4), as left, top, right, bottom, whose dimensions broadcast.

    NaN for two boxes without area.
    """
    areas, other_areas = ((b[..., 2:] - b[..., :2]).prod(-1) for b in (boxes, others))
    least = torch.minimum(boxes[..., 2:], others[..., 2:])
    overlap = (least - torch.maximum(boxes[..., :2], others[..., :2])).clamp(min=0).prod(-1)
    return overlap / (areas + other_areas - overlap)


def pairwise_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """`iou_of` all pairs: (n, m) of boxes (n, 4) and (m, 4)."""
    return iou_of(boxes[:, None], others[None])
