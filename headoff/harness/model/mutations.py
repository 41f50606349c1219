"""Wrong results that a tolerance must reject: the self-tests that show that it is small enough.

A tolerance measured on rounding errors says what must pass. That nothing else passes is tested by comparing results
that are known to be wrong:

- no evidence: a map of zeros in the place of any map;
- another query's map, of the same layer, in the place of any map;
- one-head errors: outputs, maps and gradients under a gate that is wrong for a single head of a single layer. They are
  too many for every run: runs with other seeds try others (`some_heads`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from headoff.gates import Gates, HeadLayout
from headoff.harness.reference.cases import BUNDLED_MODEL, ReferenceCase
from headoff.harness.reference.maps import CaseMaps, map_errors

if TYPE_CHECKING:
    from headoff.harness.plugin.patch import Patch


def require_rejected(
    under_test: Patch, case: ReferenceCase, what: str, accepted: Sequence[str], tested: int
) -> None:
    """Fail where a tolerance accepts wrong results, which ends the run without a verdict.

    A user's own model may have heads that do nothing, and a dtype of few digits has tolerances that a head's error
    stays within. There it is no failure, but the verdict says what it could not tell apart.

    Args:
        what: the kind of wrong results, in the plural.
        accepted: a sentence for each wrong result that passes.
        tested: how many there were.
    """
    if not accepted:
        return
    if case.model == BUNDLED_MODEL and torch.finfo(under_test.dtype).bits >= 32:
        raise AssertionError("\n".join(["the tolerance accepts wrong results:", *accepted]))
    dtype = str(under_test.dtype).removeprefix("torch.")
    under_test.cannot_tell(
        f"{len(accepted)} of {tested} {what} of {case.name} from rounding errors in {dtype}, such as: {accepted[0]}"
    )


def accepted_wrongly(expected: CaseMaps, allowed: float) -> list[str]:
    """Which maps of zeros, and which of other queries, would pass for the expected maps; a sentence each.

    Where the expected map is zero a map of zeros is right, and where it is zero for both queries so is the other's.
    """
    maps = expected.maps
    problems = []
    for index, name in enumerate(expected.objects):
        for layer in range(maps.shape[1]):
            true = maps[index, layer]
            if not true.any():
                continue
            if map_errors(true, np.zeros_like(true)) <= allowed:
                problems.append(f"{expected.case}: {name}, after layer {layer}: a map of zeros passes")
            for other, other_name in enumerate(expected.objects):
                if other != index and map_errors(true, maps[other, layer]) <= allowed:
                    problems.append(
                        f"{expected.case}: {name}, after layer {layer}: the map of {other_name} passes"
                    )
    return problems


def some_heads(layout: HeadLayout, number: int, count: int) -> list[tuple[int, int]]:
    """`count` of the decoder's (layer, head) pairs, spread out; others for each `number`, until all have been."""
    heads = list(product(range(layout.decoder_layers), range(layout.heads)))
    step = max(1, len(heads) // count)
    return [heads[(number + index * step) % len(heads)] for index in range(min(count, len(heads)))]


def with_wrong_heads(gates: Gates, layout: HeadLayout, heads: Sequence[tuple[int, int]]) -> Gates:
    """The same configurations with the cross-attention gate of one (layer, head) wrong in each: on where it is off."""
    if gates.decoder_cross is None:
        wrong = torch.ones(len(heads), layout.decoder_layers, 1, layout.heads)
    else:
        wrong = gates.decoder_cross.clone()
    for index, (layer, head) in enumerate(heads):
        before = wrong[index, layer, :, head]
        wrong[index, layer, :, head] = (before == 0).to(before)
    return replace(gates, decoder_cross=wrong)
