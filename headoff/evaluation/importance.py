"""What heads contribute to AP: by the removal of single heads, and by Shapley values of the columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from headoff.choices import Site
from headoff.evaluation.precision import METRICS
from headoff.evaluation.scores import Scores, interval
from headoff.gates import SingleHeadSweep, SubsetSweep, sweeps_among
from headoff.importance.shapley import shapley_interactions, shapley_values


@dataclass(frozen=True, eq=False)
class HeadScores:
    """What the heads of a site contribute to AP, with 95% intervals of the bootstrap over images.

    Attributes:
        site: where the heads are.
        measure: `removal`: the AP lost without a single head; `shapley_columns`: exact Shapley values of heads in all
            layers.
        layers, heads: their numbers; no layers where a head is one in all of them.
        scores, low, high: (L, H), or (1, H) for heads in all layers. AP, 0..1.
        interactions: (H, H), Shapley interactions of the columns; None for removal.
        on, off: AP with all heads of the site on, and for columns with all off: the scores sum to the difference.
    """

    site: Site
    measure: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    scores: np.ndarray
    low: np.ndarray
    high: np.ndarray
    interactions: np.ndarray | None
    on: float
    off: float | None

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each score, with the columns of `headoff.ImportanceTotals.rows` that apply."""
        for (row, column), value in np.ndenumerate(self.scores):
            yield {
                "site": self.site,
                "layer": self.layers[row] if self.layers else "all",
                "head": self.heads[column],
                "measure": self.measure,
                "value": "AP",
                "score": float(value),
                "low": float(self.low[row, column]),
                "high": float(self.high[row, column]),
            }


def head_scores(scores: Scores) -> list[HeadScores]:
    """What single heads and columns contribute, for each sweep of these among the configurations."""
    configurations = [one.configuration for one in scores.configurations]
    found = []
    for kind, indices in sweeps_among(configurations):
        if isinstance(kind, SingleHeadSweep):
            found.append(_removal(scores, kind, indices))
        elif isinstance(kind, SubsetSweep):
            found.append(_shapley(scores, kind, indices))
    return found


def _values(scores: Scores, indices: Sequence[int]) -> np.ndarray:
    """(n, 1 + B): AP of configurations, and in the samples."""
    row = METRICS.index("AP")
    return np.stack(
        [np.r_[one.metrics[row], one.samples[row]] for one in (scores.configurations[i] for i in indices)]
    )


def _removal(scores: Scores, kind: SingleHeadSweep, indices: Sequence[int]) -> HeadScores:
    places = [[indices[place] for place in row] for row in kind.configurations]
    baseline = _values(scores, [0])
    lost = np.stack([baseline - _values(scores, row) for row in places])
    low, high = interval(lost[..., 1:], lost[..., 0])
    return HeadScores(
        kind.site,
        "removal",
        kind.layers,
        kind.heads,
        lost[..., 0],
        low,
        high,
        None,
        float(baseline[0, 0]),
        None,
    )


def _shapley(scores: Scores, kind: SubsetSweep, indices: Sequence[int]) -> HeadScores:
    players = len(kind.heads)
    # Bit i of a coalition's index is set if player i is in it, that is, on.
    values = np.zeros((2**players, 1 + scores.resamples))
    for off, row in zip(kind.off, _values(scores, indices), strict=True):
        values[sum(1 << i for i, head in enumerate(kind.heads) if head not in off)] = row
    found = shapley_values(torch.from_numpy(values), players).numpy()
    low, high = interval(found[:, 1:], found[:, 0])
    site = next(clause.site for one in indices for clause in scores.configurations[one].configuration.clauses)
    return HeadScores(
        site,
        "shapley_columns",
        (),
        kind.heads,
        found[None, :, 0],
        low[None],
        high[None],
        shapley_interactions(torch.from_numpy(values[:, 0]), players).numpy(),
        float(values[-1, 0]),
        float(values[0, 0]),
    )
