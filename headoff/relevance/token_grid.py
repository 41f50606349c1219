"""Where the cells of a relevance map are in the image."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenGrid:
    """The cells of a map, which are squares of the resized picture.

    Attributes:
        shape: (h, w).
        stride: pixels of the resized picture per cell, along one side.
        resized: (height, width) of the resized picture. The last row and column of cells may exceed it.
        image_size: (height, width) of the original image.
    """

    shape: tuple[int, int]
    stride: int
    resized: tuple[int, int]
    image_size: tuple[int, int]

    @property
    def edges(self) -> tuple[Tensor, Tensor]:
        """Edges of rows (h + 1,) and columns (w + 1,) in pixels of the original image, cut at its border, float64."""
        edges = []
        for count, side, original in zip(self.shape, self.resized, self.image_size, strict=True):
            edges.append((torch.arange(count + 1).double() * self.stride).clamp(max=side) * (original / side))
        return edges[0], edges[1]

    @property
    def middles(self) -> tuple[Tensor, Tensor]:
        """The middles of rows (h,) and columns (w,) in pixels of the original image, float64."""
        rows, columns = self.edges
        return (rows[1:] + rows[:-1]) / 2, (columns[1:] + columns[:-1]) / 2

    def cover(self, box: Tensor) -> Tensor:
        """The share of each cell that `box` (left, top, right, bottom; pixels) covers: (h, w), 0..1."""
        shares = []
        for edges, low, high in zip(self.edges, (box[1], box[0]), (box[3], box[2]), strict=True):
            inside = edges.clamp(float(low), float(high)).diff()
            width = edges.diff()
            shares.append(torch.where(width > 0, inside / width.clamp(min=1e-12), 0))
        return shares[0][:, None] * shares[1]

    def mean_over_cells(self, pixels: Tensor) -> Tensor:
        """The mean over each cell of numbers of the original image's pixels (..., height, width): (..., h, w) float64.

        For a mask of zeros and ones it is the share of the cell that the mask covers. A pixel that lies in several
        cells counts in each by its area there.
        """
        rows, columns = (
            _weights(edges, count) for edges, count in zip(self.edges, self.image_size, strict=True)
        )
        return rows @ pixels.double() @ columns.T


def _weights(edges: Tensor, pixels: int) -> Tensor:
    """(cells, pixels) float64: the part of each cell that each pixel covers; zero for cells without extent."""
    start = torch.arange(pixels).double()
    low = torch.maximum(edges[:-1, None], start)
    high = torch.minimum(edges[1:, None], start + 1)
    width = edges.diff()[:, None]
    return torch.where(width > 0, (high - low).clamp(min=0) / width.clamp(min=1e-12), 0)
