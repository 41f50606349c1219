"""Images, and what a detector finds in them under what the reader of the page has switched."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from headoff.ablation import Ablation, make_ablation
from headoff.choices import ABLATION_KINDS, SITES, AblationKind
from headoff.detections import Detections
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.errors import GateError, SettingError
from headoff.figures.captions import object_name, views
from headoff.figures.colouring import MapStyle, coloured
from headoff.figures.palette import STATUS_STYLES, object_colour
from headoff.figures.pictures import small_picture
from headoff.figures.relevance import grid_span
from headoff.gates import Configuration, none_off, parse_configuration
from headoff.images import load_image, read_image
from headoff.live.commands import Origin, Recipe
from headoff.relevance import explain
from headoff.report.maps import rounded
from headoff.report.page import background, data_uri, marks_in_percent, picture_width
from headoff.report.story import sentences
from headoff.scenes.samples import sample_image
from headoff.sweeps import query_of_object, sweep

MOST_BYTES = 32 * 2**20
"""Most bytes of an image that is sent."""
MOST_PIXELS = 40_000_000
"""Most pixels of an image that is sent."""
MOST_SENT = 8
"""Sent images that are kept; the oldest goes when another one comes."""
MOST_ENCODED = 16
"""Images whose features are kept."""


@dataclass(frozen=True)
class Setting:
    """What the reader has chosen.

    Attributes:
        image: its id.
        off: a configuration, see `headoff.gates.parse`; it names neither objects nor queries.
        object: switch heads off for this object's query alone; None for all queries.
        ablation: what heads that are off contribute.
    """

    image: str
    off: str = "none"
    object: int | None = None
    ablation: AblationKind = "zero"

    @classmethod
    def of(cls, contents: Any) -> Setting:
        """Read the JSON of a request. Raises SettingError where it is of another form."""
        kinds: dict[str, tuple[type, ...]] = {
            "image": (str,),
            "off": (str,),
            "object": (int, type(None)),
            "ablation": (str,),
        }
        if not isinstance(contents, dict) or not all(
            name in contents and isinstance(contents[name], kind) and not isinstance(contents[name], bool)
            for name, kind in kinds.items()
        ):
            raise SettingError(f"a request needs {', '.join(kinds)}, each of its type: load the page again")
        if contents["ablation"] not in ABLATION_KINDS:
            raise SettingError(
                f"there is no ablation kind {contents['ablation']!r}: use one of {', '.join(ABLATION_KINDS)}"
            )
        return cls(**{name: contents[name] for name in kinds})


@dataclass(eq=False)
class LiveImage:
    """An image of the page, and what is known of it."""

    encoded: EncodedImage
    ablations: dict[AblationKind, Ablation]
    greatest: dict[tuple[int, int | None], list[float]]
    """For each query, and head whose attention was shown (None: relevance), what full colour is in each layer."""
    objects: Detections


class Session:
    """A detector and some images. All methods can be called from several threads.

    Args:
        detector: what detects.
        images: files that the page may show.
        origin: of the detector, for commands.
        references: see `headoff.sweep`.
        confidence: score above which a query's prediction is a detection.
        explainer: makes another detector with the same weights, for maps to be computed while boxes are; by default
            boxes wait for maps.
    """

    def __init__(
        self,
        detector: Detector,
        images: Sequence[Path],
        *,
        origin: Origin | None = None,
        references: Path | None = None,
        confidence: float = 0.5,
        explainer: Callable[[], Detector] | None = None,
    ) -> None:
        self.detector = detector
        self.origin = origin or Origin()
        self.references = references
        self.confidence = confidence
        self._files = {str(number): path for number, path in enumerate(images)}
        self._sent: OrderedDict[str, tuple[str, Image.Image]] = OrderedDict()
        self._count = 0
        self._known: OrderedDict[str, LiveImage] = OrderedDict()
        self._detecting = threading.RLock()
        self._explaining = threading.RLock() if explainer else self._detecting
        self._make_explainer = explainer
        self._explainer: Detector | None = None

    @property
    def images(self) -> list[dict[str, str]]:
        """Id and name of every image."""
        files = [path.name for path in self._files.values()]
        names = {
            number: path.name if files.count(path.name) == 1 else str(path)
            for number, path in self._files.items()
        }
        names |= {number: name for number, (name, _) in self._sent.items()}
        return [{"id": number, "name": name} for number, name in names.items()]

    def about(self) -> dict[str, Any]:
        """What the page needs to know before its first request."""
        layout = self.detector.head_layout
        return {
            "images": self.images,
            "sites": {
                site: [layout.layers(site), layout.heads_at(site)] for site in SITES if layout.layers(site)
            },
            "layers": layout.decoder_layers,
            "heads": layout.heads_at("decoder_cross"),
            "ablations": ABLATION_KINDS,
            "most_bytes": MOST_BYTES,
        }

    def add(self, name: str, contents: bytes) -> dict[str, str]:
        """Keep an image that was sent, and return its id and name. Raises ImageError."""
        name = Path(name.replace("\\", "/")).name[:120] or "image"
        picture = read_image(contents, name, MOST_PIXELS)
        with self._detecting:
            self._count += 1
            number = f"sent-{self._count}"
            self._sent[number] = name, picture
            while len(self._sent) > MOST_SENT:
                oldest, _ = self._sent.popitem(last=False)
                self._known.pop(oldest, None)
        return {"id": number, "name": name}

    def picture(self, number: str) -> tuple[str, bytes]:
        """The kind (`png`, `webp`) and contents of a file of an image. Raises SettingError, ImageError."""
        return background(small_picture(self._image(number).encoded.picture))

    def boxes(self, setting: Setting) -> dict[str, Any]:
        """What is detected, as JSON types.

        Raises:
            SettingError, GateError: the setting is of an image, object or head that does not exist.
            ImageError: the image cannot be read.
        """
        configuration, gates = self._configuration(setting)
        with self._detecting:
            image = self._image(setting.image)
            result = sweep(
                self.detector,
                image.encoded,
                configuration,
                confidence=self.confidence,
                ablation=self._ablation(image, setting.ablation),
            )
        view = views(result)[-1]
        found = []
        for outcome in view.outcome.outcomes:
            style = STATUS_STYLES[outcome.status]
            found.append(
                {
                    "name": object_name(result.baseline, outcome.object),
                    "colour": object_colour(outcome.object),
                    "status": outcome.status.value,
                    "letter": style.letter,
                    "fill": style.fill,
                    "before": float(result.baseline.scores[outcome.object]),
                    "now": outcome.query_score,
                    "iou": outcome.iou,
                }
            )
        height, width = result.image_size
        return {
            "title": configuration.name,
            "gates": gates,
            "aspect": f"{width} / {height}",
            "width": picture_width(result.image_size),
            "pixelated": max(height, width) < 400,
            "marks": marks_in_percent(result, view),
            "told": sentences(result.baseline, view.detections, view.outcome),
            "objects": found,
            "duplicates": view.outcome.duplicates,
            "unmatched": len(view.outcome.unmatched),
            **self._commands(setting, configuration),
        }

    def maps(self, setting: Setting, number: int, head: int | None = None) -> dict[str, Any]:
        """The relevance maps of object `number` after every decoder layer, as pictures, from 0 to the object's greatest
        relevance with nothing off; or what a `head` of every layer's cross-attention attends to at the object's query,
        from 0 to its greatest weight in that layer with nothing off.

        Raises:
            SettingError, GateError, ImageError: as `boxes` does.
        """
        configuration, _ = self._configuration(setting)
        heads = self.detector.head_layout.heads_at("decoder_cross")
        if head is not None and not 0 <= head < heads:
            raise SettingError(f"there is no head {head}: there are {heads}, counted from 0")
        image = self._image(setting.image)
        query = query_of_object(image.objects, number)
        with self._explaining:
            known = (query, head) in image.greatest
            explanation = explain(
                self._explaining_detector(),
                image.encoded,
                list(dict.fromkeys([configuration] if known else [none_off(), configuration])),
                [query],
                "chefer" if head is None else "raw",
                confidence=self.confidence,
                heads=head is not None,
                ablation=self._ablation(image, setting.ablation),
            )
            if head is not None:
                assert explanation.heads is not None
                explanation = replace(explanation, maps=explanation.heads[:, :, :, head])
            if not known:
                by_layer = explanation.maps[0, 0].amax((-2, -1))
                full = by_layer.max().expand_as(by_layer) if head is None else by_layer
                image.greatest[query, head] = full.tolist()
        greatest = image.greatest[query, head]
        masses, shares = explanation.masses[-1, 0].tolist(), explanation.box_shares[-1, 0].tolist()
        return {
            "span": grid_span(explanation),
            "greatest": greatest,
            "maps": [
                _png(coloured(values / full if full else values, MapStyle()))
                for values, full in zip(explanation.maps[-1, 0], greatest, strict=True)
            ],
            "masses": rounded(masses),
            "shares": rounded(shares),
        }

    def _explaining_detector(self) -> Detector:
        if self._explainer is None:
            self._explainer = self._make_explainer() if self._make_explainer else self.detector
        return self._explainer

    def _image(self, number: str) -> LiveImage:
        with self._detecting:
            if number in self._known:
                self._known.move_to_end(number)
                return self._known[number]
            if number in self._files:
                picture = load_image(self._files[number])
            elif number in self._sent:
                picture = self._sent[number][1]
            else:
                raise SettingError("that image is not here any more: choose or send another one")
            encoded = EncodedImage.of(self.detector, picture)
            baseline = sweep(self.detector, encoded, none_off(), confidence=self.confidence).baseline
            found = LiveImage(encoded, {"zero": Ablation("zero")}, {}, baseline)
            self._known[number] = found
            while len(self._known) > MOST_ENCODED:
                self._known.popitem(last=False)
            return found

    def _ablation(self, image: LiveImage, kind: AblationKind) -> Ablation:
        if kind not in image.ablations:
            image.ablations[kind] = make_ablation(kind, self.detector, self.references, image.encoded.picture)
        return image.ablations[kind]

    def _configuration(self, setting: Setting) -> tuple[Configuration, Mapping[str, Any]]:
        """The configuration, and the gates (layers, heads) of each site."""
        given = parse_configuration(setting.off)
        if any(clause.queries or clause.objects for clause in given.clauses):
            raise GateError(
                f"'{setting.off}' names queries or objects: name heads alone, and choose the object"
            )
        layout = self.detector.head_layout
        gates: dict[str, Any] = {}
        for site in SITES:
            gate = given.gate(site, layout)
            gates[site] = (
                [[1.0] * layout.heads_at(site)] * layout.layers(site)
                if gate is None
                else rounded(gate[:, 0].tolist())
            )
        # Named by its text: the name of someone else's link would not say what is off.
        given = Configuration(clauses=given.clauses)
        if setting.object is None or not given.clauses:
            return given, gates
        return given.for_objects(setting.object), gates

    def _commands(self, setting: Setting, configuration: Configuration) -> dict[str, str]:
        path = self._files.get(setting.image)
        name = str(path) if path is not None else self._sent[setting.image][0]
        recipe = Recipe(
            self.origin,
            None if path == sample_image(0) else name,
            configuration.text,
            setting.ablation,
            None if setting.ablation in ("zero", "uniform") else self.references,
            self.confidence,
        )
        return {"command": recipe.command(), "program": recipe.program()}


def _png(pixels: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return data_uri("png", buffer.getvalue())
