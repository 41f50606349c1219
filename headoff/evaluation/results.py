"""A results folder, as it is read.

    manifest.json        what the results belong to, see `headoff.evaluation.manifest`
    truth.npz            the ground truth
    detections/          batch-00000.parquet, ...: the detections of a batch of images, under all configurations

Columns of the Parquet files: `image` int32 (index into the ground truth's images), `configuration` int16, `query` int32,
`label` int32, `score` float32, `left`, `top`, `right`, `bottom` float32 (pixels of the original image).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from headoff.evaluation.tables import DetectionTable, GroundTruth
from headoff.gates import Configuration


class Results:
    """The results in a folder. They may be incomplete: what is there is what can be read.

    It holds the ground truth and the detections of few configurations at a time, however many there are. It pickles as
    the name of its folder, so that processes can share the configurations among them: give each consecutive ones.

    Args:
        folder: of `headoff evaluate`.

    Raises:
        SettingError: there are no results of this version of the format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        raise NotImplementedError

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return Results, (self.folder,)

    @cached_property
    def manifest(self) -> Mapping:
        """The contents of manifest.json: `model`, `ablation`, `provenance` and others."""
        raise NotImplementedError

    @cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """In the order of their indices; the first has nothing off. No two are equal."""
        raise NotImplementedError

    @cached_property
    def truth(self) -> GroundTruth:
        """Of all images that were asked for, done or not."""
        raise NotImplementedError

    @cached_property
    def done(self) -> NDArray[np.int64]:
        """Indices of the images that have detections, ascending."""
        raise NotImplementedError

    @cached_property
    def skipped(self) -> Mapping[int, str]:
        """Why images were left out, by index. They have no detections, and count for nothing."""
        raise NotImplementedError

    def detections(self, configuration: int) -> DetectionTable:
        """All detections of a configuration, in the images that are `done`.

        Raises:
            SettingError: there is no such configuration, or pyarrow is not installed.
        """
        raise NotImplementedError
