"""What heads contribute over many images: means with intervals.

Images are what varies, so an image counts once, however many objects it has: its scores are the mean over its objects.
Intervals are of a bootstrap over images. Only these means are kept, so memory does not grow with the objects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from headoff.choices import Site
from headoff.dataframes import dataframe
from headoff.errors import SettingError
from headoff.importance.result import IMAGE, HeadImportance, Key
from headoff.totals import bootstrap_interval

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, eq=False)
class MeanScores:
    """Scores over n images, as float64 arrays.

    Attributes:
        scores: (L, H), or (1, H) for heads in all layers: the mean over images of the mean over objects.
        low, high: of the same shape, the 95% interval of the mean, by a bootstrap over images; NaN with fewer than two.
        interactions: (L or 1, H, H), means; None where there are none.
        images: n, those that have objects.
    """

    scores: np.ndarray
    low: np.ndarray
    high: np.ndarray
    interactions: np.ndarray | None
    images: int

    @property
    def spans_zero(self) -> np.ndarray:
        """Where the interval has both signs, or there is none."""
        return ~((self.low > 0) | (self.high < 0))


@dataclass(frozen=True, eq=False)
class ImportanceTotals:
    """What every head of a site contributes over many images.

    Attributes:
        site: where the heads are.
        shape: (L, H), layers and heads.
        images: number of images, with or without objects.
        objects: number of objects in all of them.
        scores: for each ablation kind, measure and value.
        image_values: the values that are one number for an image.
    """

    site: Site
    shape: tuple[int, int]
    images: int
    objects: int
    scores: Mapping[Key, MeanScores]
    image_values: frozenset[str]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each score: the columns of heads.csv of a folder. `layer` is `all` for a head in all layers."""
        for key, found in self.scores.items():
            for (layer, head), score in np.ndenumerate(found.scores):
                yield {
                    "site": self.site,
                    "images": found.images,
                    "of": IMAGE if key.value in self.image_values else "object",
                    "layer": layer if len(found.scores) > 1 else "all",
                    "head": head,
                    "ablation": key.ablation,
                    "measure": key.measure,
                    "value": key.value,
                    "score": float(score),
                    "low": float(found.low[layer, head]),
                    "high": float(found.high[layer, head]),
                }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())


@dataclass(frozen=True, eq=False)
class ImageMeans:
    """One image's means over its objects; images without objects have none.

    Attributes:
        site, shape, image_values: see `ImportanceTotals`.
        objects: number of objects.
        scores, interactions: by key, without keys whose scores have no rows.
        keys: all keys.
    """

    site: Site
    shape: tuple[int, int]
    image_values: frozenset[str]
    objects: int
    scores: Mapping[Key, np.ndarray]
    interactions: Mapping[Key, np.ndarray]
    keys: tuple[Key, ...]

    @classmethod
    def of(cls, contents: Mapping[str, Any]) -> ImageMeans:
        """Of `HeadImportance.as_dict`, or a heads.json. Raises KeyError or TypeError where something is missing."""
        scores: dict[Key, np.ndarray] = {}
        interactions: dict[Key, np.ndarray] = {}
        keys = []
        for one in contents["scores"]:
            key = Key(one["ablation"], one["measure"], one["value"])
            keys.append(key)
            if one["scores"]:
                scores[key] = np.asarray(one["scores"], dtype=np.float64).mean(0)
                if one["interactions"] is not None:
                    interactions[key] = np.asarray(one["interactions"], dtype=np.float64).mean(0)
        return cls(
            contents["site"],
            (contents["layers"], contents["heads"]),
            frozenset(contents["image_values"]),
            len(contents["objects"]["detections"]),
            scores,
            interactions,
            tuple(keys),
        )


def aggregate(results: Iterable[HeadImportance | Mapping[str, Any]]) -> ImportanceTotals:
    """The mean over images of the mean over objects, with 95% intervals of a bootstrap over images.

    Args:
        results: of `headoff.heads` with the same arguments, or contents of their heads.json; they are read one by one.

    Raises:
        SettingError: there are none, or they are of different heads, measures, values or ablation kinds.

    Example:
        >>> found = headoff.aggregate(headoff.heads(detector, image) for image in headoff.sample_images())
    """
    return add_up_means(
        [ImageMeans.of(one.as_dict() if isinstance(one, HeadImportance) else one) for one in results]
    )


def add_up_means(images: Sequence[ImageMeans]) -> ImportanceTotals:
    """`aggregate` of means that are made already. Raises SettingError."""
    if not images:
        raise SettingError("there are no images to take the mean over; give at least one")
    first = images[0]
    if any(
        (image.site, image.shape, image.keys) != (first.site, first.shape, first.keys) for image in images
    ):
        raise SettingError(
            "the images were scored at different sites, or by different measures, values or ablation kinds; "
            "give those that were scored alike"
        )
    # Values of the image are there for images without objects, too; all others for the same images, drawn together.
    members: dict[tuple[int, ...], list[Key]] = {}
    for key in first.keys:
        present = tuple(index for index, image in enumerate(images) if key in image.scores)
        members.setdefault(present, []).append(key)
    scores: dict[Key, MeanScores] = {}
    for present, keys in members.items():
        if not present:
            continue
        stacks = [np.stack([images[index].scores[key] for index in present]) for key in keys]
        flat = np.concatenate([stack.reshape(len(present), -1) for stack in stacks], axis=1)
        ends = np.cumsum([stack[0].size for stack in stacks])[:-1]
        lows, highs = (np.split(side, ends) for side in bootstrap_interval(flat, np.ones(len(present))))
        for key, stack, low, high in zip(keys, stacks, lows, highs, strict=True):
            pairs = [
                images[index].interactions[key] for index in present if key in images[index].interactions
            ]
            scores[key] = MeanScores(
                stack.mean(0),
                low.reshape(stack.shape[1:]),
                high.reshape(stack.shape[1:]),
                np.mean(pairs, axis=0) if pairs else None,
                len(present),
            )
    in_order = {key: scores[key] for key in first.keys if key in scores}
    return ImportanceTotals(
        first.site,
        first.shape,
        len(images),
        sum(image.objects for image in images),
        in_order,
        first.image_values,
    )
