"""Explanations made by hand, for tests of figures and reports."""

import torch

from headoff.relevance import Explanation
from headoff.sweeps import SweepResult

LAYERS, HEADS = 6, 8


def explanation_of(
    result: SweepResult,
    *,
    grid: tuple[int, int] = (6, 6),
    stride: int = 32,
    resized: tuple[int, int] = (192, 192),
    heads: bool = False,
    layers: int = LAYERS,
) -> Explanation:
    """Evidence of the sweep's objects in the middle of their boxes, which grows over layers and fades over
    configurations; under the last of several there is none."""
    count, objects = len(result), len(result.baseline)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    maps = torch.zeros(count, objects, layers, *grid)
    height, width = result.image_size
    for o, found in enumerate(result.baseline):
        x = (found.box[0] + found.box[2]) / 2 / width * resized[1] / stride
        y = (found.box[1] + found.box[3]) / 2 / height * resized[0] / stride
        blob = torch.exp(-((columns + 0.5 - x) ** 2) - (rows + 0.5 - y) ** 2) + 0.01
        for c in range(count):
            for m in range(layers):
                maps[c, o, m] = blob * (m + 1) * (o + 1) * 0.7**c
    if count > 1:
        maps[-1] = 0
    weights = None
    if heads:
        weights = maps[:, :, :, None].expand(-1, -1, -1, HEADS, -1, -1).clone() / 100
        for c in range(count):
            weights[c, :, :, :c] = 0
    queries = result.baseline.queries.expand(count, objects).clone()
    return Explanation(
        configurations=result.configurations,
        objects=result.baseline,
        layers=tuple(range(LAYERS - layers, LAYERS)),
        maps=maps,
        queries=queries,
        labels=result.baseline.labels.expand(count, objects).clone(),
        values=torch.ones(count, objects, dtype=torch.float64),
        decoder_identity_rows=torch.zeros(count, objects, layers, dtype=torch.long),
        encoder_identity_rows=torch.zeros(count, objects, dtype=torch.long),
        reference_differs=torch.zeros(count, objects, layers, dtype=torch.bool),
        logits=result.logits,
        boxes=result.boxes,
        heads=weights,
        points=None,
        tokens=None,
        shapes=(tuple(maps.shape[-2:]),),
        through_encoder=True,
        stride=stride,
        resized=resized,
        method="chefer",
        target=("class",) * objects,
        pick="baseline",
        zero_rows="identity",
    )
