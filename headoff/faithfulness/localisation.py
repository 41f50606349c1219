"""Whether relevance lies on the object: the pointing game, and the share of relevance inside a region.

With the cells t of a map R, of which negative numbers count as 0, and the share c[t] of each cell that the region
covers:

- *energy* = (sum over t of R[t] c[t]) / (sum over t of R[t]), the energy-based pointing game (Wang et al., CVPR
  workshops 2020, Score-CAM). A map that is the same everywhere has the region's share of the image.
- *pointing* = 1 if the middle of the cell with the greatest relevance is in the region, else 0 (Zhang et al., ECCV
  2016, without their tolerance of 15 pixels); where several cells have the greatest relevance, the mean over them.

A map without any positive relevance points nowhere: both are 0. The region is the box that the detector found, the true
box, or the true mask: the visible pixels of the object that the detection found (`Truth.match`).

That relevance lies on the object is what people expect of a detector, not what every detector does: it may look at the
surroundings. A high number says that map and expectation agree.

Shapes: O objects, h x w cells, H x W pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from headoff.faithfulness.explained import ExplainedImage
from headoff.faithfulness.measures import Measure, Quantity, Scores, register_measure


class _Localisation(Measure):
    """Relevance inside a region; see the module."""

    quantities = (
        Quantity("energy", "share of positive relevance inside the region", "higher", "share"),
        Quantity("pointing", "the most relevant cell is inside the region", "higher", "share"),
    )

    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        cover, inside, known = self.regions(image)
        found = {}
        for method in methods:
            maps = image.maps(method).clamp(min=0).flatten(1)  # (O, N)
            total = maps.sum(-1)
            energy = (maps * cover.flatten(1)).sum(-1) / torch.where(total > 0, total, 1)
            greatest = (maps == maps.amax(-1, keepdim=True)) & (maps > 0)
            hits = (greatest & inside.flatten(1)).sum(-1) / greatest.sum(-1).clamp(min=1)
            values = torch.stack((energy, hits.double()), dim=-1)
            found[method] = Scores(values.masked_fill(~known[:, None], torch.nan))
        return found

    @abstractmethod
    def regions(self, image: ExplainedImage) -> tuple[Tensor, Tensor, Tensor]:
        """The share of each cell inside the objects' regions (O, h, w) float64, whether its middle is (O, h, w), and
        whether there is a region (O,).
        """


def _of_boxes(image: ExplainedImage, boxes: Tensor, known: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = image.grid.middles
    cover = torch.stack([image.grid.cover(box) for box in boxes.double()])
    left, top, right, bottom = boxes.double()[:, :, None].unbind(1)
    across = (columns >= left) & (columns <= right)
    down = (rows >= top) & (rows <= bottom)
    return cover, down[:, :, None] & across[:, None, :], known


class DetectedBox(_Localisation):
    """Inside the box that the detector found."""

    name = "detected_box"
    summary = "relevance inside the box that the detector found"

    def regions(self, image: ExplainedImage) -> tuple[Tensor, Tensor, Tensor]:
        return _of_boxes(image, image.objects.detections.boxes, torch.ones(len(image), dtype=torch.bool))


class TrueBox(_Localisation):
    """Inside the box of the true object that was found; not defined for a detection that found none."""

    name = "true_box"
    summary = "relevance inside the true object's box"
    needs = "boxes"

    def regions(self, image: ExplainedImage) -> tuple[Tensor, Tensor, Tensor]:
        assert image.truth is not None
        if not len(image.truth):
            return _nothing(image)
        return _of_boxes(image, image.truth.boxes[image.matched.clamp(min=0)], image.matched >= 0)


class TrueMask(_Localisation):
    """Inside the visible pixels of the true object that was found; not defined for a detection that found none."""

    name = "true_mask"
    summary = "relevance on the true object's visible pixels"
    needs = "masks"

    def regions(self, image: ExplainedImage) -> tuple[Tensor, Tensor, Tensor]:
        assert image.truth is not None and image.truth.masks is not None
        if not len(image.truth):
            return _nothing(image)
        masks = image.truth.masks[image.matched.clamp(min=0)]
        rows, columns = (
            middles.long().clamp(max=side - 1)
            for middles, side in zip(image.grid.middles, masks.shape[-2:], strict=True)
        )
        inside = masks[:, rows][:, :, columns]
        return image.grid.mean_over_cells(masks), inside, image.matched >= 0


def _nothing(image: ExplainedImage) -> tuple[Tensor, Tensor, Tensor]:
    cover = torch.zeros(len(image), *image.grid.shape, dtype=torch.float64)
    return cover, cover.bool(), torch.zeros(len(image), dtype=torch.bool)


for _measure in (DetectedBox, TrueBox, TrueMask):
    register_measure(_measure.name, _measure)
