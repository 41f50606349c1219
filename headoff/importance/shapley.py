"""Shapley values and pairwise Shapley interactions of n players.

Exact ones follow from the values of all 2^n coalitions; a coalition's index has bit i set if player i is in it. Sampled
ones average marginal contributions along random permutations.

Shapley, "A value for n-person games", 1953. Grabisch and Roubens, "An axiomatic approach to the concept of interaction
among players in cooperative games", 1999. Antithetic pairs (a permutation and its reverse): Lomeli, Rowland, Gretton,
Ghahramani, "Antithetic and Monte Carlo kernel estimators for partial rankings", 2019; Mitchell, Cooper, Frank, Holmes,
"Sampling permutations for Shapley value estimation", JMLR 2022.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_coalitions(players: int) -> Tensor:
    """(2^n, n) bool: which players are in each coalition."""
    return (torch.arange(2**players)[:, None] >> torch.arange(players) & 1).bool()


def shapley_values(values: Tensor, players: int) -> Tensor:
    """Exact Shapley values.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)).

    Args:
        values: (2^n, ...), the value of each coalition.
        players: n.

    Returns:
        (n, ...) float64.
    """
    values = values.double()
    sizes = all_coalitions(players).sum(1)
    weight = torch.tensor(
        [
            math.factorial(size) * math.factorial(players - size - 1) / math.factorial(players)
            for size in range(players)
        ],
        dtype=torch.float64,
    )
    index = torch.arange(2**players)
    found = []
    for player in range(players):
        without = index[(index >> player & 1) == 0]
        gains = values[without | 1 << player] - values[without]
        found.append(torch.tensordot(weight[sizes[without]], gains, 1))
    return torch.stack(found)


def shapley_interactions(values: Tensor, players: int) -> Tensor:
    """Exact pairwise Shapley interactions: negative where two players can stand in for each other (redundant), positive
    where they need each other.

    I_ij = sum over S without i, j of |S|! (n - |S| - 2)! / (n - 1)! (v(S + ij) - v(S + i) - v(S + j) + v(S)).

    Args:
        values: (2^n, ...), the value of each coalition.
        players: n.

    Returns:
        (n, n, ...) float64, symmetric, with a zero diagonal.
    """
    values = values.double()
    sizes = all_coalitions(players).sum(1)
    weight = torch.tensor(
        [
            math.factorial(size) * math.factorial(players - size - 2) / math.factorial(players - 1)
            for size in range(players - 1)
        ],
        dtype=torch.float64,
    )
    index = torch.arange(2**players)
    found = values.new_zeros(players, players, *values.shape[1:])
    for i in range(players):
        for j in range(i):
            s = index[((index >> i | index >> j) & 1) == 0]
            gains = values[s | 1 << i | 1 << j] - values[s | 1 << i] - values[s | 1 << j] + values[s]
            found[i, j] = found[j, i] = torch.tensordot(weight[sizes[s]], gains, 1)
    return found


def permutation_coalitions(permutation: Tensor) -> Tensor:
    """(n + 1, n) bool: everyone, everyone without the first of `permutation` (n,), ..., nobody."""
    place = permutation.argsort()
    return place[None] >= torch.arange(len(permutation) + 1)[:, None]


def marginal_contributions(values: Tensor, permutation: Tensor) -> Tensor:
    """What each player's removal costs, along a permutation.

    Args:
        values: (n + 1, ...) of `permutation_coalitions`.
        permutation: (n,).

    Returns:
        (n, ...) float64, by player; the sum is v(everyone) - v(nobody).
    """
    values = values.double()
    return (values[:-1] - values[1:])[permutation.argsort()]


def antithetic_permutations(players: int, seed: int, pair: int) -> tuple[Tensor, Tensor]:
    """The permutation number `pair` of a seed, and its reverse; the same on every machine and in any order of calls."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + pair) % 2**63)
    permutation = torch.randperm(players, generator=generator)
    return permutation, permutation.flip(0)


def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over independent samples (n, ...); the error is infinite for a single sample."""
    if len(samples) < 2:
        return samples.mean(0), torch.full_like(samples[0], math.inf)
    return samples.mean(0), samples.std(0) / math.sqrt(len(samples))
