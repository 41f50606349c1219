"""Reference cases: an image for a model, with everything that the float64 oracle computes there.

Nothing here depends on the attention under test, its dtype or its device; everything is computed once per process.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headoff.detections import Detections, detections_from
from headoff.detector import DetectorOutput
from headoff.detr.checkpoints import ModelChoice
from headoff.detr.checkpoints.load import BUNDLED
from headoff.detr.detector import Detr, Features
from headoff.errors import SettingError
from headoff.gates import (
    Clause,
    Configuration,
    HeadLayout,
    cumulative,
    heads_off,
    none_off,
    only_heads_on,
    stack,
)
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.reference.cache import Arrays, cached, print_progress
from headoff.harness.reference.golden import golden_root
from headoff.harness.reference.maps import CaseMaps, stale
from headoff.harness.reference.oracle import batches, dense_maps, features_of, forward_batch, sha256_of
from headoff.harness.settings import Settings
from headoff.images import load_image
from headoff.relevance import Target, class_logit
from headoff.scenes.samples import sample_folder, sample_images
from headoff.sweeps import decode_all

METHOD = "chefer"
CONFIDENCE = 0.5
MOST_OBJECTS = 3
"""Objects explained in an image, those with the highest scores: more of them test little more."""
LEAST_OBJECTS = 2
"""However little is detected: with one object alone, a map could not be told from that of another query."""
MANY_TOKENS = 400
"""The dense oracle's time grows with the third power of the tokens: above so many it explains `LEAST_OBJECTS`."""
SCENES_FOR_OTHER_MODELS = 2
"""Bundled scenes that another model than the bundled one is tried on where no image is given."""


BUNDLED_MODEL = ModelChoice(BUNDLED)


def case_names(settings: Settings) -> list[str]:
    """Names of the images: the bundled scenes, or the user's own. No file is opened."""
    return list(_images(settings))


def reference_case(settings: Settings, name: str) -> ReferenceCase:
    """The case called `name`, one of `case_names`; the same object for the same settings.

    Raises:
        SettingError: for another name. A model or image that cannot be read raises a HeadoffError when it is needed.
    """
    images = _images(settings)
    if name not in images:
        raise SettingError(f"there is no image {name!r} here: use one of {', '.join(images)}")
    model = settings.model_choice
    has_golden = settings.golden_dir is not None or (model == BUNDLED_MODEL and not settings.images)
    return _reference_case(model, name, images[name], golden_root(settings) if has_golden else None)


def cumulative_names() -> list[str]:
    """Names of the cumulative configurations of a model of 8 heads, which all DETRs are."""
    return [configuration.name for configuration in cumulative()]


def configuration_names() -> list[str]:
    """Names of all configurations of a model of 8 heads; every model has the last ones."""
    return [*cumulative_names(), *(configuration.name for configuration in _others(HeadLayout(), 0))]


@dataclass(frozen=True, eq=False)
class ReferenceCase:
    """One image for one model.

    Attributes:
        name: of the image.
        model: what the detector is loaded from.
        image: a path.
        golden: the folder of golden files, or None where there are none to be expected.
    """

    name: str
    model: ModelChoice
    image: Path
    golden: Path | None

    @property
    def detector(self) -> Detr:
        """The oracle: float64, eager, on the CPU."""
        return oracle_of(self.model)

    @property
    def layout(self) -> HeadLayout:
        return self.detector.head_layout

    @functools.cached_property
    def features(self) -> Features:
        """The encoder's input, for the oracle and the detectors under test alike: the backbone has no attention."""
        return features_of(self.detector, load_image(self.image))

    @functools.cached_property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        picture = load_image(self.image)
        return picture.height, picture.width

    @functools.cached_property
    def objects(self) -> Detections:
        """What is explained: the detections with the highest scores with none off, or such queries if too few."""
        with torch.no_grad():
            output = decode_all(self.detector, self.features, stack([none_off()], self.layout))
        found = self.detections(output.logits[0, 0], output.boxes[0, 0], confidence=0.0)
        most = LEAST_OBJECTS if self.features.tokens.shape[1] > MANY_TOKENS else MOST_OBJECTS
        count = min(most, max(LEAST_OBJECTS, int((found.scores > CONFIDENCE).sum())))
        return Detections(
            found.queries[:count],
            found.labels[:count],
            found.scores[:count],
            found.boxes[:count],
            found.image_size,
            found.class_names,
        )

    @property
    def object_names(self) -> tuple[str, ...]:
        return tuple(f"query {detection.query} ({detection.class_name})" for detection in self.objects)

    @property
    def targets(self) -> list[Target]:
        return [class_logit(detection.query, detection.label) for detection in self.objects]

    @functools.cached_property
    def cumulative(self) -> tuple[Configuration, ...]:
        """None off, first 1 off, ..., all heads off."""
        return cumulative(self.layout.heads)

    @functools.cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """The cumulative ones, and others that gate single heads, queries, parts of heads and the other sites."""
        return (*self.cumulative, *_others(self.layout, self.objects[0].query))

    def configuration(self, name: str) -> Configuration:
        """Raises SettingError for one that this model does not have."""
        by_name = {configuration.name: configuration for configuration in self.configurations}
        if name not in by_name:
            raise SettingError(
                f"there is no configuration {name!r} for a model of {self.layout.heads} heads: use one of "
                f"{', '.join(by_name)}"
            )
        return by_name[name]

    def indices(self, configurations: Sequence[Configuration]) -> list[int]:
        """Where they are in `configurations`."""
        return [self.configurations.index(configuration) for configuration in configurations]

    @functools.cached_property
    def output(self) -> DetectorOutput:
        """The oracle's logits (C, Q, K + 1) and boxes (C, Q, 4) under all `configurations`."""
        with torch.no_grad():
            output = decode_all(self.detector, self.features, stack(self.configurations, self.layout))
        return DetectorOutput(output.logits[:, 0], output.boxes[:, 0])

    @functools.cached_property
    def relu_masks(self) -> ReluMasks:
        """The oracle's under all `configurations`, which are the copies."""
        masks = ReluMasks()
        gates = stack(self.configurations, self.layout)
        with torch.no_grad(), masks.recording(self.detector):
            for members in batches(self.detector, self.features, len(gates)):
                forward_batch(self.detector, self.features, gates[torch.tensor(members)])
        return masks

    def masks_of(self, configurations: Sequence[Configuration]) -> ReluMasks:
        """`relu_masks` under some of the configurations."""
        return self.relu_masks[self.indices(configurations)]

    def detections(self, logits: Tensor, boxes: Tensor, confidence: float = CONFIDENCE) -> Detections:
        """What logits (Q, K + 1) and boxes (Q, 4) find in this image."""
        return detections_from(logits, boxes, self.image_size, self.detector.class_names, confidence)

    def inputs(self, configuration: Configuration) -> dict[str, str]:
        """What maps under `configuration` depend on: each entry is a text that changes with it."""
        return {
            "configuration": configuration.text,
            "image": _hash_of_file(self.image),
            "method": METHOD,
            "weights": _weights_hash(self.model),
        }

    def inputs_of_all(self) -> dict[str, str]:
        """The same for results under all `configurations`."""
        return {
            **self.inputs(self.configurations[0]),
            "configuration": "; ".join(configuration.text for configuration in self.configurations),
            "objects": ", ".join(self.object_names),
        }

    def golden_file(self, configuration: Configuration) -> Path | None:
        """The golden file of relevance maps, named by the test that writes it; None where none is to be expected.

        It may not exist.
        """
        if self.golden is None:
            return None
        name = f"test_heads_off_truth[{self.name}-{configuration.name}].npz"
        return self.golden / "test_heads_off_relevance" / name

    def golden_maps(self, configuration: Configuration) -> CaseMaps | None:
        """What the golden file holds; None where there is none about this model, image and configuration."""
        path = self.golden_file(configuration)
        if path is None or not path.is_file():
            return None
        golden = CaseMaps.from_bytes(path.read_bytes())
        return None if stale(golden, self.inputs(configuration), self.object_names) else golden

    def maps(self, configurations: Sequence[Configuration]) -> NDArray[np.float64]:
        """The oracle's relevance maps (configurations, objects, layers, h, w): from golden files, or cached."""
        return np.stack([_maps(self, configuration) for configuration in configurations])

    def compute_maps(self, configuration: Configuration) -> NDArray[np.float64]:
        """The oracle's maps (objects, layers, h, w), computed now."""
        return dense_maps(self.detector, self.features, configuration, self.targets, METHOD).numpy()


def _images(settings: Settings) -> dict[str, Path]:
    if not settings.images:
        bundled = {path.stem: path for path in sample_images()}
        count = len(bundled) if settings.model == BUNDLED else SCENES_FOR_OTHER_MODELS
        return dict(list(bundled.items())[:count])
    found: dict[str, Path] = {}
    seen: Counter[str] = Counter()
    for image in settings.images:
        stem = Path(image).stem
        seen[stem] += 1
        found[stem if seen[stem] == 1 else f"{stem} ({seen[stem]})"] = Path(image)
    return found


@functools.cache
def _reference_case(model: ModelChoice, name: str, image: Path, golden: Path | None) -> ReferenceCase:
    return ReferenceCase(name, model, image, golden)


@functools.cache
def oracle_of(model: ModelChoice) -> Detr:
    """The model in float64 with eager attention, on the CPU."""
    return model.load_detr(attention="eager", dtype=torch.float64)


@functools.cache
def _hash_of_file(path: Path) -> str:
    return sha256_of(path)


@functools.cache
def _weights_hash(model: ModelChoice) -> str:
    if model == BUNDLED_MODEL:
        return sha256_of(sample_folder().parent / "weights" / "scenes.safetensors")
    # Heads, dilation and the size of images are in no tensor.
    total = hashlib.sha256(json.dumps(oracle_of(model).config.as_dict(), sort_keys=True).encode())
    for name, tensor in sorted(oracle_of(model).state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


@functools.cache
def _maps(case: ReferenceCase, configuration: Configuration) -> NDArray[np.float64]:
    if (golden := case.golden_maps(configuration)) is not None:
        return golden.maps

    def compute() -> Arrays:
        count = len(case.objects)
        print_progress(f"computing {count} expected maps of {case.name}, {configuration.name} in float64")
        return {"maps": case.compute_maps(configuration)}

    key = {**case.inputs(configuration), "objects": ", ".join(case.object_names)}
    return cached("maps", key, compute)["maps"]


def _others(layout: HeadLayout, query: int) -> tuple[Configuration, ...]:
    """One of each kind of gate that the cumulative configurations do not have; named alike for every model."""
    last, middle = layout.decoder_layers - 1, layout.decoder_layers // 2
    head, other = min(2, layout.heads - 1), layout.heads - 1
    half = Configuration(clauses=(Clause(layers=(middle,), heads=(head,), gate=0.5),))
    return (
        heads_off(head, layers=[last]).named("one head off"),
        half.named("half a head off"),
        heads_off(head, layers=[last]).for_queries(query).named("one head off for one query"),
        only_heads_on(other, layers=[0, last]).named("one head on in two layers"),
        heads_off(head, other, site="decoder_self").named("heads of decoder_self off"),
        heads_off(0, other, site="encoder_self").named("heads of encoder_self off"),
    )
