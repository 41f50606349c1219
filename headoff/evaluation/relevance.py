"""Relevance on a sample of images of a data set: its share in the object's box, its mass, and whether it is faithful.

What is found in an image is kept in the folder of results, so that an interrupted summary goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from headoff.choices import AblationKind
from headoff.errors import ImageError, SettingError
from headoff.files import write_file
from headoff.gates import Configuration, CumulativeSweep, SingleHeadSweep, SubsetSweep, sweeps_among
from headoff.totals import bootstrap_interval

if TYPE_CHECKING:
    from headoff.ablation import References
    from headoff.detector import Detector
    from headoff.faithfulness import Estimate
    from headoff.faithfulness.measures import Needs
    from headoff.faithfulness.truth import Truth

QUANTITIES = ("share_in_box", "mass")
"""Of the map after the last decoder layer: the share of positive relevance within the box with nothing off, and the sum
of the map in units of its sum with nothing off."""
CONTROL = "random"
"""What a method is compared with in its faithfulness."""
MOST_CONFIGURATIONS = 16
"""Explanations are dear: of more configurations only the cumulative sweep has them, or the first ones, unless others
are asked for. So many are explained at a time."""
CHOICES = {"cumulative": CumulativeSweep, "single": SingleHeadSweep, "subsets": SubsetSweep}


def explained(configurations: Sequence[Configuration], which: str | int | None = None) -> list[Configuration]:
    """Those of the configurations whose relevance is measured, the baseline first.

    Args:
        configurations: of a data set's results, the baseline first.
        which: `all`, one of `CHOICES`, or how many of the first. By default all of up to `MOST_CONFIGURATIONS`, and of
            more the cumulative sweep, or the first ones.

    Raises:
        SettingError: there are no such configurations.
    """
    if which == "all" or (which is None and len(configurations) <= MOST_CONFIGURATIONS):
        return list(configurations)
    wanted = CumulativeSweep if which is None else CHOICES.get(str(which))
    for kind, indices in sweeps_among(configurations):
        if wanted is not None and isinstance(kind, wanted):
            found = [configurations[index] for index in indices]
            return found[:MOST_CONFIGURATIONS] if which is None else found
    if which is None:
        return list(configurations[:MOST_CONFIGURATIONS])
    if wanted is not None:
        raise SettingError(
            f"there is no {which} sweep whose relevance could be measured: ask for one that is evaluated"
        )
    if not str(which).isdecimal() or int(which) < 1:
        raise SettingError(
            f"relevance cannot be measured of {which!r}: give all, {', '.join(CHOICES)}, or a number of configurations"
        )
    return list(configurations[: int(which)])


class Pictures(Protocol):
    """Images by their index, and a hash of each."""

    def load(self, index: int) -> tuple[Image.Image, str]: ...


@dataclass(frozen=True, eq=False)
class SampleStatistics:
    """Means over the objects of a sample of images, with 95% intervals of a bootstrap over images.

    Attributes:
        configurations: C, the baseline first.
        columns: S, what each statistic is; `quantity` and, of faithfulness, `method` and `measure`.
        images: (C,) int64, how many images of the sample have objects.
        objects: (C,) int64, how many objects they have.
        mean, low, high: (C, S); NaN without objects.
    """

    configurations: tuple[Configuration, ...]
    columns: tuple[Mapping[str, str], ...]
    images: np.ndarray
    objects: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each configuration and column."""
        for index, one in enumerate(self.configurations):
            for place, column in enumerate(self.columns):
                yield {
                    "configuration": one.name,
                    "text": one.text,
                    "images": int(self.images[index]),
                    "objects": int(self.objects[index]),
                    **column,
                    "mean": float(self.mean[index, place]),
                    "low": float(self.low[index, place]),
                    "high": float(self.high[index, place]),
                }


def sample_of(images: Sequence[int], sample: int, seed: int = 0) -> list[int]:
    """So many of the images, drawn at random but always the same for a `seed`, ascending. Raises SettingError."""
    if sample < 1:
        raise SettingError(f"a sample of {sample} images has no relevance: give 1 or more")
    order = np.random.default_rng(seed).permutation(len(images))[:sample]
    return sorted(int(images[place]) for place in order)


def relevance_statistics(
    detector: Detector,
    pictures: Pictures,
    images: Sequence[int],
    configurations: Sequence[Configuration],
    sample: int,
    *,
    method: str = "chefer",
    confidence: float = 0.5,
    ablation: AblationKind = "zero",
    references: References | str | Path | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SampleStatistics:
    """Explain the objects of a sample of images under configurations: `QUANTITIES` of their maps.

    A configuration without relevance in the map of an object (where all heads are off) counts for the mass, which is 0,
    and not for the share in the box.

    Args:
        detector: the one that was evaluated.
        pictures: the images.
        images: indices of those that were evaluated.
        configurations: the baseline first.
        sample: how many images are drawn.
        method: see `headoff.explain`.
        confidence: of objects, the detections with nothing off.
        ablation, references: what heads that are off contribute.
        seed: of the sample.
        store: a folder with a file for each image, from which an interrupted call goes on.
        about: what else the numbers depend on, of JSON types, such as the identity of the results.
        progress: called with (images done, images in the sample).

    Raises:
        SettingError: `sample` is below 1, or there is no such method.
    """
    chosen = sample_of(images, sample, seed)
    common = {
        **(about or {}),
        "method": method,
        "confidence": confidence,
        "ablation": ablation,
        "baseline": configurations[0].text,
    }
    sums, counts = [], []
    for done, index in enumerate(chosen):
        if progress is not None:
            progress(done, len(chosen))
        try:
            picture, digest = pictures.load(index)
        except ImageError:
            continue
        kept = _Kept(None if store is None else Path(store) / f"{index:06}.json", {**common, "image": digest})
        missing = [one for one in configurations if one.text not in kept.sums]
        for start in range(0, len(missing), MOST_CONFIGURATIONS - 1):
            some = missing[start : start + MOST_CONFIGURATIONS - 1]
            kept.sums |= _sums(
                detector, picture, configurations[0], some, method, confidence, ablation, references
            )
        if missing:
            kept.write()
        found = np.array([kept.sums[one.text] for one in configurations])
        sums.append(found[..., 0])
        counts.append(found[..., 1])
    if progress is not None:
        progress(len(chosen), len(chosen))
    shape = (len(sums), len(configurations), len(QUANTITIES))
    total, count = np.array(sums).reshape(shape), np.array(counts).reshape(shape)
    with np.errstate(invalid="ignore"):
        mean = total.sum(0) / count.sum(0)
    low, high = np.full((2, *mean.shape), np.nan)
    for place in np.ndindex(*mean.shape):
        ends = bootstrap_interval(total[:, *place, None], count[:, *place])
        low[place], high[place] = (float(end[0]) for end in ends)
    # Objects are those with nothing off, whatever the configuration.
    objects = count[:, 0, QUANTITIES.index("mass")].astype(np.int64)
    return SampleStatistics(
        tuple(configurations),
        tuple({"method": method, "quantity": quantity} for quantity in QUANTITIES),
        np.full(len(configurations), (objects > 0).sum()),
        np.full(len(configurations), objects.sum()),
        mean,
        low,
        high,
    )


def _sums(
    detector: Detector,
    picture: Image.Image,
    baseline: Configuration,
    configurations: Sequence[Configuration],
    method: str,
    confidence: float,
    ablation: AblationKind,
    references: References | str | Path | None,
) -> dict[str, list[list[float]]]:
    """For each configuration the sum over objects of each of `QUANTITIES`, and how many objects have it."""
    from headoff.relevance import explain

    found = explain(
        detector,
        picture,
        [baseline, *configurations],
        method=method,
        layers="last",
        confidence=confidence,
        ablation=ablation,
        references=references,
    )
    masses = found.masses[..., -1]
    values = torch.stack((found.box_shares[..., -1], masses / masses[:1]), -1).numpy().astype(np.float64)
    known = np.isfinite(values)
    sums, counts = np.where(known, values, 0).sum(1), known.sum(1)
    rows = np.stack([sums, counts], -1).tolist()
    return dict(zip((one.text for one in found.configurations), rows, strict=True))


class _Kept:
    """What is known of an image: (S, 2) sums and counts by the text of a configuration, in a file, if there is one.

    A file that is damaged, or about something else, is as one that does not exist.
    """

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, json.loads(json.dumps(about))
        self.sums: dict[str, list[list[float]]] = {}
        try:
            if path is not None and (contents := json.loads(path.read_text()))["about"] == self.about:
                self.sums = dict(contents["sums"])
        except (OSError, ValueError, KeyError, TypeError):
            pass

    def write(self) -> None:
        if self.path is not None:
            write_file(self.path, json.dumps({"about": self.about, "sums": self.sums}) + "\n")


@dataclass(frozen=True, eq=False)
class _Judged:
    """An image for `headoff.faithfulness`, which knows no true objects of it."""

    pictures: Pictures
    index: int

    @property
    def name(self) -> str:
        return f"image {self.index}"

    @property
    def knows(self) -> Needs:
        return ""

    def load(self) -> tuple[Image.Image, Truth | None]:
        return self.pictures.load(self.index)[0], None


def faithfulness_statistics(
    detector: Detector,
    pictures: Pictures,
    images: Sequence[int],
    configurations: Sequence[Configuration],
    sample: int,
    *,
    method: str = "chefer",
    confidence: float = 0.5,
    seed: int = 0,
    store: str | Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> SampleStatistics:
    """Areas under deletion and insertion curves of image tokens (`headoff.faithfulness`), of a method and `CONTROL`.

    The objects are those that are detected under the configuration, and maps and curves are those with its heads off.

    Args:
        detector: the one that was evaluated.
        pictures: the images.
        images: indices of those that were evaluated.
        configurations: the baseline first. Heads that are off contribute nothing.
        sample: how many images are drawn.
        method: see `headoff.explain`.
        confidence: of objects.
        seed: of the sample, and of all random numbers.
        store: a folder of results of images, from which an interrupted call goes on.
        progress: called with (images done, images of the sample) of all configurations.

    Raises:
        SettingError: `sample` is below 1, or there is no such method.
        ImageError: no image of the sample can be read.
    """
    from headoff.detr.detector import Detr
    from headoff.faithfulness import faithfulness
    from headoff.relevance.methods import resolve_method

    name = resolve_method(method).name
    measure = "tokens_removed" if isinstance(detector, Detr) else "tokens_mean"
    sources = [_Judged(pictures, index) for index in sample_of(images, sample, seed)]
    columns: list[Mapping[str, str]] = []
    numbers: list[list[Estimate]] = []

    def advance(done: int, total: int) -> None:
        if progress is not None:
            progress(len(numbers) * total + done, len(configurations) * total)

    for configuration in configurations:
        found = faithfulness(
            detector,
            sources,
            (name, CONTROL),
            measure,
            off=configuration,
            confidence=confidence,
            seed=seed,
            store=store,
            progress=advance,
        )
        columns = [
            {"method": one, "measure": measure, "quantity": quantity.name}
            for one in found.methods
            for _, quantity in found.columns
        ]
        numbers.append([found.estimate(one["method"], measure, one["quantity"]) for one in columns])
    mean, low, high = (
        np.array([[getattr(one, end) for one in row] for row in numbers]) for end in ("value", "low", "high")
    )
    images_with, objects = (
        np.array([getattr(row[0], name) for row in numbers]) for name in ("images", "objects")
    )
    return SampleStatistics(tuple(configurations), tuple(columns), images_with, objects, mean, low, high)
