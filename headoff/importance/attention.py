"""Where heads look: statistics of cross-attention relative to the boxes of the objects.

Shapes: O objects, L layers, H heads, N image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.calls import Attend, AttentionCall
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.values import Objects

CORE, RIM = 0.75, 1.25
"""The rim of a box is what lies between the box scaled by these factors about its centre."""

POINTS = 8
"""Points along a side of a token, at which it is decided how much of the token belongs to a region."""

STATISTICS = {
    "tokens": "effective number of tokens",
    "inside": "share of attention inside the box",
    "rim": "share of attention on the rim of the box",
    "outside": "share of attention beyond the rim",
    "extremity": "rim's share of box and rim, relative to even attention",
    "left": "left side's share of the attention on the rim",
    "right": "right side's share of the attention on the rim",
    "top": "top side's share of the attention on the rim",
    "bottom": "bottom side's share of the attention on the rim",
    "distance": "mean distance of attention from the box centre, in half sides",
    "offset_x": "centre of attention, to the right of the box centre, in half widths",
    "offset_y": "centre of attention, below the box centre, in half heights",
}
"""The statistics, and what they are."""


@dataclass(frozen=True)
class AttentionStatistics:
    """Statistics of the decoder's cross-attention in one image. Tensors are float64 on the CPU.

    Attributes:
        by_name: (O, L, H) each, see `STATISTICS`.
        agreement: (L, H, H), cosine similarity of the maps of two heads of a layer, averaged over objects.
        across_objects: (L, H), mean cosine similarity of a head's maps of two objects; NaN with fewer than two.
        across_layers: (L - 1, H), mean cosine similarity of a head's map with that of the same number in the next
            layer.
    """

    by_name: dict[str, Tensor]
    agreement: Tensor
    across_objects: Tensor
    across_layers: Tensor


def attention_at_objects(detector: Detector, encoded: EncodedImage, objects: Objects) -> Tensor:
    """Cross-attention weights at the objects' queries with everything on: (O, L, H, N) float64 on the CPU."""
    queries = objects.detections.queries.to(detector.device)
    found: dict[int, Tensor] = {}

    def record(call: AttentionCall, proceed: Attend) -> Tensor:
        if call.address.site == "decoder_cross":
            found[call.address.layer] = call.weights_at(queries)[0].transpose(0, 1).cpu()
        return proceed(call)

    with torch.inference_mode(), detector.intercepting(record):
        detector.decode(encoded.memory)
    weights = torch.stack([found[layer] for layer in sorted(found)], dim=1)
    return encoded.features.to_grid(weights).flatten(-2).clone()


def attention_statistics(
    weights: Tensor, boxes: Tensor, grid: tuple[int, int], extent: tuple[float, float]
) -> AttentionStatistics:
    """Statistics of attention weights.

    Args:
        weights: (O, L, H, N), rows that sum to 1.
        boxes: (O, 4), cxcywh as fractions of the image.
        grid: (h, w), N = h w.
        extent: (height, width) of the grid in units of the image: 1 unless the last row or column of tokens is cut.
    """
    weights, boxes = weights.double(), boxes.double()
    regions = token_regions(boxes, grid, extent)  # (regions, O, N)
    share = {name: torch.einsum("olhn,on->olh", weights, cover) for name, cover in regions.items()}
    even = {name: cover.sum(-1) for name, cover in regions.items()}
    box_and_rim = share["core"] + share["rim"]
    even_rim = even["rim"] / (even["core"] + even["rim"])
    logs = torch.where(weights > 0, weights.log(), 0)
    x, y = _centres(grid, extent)
    right = (x - boxes[:, :1]) / (boxes[:, 2:3] / 2)  # (O, N), from the box centre, in half sides
    down = (y - boxes[:, 1:2]) / (boxes[:, 3:] / 2)
    by_name = {
        "tokens": (-(weights * logs).sum(-1)).exp(),
        "inside": share["inside"],
        "rim": share["rim"],
        "outside": 1 - box_and_rim,
        "extremity": share["rim"] / box_and_rim / even_rim[:, None, None],
        **{side: share[side] / share["rim"] for side in ("left", "right", "top", "bottom")},
        "distance": torch.einsum("olhn,on->olh", weights, torch.hypot(right, down)),
        "offset_x": torch.einsum("olhn,on->olh", weights, right),
        "offset_y": torch.einsum("olhn,on->olh", weights, down),
    }
    assert set(by_name) == set(STATISTICS)
    unit = weights / weights.norm(dim=-1, keepdim=True)
    objects = len(weights)
    across = torch.einsum("olhn,plhn->lhop", unit, unit)
    pairs = objects * (objects - 1)
    return AttentionStatistics(
        by_name,
        torch.einsum("olhn,olgn->lhg", unit, unit) / max(objects, 1),
        (across.sum((-1, -2)) - across.diagonal(dim1=-2, dim2=-1).sum(-1)) / pairs
        if pairs
        else across.new_full(across.shape[:2], torch.nan),
        torch.einsum("olhn,olhn->lh", unit[:, :-1], unit[:, 1:]) / max(objects, 1),
    )


def token_regions(boxes: Tensor, grid: tuple[int, int], extent: tuple[float, float]) -> dict[str, Tensor]:
    """How much of each token lies in a region of each box: (O, N), 0..1.

    `inside` is the box; `core`, and `rim` around it, are divided at `CORE` and `RIM` times its size; the parts of the
    rim, `left`, `right`, `top` and `bottom`, at the box's diagonals.
    """
    height, width = grid
    y = (torch.arange(height * POINTS).double() + 0.5) / (height * POINTS) * extent[0]
    x = (torch.arange(width * POINTS).double() + 0.5) / (width * POINTS) * extent[1]
    u = ((x - boxes[:, :1]) / (boxes[:, 2:3] / 2))[:, None, :]
    v = ((y - boxes[:, 1:2]) / (boxes[:, 3:] / 2))[:, :, None]
    radius = torch.maximum(u.abs(), v.abs())
    rim = (radius > CORE) & (radius <= RIM)
    beside, above = u.abs() >= v.abs(), u.abs() < v.abs()
    points = {
        "inside": radius <= 1,
        "core": radius <= CORE,
        "rim": rim,
        "left": rim & beside & (u < 0),
        "right": rim & beside & (u >= 0),
        "top": rim & above & (v < 0),
        "bottom": rim & above & (v >= 0),
    }

    def of_tokens(mask: Tensor) -> Tensor:
        cells = mask.double().view(len(boxes), height, POINTS, width, POINTS)
        return cells.mean((2, 4)).flatten(1)

    return {name: of_tokens(mask) for name, mask in points.items()}


def _centres(grid: tuple[int, int], extent: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """x and y (N,) of the tokens' centres, as fractions of the image."""
    height, width = grid
    y = (torch.arange(height).double() + 0.5) / height * extent[0]
    x = (torch.arange(width).double() + 0.5) / width * extent[1]
    return x.repeat(height), y.repeat_interleave(width)
