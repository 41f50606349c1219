"""The effect of another precision on the results of a sweep and on relevance maps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from headoff.detections import class_probabilities
from headoff.errors import SettingError
from headoff.gates import Configuration
from headoff.relevance.explanations import Explanation
from headoff.sweeps import SweepResult


@dataclass(frozen=True)
class DetectionEffect:
    """How the detections of a sweep differ from those of a reference, for the same image and configurations.

    Attributes:
        score: largest difference of a probability, over configurations, queries and classes.
        box: largest difference of a side of a box, in pixels of the original image, of detections that both have.
        detections: number of detections of the reference, over all configurations.
        gained: number of detections (query and class, under a configuration) that only the other sweep has.
        lost: number of detections that only the reference has.
    """

    score: float
    box: float
    detections: int
    gained: int
    lost: int

    def sentence(self, name: str) -> str:
        """The effect in one sentence; `name` is what was changed."""
        return (
            f"{name} compared with full precision: scores differ by at most {self.score:.2g}, boxes by "
            f"{self.box:.2g} pixels; "
            f"of {self.detections} detections in the sweep {self.lost} are lost, and {self.gained} gained"
        )


@dataclass(frozen=True)
class MapEffect:
    """How relevance maps differ from those of a reference, for the same objects.

    Attributes:
        error: largest difference in a map, relative to the maximum of the reference map; infinite if only one of the
            two is zero, or one is not finite; 0 if no map was compared.
        compared: number of maps.
        other_targets: number of maps that were not compared, because they explain different classes.
    """

    error: float
    compared: int
    other_targets: int

    def sentence(self, name: str) -> str:
        """The effect in one sentence; `name` is what was changed."""
        left_out = (
            f"; {self.other_targets} explain another class and are left out" if self.other_targets else ""
        )
        if not self.compared:
            return f"{name} compared with full precision: there are no maps to compare{left_out}"
        return (
            f"{name} compared with full precision: {self.compared} maps differ by at most {self.error:.2g} of "
            f"their peak"
            f"{left_out}"
        )


def effect_on_detections(reference: SweepResult, found: SweepResult) -> DetectionEffect:
    """Compare the detections of two sweeps.

    Raises:
        SettingError: they have different configurations or image sizes.
    """
    _check_same(reference.configurations, found.configurations, reference.image_size, found.image_size)
    scores = class_probabilities(found.logits, found.baseline.scoring) - class_probabilities(
        reference.logits, reference.baseline.scoring
    )
    box, gained, lost = 0.0, 0, 0
    for then, now in zip(reference.detections, found.detections, strict=True):
        before = {(detection.query, detection.label): detection.box for detection in then}
        after = {(detection.query, detection.label): detection.box for detection in now}
        gained += len(after.keys() - before.keys())
        lost += len(before.keys() - after.keys())
        for key in before.keys() & after.keys():
            box = max(box, *(abs(a - b) for a, b in zip(before[key], after[key], strict=True)))
    return DetectionEffect(
        score=float(scores.abs().amax()) if scores.numel() else 0.0,
        box=box,
        detections=sum(map(len, reference.detections)),
        gained=gained,
        lost=lost,
    )


def effect_on_maps(reference: Explanation, found: Explanation) -> MapEffect:
    """Compare relevance maps.

    Raises:
        SettingError: they have different configurations, queries, layers or tokens.
    """
    _check_same(reference.configurations, found.configurations, reference.maps.shape, found.maps.shape)
    if not torch.equal(reference.objects.queries, found.objects.queries) or reference.layers != found.layers:
        raise SettingError(
            "the two explanations are of other queries or layers: give the queries of one to the other"
        )
    same = (reference.labels == found.labels) & (reference.queries == found.queries) & (found.queries >= 0)
    truth, maps = reference.maps[same].double(), found.maps[same].double()
    difference, peak = (maps - truth).abs().flatten(-2).amax(-1), truth.abs().flatten(-2).amax(-1)
    errors = torch.where(difference == 0, 0.0, difference / peak)
    errors = torch.where(errors.isfinite(), errors, torch.inf)
    return MapEffect(
        error=float(errors.amax()) if errors.numel() else 0.0,
        compared=errors.numel(),
        other_targets=int((~same).sum()) * len(reference.layers),
    )


def _check_same(
    reference: Iterable[Configuration],
    found: Iterable[Configuration],
    expected: tuple[int, ...],
    got: tuple[int, ...],
) -> None:
    texts, found_texts = ([one.text for one in group] for group in (reference, found))
    if texts != found_texts or tuple(expected) != tuple(got):
        raise SettingError("the two results are of other configurations or sizes: make both of the same")
