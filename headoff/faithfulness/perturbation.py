"""Perturbation curves: what becomes of an object while ever more of the image is taken away, or given back.

Cells of a map are ordered by relevance. *Deletion* takes them away, the most relevant first; *insertion* begins with
nothing and gives them back, the most relevant first. Positive perturbation is another name for deletion, and negative
perturbation, which takes the least relevant away first, is insertion read from right to left.

Shapes: O objects, P images with different cells, N cells, Q queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from headoff.detector import Detector
from headoff.detr.detector import Detr, Features
from headoff.errors import SettingError
from headoff.faithfulness.explained import ExplainedImage
from headoff.faithfulness.measures import Measure, Quantity, Scores, register_measure

STEPS = 20
"""Default number of steps of a curve."""

VALUES = ("probability", "found")
"""The values of `headoff.values` that curves are of."""

BLUR = 0.08
"""Standard deviation of the fill `blur`, in short sides of the image."""

REACH = 1.5
"""Standard deviation of the fill `surroundings`, in cells."""


class Perturber(ABC):
    """An image with cells taken away.

    Args:
        image: the image.
    """

    def __init__(self, image: ExplainedImage) -> None:
        self.image = image
        detector = image.detector
        gate = image.gates.encoder_self
        self.encoder_gate = None if gate is None else gate[0]
        decoder_sites = {site: image.gates.site(site) for site in ("decoder_self", "decoder_cross")}
        self.plan = None
        if any(gate is not None for gate in decoder_sites.values()):
            self.plan = detector.plan(replace(image.gates, encoder_self=None))

    def __call__(self, kept: Tensor) -> Tensor:
        """The values of all objects in images of which only some cells are kept.

        Args:
            kept: (P, N) bool.

        Returns:
            (P, O, `VALUES`) float64 on the CPU.
        """
        # Images without a difference are computed once: all curves share their first and last image.
        packed = np.packbits(kept.numpy(), axis=1)
        _, first, place = np.unique(packed, axis=0, return_index=True, return_inverse=True)
        distinct = kept[torch.from_numpy(first)]
        order = distinct.sum(1).argsort(stable=True)
        results = torch.zeros(len(distinct), len(self.image), len(VALUES), dtype=torch.float64)
        with torch.inference_mode():
            for batch in self.batches(distinct[order].sum(1)):
                chosen = order[batch]
                memory = self.memory(distinct[chosen])
                output = self.image.detector.decode(memory, self.plan)
                logits, boxes = output.logits[0], output.boxes[0]
                found = [self.image.value(logits, boxes, value) for value in VALUES]
                results[chosen] = torch.stack(found, dim=-1)
        return results[torch.from_numpy(place.reshape(-1))]

    def batches(self, counts: Tensor) -> Sequence[slice]:
        """Batches of images with so many cells each (P,), in ascending order."""
        size = max(1, self.image.memory_budget // self.bytes_of(int(counts.max()) if len(counts) else 1))
        return [slice(start, start + size) for start in range(0, len(counts), size)]

    @abstractmethod
    def bytes_of(self, count: int) -> int:
        """About how many bytes the activations of one image with `count` cells take."""

    @abstractmethod
    def memory(self, kept: Tensor) -> Any:
        """The memory of the images with these cells (P, N)."""


class TokenPerturber(Perturber):
    """Image tokens are taken away after the backbone, so that only encoder and decoder run.

    Args:
        fill: what is in their place. `removed`: nothing; no query attends to them, and the others keep their positions.
            `zero`: zeros; `mean`: the mean of the image's tokens; both with the position that the token had. Of a
            detector of transformers it is cells of the backbone's maps on all levels that are filled.

    Raises:
        SettingError: tokens of the detector cannot be removed.
    """

    def __init__(self, image: ExplainedImage, fill: str) -> None:
        super().__init__(image)
        self.fill = fill
        self.features = image.features
        if fill == "removed":
            check_removable(image.detector)

    def batches(self, counts: Tensor) -> Sequence[slice]:
        if self.fill != "removed":
            return super().batches(counts)
        # Sequences of a batch have one length.
        found, ends = [], [0, *(counts.diff().nonzero().flatten() + 1).tolist(), len(counts)]
        for start, end in zip(ends, ends[1:], strict=False):
            size = max(1, self.image.memory_budget // self.bytes_of(int(counts[start])))
            found += [slice(first, min(first + size, end)) for first in range(start, end, size)]
        return found

    def bytes_of(self, count: int) -> int:
        # Per token an encoder layer keeps about 8 vectors, and the hidden layer of its feed-forward block.
        detector = self.image.detector
        tokens = count if self.fill == "removed" else sum(h * w for h, w in self.features.shapes)
        width = detector.config.width if isinstance(detector, Detr) else 256
        element = torch.finfo(detector.dtype).bits // 8
        return max(tokens, 1) * 16 * width * element + detector.decoder_bytes(self.features)

    def memory(self, kept: Tensor) -> Any:
        features, detector, count = self.features, self.image.detector, len(kept)
        kept = kept.to(detector.device)
        gate = self.encoder_gate
        if self.fill != "removed":
            filled = features.filled(kept.unflatten(1, self.image.grid.shape), self.fill)
            return detector.encode_features(filled, gate)
        if not bool(kept.any()):
            # Nothing can be attended to; a sequence needs a token all the same.
            one = torch.zeros_like(kept[:, :1])
            gate = gate if gate is None or gate.shape[1] == 1 else gate[:, :1]
            tokens, positions = (
                x[:, :1].expand(count, -1, -1) for x in (features.tokens, features.positions)
            )
            return detector.encode_features(Features(tokens, positions, one[:, None, None], (1, 1)), gate)
        index = kept.nonzero()[:, 1].view(count, -1)
        if gate is not None and gate.shape[1] > 1:
            raise SettingError(
                "a gate of the encoder that differs between tokens cannot be used while tokens are removed: use "
                "tokens_zero or tokens_mean"
            )
        tokens, positions = features.tokens[0][index], features.positions[0][index]
        return detector.encode_features(Features(tokens, positions, None, (1, index.shape[1])), gate)


def check_removable(detector: Detector) -> None:
    """Raise SettingError unless image tokens can be removed from the attention of this detector."""
    if not isinstance(detector, Detr):
        raise SettingError(
            "image tokens can be removed from attention only in headoff's own DETR: use tokens_mean or tokens_zero, "
            "or a measure on pixels"
        )


class PixelPerturber(Perturber):
    """Squares of pixels, one for each cell, are replaced before the backbone, so that the whole model runs.

    Args:
        fill: what they are replaced by. `grey`: the mean colour that images are normalised with. `blur`: the blurred
            image. `surroundings`: for each square the mean colour of the squares that are kept, the nearer the more (a
            Gaussian of `REACH` cells).
    """

    def __init__(self, image: ExplainedImage, fill: str) -> None:
        super().__init__(image)
        self.fill = fill
        pixels, _ = image.detector.preprocess([image.picture])
        self.pixels = pixels.to(image.detector.device)
        self.blurred = blurred(self.pixels, BLUR * min(self.pixels.shape[-2:])) if fill == "blur" else None
        rows, columns = image.grid.shape
        height, width = self.pixels.shape[-2:]
        stride = image.grid.stride
        # The cell of every row and column of pixels.
        self.row = (torch.arange(height, device=self.pixels.device) // stride).clamp(max=rows - 1)
        self.column = (torch.arange(width, device=self.pixels.device) // stride).clamp(max=columns - 1)
        if fill == "surroundings":
            self.colours = self._colours()
            self.nearness = _nearness(rows, columns).to(self.pixels)

    def bytes_of(self, count: int) -> int:
        # The first stages of a ResNet-50 hold about 64 numbers for each pixel.
        height, width = self.pixels.shape[-2:]
        return 64 * height * width * self.pixels.element_size()

    def memory(self, kept: Tensor) -> Any:
        kept = kept.to(self.pixels.device)
        mask = self._spread(kept.unflatten(1, self.image.grid.shape)[:, None])
        changed = torch.where(mask, self.pixels, self._filling(kept))
        detector = self.image.detector
        return detector.encode_features(detector.features(changed), self.encoder_gate)

    def _filling(self, kept: Tensor) -> Tensor:
        if self.fill == "grey":
            return self.pixels.new_zeros(())  # pixels are normalised
        if self.blurred is not None:
            return self.blurred
        weights = kept.to(self.pixels.dtype) @ self.nearness.T  # symmetric up to scale
        colours = (kept.to(self.pixels.dtype)[:, None] * self.colours) @ self.nearness.T
        filling = colours / weights.clamp(min=1e-12)[:, None]
        return self._spread(filling.unflatten(-1, self.image.grid.shape))

    def _spread(self, cells: Tensor) -> Tensor:
        """(..., h, w) of cells as (..., H, W) of pixels."""
        return cells[..., self.row, :][..., self.column]

    def _colours(self) -> Tensor:
        """(3, N) mean colour of each cell's pixels."""
        rows, columns = self.image.grid.shape
        total = self.pixels.new_zeros(3, rows, self.pixels.shape[-1]).index_add_(1, self.row, self.pixels[0])
        total = self.pixels.new_zeros(3, rows, columns).index_add_(2, self.column, total)
        height = torch.bincount(self.row, minlength=rows)[:, None]
        width = torch.bincount(self.column, minlength=columns)
        return (total / (height * width).clamp(min=1)).flatten(1)


def _nearness(rows: int, columns: int) -> Tensor:
    """(N, N) weights of each cell's colour in place of another."""
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    places = torch.stack((y.flatten(), x.flatten()), dim=1)
    # The constant makes far cells count where no near one is left.
    return torch.exp(-0.5 * (torch.cdist(places, places) / REACH) ** 2) + 1e-6


def blurred(pixels: Tensor, deviation: float) -> Tensor:
    """(B, C, H, W) images blurred by a Gaussian of `deviation` pixels; at the border pixels are repeated."""
    radius = max(1, round(3 * deviation))
    offsets = torch.arange(-radius, radius + 1, device=pixels.device, dtype=pixels.dtype)
    kernel = torch.exp(-0.5 * (offsets / max(deviation, 1e-6)) ** 2)
    kernel = (kernel / kernel.sum()).expand(pixels.shape[1], 1, -1)
    padded = F.pad(pixels, (radius, radius, radius, radius), mode="replicate")
    across = F.conv2d(padded, kernel[:, :, None], groups=pixels.shape[1])
    return F.conv2d(across, kernel[..., None], groups=pixels.shape[1])


TOKEN_FILLS = {
    "removed": "nothing, removed from attention",
    "zero": "zeros",
    "mean": "the mean of the image's tokens",
}
PIXEL_FILLS = {
    "grey": "grey, the mean that images are normalised with",
    "blur": "the blurred image",
    "surroundings": "the mean colour of what is left around",
}


class Perturbation(Measure):
    """Areas under deletion and insertion curves.

    The x axis of a curve is the share of cells that are taken away (deletion) or given back (insertion). The area is
    that of the trapezoids between `steps` + 1 points, so it is in 0..1 as the value is. Cells of the same relevance are
    in a random order, which is seeded by the image and the same for all its maps.

    Args:
        place: `tokens` or `pixels`.
        fill: one of `TOKEN_FILLS` or `PIXEL_FILLS`.
        steps: of the curves.
        spacing: of the points: `quadratic`, (k / steps)^2, or `even`, k / steps. A detector often loses an object with
            the first few tokens. With even steps all curves that fall so soon have the area of the first trapezoid.

    Raises:
        SettingError: there is no such fill or spacing, or there are too few steps.
    """

    axis = "share of the image that is taken away (deletion) or given back (insertion)"
    quantities = (
        Quantity("deletion", "area under the deletion curve, class probability", "lower", "probability"),
        Quantity("insertion", "area under the insertion curve, class probability", "higher", "probability"),
        Quantity("deletion_found", "area under the deletion curve, found", "lower", "probability x IoU"),
        Quantity("insertion_found", "area under the insertion curve, found", "higher", "probability x IoU"),
    )

    def __init__(
        self, place: str, fill: str, steps: int = STEPS, spacing: Literal["quadratic", "even"] = "quadratic"
    ) -> None:
        fills = {"tokens": TOKEN_FILLS, "pixels": PIXEL_FILLS}.get(place, {})
        if fill not in fills:
            raise SettingError(f"{place!r} cannot be filled with {fill!r}: use one of {', '.join(fills)}")
        if steps < 2:
            raise SettingError(f"{steps} steps make no curve: give at least 2")
        if spacing not in ("quadratic", "even"):
            raise SettingError(f"the spacing of steps cannot be {spacing!r}: use quadratic or even")
        self.name = f"{place}_{fill}"
        self.place, self.fill, self.steps, self.spacing = place, fill, steps, spacing
        what = "image tokens" if place == "tokens" else "pixels"
        self.summary = f"deletion and insertion of {what}, filled with {fills[fill]}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps, "spacing": self.spacing}

    @property
    def points(self) -> Tensor:
        even = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        return even**2 if self.spacing == "quadratic" else even

    def check(self, detector: Detector) -> None:
        if self.name == "tokens_removed":
            check_removable(detector)

    def scores(self, image: ExplainedImage, methods: Sequence[str]) -> dict[str, Scores]:
        perturber = (TokenPerturber if self.place == "tokens" else PixelPerturber)(image, self.fill)
        maps = torch.stack([image.maps(method) for method in methods]).flatten(-2)  # (methods, O, N)
        counts = counts_of_cells(self.points, maps.shape[-1])
        kept = kept_cells(order_of_cells(maps, image.generator("ties")), counts)
        found = perturber(kept.flatten(0, -2)).unflatten(0, kept.shape[:-1])
        # (methods, O, 2, P, O, values): of the objects only the one whose map ordered the cells.
        curves = found.diagonal(dim1=1, dim2=4).permute(0, 4, 3, 1, 2).flatten(2, 3)
        shares = counts.double() / maps.shape[-1]
        areas = torch.trapezoid(curves, shares, dim=-1)
        # Shares are whole cells. Curves of images with different grids can be averaged at the same points.
        curves = curves @ _interpolation(shares, self.points)
        return {name: Scores(areas[at], curves[at]) for at, name in enumerate(methods)}


def order_of_cells(maps: Tensor, generator: torch.Generator) -> Tensor:
    """(..., N) int64, the cells by falling relevance `maps` (..., N), those of the same relevance in a random order."""
    shuffled = torch.randperm(maps.shape[-1], generator=generator)
    return shuffled[maps[..., shuffled].argsort(dim=-1, descending=True, stable=True)]


def counts_of_cells(points: Tensor, cells: int) -> Tensor:
    """(P,) int64: how many of the cells have changed at each point, the nearest number to that share of them, and with
    every point one more than before as long as there are enough.
    """
    nearest = (points * cells).round().long()
    return torch.maximum(nearest, torch.arange(len(points)).clamp(max=cells))


def _interpolation(shares: Tensor, points: Tensor) -> Tensor:
    """(P, P) weights of the values at `shares` in the piecewise linear function at `points`."""
    values = torch.eye(len(shares), dtype=torch.float64).numpy()
    keep = np.concatenate(([True], np.diff(shares.numpy()) > 0))  # fewer cells than points
    columns = [np.interp(points.numpy(), shares.numpy()[keep], row[keep]) for row in values]
    return torch.from_numpy(np.stack(columns))


def kept_cells(order: Tensor, counts: Tensor) -> Tensor:
    """(..., 2, P, N) bool, the cells that are kept at each point of deletion, and of insertion.

    Args:
        order: (..., N), the cells by falling relevance.
        counts: (P,) how many cells have changed at each point.
    """
    rank = order.argsort(-1)[..., None, :]  # the place of each cell in the order
    given = rank < counts[:, None]
    return torch.stack((~given, given), dim=-3)


for _place, _fills in (("tokens", TOKEN_FILLS), ("pixels", PIXEL_FILLS)):
    for _fill in _fills:
        register_measure(f"{_place}_{_fill}", partial(Perturbation, _place, _fill))
