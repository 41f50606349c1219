"""How many heads can go at what loss: the value against the number of heads that are off in all layers.

The values of all 2^H coalitions of columns say it for every order of heads, so a comparison with random orders needs no
sampling: every subset of k heads is off equally often in a random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.importance.shapley import all_coalitions


@dataclass(frozen=True)
class RemovalCurves:
    """A value with k heads off in all layers, k from 0 to H: (H + 1,) float64 each.

    Attributes:
        least_first, most_first: heads go off by rising or falling importance.
        by_number: first head 0, then head 1, ...: the cumulative sweep.
        random: the mean over all orders.
        low, high: the 5th and 95th percentile over all subsets of k heads.
        best, worst: the largest and smallest value of any subset of k heads.
        best_subsets: the heads that are off in the best one.
        least_order, most_order: the heads of `least_first` and `most_first` as they go off.
    """

    least_first: Tensor
    most_first: Tensor
    by_number: Tensor
    random: Tensor
    low: Tensor
    high: Tensor
    best: Tensor
    worst: Tensor
    best_subsets: tuple[tuple[int, ...], ...]
    least_order: tuple[int, ...]
    most_order: tuple[int, ...]


def removal_curves(
    values: Tensor, least_important_first: Sequence[int], most_important_first: Sequence[int]
) -> RemovalCurves:
    """The curves of a value.

    Args:
        values: (2^H,) of the coalitions; head h is on if bit h of the index is set.
        least_important_first, most_important_first: orders of the H heads.
    """
    heads = len(least_important_first)
    everyone = 2**heads - 1
    off_counts = heads - all_coalitions(heads).sum(1)
    groups = [torch.nonzero(off_counts == k)[:, 0] for k in range(heads + 1)]

    def along(order: Sequence[int]) -> Tensor:
        coalition, found = everyone, [values[everyone]]
        for head in order:
            coalition -= 1 << head
            found.append(values[coalition])
        return torch.stack(found)

    def over(statistic: str, *arguments: float) -> Tensor:
        return torch.stack([getattr(values[group], statistic)(*arguments) for group in groups])

    best = [int(group[values[group].argmax()]) for group in groups]
    return RemovalCurves(
        along(least_important_first),
        along(most_important_first),
        along(range(heads)),
        over("mean"),
        over("quantile", 0.05),
        over("quantile", 0.95),
        over("amax"),
        over("amin"),
        tuple(tuple(h for h in range(heads) if not coalition >> h & 1) for coalition in best),
        tuple(least_important_first),
        tuple(most_important_first),
    )
