"""Wrong answers that a tolerance must refuse: the proof that it is small enough.

A tolerance measured from rounding errors says what must pass. That nothing else passes is shown case by case, by
giving the very comparison answers that are known to be wrong:

- no evidence: a map of zeros in the place of any map;
- another query's map, of the same layer, in the place of any map;
- one-head errors: answers, maps and gradients under a gate that is wrong for a single head of a single layer. They are
  too many for every run: the runs of other seeds try others (`share_of_heads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import numpy as np
import torch

from headoff.gates import Configuration, Gates, HeadLayout, stack
from headoff.harness.reference.maps import CaseMaps, map_errors


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


def share_of_heads(layout: HeadLayout, number: int, count: int) -> list[tuple[int, int]]:
    """`count` of the decoder's (layer, head) pairs, spread out; other ones for each `number`, until all have been."""
    heads = list(product(range(layout.decoder_layers), range(layout.heads)))
    step = max(1, len(heads) // count)
    return [heads[(number + index * step) % len(heads)] for index in range(min(count, len(heads)))]


def wrong_by_one_head(
    configuration: Configuration, layout: HeadLayout, heads: Sequence[tuple[int, int]]
) -> Gates:
    """The configuration with one head's cross-attention gate wrong, once for each of `heads`."""
    names = (configuration.named(f"L{layer}H{head} wrong") for layer, head in heads)
    return with_wrong_heads(stack(names, layout), layout, heads)


def with_wrong_heads(gates: Gates, layout: HeadLayout, heads: Sequence[tuple[int, int]]) -> Gates:
    """The same configurations, the cross-attention gate of one head wrong in each: on where it is off, else off."""
    if gates.decoder_cross is None:
        wrong = torch.ones(len(heads), layout.decoder_layers, 1, layout.heads)
    else:
        wrong = gates.decoder_cross.clone()
    for index, (layer, head) in enumerate(heads):
        before = wrong[index, layer, :, head]
        wrong[index, layer, :, head] = (before == 0).to(before)
    return replace(gates, decoder_cross=wrong)
