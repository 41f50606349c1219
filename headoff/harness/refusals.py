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
from dataclasses import replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from headoff.gates import Configuration, Gates, HeadLayout, stack
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
    engine: RelevanceEngine,
    configuration: Configuration,
    targets: Sequence[Target],
    truth: CaseMaps,
    allowed: float,
    heads: Sequence[tuple[int, int]] | None = None,
) -> list[str]:
    """Which one-head errors would pass for `truth`, the maps of `targets`; a sentence each.

    Of `heads`, pairs of (layer, head); of every one where None.
    """
    layout = engine.detector.head_layout
    if heads is None:
        heads = list(product(range(layout.decoder_layers), range(layout.heads)))
    for count in (1, len(targets)):
        # One object's maps mostly give an error away, and more of them can only do so better.
        errors = one_head_errors(engine, configuration, targets[:count], truth, heads)
        if (errors > allowed).all():
            return []
    return [
        f"{truth.case}: with the gate of head {head} in layer {layer} wrong, maps pass "
        f"(off by {error:.1e}, allowed {allowed:.1e})"
        for (layer, head), error in zip(heads, errors, strict=True)
        if error <= allowed
    ]


def one_head_errors(
    engine: RelevanceEngine,
    configuration: Configuration,
    targets: Sequence[Target],
    truth: CaseMaps,
    heads: Sequence[tuple[int, int]],
) -> NDArray[np.float64]:
    """How far each one-head error is from the truth, by the largest error of any map: one number per pair of `heads`.

    `targets` are those of the first objects of `truth`.
    """
    errors = np.zeros(len(heads))
    for found in engine.run(
        wrong_by_one_head(configuration, engine.detector.head_layout, heads), lambda *_: list(targets)
    ):
        rows = torch.stack([pair.rows for pair in found.pairs if pair is not None])
        maps = rows.unflatten(-1, engine.features.grid).numpy()
        errors[found.index] = map_errors(truth.maps[: len(targets)], maps).max()
    return errors


def wrong_by_one_head(
    configuration: Configuration, layout: HeadLayout, heads: Sequence[tuple[int, int]]
) -> Gates:
    """The configuration with one head's cross-attention gate switched the other way, once for each of `heads`."""
    gates = stack((configuration.named(f"L{layer}H{head} wrong") for layer, head in heads), layout)
    if gates.decoder_cross is None:
        wrong = torch.ones(len(heads), layout.decoder_layers, 1, layout.heads)
    else:
        wrong = gates.decoder_cross.clone()
    for index, (layer, head) in enumerate(heads):
        wrong[index, layer, :, head] = 1 - wrong[index, layer, :, head]
    return replace(gates, decoder_cross=wrong)
