"""Detections under configurations, for tests of what is computed from a results folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from coco_oracle import synthetic

from headoff.evaluation.tables import DetectionTable, GroundTruth
from headoff.gates import Configuration, HeadLayout, all_subsets, cumulative, single_heads

LAYERS, HEADS = 2, 3


def several_sweeps() -> tuple[Configuration, ...]:
    """The cumulative sweep, single heads and all subsets, each configuration once."""
    chosen = (*cumulative(HEADS), *single_heads(LAYERS, HEADS), *all_subsets(HEADS))
    return tuple({one.text: one for one in chosen}.values())


@dataclass(frozen=True)
class FakeResults:
    """Like a `Results`. The more heads are off, the more boxes are moved; head 1 matters most."""

    configurations: Sequence[Configuration] = several_sweeps()
    images: int = 40
    seed: int = 0
    shift: float = 0.0
    classes: int = 3

    @cached_property
    def data(self) -> tuple[GroundTruth, DetectionTable]:
        return synthetic(
            self.seed, images=self.images, classes=self.classes, detections=24, quality=0.8, crowds=0.05
        )

    @property
    def truth(self) -> GroundTruth:
        return self.data[0]

    @property
    def done(self) -> np.ndarray:
        return np.arange(self.images)

    skipped = {}
    manifest = {"identity": {"weights": "a"}, "provenance": {"model": "fake", "device": "cpu"}}
    is_complete = True

    def detections(self, configuration: int) -> DetectionTable:
        table = self.data[1]
        layout = HeadLayout(0, LAYERS, HEADS)
        gate = self.configurations[configuration].gate("decoder_cross", layout)
        off = 0.0 if gate is None else float(((1 - gate.numpy()[:, 0]) @ [0.1, 0.5, 0.2]).sum()) / LAYERS
        moved = np.random.default_rng(1).uniform(size=len(table)) < off + self.shift
        sides = np.tile(table.boxes[:, 2:] - table.boxes[:, :2], 2)
        return replace(table, boxes=np.where(moved[:, None], table.boxes + 0.3 * sides, table.boxes))
