"""Totals of a sweep over many images: what became of their objects, for each configuration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headoff.dataframes import dataframe
from headoff.errors import SettingError
from headoff.outcomes import Status
from headoff.sweeps import SweepResult

if TYPE_CHECKING:
    import pandas

LEVEL = 0.95
"""Confidence of the intervals of mean survival."""
RESAMPLES = 2000
"""Samples of a bootstrap."""
_AT_ONCE = 2**22
"""Most numbers of a block of these samples."""


@dataclass(frozen=True)
class ConfigurationTotal:
    """One configuration over all images.

    Attributes:
        name: of the configuration.
        text: the configuration; empty if it differs between images, where it names an object's query.
        counts: number of objects by status, all statuses present.
        unmatched: number of detections that belong to no object.
        survival: mean over all objects of the probability of the object's class at the object's query, detected or
            not; NaN if there are no objects.
        low, high: its 95% interval, by a bootstrap over images; NaN with fewer than two images that have objects.
    """

    name: str
    text: str
    counts: Mapping[Status, int]
    unmatched: int
    survival: float
    low: float
    high: float


@dataclass(frozen=True)
class Totals:
    """Totals for each configuration of a sweep over images.

    Attributes:
        images: number of images.
        objects: number of objects in all of them.
        configurations: in the order of the sweep.
    """

    images: int
    objects: int
    configurations: tuple[ConfigurationTotal, ...]

    def __len__(self) -> int:
        return len(self.configurations)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each configuration."""
        for total in self.configurations:
            yield {
                "configuration": total.name,
                "text": total.text,
                "images": self.images,
                "objects": self.objects,
                **{status.value: count for status, count in total.counts.items()},
                "unmatched": total.unmatched,
                "survival": total.survival,
                "low": total.low,
                "high": total.high,
            }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())


def total(results: Iterable[SweepResult | Mapping[str, Any]]) -> Totals:
    """What became of the objects of several images, for each configuration.

    Objects count alike, whatever image they are in. Images are what varies: intervals are of a bootstrap that draws
    images, not objects, because objects of one image are not independent.

    Args:
        results: sweeps of images under the same configurations, or contents of their sweep.json.

    Raises:
        SettingError: there are none, or their configurations differ.

    Example:
        >>> results = [headoff.sweep(detector, image) for image in headoff.sample_images()]
        >>> headoff.plot_totals(headoff.total(results))
    """
    return add_up([ImageSums.of(one.as_dict() if isinstance(one, SweepResult) else one) for one in results])


def add_up(images: Sequence[ImageSums]) -> Totals:
    """`total` of sums that are made already, which are much smaller than sweeps. Raises SettingError."""
    if not images:
        raise SettingError("there are no sweeps to add up; give at least one")
    names = images[0].names
    if any(image.names != names for image in images):
        raise SettingError("the sweeps are of different configurations; add up those of the same only")
    objects = np.array([image.objects for image in images])
    sums = np.array([image.survival for image in images]).reshape(len(images), len(names))
    lows, highs = bootstrap_interval(sums, objects)
    count = int(objects.sum())
    return Totals(
        len(images),
        count,
        tuple(
            ConfigurationTotal(
                name,
                images[0].texts[c] if len({image.texts[c] for image in images}) == 1 else "",
                {status: sum(image.counts[c][status.value] for image in images) for status in Status},
                sum(image.unmatched[c] for image in images),
                float(sums[:, c].sum() / count) if count else float("nan"),
                float(lows[c]),
                float(highs[c]),
            )
            for c, name in enumerate(names)
        ),
    )


@dataclass(frozen=True)
class ImageSums:
    """What of one image's sweep is added up; all but `objects` for each configuration."""

    objects: int
    names: list[str]
    texts: list[str]
    counts: list[Mapping[str, int]]
    unmatched: list[int]
    survival: list[float]
    """Summed over objects."""

    @classmethod
    def of(cls, contents: Mapping[str, Any]) -> ImageSums:
        """Of the contents of a sweep.json. Raises KeyError or TypeError where something is missing."""
        configurations = contents["configurations"]
        return cls(
            len(contents["baseline"]["detections"]),
            [one["name"] for one in configurations],
            [one["configuration"] for one in configurations],
            [one["counts"] for one in configurations],
            [len(one["unmatched"]) for one in configurations],
            [sum(outcome["query_score"] for outcome in one["outcomes"]) for one in configurations],
        )


def bootstrap_interval(sums: np.ndarray, objects: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals of (summed over images) sums / objects, by a bootstrap over images with a fixed seed.

    Args:
        sums: (images, n), of n quantities.
        objects: (images,), or ones for a mean over images.

    Returns:
        Lower and upper ends, (n,); NaN with fewer than two images that have objects.
    """
    some = objects > 0
    sums, objects = sums[some], objects[some]
    images, configurations = sums.shape
    if images < 2:
        nothing = np.full(configurations, np.nan)
        return nothing, nothing
    means = bootstrap_means(sums, objects[:, None])
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def bootstrap_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(summed over images) sums / counts in samples of a bootstrap over images with a fixed seed.

    Args:
        sums: (images, n), of n quantities.
        counts: (images, n or 1).

    Returns:
        (`RESAMPLES`, n); NaN where no image that was drawn counts.
    """
    return np.concatenate([(drawn @ sums) / (drawn @ counts) for drawn in bootstrap_draws(len(sums))])


def bootstrap_draws(images: int) -> Iterator[np.ndarray]:
    """How often each image is drawn in `RESAMPLES` samples of a bootstrap: blocks (samples, images) float64.

    They are the same for every call with that number of images, so that equal images have equal intervals.
    """
    generator = np.random.default_rng(0)
    at_once = max(1, _AT_ONCE // images)
    for start in range(0, RESAMPLES, at_once):
        samples = min(at_once, RESAMPLES - start)
        yield generator.multinomial(images, np.full(images, 1 / images), size=samples).astype(np.float64)
