"""The sweep: an image is encoded once and decoded under every configuration, and the outcomes are computed.

Gates of the decoder change neither backbone nor encoder, so the image is encoded once. The decoder runs all
configurations as one batch, in which configurations share layers where their gates agree (`headoff.detr.sharing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headoff.ablation import Ablation, References, ablation_draws, make_ablation
from headoff.choices import AblationKind
from headoff.dataframes import dataframe
from headoff.detections import Detections, detections_from
from headoff.detector import Detector, DetectorOutput, Features
from headoff.detr.graphs import DecodeGraphs
from headoff.detr.transfers import copy_to_device
from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.gates import Configuration, Gates, cumulative, none_off, read_configurations, stack
from headoff.images import ImageSource, load_image
from headoff.outcomes import KEEP_IOU, TOUCH_IOU, ConfigurationOutcome, Status, outcomes_of
from headoff.wording import counted

if TYPE_CHECKING:
    import pandas

FOUND = (Status.KEPT, Status.MOVED, Status.DUPLICATED)
"""What is said of an object that is still detected."""

MEMORY_BUDGET = 256 * 2**20
"""Default limit of decoder activations in bytes; see `configurations_at_once`."""


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """One image under C configurations. All tensors are on the CPU.

    Attributes:
        configurations: in the order given; `len(result)` is C.
        logits: (C, Q, K + 1), class logits, the last one "no object".
        boxes: (C, Q, 4), (centre x, centre y, width, height) as fractions of the image.
        detections: per configuration.
        baseline: the detections with none off; each of them is an *object*.
        outcomes: what became of each object, per configuration.
        confidence: the score above which a query's prediction is a detection.
        ablation: what heads that are off contributed, see `headoff.ablation`.
        draws: with `resample`, the outcomes of every sampled image, the first of which the other attributes show; empty
            where there is one.
    """

    configurations: tuple[Configuration, ...]
    logits: Tensor
    boxes: Tensor
    detections: tuple[Detections, ...]
    baseline: Detections
    outcomes: tuple[ConfigurationOutcome, ...]
    confidence: float
    ablation: AblationKind = "zero"
    draws: tuple[tuple[ConfigurationOutcome, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.configurations)

    def __repr__(self) -> str:
        return (
            f"<SweepResult: {counted(len(self), 'configuration')}, {counted(len(self.baseline), 'object')}>"
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the original image in pixels."""
        return self.baseline.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.baseline.class_names

    def survival(self) -> Tensor:
        """(objects, C) float32: probability of each object's class at the object's query, detected or not."""
        rows = [[outcome.query_score for outcome in one.outcomes] for one in self.outcomes]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(self), len(self.baseline)).T

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each object under each configuration, as in objects.csv. `mean_query_score` and `share_found` are
        over the sampled images of `resample`.
        """
        draws = self.draws or (self.outcomes,)
        for at, (configuration, outcome) in enumerate(zip(self.configurations, self.outcomes, strict=True)):
            for found in outcome.outcomes:
                new = found.new_label
                drawn = [draw[at].outcomes[found.object] for draw in draws]
                yield {
                    "configuration": configuration.name,
                    "text": configuration.text,
                    "object": found.object,
                    "query": found.query,
                    "label": found.label,
                    "class": self.class_names[found.label],
                    "status": found.status.value,
                    "iou": found.iou,
                    "score": found.score,
                    "query_score": found.query_score,
                    "new_class": None if new is None else self.class_names[new],
                    "draws": len(draws),
                    "mean_query_score": sum(one.query_score for one in drawn) / len(draws),
                    "share_found": sum(one.status in FOUND for one in drawn) / len(draws),
                }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())

    # Notebooks ask a result for its pictures, which are drawn by what else depends on this module.
    def _repr_html_(self) -> str:
        from headoff.figures.notebook import sweep_html

        return sweep_html(self)

    def _repr_png_(self) -> bytes:
        from headoff.figures.notebook import sweep_png

        return sweep_png(self)

    def as_dict(self) -> dict[str, Any]:
        """Everything but the logits, as a dict of JSON types."""
        return {
            "image_size": list(self.image_size),
            "confidence": self.confidence,
            "ablation": self.ablation,
            "class_names": list(self.class_names),
            "baseline": self.baseline.as_dict(),
            "configurations": [
                {
                    "name": configuration.name,
                    "configuration": configuration.text,
                    "detections": detections.as_dict(),
                    **outcome.as_dict(),
                }
                for configuration, detections, outcome in zip(
                    self.configurations, self.detections, self.outcomes, strict=True
                )
            ],
            "draws": [[outcome.as_dict() for outcome in draw] for draw in self.draws],
        }


def sweep(
    detector: Detector,
    image: ImageSource | EncodedImage,
    configurations: Configuration | str | Iterable[Configuration | str] | None = None,
    *,
    object_index: int | None = None,
    confidence: float = 0.5,
    keep_iou: float = KEEP_IOU,
    touch_iou: float = TOUCH_IOU,
    memory_budget: int = MEMORY_BUDGET,
    autocast: torch.dtype | None = None,
    ablation: AblationKind | Ablation = "zero",
    references: References | str | Path | None = None,
    draws: int = 1,
    graphs: DecodeGraphs | None = None,
) -> SweepResult:
    """Run a detector on one image under every configuration.

    On a GPU the host waits only for logits and boxes; where objects are named, also for the baseline's detections.

    Args:
        detector: see `headoff.load`.
        image: a path, a `PIL.Image` or an array (see `headoff.images.load_image`), or an `EncodedImage`.
        configurations: configurations, or their text (`"first 3"`, `"object 0: L5H2"`). By default the cumulative
            sweep: none off, first 1 off, ..., all heads off, in every decoder layer.
        object_index: switch heads off for the query of this object only; objects are the detections with nothing
            off, counted from 0 by falling score.
        confidence: score above which a query's prediction is a detection.
        keep_iou, touch_iou: thresholds of `headoff.outcomes`.
        memory_budget: limit of decoder activations in bytes. It limits how many configurations are decoded together,
            and changes results by rounding at most.
        autocast: mixed precision in bfloat16 or float16, see `Detector.autocasting`;
            `headoff.effects.effect_on_detections` says what it changes.
        ablation: what heads that are off contribute: `zero`, `mean`, `resample` (of the first other sampled image),
            `uniform` or `optimal`; see `headoff.ablation`.
        references: the reference set of `mean`, `resample` and `optimal`, or its file.
        draws: of `resample`: how many of the other sampled images heads that are off take their contexts from, one
            after the other; all that there are at most.
        graphs: one object for all images of a folder, whose decodes are then CUDA graphs on a GPU.

    Raises:
        ImageError: the image cannot be read.
        GateError: a configuration cannot be read, or does not fit the detector.
        SettingError: another argument is invalid.
        NonFiniteError: the detector's output is not finite.
    """
    layout = detector.head_layout
    chosen = cumulative(layout.heads) if configurations is None else read_configurations(configurations)
    if object_index is not None:
        chosen = tuple(c.for_objects(object_index) if c.clauses else c for c in chosen)
    for configuration in chosen:
        configuration.check(layout)
    picture = image.picture if isinstance(image, EncodedImage) else load_image(image)
    image_size = (picture.height, picture.width)
    replaced, *others = _draws(ablation, detector, references, picture, draws)
    with torch.inference_mode(), detector.autocasting(autocast), replaced.applied_to(detector):
        encoded = image if isinstance(image, EncodedImage) else EncodedImage.of(detector, picture)
        features, memory = encoded.features, encoded.memory
        known = encoded.output if chosen and isinstance(image, EncodedImage) and autocast is None else None
        if any(configuration.names_objects for configuration in chosen):
            alone = known or decode_all(detector, features, stack([none_off()], layout), memory=memory)
            objects = detections_from(
                alone.logits[0, 0],
                alone.boxes[0, 0],
                image_size,
                detector.class_names,
                confidence,
                detector.scoring,
            )
            chosen = for_queries_of(objects, chosen)
        # The baseline is decoded in the same batch, so that layers it shares with others are computed once; unless it
        # is known.
        first = [] if known else [none_off().named("baseline of the sweep")]
        gates = stack((*first, *chosen), layout)
        output = decode_all(
            detector, features, gates, memory_budget=memory_budget, graphs=graphs, memory=memory
        )
        # Concatenated, so that the host waits for one copy only.
        parts = [torch.cat((one.logits[:, 0], one.boxes[:, 0]), dim=-1) for one in (known, output) if one]
        predictions = torch.cat(parts).cpu()
        logits, boxes = predictions[..., :-4].contiguous(), predictions[..., -4:].contiguous()

    def detections_of(logits: Tensor, boxes: Tensor) -> list[Detections]:
        return [
            detections_from(one, box, image_size, detector.class_names, confidence, detector.scoring)
            for one, box in zip(logits, boxes, strict=True)
        ]

    def became(logits: Tensor, found: list[Detections]) -> tuple[ConfigurationOutcome, ...]:
        return tuple(
            outcomes_of(baseline, detections, one, keep_iou, touch_iou)
            for detections, one in zip(found, logits, strict=True)
        )

    baseline, *found = detections_of(logits, boxes)
    outcomes = became(logits[1:], found)
    drawn = [outcomes]
    for other in others:
        with torch.inference_mode(), detector.autocasting(autocast), other.applied_to(detector):
            output = decode_all(
                detector, features, stack(chosen, layout), memory_budget=memory_budget, memory=memory
            )
        again = output.logits[:, 0].cpu(), output.boxes[:, 0].cpu()
        drawn.append(became(again[0], detections_of(*again)))
    return SweepResult(
        configurations=chosen,
        logits=logits[1:],
        boxes=boxes[1:],
        detections=tuple(found),
        baseline=baseline,
        outcomes=outcomes,
        confidence=confidence,
        ablation=replaced.kind,
        draws=tuple(drawn) if others else (),
    )


def _draws(
    ablation: AblationKind | Ablation,
    detector: Detector,
    references: References | str | Path | None,
    picture: ImageSource,
    draws: int,
) -> tuple[Ablation, ...]:
    """What heads that are off contribute, in each of the sampled images."""
    if draws == 1:
        return (make_ablation(ablation, detector, references, picture),)
    if ablation != "resample" or draws < 1:
        raise SettingError(
            f"{draws} draws need the ablation kind resample and at least 1 of them: no other kind draws images"
        )
    return ablation_draws(ablation, detector, references, picture)[:draws]


def query_of_object(objects: Detections, index: int) -> int:
    """The query that detected an object.

    Raises:
        SettingError: there is no such object; the message lists the objects.
    """
    if 0 <= index < len(objects):
        return objects[index].query
    listed = ", ".join(f"#{number} {found.class_name}" for number, found in enumerate(objects)) or "none"
    raise SettingError(
        f"object {index} does not exist; with none off there are {len(objects)} ({listed}): "
        "name one of them, or lower the confidence"
    )


def for_queries_of(objects: Detections, configurations: Iterable[Configuration]) -> tuple[Configuration, ...]:
    """Configurations in which the queries that detected the objects take their place.

    Raises:
        SettingError: a configuration names an object that does not exist.
    """
    return tuple(one.with_queries(partial(query_of_object, objects)) for one in configurations)


def decode_all(
    detector: Detector,
    features: Features,
    gates: Gates,
    *,
    memory_budget: int = MEMORY_BUDGET,
    graphs: DecodeGraphs | None = None,
    memory: Any = None,
) -> DetectorOutput:
    """Logits and boxes of every configuration, including encoder gates.

    The encoder runs once per distinct encoder gate, and not at all where everything is on in it and that `memory` is
    given. The decoder runs in batches that fit `memory_budget`, by `graphs` if they are given and can be used. The host
    does not wait for the device.

    Returns:
        Logits (C, B, Q, K + 1) and boxes (C, B, Q, 4), on the detector's device.
    """
    at_once = configurations_at_once(detector, features, memory_budget)
    order: list[Tensor] = []
    parts: list[DetectorOutput] = []
    for encoder_gate, members in by_encoder_gate(gates):
        known = encoder_gate is None and memory is not None
        encoded = memory if known else detector.encode_features(features, encoder_gate)
        if not known and graphs is None and len(members) > at_once:
            encoded = detector.prepare(encoded)  # as a memory that is given is
        for batch in members.split(at_once):
            chosen = gates[batch]
            decoder_gates = Gates(chosen.names, None, chosen.decoder_self, chosen.decoder_cross)
            parts.append(
                detector.decode(encoded, decoder_gates)
                if graphs is None
                else graphs.decode(detector, encoded, decoder_gates)
            )
            order.append(batch)
    if len(parts) == 1:
        return parts[0]
    (original_order,) = copy_to_device([torch.cat(order).argsort()], detector.device)
    return DetectorOutput(
        torch.cat([part.logits for part in parts])[original_order],
        torch.cat([part.boxes for part in parts])[original_order],
    )


def configurations_at_once(detector: Detector, features: Features, memory_budget: int) -> int:
    """How many configurations' decoder activations fit in `memory_budget` bytes; at least one."""
    if memory_budget <= 0:
        raise SettingError(f"a memory budget of {memory_budget} bytes is too small; give a positive number")
    return max(1, memory_budget // detector.decoder_bytes(features))


def by_encoder_gate(gates: Gates) -> list[tuple[Tensor | None, Tensor]]:
    """Distinct encoder gates (None for all on), with the indices of the configurations that have them."""
    indices = torch.arange(len(gates))
    if gates.encoder_self is None:
        return [(None, indices)]
    distinct, which = torch.unique(gates.encoder_self, dim=0, return_inverse=True)
    return [
        (None if bool((gate == 1).all()) else gate, indices[which == index])
        for index, gate in enumerate(distinct)
    ]
