"""Two results folders side by side: two models, two attentions or two revisions on the same images.

Both are scored over the images that both have, with the same bootstrap samples: differences are paired by image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headoff.dataframes import dataframe
from headoff.errors import SettingError
from headoff.evaluation.outcomes import CONFIDENCE, COUNTED
from headoff.evaluation.precision import METRICS
from headoff.evaluation.results import Results
from headoff.evaluation.scores import RESAMPLES, Scores, SourceOfDetections, interval, score
from headoff.evaluation.tables import GroundTruth
from headoff.wording import counted, markdown_table

if TYPE_CHECKING:
    import pandas

TABLE_OUTCOMES = ("kept", "lost", "unmatched")


@dataclass(frozen=True, eq=False)
class Comparison:
    """Scores of A and B over the same images, and their differences, B less A.

    Attributes:
        names: what A and B are.
        a, b: scores of the configurations that both have, in the same order, the baseline first.
        image_ids: (n,) ids of the images that both have.
        only_a, only_b: configurations, as texts, that only one of them has.
    """

    names: tuple[str, str]
    a: Scores
    b: Scores
    image_ids: np.ndarray
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.a)

    def difference(self, index: int, metric: str = "AP") -> tuple[float, float, float]:
        """A metric of B less that of A under a configuration, and the 95% interval, paired by image."""
        row = METRICS.index(metric)
        first, second = self.a.configurations[index], self.b.configurations[index]
        found = float(second.metrics[row] - first.metrics[row])
        low, high = interval(second.samples[row] - first.samples[row], found)
        return found, float(low), float(high)

    def class_differences(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(K,) AP of each class of B less that of A, and the ends of the 95% intervals."""
        first, second = self.a.configurations[index], self.b.configurations[index]
        found = second.by_class - first.by_class
        assert first.class_samples is not None and second.class_samples is not None
        return found, *interval(second.class_samples.astype(float) - first.class_samples, found)

    def drops(self, most: float, metric: str = "AP") -> list[int]:
        """The configurations under which a metric of B is lower than that of A by more than `most`.

        It is the difference on these images that counts, not its interval: on the same images nothing in it is random.
        """
        # Rounding of a difference of exactly `most` is no drop.
        return [index for index in range(len(self)) if self.difference(index, metric)[0] < -most - 1e-12]

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each configuration and metric."""
        for index, one in enumerate(self.a.configurations):
            for metric in METRICS:
                found, low, high = self.difference(index, metric)
                yield {
                    "configuration": one.configuration.name,
                    "text": one.configuration.text,
                    "images": len(self.image_ids),
                    "metric": metric,
                    "a": one[metric],
                    "b": self.b.configurations[index][metric],
                    **{"difference": found, "low": low, "high": high},
                }

    def class_rows(self) -> Iterator[dict[str, Any]]:
        """One row for each configuration and class that has objects."""
        for index, one in enumerate(self.a.configurations):
            found, low, high = self.class_differences(index)
            for label in np.flatnonzero(~np.isnan(found)):
                yield {
                    "configuration": one.configuration.name,
                    "text": one.configuration.text,
                    "class": self.a.truth.class_names[label],
                    "a": float(one.by_class[label]),
                    "b": float(self.b.configurations[index].by_class[label]),
                    **{
                        "difference": float(found[label]),
                        "low": float(low[label]),
                        "high": float(high[label]),
                    },
                }

    def outcome_rows(self) -> Iterator[dict[str, Any]]:
        """One row for each configuration and outcome of the true objects: counts for one object."""
        for first, second in zip(self.a.configurations, self.b.configurations, strict=True):
            for place, outcome in enumerate(COUNTED):
                yield {
                    "configuration": first.configuration.name,
                    "text": first.configuration.text,
                    "outcome": outcome,
                    "a": float(first.outcomes["truth"].rates[place]),
                    "b": float(second.outcomes["truth"].rates[place]),
                }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())

    def table_rows(self, outcomes: Sequence[str] = TABLE_OUTCOMES) -> Iterator[list[str]]:
        """AP of both, the difference and what becomes of true objects, as texts under `table_head`."""
        for index, (first, second) in enumerate(
            zip(self.a.configurations, self.b.configurations, strict=True)
        ):
            found, low, high = self.difference(index)
            span = "" if np.isnan(low) else f"{signed(low)} to {signed(high)}"
            rates = [
                f"{first.outcomes['truth'].rates[place]:.3f}, {second.outcomes['truth'].rates[place]:.3f}"
                for place in map(COUNTED.index, outcomes)
            ]
            name = first.configuration.name
            yield [name, f"{first['AP']:.4f}", f"{second['AP']:.4f}", signed(found), span, *rates]

    def table(self, most: int | None = None, outcomes: Sequence[str] = TABLE_OUTCOMES) -> str:
        """`table_rows` as a Markdown table; only the first `most` of them."""
        rows = list(islice(self.table_rows(outcomes), most))
        escaped = [[row[0].replace("|", "\\|"), *row[1:]] for row in rows]
        return "\n".join(markdown_table(table_head(outcomes), escaped))


def table_head(outcomes: Sequence[str] = TABLE_OUTCOMES) -> list[str]:
    """The head of `Comparison.table`. Outcomes are counts for one true object."""
    return [
        "heads off",
        "AP of A",
        "AP of B",
        "B less A",
        "95% interval",
        *(f"{one} A, B" for one in outcomes),
    ]


def signed(value: float) -> str:
    """A difference of AP."""
    return f"{value:+.4f}"


def compare(
    a: str | Path | SourceOfDetections,
    b: str | Path | SourceOfDetections,
    *,
    names: tuple[str, str] | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    processes: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Compare the results in two folders of `headoff evaluate`, under the configurations that both have.

    Args:
        a, b: the folders.
        names: what they are called; by default their folders.
        resamples: samples of the bootstrap over images; 0 for no intervals.
        confidence: above which detections have outcomes.
        processes: that score configurations; by default as many as there are cores, if that is worth their start.
        progress: called with (configurations that were scored, all of both).

    Raises:
        SettingError: they have no images in common, or other annotations, classes or configurations.

    Example:
        >>> found = headoff.compare("results/sdpa", "results/my_kernel")
        >>> found.difference(0)
    """
    sources = [Results(one) if isinstance(one, str | Path) else one for one in (a, b)]
    if names is None:
        names = (str(a), str(b)) if isinstance(a, str | Path) and isinstance(b, str | Path) else ("A", "B")
    images = _common_images(*sources)
    texts = [[one.text for one in source.configurations] for source in sources]
    common = [text for text in texts[0] if text in set(texts[1])]
    only_a, only_b = (tuple(text for text in own if text not in set(common)) for own in texts)
    if not common or (len(common) == 1 and only_a and only_b):
        raise SettingError(
            f"the folders have other configurations ({_some(only_a)}; {_some(only_b)}), and only the baseline in "
            "common: evaluate the same --set or --off in both"
        )
    total, done = 2 * len(common), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    run = partial(
        score,
        resamples=resamples,
        confidence=confidence,
        processes=processes,
        keep_class_samples=True,
        progress=advance,
    )
    first, second = (
        run(source, images=chosen, configurations=[own.index(text) for text in common])
        for source, chosen, own in zip(sources, images, texts, strict=True)
    )
    return Comparison(names, first, second, sources[0].truth.image_ids[images[0]], only_a, only_b)


def _some(texts: Sequence[str]) -> str:
    return ", ".join(texts[:3]) + (", ..." if len(texts) > 3 else "")


def _common_images(a: SourceOfDetections, b: SourceOfDetections) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the images that are done in both, in the order of A."""
    if a.truth.class_names != b.truth.class_names:
        raise SettingError(
            f"the folders have other classes ({len(a.truth.class_names)} and {len(b.truth.class_names)}, or other "
            "names or another order): compare results on the same annotations, of detectors of the same classes"
        )
    ids = [source.truth.image_ids[source.done] for source in (a, b)]
    shared, first, second = np.intersect1d(ids[0], ids[1], assume_unique=True, return_indices=True)
    if not len(shared):
        raise SettingError(
            "the folders have no evaluated images in common: compare results on the same data set"
        )
    order = np.argsort(first)
    chosen = a.done[first[order]], b.done[second[order]]
    parts = [_annotations(source.truth, images) for source, images in zip((a, b), chosen, strict=True)]
    same = all(np.array_equal(mine, other) for mine, other in zip(*parts, strict=True))
    if not same:
        counts = [len(part[0]) for part in parts]
        raise SettingError(
            f"the folders have other annotations of the {counted(len(shared), 'image')} that they share "
            f"({counts[0]:,} and {counts[1]:,} objects, or others): evaluate both on the same annotation file"
        )
    return chosen


def _annotations(truth: GroundTruth, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """The annotations of images, in their order: place of the image, labels, boxes, areas, crowds."""
    place = np.full(len(truth), -1)
    place[images] = np.arange(len(images))
    rows = np.flatnonzero(place[truth.image] >= 0)
    rows = rows[np.lexsort((truth.annotation_ids[rows], place[truth.image[rows]]))]
    return (
        place[truth.image[rows]],
        truth.labels[rows],
        truth.boxes[rows],
        truth.areas[rows],
        truth.crowd[rows],
    )
