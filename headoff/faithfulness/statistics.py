"""Means with intervals, and tests of differences between methods on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

import numpy as np

from headoff.faithfulness.measures import Measure, Scores, mean_over_objects
from headoff.totals import LEVEL, bootstrap_draws

FLIPS = 20_000
"""Random choices of signs of a permutation test."""
_AT_ONCE = 2**24


@dataclass(frozen=True)
class Estimate:
    """A quantity of a method over images.

    Attributes:
        value: of all images.
        low, high: its 95% interval, by a bootstrap over images; NaN with fewer than two.
        images: how many have a value.
        objects: how many of their objects have one.
    """

    value: float
    low: float
    high: float
    images: int
    objects: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """A quantity of M methods, in pairs, each pair on the images that both have.

    Attributes:
        methods: M names.
        difference: (M, M), the value of the method of the row less that of the column; NaN where no image is common.
        p: (M, M), of a two-sided test that there is no difference, Holm-corrected for all pairs; NaN likewise.
        test: which one.
    """

    methods: tuple[str, ...]
    difference: np.ndarray
    p: np.ndarray
    test: str


def all_draws(images: int) -> np.ndarray:
    """`headoff.totals.bootstrap_draws` as one array, (R, images)."""
    return np.concatenate([*bootstrap_draws(images)])


def estimates(measure: Measure, images: Sequence[Scores]) -> list[Estimate]:
    """One for each quantity of the measure, from the images of one method, of which there is at least one."""
    whole = measure.pooled(images, np.ones((1, len(images))))[0]
    values = np.stack([one.values.isfinite().numpy().sum(0) for one in images])
    if len(images) < 2:
        low = high = np.full(len(whole), np.nan)
    else:
        with np.errstate(invalid="ignore"):
            drawn = measure.pooled(images, all_draws(len(images)))
        low, high = quantiles(drawn)
    found = []
    for at, value in enumerate(whole.tolist()):
        counted = int((values[:, at] > 0).sum())
        some = counted > 1
        found.append(
            Estimate(
                value,
                float(low[at]) if some else math.nan,
                float(high[at]) if some else math.nan,
                counted,
                int(values[:, at].sum()),
            )
        )
    return found


def quantiles(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the interval at `LEVEL`, of (R, ...) samples; NaN where there are none."""
    there = np.isfinite(drawn).any(0)
    filled = np.where(there, drawn, 0.0)
    ends = np.nanquantile(filled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    low, high = np.where(there, ends, np.nan)
    return low, high


def compare(measure: Measure, by_method: dict[str, dict[int, Scores]], quantity: int) -> Comparison:
    """All pairs of methods.

    Args:
        measure: the measure.
        by_method: for each method its scores by the image's number.
        quantity: which of the measure's.

    Where the quantity is a mean over images, the test is a permutation test that flips the signs of the images'
    differences; otherwise it is a z test with the standard error of a bootstrap over the common images.
    """
    names = tuple(by_method)
    difference = np.full((len(names), len(names)), np.nan)
    p = difference.copy()
    pairs = list(combinations(range(len(names)), 2))
    if measure.is_mean:
        count = 1 + max((max(found, default=0) for found in by_method.values()), default=0)
        means = np.full((len(names), count), np.nan)
        for row, found in enumerate(by_method.values()):
            for image, scores in found.items():
                means[row, image] = mean_over_objects(scores)[quantity]
        gaps = np.stack([means[a] - means[b] for a, b in pairs]) if pairs else np.zeros((0, count))
        raw = sign_flip_p(gaps)
        with np.errstate(invalid="ignore"):
            there = np.isfinite(gaps)
            found_gaps = np.where(there, gaps, 0).sum(1) / there.sum(1)
    else:
        raw, found_gaps = np.full(len(pairs), np.nan), np.full(len(pairs), np.nan)
        for at, (a, b) in enumerate(pairs):
            first, second = by_method[names[a]], by_method[names[b]]
            common = sorted(first.keys() & second.keys())
            if len(common) >= 2:
                draws = np.concatenate([np.ones((1, len(common))), all_draws(len(common))])
                gap = np.subtract(
                    *(measure.pooled([of[i] for i in common], draws)[:, quantity] for of in (first, second))
                )
                found_gaps[at], raw[at] = gap[0], _z_test_p(gap[0], gap[1:])
    corrected = holm(raw)
    for at, (a, b) in enumerate(pairs):
        difference[a, b], difference[b, a] = found_gaps[at], -found_gaps[at]
        p[a, b] = p[b, a] = corrected[at]
    test = "sign-flip permutation test" if measure.is_mean else "z test, bootstrap standard error"
    return Comparison(names, difference, p, test)


def sign_flip_p(gaps: np.ndarray) -> np.ndarray:
    """Two-sided p of each row of (pairs, images) differences, whose signs are random if there is no difference.

    NaN is an image that the pair does not have. Of few images all choices of signs are tried, otherwise `FLIPS` random
    ones, the same for all pairs with the same images. NaN for fewer than two images.
    """
    p = np.full(len(gaps), np.nan)
    patterns, group = np.unique(np.isfinite(gaps), axis=0, return_inverse=True)
    for index, there in enumerate(patterns):
        rows = np.flatnonzero(group.reshape(-1) == index)
        if there.sum() >= 2:
            p[rows] = _sign_flip_p(gaps[np.ix_(rows, np.flatnonzero(there))])
    return p


def _sign_flip_p(gaps: np.ndarray) -> np.ndarray:
    """The same of finite differences."""
    images = gaps.shape[1]
    # What is equal but for rounding counts as large.
    observed = np.abs(gaps.sum(1)) - 1e-12 * np.abs(gaps).sum(1)
    exact = images < 63 and 2**images <= FLIPS
    generator = np.random.default_rng(0)
    flips = 2**images if exact else FLIPS
    at_once = max(1, _AT_ONCE // images)
    larger = np.zeros(len(gaps))
    for start in range(0, flips, at_once):
        stop = min(start + at_once, flips)
        if exact:
            bits = (np.arange(start, stop)[:, None] >> np.arange(images)) & 1
        else:
            bits = generator.integers(0, 2, size=(stop - start, images), dtype=np.int8)
        larger += (np.abs((2.0 * bits - 1) @ gaps.T) >= observed).sum(0)
    return larger / flips if exact else (larger + 1) / (flips + 1)


def _z_test_p(gap: float, drawn: np.ndarray) -> float:
    error = float(np.nanstd(drawn))
    if not math.isfinite(gap):
        return math.nan
    if error == 0:
        return 1.0 if gap == 0 else 0.0
    return 2 * (1 - NormalDist().cdf(abs(gap) / error))


def holm(p: np.ndarray) -> np.ndarray:
    """p values corrected for their number by Holm's method (1979); NaN are left out."""
    corrected = np.full(len(p), np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    stepped = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1.0)
    return corrected
