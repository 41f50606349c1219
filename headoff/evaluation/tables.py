"""The ground truth of a data set, and all detections of one configuration in it, as numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from headoff.errors import SettingError


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """The n images of a data set and their m annotations. Annotations are sorted by image.

    Attributes:
        class_names: names by label. They are the detector's: its detections have the same labels.
        image_ids: (n,) int64, the ids of the annotation file.
        names: n file names.
        sizes: (n, 2) int64, (height, width) in pixels.
        image: (m,) int64, index into `image_ids` of each annotation.
        boxes: (m, 4) float64, left, top, right, bottom in pixels of the original image.
        labels: (m,) int64, index into `class_names`.
        areas: (m,) float64, `area` of the annotation: that of its mask, where it has one.
        crowd: (m,) bool, whether the annotation is a group of objects.
        annotation_ids: (m,) int64.

    Raises:
        SettingError: shapes or dtypes do not agree, or annotations are not sorted by image.
    """

    class_names: tuple[str, ...]
    image_ids: NDArray[np.int64]
    names: tuple[str, ...]
    sizes: NDArray[np.int64]
    image: NDArray[np.int64]
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    annotation_ids: NDArray[np.int64]

    def __post_init__(self) -> None:
        n, m = len(self.names), len(self.image)
        _check(self, "image_ids", (n,), np.int64)
        _check(self, "sizes", (n, 2), np.int64)
        _check(self, "boxes", (m, 4), np.float64)
        _check(self, "areas", (m,), np.float64)
        _check(self, "crowd", (m,), np.bool_)
        for name in ("image", "labels", "annotation_ids"):
            _check(self, name, (m,), np.int64)
        _check_sorted(self.image)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.names)


@dataclass(frozen=True, eq=False)
class DetectionTable:
    """All n detections of one configuration, whatever their scores, sorted by image.

    Attributes:
        image: (n,) int64, index into `GroundTruth.image_ids`, ascending.
        scores: (n,) float32, 0..1.
        labels: (n,) int64, index into `GroundTruth.class_names`.
        boxes: (n, 4) float32, left, top, right, bottom in pixels of the original image, clipped to it.
        queries: (n,) int64, the object query of each detection.

    Raises:
        SettingError: shapes or dtypes do not agree, or detections are not sorted by image.
    """

    image: NDArray[np.int64]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    queries: NDArray[np.int64]

    def __post_init__(self) -> None:
        n = len(self.image)
        _check(self, "scores", (n,), np.float32)
        _check(self, "boxes", (n, 4), np.float32)
        for name in ("image", "labels", "queries"):
            _check(self, name, (n,), np.int64)
        _check_sorted(self.image)

    def __len__(self) -> int:
        return len(self.image)

    def same_as(self, other: DetectionTable) -> bool:
        """Whether all numbers are the same, bit for bit."""
        return all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )


def _check(table: object, name: str, shape: tuple[int, ...], dtype: type) -> None:
    array = getattr(table, name)
    if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
        raise SettingError(f"{name} is {got}: it must be {np.dtype(dtype)} {shape}")


def _check_sorted(image: NDArray[np.int64]) -> None:
    if len(image) and ((np.diff(image) < 0).any() or image[0] < 0):
        raise SettingError("rows are not sorted by image: sort them by rising index")
