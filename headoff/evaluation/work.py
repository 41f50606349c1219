"""One batch of images: read, detected under all configurations, and written.

The batch is the unit of work. What it finds does not depend on the process that computes it, so engines
(`headoff.evaluation.engines`) do nothing but call these two halves somewhere: `Work.read` wherever there are
processors, `Worker.compute` where a detector is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from headoff.ablation import Ablation, References, ablation_draws
from headoff.ablation.kinds import NEEDS_REFERENCES
from headoff.ablation.references import hash_of_image
from headoff.boxes import corners_of
from headoff.choices import AblationKind
from headoff.detector import Detector, DetectorOutput
from headoff.errors import ImageError, NonFiniteError, SettingError
from headoff.evaluation.candidates import candidates
from headoff.evaluation.shards import ROWS, Shard, write_shard
from headoff.evaluation.sources import Source
from headoff.gates import Configuration, stack
from headoff.images import Preprocessing, normalise, resize
from headoff.sweeps import MEMORY_BUDGET, decode_all


@dataclass(frozen=True)
class ReadBatch:
    """The images of a batch that could be read.

    Attributes:
        number: of the batch.
        images: their indices.
        pixels: uint8 (B, H, W, 3), see `headoff.images.resize`; None without images.
        resized: (height, width) of each in `pixels`.
        digests: a hash of each one's file.
        hashes: of each one's pixels, where the ablation needs them.
        skipped: why others were left out, by index.
    """

    number: int
    images: tuple[int, ...]
    pixels: Tensor | None
    resized: tuple[tuple[int, int], ...]
    digests: tuple[str, ...]
    hashes: tuple[str, ...]
    skipped: Mapping[int, str]

    def pin_memory(self) -> ReadBatch:
        """With pixels in pinned memory, from where they are copied while a GPU computes. The DataLoader calls it."""
        return self if self.pixels is None else replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class Detected:
    """What was found in a batch.

    Attributes:
        shard: what it is of.
        scores: (C, B, n) float32, on the CPU like the others.
        labels, queries: (C, B, n) int64.
        boxes: (C, B, n, 4) float32, left, top, right, bottom in pixels of the original image, clipped to it.
    """

    shard: Shard
    scores: Tensor
    labels: Tensor
    boxes: Tensor
    queries: Tensor

    def write(self, folder: Path) -> Shard:
        """Write it to a folder of results. Raises OutputError."""
        columns = (self.scores, self.labels, self.boxes, self.queries)
        write_shard(folder, self.shard, *(column.numpy() for column in columns))
        return self.shard


@dataclass(frozen=True)
class Work:
    """All that a batch's detections depend on, apart from the detector. It pickles.

    Attributes:
        source: the images.
        names: of the images, for messages.
        sizes: (n, 2), annotated (height, width) of each.
        batches: indices of the images of each batch.
        preprocessing: of the detector.
        configurations: C, which name no objects.
        ablation: what heads that are off contribute.
        references: the reference set of some ablations.
        threads: of torch on the CPU: their number changes sums by rounding.
        memory_budget: see `headoff.sweep`.
        strict: whether an image that cannot be read is an error.
    """

    source: Source
    names: Sequence[str]
    sizes: np.ndarray
    batches: Sequence[Sequence[int]]
    preprocessing: Preprocessing
    configurations: tuple[Configuration, ...]
    ablation: AblationKind = "zero"
    references: References | None = None
    threads: int = 1
    memory_budget: int = MEMORY_BUDGET
    strict: bool = False

    def read(self, number: int) -> ReadBatch:
        """Read and resize the images of a batch.

        Raises:
            ImageError: `strict`, and one cannot be read.
        """
        pictures: dict[int, Image.Image] = {}
        digests, hashes = [], []
        skipped: dict[int, str] = {}
        for index in self.batches[number]:
            try:
                picture, digest = self.source.load(index)
                hashed = self._hash(picture)
            except ImageError as error:
                if self.strict:
                    raise
                skipped[index] = str(error)
                continue
            pictures[index] = picture
            digests.append(digest)
            hashes += hashed
        pixels, resized = resize(list(pictures.values()), self.preprocessing) if pictures else (None, [])
        return ReadBatch(
            number, tuple(pictures), pixels, tuple(resized), tuple(digests), tuple(hashes), skipped
        )

    def can_read(self, index: int) -> bool:
        """Whether an image would not be left out."""
        try:
            self._hash(self.source.load(index)[0])
        except ImageError:
            return False
        return True

    def _hash(self, picture: Image.Image) -> list[str]:
        """Its hash, where the ablation needs it."""
        if self.references is None or self.ablation not in NEEDS_REFERENCES[1:]:
            return []
        found = hash_of_image(picture)
        if self.ablation == "optimal" and found in self.references.images:
            raise ImageError("the optimal constants were fitted on this image, so it is left out")
        return [found]


class Worker:
    """Computes batches with a detector.

    Args:
        work: what is to be computed.
        detector: a detector.
    """

    def __init__(self, work: Work, detector: Detector) -> None:
        self.work, self.detector = work, detector
        self._gates = stack(work.configurations, detector.head_layout)
        self._draws = ablation_draws(work.ablation, detector, work.references)

    def compute(self, read: ReadBatch) -> Detected:
        """The detections of a batch.

        Raises:
            NonFiniteError: the detector's output is not finite.
            SettingError: all images that `resample` takes contexts from are in the batch.
        """
        detector = self.detector
        if read.pixels is None:
            scores, boxes = torch.zeros(len(self._gates), 0, 0), torch.zeros(len(self._gates), 0, 0, 4)
            return Detected(self._shard(read, 0), scores, scores.long(), boxes, scores.long())
        with torch.inference_mode(), self._ablation(read).applied_to(detector):
            pixels = read.pixels.to(detector.device, non_blocking=True)
            pixel_values, mask = normalise(pixels, read.resized, self.work.preprocessing, detector.dtype)
            is_padded = len(set(read.resized)) > 1
            features = detector.features(pixel_values, mask if is_padded else None)
            output = decode_all(detector, features, self._gates, memory_budget=self.work.memory_budget)
            self._check_finite(read, output)
            # In float64, so that rounding comes last; Apple's GPUs have none.
            at = "cpu" if detector.device.type == "mps" else detector.device
            scores, labels, boxes, queries = candidates(
                detector.scoring, output.logits.to(at).double(), output.boxes.to(at).double()
            )
            sizes = torch.from_numpy(self.work.sizes[list(read.images)]).to(boxes)
            most = sizes[:, None, [1, 0, 1, 0]]
            corners = (corners_of(boxes) * most).clamp(min=torch.zeros_like(most), max=most)
            scores, corners = scores.float().cpu(), corners.float().cpu()
        return Detected(self._shard(read, scores.shape[-1]), scores, labels.cpu(), corners, queries.cpu())

    def _shard(self, read: ReadBatch, detections: int) -> Shard:
        rows = max(1, len(read.images) * detections)
        return Shard(read.number, read.images, read.skipped, read.digests, max(1, ROWS // rows), detections)

    def _ablation(self, read: ReadBatch) -> Ablation:
        """What heads that are off contribute: for `resample`, the contexts of the first image outside the batch."""
        if self.work.ablation != "resample" or self.work.references is None:
            return self._draws[0]
        for draw, sampled in zip(self._draws, self.work.references.sampled, strict=True):
            if sampled not in read.hashes:
                return draw
        raise SettingError(
            "all images that contexts can be taken from are in one batch of images that are evaluated: gather the "
            "reference set from others"
        )

    def _check_finite(self, read: ReadBatch, output: DetectorOutput) -> None:
        for name, values in (("logit", output.logits), ("box", output.boxes)):
            finite = values.isfinite().flatten(2).all(-1)
            if not finite.all():
                configuration, image = (~finite).nonzero()[0].tolist()
                raise NonFiniteError(
                    f"a {name} of image {self.work.names[read.images[image]]!r} under "
                    f"'{self.work.configurations[configuration].name}' is NaN or infinite: check the attention, or use "
                    "--dtype float32"
                )
