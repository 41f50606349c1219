"""Where relevance is on a sample of images of a data set: its share in the object's box, and its mass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from headoff.choices import AblationKind
from headoff.errors import ImageError, SettingError
from headoff.gates import Configuration, CumulativeSweep, sweeps_among
from headoff.totals import bootstrap_interval

if TYPE_CHECKING:
    from headoff.ablation import References
    from headoff.detector import Detector

QUANTITIES = ("share_in_box", "mass")
"""Of the map after the last decoder layer: the share of positive relevance within the box with nothing off, and the sum
of the map in units of its sum with nothing off."""
MOST_CONFIGURATIONS = 16
"""Explanations are dear: of more configurations only the cumulative sweep has them, or the first ones."""


def explained(configurations: Sequence[Configuration]) -> list[Configuration]:
    """Those of the configurations whose relevance is measured."""
    if len(configurations) <= MOST_CONFIGURATIONS:
        return list(configurations)
    for kind, indices in sweeps_among(configurations):
        if isinstance(kind, CumulativeSweep):
            return [configurations[index] for index in indices][:MOST_CONFIGURATIONS]
    return list(configurations[:MOST_CONFIGURATIONS])


class Pictures(Protocol):
    """Images by their index."""

    def load(self, index: int) -> tuple[Image.Image, str]: ...


@dataclass(frozen=True, eq=False)
class RelevanceStatistics:
    """Means over the objects of a sample of images, with 95% intervals of a bootstrap over images.

    Attributes:
        configurations: C, the baseline first.
        images: how many images of the sample have objects.
        objects: how many objects they have.
        mean, low, high: (C, 2), in the order of `QUANTITIES`; NaN without objects.
    """

    configurations: tuple[Configuration, ...]
    images: int
    objects: int
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each configuration and quantity."""
        for index, one in enumerate(self.configurations):
            for place, quantity in enumerate(QUANTITIES):
                yield {
                    "configuration": one.name,
                    "text": one.text,
                    "images": self.images,
                    "objects": self.objects,
                    "quantity": quantity,
                    "mean": float(self.mean[index, place]),
                    "low": float(self.low[index, place]),
                    "high": float(self.high[index, place]),
                }


def relevance_statistics(
    detector: Detector,
    pictures: Pictures,
    images: Sequence[int],
    configurations: Sequence[Configuration],
    sample: int,
    *,
    confidence: float = 0.5,
    ablation: AblationKind = "zero",
    references: References | str | Path | None = None,
    seed: int = 0,
    progress: Callable[[int, int], object] | None = None,
) -> RelevanceStatistics:
    """Explain the objects of a sample of images under configurations, by the default method.

    A configuration without relevance in the map of an object (where all heads are off) counts for the mass, which is 0,
    and not for the share in the box.

    Args:
        detector: the one that was evaluated.
        pictures: the images.
        images: indices of those that were evaluated.
        configurations: at most `MOST_CONFIGURATIONS`, the baseline first.
        sample: how many images are drawn, at random but always the same for a `seed`.
        confidence: of objects, the detections with nothing off.
        ablation, references: what heads that are off contribute.
        progress: called with (images done, images in the sample).

    Raises:
        SettingError: `sample` is below 1, or there are too many configurations.
    """
    from headoff.relevance import explain

    if sample < 1:
        raise SettingError(f"a sample of {sample} images has no relevance: give 1 or more")
    if len(configurations) > MOST_CONFIGURATIONS:
        raise SettingError(
            f"relevance of {len(configurations)} configurations would take very long: give {MOST_CONFIGURATIONS} or "
            "less"
        )
    order = np.random.default_rng(seed).permutation(len(images))[:sample]
    sums, counts = [], []
    for done, index in enumerate(sorted(int(images[place]) for place in order)):
        if progress is not None:
            progress(done, len(order))
        try:
            picture, _ = pictures.load(index)
        except ImageError:
            continue
        found = explain(
            detector,
            picture,
            configurations,
            layers="last",
            confidence=confidence,
            ablation=ablation,
            references=references,
        )
        masses = found.masses[..., -1]
        values = torch.stack((found.box_shares[..., -1], masses / masses[:1]), -1).numpy()
        known = np.isfinite(values)
        sums.append(np.where(known, values, 0).sum(1))
        counts.append(known.sum(1))
    if progress is not None:
        progress(len(order), len(order))
    shape = (len(sums), len(configurations), len(QUANTITIES))
    total, count = np.array(sums).reshape(shape), np.array(counts).reshape(shape)
    with np.errstate(invalid="ignore"):
        mean = total.sum(0) / count.sum(0)
    low, high = np.full((2, *mean.shape), np.nan)
    for place in np.ndindex(*mean.shape):
        ends = bootstrap_interval(total[:, *place, None], count[:, *place])
        low[place], high[place] = (float(end[0]) for end in ends)
    objects = count[:, 0, 1]
    return RelevanceStatistics(
        tuple(configurations), int((objects > 0).sum()), int(objects.sum()), mean, low, high
    )
