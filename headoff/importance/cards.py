"""What single heads do, for pictures and pages: the detections without each of them, and where each of them looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from headoff.ablation import References
from headoff.choices import AblationKind
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.gates import Configuration, heads_off, none_off, single_heads
from headoff.images import ImageSource
from headoff.importance.result import HeadImportance
from headoff.relevance.explainer import explain
from headoff.relevance.explanations import Explanation
from headoff.sweeps import MEMORY_BUDGET, SweepResult, sweep

MOST_OBJECTS = 12
"""Objects whose attention is recorded."""


@dataclass(frozen=True)
class HeadCards:
    """What every head does in one image.

    Attributes:
        shape: (L, H).
        sweeps: for each ablation kind, the detections with every head of every layer off alone, and with every head
            off in all layers.
        attention: cross-attention of every head with nothing off, for the first objects; None at other sites, and
            where there is no object.
    """

    shape: tuple[int, int]
    sweeps: Mapping[AblationKind, SweepResult]
    attention: Explanation | None

    @classmethod
    def of(
        cls,
        detector: Detector,
        image: ImageSource | EncodedImage,
        importance: HeadImportance,
        *,
        references: References | str | Path | None = None,
        confidence: float = 0.5,
        memory_budget: int = MEMORY_BUDGET,
    ) -> HeadCards:
        """The cards of all heads that `importance` scores.

        Args:
            detector, image, references, confidence, memory_budget: as they were given to `headoff.heads`. With
                `resample`, heads contribute their context in the first sampled image.
            importance: its result.
        """
        encoded = image if isinstance(image, EncodedImage) else EncodedImage.of(detector, image)
        configurations = _configurations(importance)
        sweeps = {
            kind: sweep(
                detector,
                encoded,
                configurations,
                confidence=confidence,
                memory_budget=memory_budget,
                ablation=kind,
                references=references,
            )
            for kind in importance.ablations
        }
        attention = None
        if importance.site == "decoder_cross" and len(importance.objects):
            shown = importance.objects.subset(range(min(MOST_OBJECTS, len(importance.objects))))
            attention = explain(
                detector, encoded, [none_off()], shown, "raw", confidence=confidence, heads=True
            )
        return cls(importance.shape, sweeps, attention)

    def index(self, head: int, layer: int | None = None) -> int:
        """The configuration of `sweeps` without a head: in one layer, or in all.

        Raises:
            SettingError: there is no such head.
        """
        layers, heads = self.shape
        if not 0 <= head < heads or not (layer is None or 0 <= layer < layers):
            where = "all layers" if layer is None else f"layer {layer}"
            raise SettingError(
                f"there is no head {head} in {where}: there are {layers} layers of {heads} heads, counted from 0"
            )
        return (layers if layer is None else layer) * heads + head


def _configurations(importance: HeadImportance) -> tuple[Configuration, ...]:
    layers, heads = importance.shape
    columns = (heads_off(head, site=importance.site) for head in range(heads))
    return (*single_heads(layers, heads, site=importance.site), *columns)
