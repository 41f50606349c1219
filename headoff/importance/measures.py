"""Measures of what a head contributes: one registry, one signature.

Every measure scores all objects at once. A positive score means that the head adds to the value.
Shapes: C coalitions, O objects, L layers, H heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headoff.choices import MEASURES
from headoff.errors import SettingError, did_you_mean
from headoff.importance.games import Game
from headoff.importance.shapley import (
    all_coalitions,
    antithetic_permutations,
    marginal_contributions,
    mean_and_error,
    permutation_coalitions,
    shapley_interactions,
    shapley_values,
)
from headoff.values import Value
from headoff.wording import counted

NODES = 64
"""Of the midpoint rule of the integrated gradient."""

PERMUTATIONS = 32
"""Antithetic pairs of permutations of all layers x heads."""


@dataclass(frozen=True)
class Scores:
    """What heads contribute to a value. float64 on the CPU.

    Attributes:
        scores: (O, L, H), or (O, 1, H) where a player is a head in all layers.
        errors: standard errors of the same shape, where permutations were sampled; else None.
        interactions: (O, L or 1, H, H), of pairs of heads of one layer or of columns; None where there are none.
        coalitions: (O, 2^H), the value of every coalition of columns, where players are columns; head h is on if bit h
            of the index is set.
        residuals: (O,), v(all) - v(none) less the sum of the scores, where that is the error of a quadrature.
    """

    scores: Tensor
    errors: Tensor | None = None
    interactions: Tensor | None = None
    coalitions: Tensor | None = None
    residuals: Tensor | None = None


class Measure(ABC):
    """A measure of importance.

    Attributes:
        name: in the registry.
        title: for people.
    """

    name: str
    title: str

    def coalitions(self, layers: int, heads: int) -> Tensor:
        """(C, L, H) bool, the coalitions whose values are needed; none by default."""
        return torch.zeros(0, layers, heads, dtype=torch.bool)

    def supports(self, value: Value) -> bool:
        """Whether there are scores of this value."""
        return True

    @abstractmethod
    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        """The scores, for each of the game's values; `values` are those of `coalitions`, (C, O) each."""


class Removal(Measure):
    """v(all) - v(all but the head): leave one out."""

    name = "removal"
    title = "what is lost when the head alone is off"

    def coalitions(self, layers: int, heads: int) -> Tensor:
        everyone = torch.ones(1, layers, heads, dtype=torch.bool)
        single = torch.eye(layers * heads, dtype=torch.bool).view(-1, layers, heads)
        return torch.cat((everyone, ~single))

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        return [Scores((v[0] - v[1:]).T.unflatten(1, game.shape)) for v in values]


class RemovalColumns(Measure):
    """v(all) - v(all but the head in all layers)."""

    name = "removal_columns"
    title = "what is lost when the head is off in all layers"

    def coalitions(self, layers: int, heads: int) -> Tensor:
        everyone = torch.ones(1, layers, heads, dtype=torch.bool)
        return torch.cat((everyone, ~torch.eye(heads, dtype=torch.bool)[:, None].expand(-1, layers, -1)))

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        return [Scores((v[0] - v[1:]).T[:, None]) for v in values]


class Alone(Measure):
    """v(the head alone on in its layer) - v(its layer off); other layers are on."""

    name = "alone"
    title = "what the head gains as the only one of its layer"

    def coalitions(self, layers: int, heads: int) -> Tensor:
        of_layer = torch.eye(layers, dtype=torch.bool)[:, :, None].expand(-1, -1, heads)
        single = torch.eye(layers * heads, dtype=torch.bool).view(-1, layers, heads)
        other_layers = ~of_layer.repeat_interleave(heads, 0)
        return torch.cat((~of_layer, other_layers | single))

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        layers, heads = game.shape
        found = []
        for v in values:
            without, only = v[:layers].T[:, :, None], v[layers:].T.unflatten(1, (layers, heads))
            found.append(Scores(only - without))
        return found


class Gradient(Measure):
    """dv/dg at g = 1, with its sign (Michel, Levy and Neubig, arXiv 1905.10650)."""

    name = "gradient"
    title = "derivative with respect to the head's gate"

    def supports(self, value: Value) -> bool:
        return value.differentiable and not value.peaks_at_baseline

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        return [Scores(gradients[0]) for gradients in game.gradients(torch.ones(1, dtype=torch.float64))]


class IntegratedGradient(Measure):
    """The integral of dv/dg while all gates of the site open together (Sundararajan, Taly, Yan, ICML 2017).

    The scores sum to v(all) - v(none) up to the error of the midpoint rule, which `Scores.residuals` has. The midpoint
    rule, because the derivative jumps wherever a ReLU switches.

    Args:
        nodes: of the midpoint rule.
    """

    name = "integrated_gradient"
    title = "derivative, integrated while all gates open"

    def __init__(self, nodes: int = NODES) -> None:
        self.nodes = nodes

    def supports(self, value: Value) -> bool:
        return value.differentiable

    def coalitions(self, layers: int, heads: int) -> Tensor:
        return torch.tensor([True, False])[:, None, None].expand(-1, layers, heads)

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        gates = (torch.arange(self.nodes, dtype=torch.float64) + 0.5) / self.nodes
        found = [gradients.mean(0) for gradients in game.gradients(gates)]
        return [
            Scores(scores, residuals=v[0] - v[1] - scores.sum((1, 2)))
            for scores, v in zip(found, values, strict=True)
        ]


class ShapleyColumns(Measure):
    """Exact Shapley values and interactions of the H heads as columns, each in all layers: 2^H coalitions."""

    name = "shapley_columns"
    title = "Shapley value of the head in all layers"

    def coalitions(self, layers: int, heads: int) -> Tensor:
        _check_count(heads, 1)
        return all_coalitions(heads)[:, None].expand(-1, layers, -1)

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        heads = game.shape[1]
        return [
            Scores(
                shapley_values(v, heads).T[:, None],
                interactions=shapley_interactions(v, heads).permute(2, 0, 1)[:, None],
                coalitions=v.T.contiguous(),
            )
            for v in values
        ]


class ShapleyLayers(Measure):
    """Exact Shapley values and interactions of the H heads of each layer, other layers on: L 2^H coalitions."""

    name = "shapley_layers"
    title = "Shapley value within the head's layer"

    def coalitions(self, layers: int, heads: int) -> Tensor:
        _check_count(heads, layers)
        subsets = all_coalitions(heads)
        found = torch.ones(layers, len(subsets), layers, heads, dtype=torch.bool)
        for layer in range(layers):
            found[layer, :, layer] = subsets
        return found.flatten(0, 1)

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        layers, heads = game.shape
        found = []
        for v in values:
            by_layer = v.unflatten(0, (layers, -1))
            exact = torch.stack([shapley_values(one, heads).T for one in by_layer], dim=1)
            pairs = torch.stack(
                [shapley_interactions(one, heads).permute(2, 0, 1) for one in by_layer], dim=1
            )
            found.append(Scores(exact, interactions=pairs))
        return found


class SampledShapley(Measure):
    """Shapley values of all L x H heads, by permutations in antithetic pairs, with standard errors over the pairs.

    Args:
        pairs: number of pairs; each takes 2 (L H + 1) coalitions.
        seed: of the permutations.
    """

    name = "shapley"
    title = "Shapley value among all heads"

    def __init__(self, pairs: int = PERMUTATIONS, seed: int = 0) -> None:
        if pairs < 2:
            raise SettingError(
                f"{counted(pairs, 'pair')} of permutations cannot give standard errors: give at least 2"
            )
        self.pairs = pairs
        self.seed = seed

    def permutations(self, players: int) -> list[Tensor]:
        """The permutations, each followed by its reverse."""
        return [p for pair in range(self.pairs) for p in antithetic_permutations(players, self.seed, pair)]

    def coalitions(self, layers: int, heads: int) -> Tensor:
        count = 2 * self.pairs * (layers * heads + 1)
        if count > MOST_SAMPLED:
            most = MOST_SAMPLED // (2 * (layers * heads + 1))
            raise SettingError(
                f"{self.pairs:,} pairs of permutations need {count:,} coalitions, which is too many: give at most "
                f"{most:,} pairs"
            )
        found = [permutation_coalitions(p) for p in self.permutations(layers * heads)]
        return torch.cat(found).view(-1, layers, heads)

    def scores(self, game: Game, values: Sequence[Tensor]) -> list[Scores]:
        layers, heads = game.shape
        permutations = self.permutations(layers * heads)
        found = []
        for v in values:
            gains = [
                marginal_contributions(part, permutation)
                for part, permutation in zip(v.split(layers * heads + 1), permutations, strict=True)
            ]
            of_pairs = torch.stack(gains).unflatten(0, (self.pairs, 2)).mean(1)
            mean, error = mean_and_error(of_pairs)
            found.append(Scores(mean.T.unflatten(1, game.shape), error.T.unflatten(1, game.shape)))
        return found


MOST_COALITIONS = 2**17
"""Coalitions of an exact measure; more take hours and gigabytes."""

MOST_SAMPLED = 2**20
"""Coalitions of a sampled one, which can be interrupted."""


def _check_count(heads: int, layers: int) -> None:
    if 2**heads * layers > MOST_COALITIONS:
        raise SettingError(
            f"exact Shapley values of {heads} heads need {2**heads * layers:,} coalitions, which is too many: use the "
            "sampled measure 'shapley'"
        )


_REGISTERED: dict[str, type[Measure]] = {
    measure.name: measure
    for measure in (
        Removal,
        RemovalColumns,
        Alone,
        Gradient,
        IntegratedGradient,
        ShapleyColumns,
        ShapleyLayers,
        SampledShapley,
    )
}
assert tuple(_REGISTERED) == MEASURES


def resolve_measure(spec: str | Measure) -> Measure:
    """The measure that `spec` names, with its defaults.

    Raises:
        SettingError: the name is unknown.
    """
    if isinstance(spec, Measure):
        return spec
    if spec not in _REGISTERED:
        raise SettingError(
            f"there is no measure {spec!r}{did_you_mean(spec, MEASURES)}: use one of {', '.join(MEASURES)}"
        )
    return _REGISTERED[spec]()


def check_supported(measures: Sequence[Measure], values: Sequence[Value]) -> None:
    """Raise SettingError for a measure that supports none of the values."""
    for measure in measures:
        if not any(measure.supports(value) for value in values):
            raise SettingError(
                f"the measure {measure.name!r} needs a derivative, and none of the values "
                f"{', '.join(value.name for value in values)} has one at the baseline: add the value 'probability', or "
                "leave the measure out"
            )


@dataclass(frozen=True)
class Coalitions:
    """What several measures need of a game, every coalition once.

    Attributes:
        distinct: (C, L, H) bool, with nobody first and everyone last. They are sorted by layers, so that coalitions of
            one batch share the decoder's first layers.
        places: for each measure, the indices of its coalitions.
    """

    distinct: Tensor
    places: tuple[Tensor, ...]

    @classmethod
    def of(cls, measures: Sequence[Measure], shape: tuple[int, int]) -> Coalitions:
        ends = torch.tensor([False, True])[:, None, None].expand(-1, *shape)
        wanted = [ends, *(measure.coalitions(*shape) for measure in measures)]
        distinct, place = torch.unique(torch.cat(wanted).flatten(1), dim=0, return_inverse=True)
        return cls(distinct.view(-1, *shape), place.split([len(one) for one in wanted])[1:])


def score_all(measures: Sequence[Measure], game: Game) -> dict[str, list[Scores | None]]:
    """`scores_of` the values of what the measures need."""
    coalitions = Coalitions.of(measures, game.shape)
    return scores_of(measures, game, coalitions, game(coalitions.distinct))


def scores_of(
    measures: Sequence[Measure], game: Game, coalitions: Coalitions, values: Sequence[Tensor]
) -> dict[str, list[Scores | None]]:
    """The scores of several measures, by name, for each of the game's values: None for a value that a measure does not
    support. `values` are those of `coalitions.distinct`.
    """
    results: dict[str, list[Scores | None]] = {}
    for measure, indices in zip(measures, coalitions.places, strict=True):
        supported = [index for index, value in enumerate(game.values) if measure.supports(value)]
        sub_game = replace(game, values=[game.values[index] for index in supported], store=None)
        found = measure.scores(sub_game, [values[index][indices] for index in supported])
        by_value: dict[int, Scores] = dict(zip(supported, found, strict=True))
        results[measure.name] = [by_value.get(index) for index in range(len(game.values))]
    return results
