"""D-RISE (Petsiuk et al., CVPR 2021, arXiv 2006.03204): relevance of a detector that is a black box.

The image is multiplied by random masks, and the relevance of a place is the mean of the masked images' similarity to
the detection that is explained, weighted by the masks' values there:

    S[t] = sum over masks i of w_i M_i[t] / sum over i of M_i[t] - mean over i of w_i
    w_i = max over the predictions j of the masked image i of IoU(box, box_j) cos(p, p_j) o_j

The paper divides by the expected sum of the masks, whose difference from the sum is the noise of sampling, and does not
subtract the mean, which changes neither the order of places nor a map that is scaled from its minimum to its maximum.
So relevance is what seeing a place adds to the similarity, and zero where the image does not matter; it is negative
where seeing a place harms. Masks are as in RISE: a grid of random zeros and ones, enlarged bilinearly, and
shifted at random by less than a cell. A masked pixel has the mean colour of the detector's preprocessing, which
becomes 0.

The detection that is explained is a box and a class, those of the object under every configuration: D-RISE takes any,
found or not, and p is then 1 for the class and 0 for the others. The configuration decodes the masked images. p_j is
the vector of class probabilities, with "no object" where the detector has that class; there the objectness o_j is left
out, as the paper says for detectors without one. With one sigmoid per class, cosines do not tell a confident prediction
from another, and o_j is the greatest of them.

After a decoder layer before the last, predictions are those of class and box heads applied to its states, for headoff's
DETR; other detectors have the same map after all layers.

Shapes: C configurations, O targets, M layers, B masked images, Q queries, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from headoff.boxes import corners_of, iou_of
from headoff.detector import Detector
from headoff.errors import SettingError
from headoff.gates import Gates
from headoff.relevance.decoded import decoded, of_decoder
from headoff.relevance.engine import ConfigurationRelevance, TargetsOf, check_one_image
from headoff.relevance.memory import chosen_memory_budget
from headoff.relevance.methods import EngineMethod, register_method
from headoff.relevance.targets import Target
from headoff.sweeps import by_encoder_gate

MASKS = 1000
"""Masks by default."""
CELLS = 8
"""Cells of a mask's grid along a side, by default."""
_BACKBONE_NUMBERS = 64
"""Numbers in memory for each pixel while a backbone runs, about."""


_Object = tuple[int, float, float, float, float]
"""A class and a box (left, top, right, bottom) as fractions of the image."""


@dataclass(frozen=True)
class Masks:
    """Random masks of an image, which depend on nothing but these numbers.

    Attributes:
        count: number of masks.
        cells: of the grid, along a side.
        probability: that a cell is kept.
        seed: of the random numbers.
    """

    count: int = MASKS
    cells: int = CELLS
    probability: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1 or self.cells < 1 or not 0 < self.probability < 1 or self.seed < 0:
            raise SettingError(
                f"{self.count} masks of {self.cells} x {self.cells} cells, kept with probability "
                f"{self.probability}, seed {self.seed}: "
                "give at least one mask and cell, a probability between 0 and 1, and a seed from 0"
            )

    def batches(self, height: int, width: int, at_once: int) -> Iterator[Tensor]:
        """The masks, float32 (B, height, width) in 0..1, some at once."""
        generator = np.random.default_rng(self.seed)
        kept = generator.random((self.count, self.cells, self.cells)) < self.probability
        shifts = generator.random((self.count, 2))
        cell = [-(-side // self.cells) for side in (height, width)]
        size = [(self.cells + 1) * side for side in cell]
        starts = (shifts * cell).astype(int)
        for first in range(0, self.count, at_once):
            grids = torch.from_numpy(kept[first : first + at_once, None]).float()
            large = F.interpolate(grids, size=size, mode="bilinear", align_corners=False)[:, 0]
            yield torch.stack(
                [
                    mask[top : top + height, left : left + width]
                    for mask, (top, left) in zip(large, starts[first : first + at_once], strict=True)
                ]
            )


class DRiseEngine:
    """D-RISE of one image for any number of configurations and targets; see `RelevanceEngine` for `run`.

    All configurations are decoded from one encoding of each masked image. Results come after the last mask.

    Args:
        detector: any.
        features: of the image without masks.
        method: the `EngineMethod`.
        picture: the image.
        memory_budget: bytes, see `RelevanceEngine`. It determines how many masked images are computed together.
        masks: the masks.
        batch: most masked images that are computed together.

    Raises:
        SettingError: the picture is not known, or there is more than one image.
    """

    def __init__(
        self,
        detector: Detector,
        features: Any,
        *,
        method: EngineMethod,
        picture: Image.Image | None = None,
        memory_budget: int | None = None,
        masks: Masks = Masks(),
        batch: int = 64,
    ) -> None:
        check_one_image(features)
        if picture is None:
            raise SettingError(
                f"{method.name} masks the pixels of the image, which are not known here: give the picture, or use a "
                "method that needs only features, such as chefer"
            )
        if batch < 1:
            raise SettingError(f"{batch} masked images cannot be computed together: give at least 1")
        self.detector = detector
        self.features = features
        self.method = method
        self.masks = masks
        self.progress: Callable[[int, int], None] | None = None
        """Called with (number of masked images that are done, number of masks)."""
        self._picture = picture
        self._batch = batch
        self._compute = torch.promote_types(detector.dtype, torch.float32)
        self._budget = chosen_memory_budget(detector.device, memory_budget)

    @torch.no_grad()
    def run(
        self, gates: Gates, targets: TargetsOf, *, layers: Sequence[int] | None = None, heads: bool = False
    ) -> Iterator[ConfigurationRelevance]:
        """Decode and explain every configuration; see `RelevanceEngine.run`.

        Raises:
            SettingError: as `RelevanceEngine.run` does, or a target is no class logit.
        """
        count = self.detector.head_layout.decoder_layers
        chosen = list(range(count)) if layers is None else list(layers)
        all_decoded = list(decoded(self.detector, self.features, gates, targets, chosen, heads, self._budget))
        explained = [[self._object(target, one.boxes) for target in one.present] for one in all_decoded]
        objects = list(dict.fromkeys(found for some in explained for found in some))
        rows = self._rows(gates, objects, chosen) if objects else torch.zeros(len(gates), 0, len(chosen), 0)
        for one, some in zip(all_decoded, explained, strict=True):
            yield one.result(rows[one.index, [objects.index(found) for found in some]], chosen)

    def _object(self, target: Target, boxes: Tensor) -> _Object:
        if target.label is None:
            raise SettingError(
                f"{self.method.name} explains a detection, its class and box together, and not the target "
                f"{target.name!r}: leave the target out"
            )
        box = corners_of(boxes[target.query]).tolist() if target.box is None else target.box
        return target.label, *box

    def _rows(self, gates: Gates, objects: list[_Object], layers: list[int]) -> Tensor:
        """The maps of objects, as rows over the memory's tokens, (C, O, M, N)."""
        detector = self.detector
        pixels, _ = detector.preprocess([self._picture])
        boxes, labels = pixels.new_tensor([found[1:] for found in objects]), [found[0] for found in objects]
        height, width = pixels.shape[-2:]
        stride = detector.stride(self.features)
        weighted = total = torch.zeros(())
        similarities, done = [], 0
        plans = [
            (encoder_gate, members, detector.plan(of_decoder(gates[members])))
            for encoder_gate, members in by_encoder_gate(gates)
        ]
        for masks in self.masks.batches(height, width, self._at_once(pixels, len(gates))):
            masks = masks.to(pixels)
            features = detector.features(pixels * masks[:, None])
            weights = pixels.new_zeros(len(gates), len(objects), len(layers), len(masks))
            for encoder_gate, members, plan in plans:
                outputs = detector.decode_layers(detector.encode_features(features, encoder_gate), plan)
                for slot, layer in enumerate(layers):
                    output = outputs[layer]
                    weights[members.to(pixels.device), :, slot] = self._similarity(
                        output.boxes, output.logits, boxes, labels
                    )
            similarities.append(weights)
            # A token's mask is the mean over the token's pixels.
            tokens = F.avg_pool2d(masks[:, None], stride, ceil_mode=True, count_include_pad=False)[:, 0]
            weighted = weighted + torch.einsum(
                "comb,bhw->comhw", *(x.to(self._compute) for x in (weights, tokens))
            )
            total = total + tokens.to(self._compute).sum(0)
            done += len(masks)
            if self.progress is not None:
                self.progress(done, self.masks.count)
        found = torch.cat(similarities, dim=-1).to(self._compute)
        maps = weighted / total.clamp(min=torch.finfo(self._compute).tiny) - found.mean(-1)[..., None, None]
        # Where similarities differ by rounding only, the image does not matter.
        spread = found.amax(-1) - found.amin(-1)
        maps = torch.where((spread > 1e-6)[..., None, None], maps, 0)
        rows, columns = self.features.grid
        padding = columns - maps.shape[-1], rows - maps.shape[-2]
        maps = F.pad(maps, (0, padding[0], 0, padding[1]))
        # On the finest level: a similarity is no sum over levels.
        rest = sum(h * w for h, w in self.features.shapes) - rows * columns
        return F.pad(maps.flatten(-2), (0, rest)).cpu()

    def _similarity(self, boxes: Tensor, logits: Tensor, of: Tensor, labels: list[int]) -> Tensor:
        """(C, O, B) of predictions (C, B, Q, ...) and objects with boxes `of` (O, 4)."""
        found = corners_of(boxes).clamp(0, 1)  # as boxes of objects are
        iou = iou_of(found[:, None], of[None, :, None, None]).nan_to_num(0)
        if self.detector.scoring.kind == "softmax":
            probabilities = logits.softmax(-1)
            cosine = F.normalize(probabilities, dim=-1)
        else:
            probabilities = logits.sigmoid()
            cosine = F.normalize(probabilities, dim=-1) * probabilities.amax(-1, keepdim=True)
        return (iou * cosine[..., labels].movedim(-1, 1)).amax(-1)

    def _at_once(self, pixels: Tensor, configurations: int) -> int:
        numbers = _BACKBONE_NUMBERS * pixels[0, 0].numel() * pixels.element_size()
        item = numbers + configurations * self.detector.decoder_bytes(self.features)
        return max(1, min(self._batch, self._budget // 2 // item))


def d_rise(
    masks: int = MASKS, *, cells: int = CELLS, probability: float = 0.5, seed: int = 0, batch: int = 64
) -> EngineMethod:
    """The method `d_rise` with other masks.

    Args:
        masks: number of masks. Each costs a run of the whole detector.
        cells: of a mask's grid, along a side. 16 in the paper, with 5,000 masks.
        probability: that a cell is kept.
        seed: of the random numbers.
        batch: most masked images that are computed together, where the memory budget allows it.

    Example:
        >>> explain(detector, "street.jpg", "none", method=d_rise(5000, cells=16), layers="last")
    """
    chosen = Masks(masks, cells, probability, seed)
    return replace(_D_RISE, engine=partial(DRiseEngine, masks=chosen, batch=batch))


_D_RISE = register_method(
    EngineMethod(
        "d_rise",
        f"black box: what seeing a place adds to the similarity of detections, by {MASKS} random masks of the pixels",
        DRiseEngine,
        signed=True,
    )
)
