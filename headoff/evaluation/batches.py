"""Which images are computed together."""

from __future__ import annotations

import random

import numpy as np

from headoff.errors import SettingError
from headoff.images import Preprocessing, padded_size


def make_batches(sizes: np.ndarray, preprocessing: Preprocessing, batch: int) -> tuple[tuple[int, ...], ...]:
    """Batches of images whose sizes after resizing are alike, so that little is padded.

    They depend on the arguments only. Padding changes the detections of an image by rounding, so an image has the same
    detections in every run only if it is always in a batch with the same images. The order is random: the first batches
    are a fair sample of all, for estimates of the time and for first results.

    Args:
        sizes: (n, 2), (height, width) of the images.
        preprocessing: how they are resized.
        batch: most images of a batch.

    Returns:
        Indices of the images of each batch, ascending.

    Raises:
        SettingError: `batch` is below 1, or images are resized to more than a detector can take.
    """
    if batch < 1:
        raise SettingError(f"a batch of {batch} images cannot be computed: give 1 or more")
    resized = [preprocessing.resized_size(height, width) for height, width in sizes.tolist()]
    order = sorted(range(len(resized)), key=lambda index: (resized[index], index))
    batches = [tuple(sorted(order[start : start + batch])) for start in range(0, len(order), batch)]
    for batch_of_like_sizes in batches:
        padded_size([resized[index] for index in batch_of_like_sizes])
    random.Random(0).shuffle(batches)
    return tuple(batches)


def shard_of(batches: int, shard: tuple[int, int] | None) -> range:
    """The batches that shard i of n computes, `shard` being (i, n) counted from 1; all for None.

    Raises:
        SettingError: there is no such shard.
    """
    if shard is None:
        return range(batches)
    index, count = shard
    if not 1 <= index <= count:
        raise SettingError(
            f"there is no shard {index}/{count}: shards are counted from 1/{count} to {count}/{count}"
        )
    return range(index - 1, batches, count)
