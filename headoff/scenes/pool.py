"""A pool of training scenes, drawn in advance into a memory-mapped file.

Drawing a scene takes a fifth of the time of a training step on it. A pool is drawn once, by all processes, and read
many times, with 96 augmentations of each scene. The file is used by later runs, and can be deleted.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from headoff.scenes.dataset import MAX_OBJECTS, augment, collate, draw_scene
from headoff.scenes.losses import Targets

_CHUNK = 256


class ScenePool:
    """`count` training scenes of one size, with augmented batches drawn from them.

    Args:
        folder: the folder of the pool's files.
        size: side of the scenes in pixels.
        count: number of scenes, seeds `first_seed` and up of the training split.
        workers: processes that draw.
    """

    def __init__(self, folder: Path, size: int, count: int, first_seed: int = 0, workers: int = 1) -> None:
        self._path = folder / f"pool-{size}px-{first_seed}-{count}.npy"
        self._objects_path = self._path.with_suffix(".npz")
        self._size, self._count, self._first_seed = size, count, first_seed
        # The objects are written last: if their file exists, all images have been drawn.
        if not self._objects_path.exists():
            self._draw(workers)
        self._images = np.load(self._path, mmap_mode="r")
        objects = np.load(self._objects_path)
        self._boxes, self._labels, self._counts = objects["boxes"], objects["labels"], objects["counts"]

    def __len__(self) -> int:
        return self._count

    def _draw(self, workers: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        shape = (self._count, 3, self._size, self._size)
        np.lib.format.open_memmap(self._path, "w+", np.uint8, shape).flush()
        boxes = np.zeros((self._count, MAX_OBJECTS, 4), np.float32)
        labels = np.zeros((self._count, MAX_OBJECTS), np.int64)
        counts = np.zeros(self._count, np.int64)
        jobs = [
            (str(self._path), start, min(start + _CHUNK, self._count), self._size, self._first_seed)
            for start in range(0, self._count, _CHUNK)
        ]
        with (
            _parallel_map(min(workers, len(jobs))) as parallel_map,
            tqdm(total=self._count, desc=f"drawing scenes, {self._size} px", unit="scene") as progress,
        ):
            for start, stop, objects in parallel_map(_draw_chunk, jobs):
                for index, (scene_boxes, scene_labels) in enumerate(objects, start=start):
                    counts[index] = len(scene_labels)
                    boxes[index, : len(scene_labels)] = scene_boxes
                    labels[index, : len(scene_labels)] = scene_labels
                progress.update(stop - start)
        # np.savez appends .npz to names without it, so the temporary name ends in it as well.
        unfinished = self._objects_path.with_suffix(".part.npz")
        np.savez(unfinished, boxes=boxes, labels=labels, counts=counts)
        unfinished.rename(self._objects_path)

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Targets]:
        """A random augmented batch: pixels uint8 (size, 3, S, S) and targets."""
        # Sorted, because reading in the order of the file is faster.
        chosen = np.sort(torch.randint(len(self), (size,), generator=generator).numpy())
        images = torch.from_numpy(self._images[chosen])
        counts = self._counts[chosen]
        boxes = [
            torch.from_numpy(row[:count]) for row, count in zip(self._boxes[chosen], counts, strict=True)
        ]
        images, boxes = augment(images, boxes, generator)
        padded = torch.nn.utils.rnn.pad_sequence(boxes, batch_first=True)
        objects = padded.shape[1]
        labels = torch.from_numpy(self._labels[chosen][:, :objects])
        valid = torch.arange(objects) < torch.from_numpy(counts)[:, None]
        return images, Targets(padded, labels, valid)


@contextmanager
def _parallel_map(workers: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """`map` by `workers` processes of one thread each, with results in any order; for one worker, in this process."""
    if workers == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool.imap_unordered


def _draw_chunk(job: tuple[str, int, int, int, int]) -> tuple[int, int, list[tuple[np.ndarray, np.ndarray]]]:
    path, start, stop, size, first_seed = job
    images = np.lib.format.open_memmap(path, "r+")
    scenes = [draw_scene(first_seed + index, size, "train") for index in range(start, stop)]
    pixels, boxes, labels = collate(scenes)
    images[start:stop] = pixels.numpy()
    objects = [(box.numpy(), label.numpy()) for box, label in zip(boxes, labels, strict=True)]
    images.flush()
    return start, stop, objects
