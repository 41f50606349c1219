"""What an attention is judged on: an image for a model, with all that the float64 oracle finds there.

Everything here is independent of the attention under test, of its dtype and of its device, and made once a process.
"""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headoff.detections import Detections, detections_from
from headoff.detr.checkpoints.load import BUNDLED, load
from headoff.detr.detector import Detector, DetectorOutput, Features
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
from headoff.harness.model.relu_masks import Decisions
from headoff.harness.reference.cache import Arrays, kept, say
from headoff.harness.reference.golden import golden_root
from headoff.harness.reference.maps import CaseMaps, stale
from headoff.harness.reference.oracle import dense_maps, features_of, sha256_of
from headoff.harness.settings import Settings
from headoff.images import load_image
from headoff.relevance import Target, class_logit
from headoff.scenes.samples import sample_folder, sample_images
from headoff.sweeps import decode_all

METHOD = "chefer"
CONFIDENCE = 0.5
OBJECTS = 3
"""Objects explained in an image, the surest ones: more of them test little more, and take room in the repository."""
LEAST_OBJECTS = 2
"""However little is detected: with one object alone, a map could not be told from that of another query."""
MANY_TOKENS = 400
"""The dense oracle's time grows with the third power of the tokens: above so many it explains `LEAST_OBJECTS`."""
BORROWED_SCENES = 2
"""Bundled scenes that a model of somebody's own is tried on where no image is given."""


def names(settings: Settings) -> list[str]:
    """Names of the images to be tried: the bundled scenes, or those of the user's own. Nothing is opened for it."""
    return list(_images(settings))


def subject(settings: Settings, name: str) -> Subject:
    """The subject called `name`, one of `names`; the same object for the same settings.

    Raises SettingError for another name. That a model or an image cannot be read shows when it is needed, as a
    HeadoffError.
    """
    images = _images(settings)
    if name not in images:
        raise SettingError(f"there is no image {name!r} here: use one of {', '.join(images)}")
    return _subject(
        settings.model, name, images[name], golden_root(settings) if _has_golden(settings) else None
    )


def cumulative_names() -> list[str]:
    """Names of the cumulative configurations of a model of 8 heads, which all DETRs are."""
    return [each.name for each in cumulative()]


def configuration_names() -> list[str]:
    """Names of all configurations of a model of 8 heads; of the last ones any model has its own."""
    return [*cumulative_names(), *(each.name for each in _others(HeadLayout(), 0))]


@dataclass(frozen=True, eq=False)
class Subject:
    """One image for one model.

    - `model`: as `headoff.load` takes it
    - `golden`: the folder of golden files, or None where there are none to be expected
    """

    name: str
    model: str
    image: Path
    golden: Path | None

    @property
    def detector(self) -> Detector:
        """The oracle: float64, eager, on the CPU."""
        return _oracle(self.model)

    @property
    def layout(self) -> HeadLayout:
        return self.detector.head_layout

    @functools.cached_property
    def features(self) -> Features:
        """What encoders start from, the oracle's as well as those under test: the backbone has no attention."""
        return features_of(self.detector, load_image(self.image))

    @functools.cached_property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        picture = load_image(self.image)
        return picture.height, picture.width

    @functools.cached_property
    def objects(self) -> Detections:
        """What is explained: the surest detections with nothing off, or the surest queries where there are few."""
        with torch.no_grad():
            output = decode_all(self.detector, self.features, stack([none_off()], self.layout))
        found = self.detections(output.logits[0, 0], output.boxes[0, 0], confidence=0.0)
        most = LEAST_OBJECTS if self.features.tokens.shape[1] > MANY_TOKENS else OBJECTS
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
        return tuple(f"query {each.query} ({each.class_name})" for each in self.objects)

    @property
    def targets(self) -> list[Target]:
        return [class_logit(each.query, each.label) for each in self.objects]

    @functools.cached_property
    def cumulative(self) -> tuple[Configuration, ...]:
        """Nothing off, first 1 off, ..., all heads off."""
        return cumulative(self.layout.heads)

    @functools.cached_property
    def configurations(self) -> tuple[Configuration, ...]:
        """The cumulative ones, and others that gate single heads, queries, parts of heads and the other sites."""
        return (*self.cumulative, *_others(self.layout, self.objects[0].query))

    def configuration(self, name: str) -> Configuration:
        """Raises SettingError for one that this model does not have."""
        for each in self.configurations:
            if each.name == name:
                return each
        raise SettingError(
            f"there is no configuration {name!r} for a model of {self.layout.heads} heads: use one of "
            f"{', '.join(each.name for each in self.configurations)}"
        )

    @functools.cached_property
    def answers(self) -> DetectorOutput:
        """The oracle's logits (C, Q, K + 1) and boxes (C, Q, 4) under all `configurations`."""
        with torch.no_grad():
            output = decode_all(self.detector, self.features, stack(self.configurations, self.layout))
        return DetectorOutput(output.logits[:, 0], output.boxes[:, 0])

    @functools.cached_property
    def decisions(self) -> Decisions:
        """Of the oracle's ReLUs under all `configurations`."""
        return Decisions.of(self.detector, self.features, self.configurations)

    def detections(self, logits: Tensor, boxes: Tensor, confidence: float = CONFIDENCE) -> Detections:
        """What logits (Q, K + 1) and boxes (Q, 4) find in this image."""
        return detections_from(logits, boxes, self.image_size, self.detector.class_names, confidence)

    def inputs(self, configuration: Configuration) -> dict[str, str]:
        """What maps under `configuration` are made of, each by a text that changes with it."""
        return {
            "configuration": configuration.text,
            "image": _hash_of_file(self.image),
            "method": METHOD,
            "weights": _weights_hash(self.model),
        }

    def golden_file(self, configuration: Configuration) -> Path | None:
        """The golden file of relevance maps, whether it is there or not; None where none is to be expected."""
        if self.golden is None:
            return None
        name = truth_name(self.name, configuration.name)
        return self.golden / "test_heads_off_relevance" / f"{name}.npz"

    def golden_maps(self, configuration: Configuration) -> CaseMaps | None:
        """What the golden file holds; None where there is none about just this."""
        path = self.golden_file(configuration)
        if path is None or not path.is_file():
            return None
        golden = CaseMaps.from_bytes(path.read_bytes())
        return None if stale(golden, self.inputs(configuration), self.object_names) else golden

    def maps(self, configurations: Sequence[Configuration]) -> NDArray[np.float64]:
        """The true relevance maps, (configurations, objects, layers, h, w): of golden files, or made and kept."""
        return np.stack([_maps(self, each) for each in configurations])

    def make_maps(self, configuration: Configuration) -> NDArray[np.float64]:
        """By the dense oracle, here and now: (objects, layers, h, w)."""
        return dense_maps(self.detector, self.features, configuration, self.targets, METHOD).numpy()


def truth_name(scene: str, configuration: str) -> str:
    """The name of a golden file of relevance maps: that of the test that writes it."""
    return f"test_heads_off_truth[{scene}-{configuration}]"


def _images(settings: Settings) -> dict[str, Path]:
    if not settings.images:
        bundled = {path.stem: path for path in sample_images()}
        few = BORROWED_SCENES if settings.model != BUNDLED else len(bundled)
        return dict(list(bundled.items())[:few])
    found: dict[str, Path] = {}
    seen: Counter[str] = Counter()
    for image in settings.images:
        stem = Path(image).stem
        seen[stem] += 1
        found[stem if seen[stem] == 1 else f"{stem} ({seen[stem]})"] = Path(image)
    return found


def _has_golden(settings: Settings) -> bool:
    return settings.golden_dir is not None or (settings.model == BUNDLED and not settings.images)


@functools.cache
def _subject(model: str, name: str, image: Path, golden: Path | None) -> Subject:
    return Subject(name, model, image, golden)


@functools.cache
def _oracle(model: str) -> Detector:
    return load(model, attention="eager", dtype=torch.float64)


@functools.cache
def _hash_of_file(path: Path) -> str:
    return sha256_of(path)


@functools.cache
def _weights_hash(model: str) -> str:
    if model == BUNDLED:
        return sha256_of(sample_folder().parent / "weights" / "scenes.safetensors")
    total = hashlib.sha256()
    for name, tensor in sorted(_oracle(model).state_dict().items()):
        total.update(name.encode())
        total.update(tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


@functools.cache
def _maps(subject: Subject, configuration: Configuration) -> NDArray[np.float64]:
    if (golden := subject.golden_maps(configuration)) is not None:
        return golden.maps

    def make() -> Arrays:
        count = len(subject.objects)
        say(f"making the truth for {subject.name}, {configuration.name}: {count} maps in float64")
        return {"maps": subject.make_maps(configuration)}

    about = {**subject.inputs(configuration), "objects": ", ".join(subject.object_names)}
    return kept("maps", about, make)["maps"]


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
