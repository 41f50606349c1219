"""A results folder, as it is read.

    manifest.json        what the results belong to, see `headoff.evaluation.manifest`
    truth.npz            the ground truth
    detections/          batch-000000.parquet, ...: the detections of a batch of images, under all configurations

Columns of the Parquet files: `image` int32 (index into the ground truth's images), `configuration` int16, `query` and
`label` int32, `score` float32, `left`, `top`, `right`, `bottom` float32 (pixels of the original image).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headoff.errors import SettingError
from headoff.evaluation.manifest import read_manifest, read_truth
from headoff.evaluation.shards import BOX, Shard, pyarrow_parquet, read_rows, read_shards
from headoff.evaluation.tables import DetectionTable, GroundTruth
from headoff.gates import Configuration, parse_configuration

MOST_BYTES = 2**28
"""Of the detections of several configurations that are read at once."""


BYTES = 44
"""Of a detection in a `DetectionTable`."""


class Results:
    """The results in a folder. They may be incomplete: what is there is what can be read.

    It holds the ground truth and the detections of few configurations at a time, however many there are. It pickles as
    the name of its folder, so that processes can share the configurations among them: give each consecutive ones.

    Args:
        folder: of `headoff evaluate`.

    Raises:
        SettingError: there are no results of this version of the format, or pyarrow is not installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        pyarrow_parquet()
        self.manifest: Mapping[str, Any] = read_manifest(self.folder)
        """The contents of manifest.json: `identity` (what decides the detections), `names` and `provenance`."""
        self._block: tuple[int, list[DetectionTable]] = (0, [])

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Results, (self.folder,)

    def __repr__(self) -> str:
        return (
            f"<Results in {str(self.folder)!r}: {len(self.configurations)} configurations, {len(self.done)} of "
            f"{len(self.truth)} images>"
        )

    @cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """In the order of their indices; the first has nothing off. No two are equal."""
        texts = self.manifest["identity"]["configurations"]
        return tuple(
            parse_configuration(text).named(name)
            for text, name in zip(texts, self.manifest["names"], strict=True)
        )

    @cached_property
    def truth(self) -> GroundTruth:
        """Of all images that were asked for, done or not."""
        return read_truth(self.folder)

    @cached_property
    def done(self) -> NDArray[np.int64]:
        """Indices of the images that have detections, ascending."""
        return np.array(sorted(index for shard in self._shards for index in shard.images), np.int64)

    @cached_property
    def skipped(self) -> Mapping[int, str]:
        """Why images were left out, by index. They have no detections, and count for nothing."""
        return dict(sorted(item for shard in self._shards for item in shard.skipped.items()))

    @property
    def is_complete(self) -> bool:
        """Whether all images that were asked for are done, or were left out."""
        return len(self.done) + len(self.skipped) == len(self.truth)

    def detections(self, configuration: int) -> DetectionTable:
        """All detections of a configuration, in the images that are `done`.

        Raises:
            SettingError: there is no such configuration, or a file has been damaged since.
        """
        count = len(self.configurations)
        if not 0 <= configuration < count:
            raise SettingError(
                f"there is no configuration {configuration}: there are {count}, counted from 0"
            )
        first, tables = self._block
        if not first <= configuration < first + len(tables):
            # Row groups have several configurations, and are read once for all of them where memory allows it.
            at_once = min((shard.configurations_at_once for shard in self._shards), default=1)
            rows = sum(len(shard.images) * shard.detections for shard in self._shards)
            at_once = max(1, min(at_once, MOST_BYTES // (BYTES * max(1, rows))))
            first = configuration - configuration % at_once
            self._block = (0, [])
            self._block = (first, self._read(first, min(first + at_once, count)))
        first, tables = self._block
        return tables[configuration - first]

    @cached_property
    def _shards(self) -> tuple[Shard, ...]:
        return tuple(read_shards(self.folder))

    def _read(self, first: int, end: int) -> list[DetectionTable]:
        """The detections of the configurations `first` to `end` - 1."""
        names = ("image", "score", "label", "query", *BOX)
        parts: list[dict[str, list[np.ndarray]]] = [{name: [] for name in names} for _ in range(first, end)]
        for shard in self._shards:
            if not shard.images:
                continue
            rows = read_rows(self.folder, shard, first, end - 1)
            configuration = rows["configuration"].to_numpy()
            starts = np.searchsorted(configuration, range(first, end + 1))
            columns = {name: rows[name].to_numpy() for name in names}
            for place, part in enumerate(parts):
                for name in names:
                    part[name].append(columns[name][starts[place] : starts[place + 1]].copy())
        return [_table(part) for part in parts]


def _table(parts: Mapping[str, list[np.ndarray]]) -> DetectionTable:
    columns = {name: np.concatenate(arrays) if arrays else np.zeros(0) for name, arrays in parts.items()}
    order = np.argsort(columns["image"], kind="stable")
    return DetectionTable(
        image=columns["image"][order].astype(np.int64),
        scores=columns["score"][order].astype(np.float32, copy=False),
        labels=columns["label"][order].astype(np.int64),
        boxes=np.stack([columns[side][order].astype(np.float32, copy=False) for side in BOX], -1),
        queries=columns["query"][order].astype(np.int64),
    )
