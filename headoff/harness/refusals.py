"""Wrong answers that a tolerance must refuse: the proof that it is small enough.

A tolerance measured from rounding errors says what must pass. That nothing else passes is shown case by case, by
giving the very comparison answers that are known to be wrong:

- no evidence: a map of zeros in the place of any map;
- another query's map, of the same layer, in the place of any map;
- a one-head error: the maps under a gate that is wrong for a single head of a single layer, for every one of them.
  Maps differ under it as a whole, so here it is enough that one map of the case is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headoff.detr.detector import Detector, Features
from headoff.gates import Configuration, Gates, stack
from headoff.harness.maps import CaseMaps, map_errors
from headoff.relevance import Target
from headoff.relevance.engine import RelevanceEngine


def accepted_wrongly(truth: CaseMaps, allowed: float) -> list[str]:
    """Which maps of zeros, and which of other queries, would pass for maps of `truth`; a sentence each.

    Where the truth is zero no evidence is the right answer, and where it is zero for both queries so is the other's
    map: there is nothing to refuse.
    """
    maps = truth.maps
    problems = []
    for index, name in enumerate(truth.objects):
        for layer in range(maps.shape[1]):
            true = maps[index, layer]
            if not true.any():
                continue
            if map_errors(true, np.zeros_like(true)) <= allowed:
                problems.append(f"{truth.case}: {name}, after layer {layer}: a map of zeros passes")
            for other, other_name in enumerate(truth.objects):
                if other != index and map_errors(true, maps[other, layer]) <= allowed:
                    problems.append(
                        f"{truth.case}: {name}, after layer {layer}: the map of {other_name} passes"
                    )
    return problems


def one_head_errors_accepted(
    detector: Detector,
    features: Features,
    configuration: Configuration,
    targets: Sequence[Target],
    truth: CaseMaps,
    allowed: float,
) -> list[str]:
    """Which one-head errors would pass for `truth`, the maps of `targets`; a sentence each."""
    for count in (1, len(targets)):
        # One object's maps mostly give an error away, and more of them can only do so better.
        errors = one_head_errors(detector, features, configuration, targets[:count], truth)
        if errors.min() > allowed:
            return []
    return [
        f"{truth.case}: with the gate of head {head} in layer {layer} wrong, maps pass "
        f"(off by {errors[layer, head]:.1e}, allowed {allowed:.1e})"
        for layer, head in zip(*np.nonzero(errors <= allowed), strict=True)
    ]


def one_head_errors(
    detector: Detector,
    features: Features,
    configuration: Configuration,
    targets: Sequence[Target],
    truth: CaseMaps,
) -> NDArray[np.float64]:
    """How far every one-head error is from the truth: (layers, heads), the largest error of any map.

    `targets` are those of the first objects of `truth`.
    """
    gates = wrong_by_one_head(configuration, detector)
    layers, heads = detector.config.decoder_layers, detector.config.heads
    errors = np.zeros(layers * heads)
    engine = RelevanceEngine(detector, features)
    for found in engine.run(gates, lambda *_: list(targets)):
        rows = torch.stack([pair.rows for pair in found.pairs if pair is not None])
        maps = rows.unflatten(-1, features.grid).numpy()
        errors[found.index] = map_errors(truth.maps[: len(targets)], maps).max()
    return errors.reshape(layers, heads)


def wrong_by_one_head(configuration: Configuration, detector: Detector) -> Gates:
    """The configuration's cross-attention gate with one head switched the other way, for every layer and head."""
    gates = stack([configuration], detector.head_layout)
    layers, heads = detector.config.decoder_layers, detector.config.heads
    right = gates.decoder_cross
    right = torch.ones(1, layers, 1, heads) if right is None else right
    count = layers * heads
    flipped = torch.eye(count).reshape(count, layers, 1, heads)
    wrong = (right - flipped).abs()

    def same(gate: Tensor | None) -> Tensor | None:
        return None if gate is None else gate.expand(count, *gate.shape[1:])

    names = tuple(f"L{index // heads}H{index % heads} wrong" for index in range(count))
    return Gates(names, same(gates.encoder_self), same(gates.decoder_self), wrong)
