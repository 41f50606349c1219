"""The sweep: one encode, every configuration decoded, and what becomes of each object.

A cross-attention gate changes neither backbone nor encoder, so the image is encoded once. The decoder then runs
all configurations as one batch that shares what they have in common (`headoff.detr.sharing`). A further
configuration costs its share of the decoder and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headoff.detections import Detections, detections_from
from headoff.detr.detector import Detector, DetectorOutput, Features
from headoff.detr.graphs import DecodeGraphs
from headoff.detr.transfers import copy_to_device
from headoff.errors import SettingError
from headoff.gates import Configuration, Gates, cumulative, none_off, parse_configuration, stack
from headoff.images import ImageSource, load_image
from headoff.outcomes import KEEP_IOU, TOUCH_IOU, ConfigurationOutcome, outcomes_of

MEMORY_BUDGET = 256 * 2**20
"""Bytes of activations that the decoder may hold at once, by default; see `configurations_at_once`."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """One image under C configurations. All tensors are on the CPU.

    - `configurations`: as asked for, in order; `len(result)` is C
    - `logits` (C, Q, K + 1): class logits, the last one "no object"
    - `boxes` (C, Q, 4): (centre x, centre y, width, height) as fractions of the image
    - `detections`: per configuration
    - `baseline`: the detections with nothing off; each of them is an *object*
    - `outcomes`: per configuration, what becomes of each object
    - `confidence`: the score from which a query's answer counts as a detection
    """

    configurations: tuple[Configuration, ...]
    logits: Tensor
    boxes: Tensor
    detections: tuple[Detections, ...]
    baseline: Detections
    outcomes: tuple[ConfigurationOutcome, ...]
    confidence: float

    def __len__(self) -> int:
        return len(self.configurations)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the original image in pixels."""
        return self.baseline.image_size

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.baseline.class_names

    def survival(self) -> Tensor:
        """(objects, C) float32: probability of each object's class at its own query, detected or not."""
        rows = [[outcome.query_score for outcome in each.outcomes] for each in self.outcomes]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(self), len(self.baseline)).T

    def as_dict(self) -> dict[str, Any]:
        """Everything but the logits, of types that JSON knows."""
        return {
            "image_size": list(self.image_size),
            "confidence": self.confidence,
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
        }


def sweep(
    detector: Detector,
    image: ImageSource,
    configurations: Iterable[Configuration | str] | None = None,
    *,
    object_index: int | None = None,
    confidence: float = 0.5,
    keep_iou: float = KEEP_IOU,
    touch_iou: float = TOUCH_IOU,
    memory_budget: int = MEMORY_BUDGET,
    autocast: torch.dtype | None = None,
    graphs: DecodeGraphs | None = None,
) -> SweepResult:
    """Run one image under every configuration.

    On a GPU the host waits once, for logits and boxes; with `object_index` also for the answer of which query it is.

    Args:
        detector: see `headoff.load`.
        image: a path, a `PIL.Image` or an array; see `headoff.images.load_image`.
        configurations: any number of them, or their text (`"first 3"`, `"query 17: L5H2"`). By default the
            cumulative sweep: nothing off, first 1 off, ..., all heads off, in every decoder layer.
        object_index: switch the heads off for this one object's query alone; objects are the detections with
            nothing off, counted from 0 by falling score.
        confidence: score above which a query's answer is a detection.
        keep_iou, touch_iou: thresholds of `headoff.outcomes`.
        memory_budget: bytes of decoder activations held at once. It bounds how many configurations are decoded
            together and changes results by rounding at most.
        autocast: compute in bfloat16 (or float16) what can be; see `Detector.autocasting`, and
            `headoff.effects.effect_on_detections` for what it changes.
        graphs: the same for all images of a folder: on a GPU their decodes are then captured and replayed.

    Raises:
        ImageError, GateError: for an image or a configuration that cannot be.
        SettingError: for an object that is not there, or an autocast that cannot be.
        NonFiniteError: when the detector's answer is not finite.
    """
    layout = detector.head_layout
    chosen = (
        cumulative(layout.heads)
        if configurations is None
        else tuple(c if isinstance(c, Configuration) else parse_configuration(c) for c in configurations)
    )
    picture = load_image(image)
    image_size = (picture.height, picture.width)
    with torch.inference_mode(), detector.autocasting(autocast):
        pixel_values, _ = detector.preprocess([picture])
        features = detector.features(pixel_values)
        if object_index is not None:
            alone = decode_all(detector, features, stack([none_off()], layout))
            objects = detections_from(
                alone.logits[0, 0], alone.boxes[0, 0], image_size, detector.class_names, confidence
            )
            chosen = tuple(
                c.for_queries(query_of_object(objects, object_index)) if c.clauses else c for c in chosen
            )
        # The baseline is decoded with the rest: what it shares with the others is not computed twice.
        gates = stack((none_off().named("baseline of the sweep"), *chosen), layout)
        output = decode_all(detector, features, gates, memory_budget=memory_budget, graphs=graphs)
        # One copy and one wait for both.
        answers = torch.cat((output.logits[:, 0], output.boxes[:, 0]), dim=-1).cpu()
        logits, boxes = answers[..., :-4].contiguous(), answers[..., -4:].contiguous()
    found = [
        detections_from(one, box, image_size, detector.class_names, confidence)
        for one, box in zip(logits, boxes, strict=True)
    ]
    baseline = found[0]
    return SweepResult(
        configurations=chosen,
        logits=logits[1:],
        boxes=boxes[1:],
        detections=tuple(found[1:]),
        baseline=baseline,
        outcomes=tuple(
            outcomes_of(baseline, detections, one, keep_iou, touch_iou)
            for detections, one in zip(found[1:], logits[1:], strict=True)
        ),
        confidence=confidence,
    )


def query_of_object(objects: Detections, index: int) -> int:
    """The query that found an object. Raises SettingError, with the objects there are, for one that is not."""
    if 0 <= index < len(objects):
        return objects[index].query
    there = ", ".join(f"#{number} {each.class_name}" for number, each in enumerate(objects)) or "none"
    raise SettingError(
        f"object {index} does not exist; with nothing off there are {len(objects)} ({there}): "
        "name one of them, or lower the confidence"
    )


def decode_all(
    detector: Detector,
    features: Features,
    gates: Gates,
    *,
    memory_budget: int = MEMORY_BUDGET,
    graphs: DecodeGraphs | None = None,
) -> DetectorOutput:
    """Logits and boxes of every configuration, encoder gates included.

    The encoder runs once for each distinct encoder gate (once in all where there is none), the decoder in batches
    that fit `memory_budget`, by `graphs` where they are given and can be used. The host reads nothing back.

    Returns:
        Logits (C, B, Q, K + 1) and boxes (C, B, Q, 4), on the detector's device.
    """
    at_once = configurations_at_once(detector, features, memory_budget)
    order: list[Tensor] = []
    parts: list[DetectorOutput] = []
    for encoder_gate, members in by_encoder_gate(gates):
        memory = detector.encode_features(features, encoder_gate)
        for batch in members.split(at_once):
            chosen = gates[batch]
            decoder_gates = Gates(chosen.names, None, chosen.decoder_self, chosen.decoder_cross)
            parts.append(
                detector.decode(memory, decoder_gates)
                if graphs is None
                else graphs.decode(detector, memory, decoder_gates)
            )
            order.append(batch)
    if len(parts) == 1:
        return parts[0]
    (back,) = copy_to_device([torch.cat(order).argsort()], detector.device)
    return DetectorOutput(
        torch.cat([part.logits for part in parts])[back], torch.cat([part.boxes for part in parts])[back]
    )


def configurations_at_once(detector: Detector, features: Features, memory_budget: int) -> int:
    """How many configurations' decoder activations fit in `memory_budget` bytes; at least one.

    Counted per query: the feed-forward's hidden layer, a dozen rows of the width, and the attention weights of
    all heads over all tokens, which a fused kernel never stores but a patch may.
    """
    if memory_budget <= 0:
        raise SettingError(f"a memory budget of {memory_budget} bytes holds nothing; give a positive one")
    config = detector.config
    weights = config.heads * (features.tokens.shape[1] + config.queries)
    numbers = len(features) * config.queries * (config.feedforward + 12 * config.width + weights)
    return max(1, memory_budget // (numbers * features.tokens.element_size()))


def by_encoder_gate(gates: Gates) -> list[tuple[Tensor | None, Tensor]]:
    """Distinct encoder gates, each with the indices of the configurations that have it."""
    everyone = torch.arange(len(gates))
    if gates.encoder_self is None:
        return [(None, everyone)]
    distinct, which = torch.unique(gates.encoder_self, dim=0, return_inverse=True)
    return [
        (None if bool((gate == 1).all()) else gate, everyone[which == index])
        for index, gate in enumerate(distinct)
    ]
