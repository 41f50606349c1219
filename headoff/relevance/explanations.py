"""`explain`: one image in, a relevance map per configuration, object and decoder layer out, with numbers beside it."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from headoff.choices import PICKS, Pick
from headoff.detections import Detections, class_probabilities, detections_from
from headoff.detr.detector import Detector
from headoff.errors import OutputError, SettingError
from headoff.files import written_atomically
from headoff.gates import Configuration, cumulative, none_off, parse_configuration, stack
from headoff.images import ImageSource, load_image
from headoff.outcomes import outcomes_of
from headoff.relevance.engine import Backward, RelevanceEngine
from headoff.relevance.kernels import Kernels
from headoff.relevance.methods import Method, resolve_method
from headoff.relevance.rules import ZeroRows
from headoff.relevance.targets import Target, TargetSpec, make_target

FORMAT = "headoff explanation 1"


class ExplanationStatus(StrEnum):
    """What can be said of a map."""

    OK = "ok"
    NO_EVIDENCE = "no image evidence"
    """The map is exactly zero: nothing of the image reaches the target through what is on."""
    NOT_FOUND = "not found"
    """With `pick="object"`: no query finds the object under this configuration, so there is nothing to explain."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """Relevance of C configurations, O objects and M decoder layers over h x w image tokens. Tensors are on the CPU.

    - `configurations`: C, in the order asked for
    - `objects`: what is explained, O of them: the baseline's detections, by falling score, or the queries asked for, in
      that order
    - `layers`: the M decoder layers, from 0; a map is what relevance is *after* that layer
    - `maps` (C, O, M, h, w): raw relevance, never negative, of no unit; float32, float64 for a float64 detector
    - `queries` (C, O) int64: the query explained; `labels` (C, O) int64: its class; -1 where not found
    - `values` (C, O) float64: the target's value under the configuration; NaN where not found
    - `decoder_identity_rows` (C, O, M), `encoder_identity_rows` (C, O) int64: rows of R - I that summed to zero where
      equations 8 and 9 normalised (image tokens only). 0 for methods that do not normalise, and where no evidence
      came to be normalised
    - `reference_differs` (C, O, M) bool: where the paper's published code drops a contribution to the map, because
      equation 9 is 0/0 there; see `headoff.relevance.rules`
    - `logits` (C, Q, K + 1) and `boxes` (C, Q, 4): the detector's answers
    - `heads` (C, O, M, H, h, w): cross-attention weights after the gate, per head; None unless asked for
    - `stride`: pixels of the resized picture per token side; `resized`: its (height, width)
    - `method`, `target`, `pick`, `zero_rows`: how it was made
    """

    configurations: tuple[Configuration, ...]
    objects: Detections
    layers: tuple[int, ...]
    maps: Tensor
    queries: Tensor
    labels: Tensor
    values: Tensor
    decoder_identity_rows: Tensor
    encoder_identity_rows: Tensor
    reference_differs: Tensor
    logits: Tensor
    boxes: Tensor
    heads: Tensor | None
    stride: int
    resized: tuple[int, int]
    method: str
    target: tuple[str, ...]
    pick: Pick
    zero_rows: ZeroRows

    def __len__(self) -> int:
        return len(self.configurations)

    @property
    def grid(self) -> tuple[int, int]:
        """(h, w)."""
        return self.maps.shape[-2], self.maps.shape[-1]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the original image in pixels."""
        return self.objects.image_size

    @property
    def axes(self) -> dict[str, tuple[Any, ...]]:
        """The labels along each axis of `maps`."""
        rows, columns = self.grid
        return {
            "configuration": tuple(each.name for each in self.configurations),
            "object": tuple(
                f"query {each.query}: {each.class_name} {each.score:.2f}" for each in self.objects
            ),
            "layer": self.layers,
            "row": tuple(range(rows)),
            "column": tuple(range(columns)),
        }

    @property
    def masses(self) -> Tensor:
        """(C, O, M) float64: the sum of each map."""
        return self.maps.double().sum((-2, -1))

    @property
    def scores(self) -> Tensor:
        """(C, O) float64: probability of the explained class at the explained query; NaN where not found."""
        probabilities = torch.stack([class_probabilities(each) for each in self.logits])
        each = torch.arange(len(self))[:, None]
        found = self.queries >= 0
        scores = probabilities[each, self.queries.clamp(min=0), self.labels.clamp(min=0)]
        return scores.masked_fill(~found, torch.nan)

    @property
    def statuses(self) -> tuple[tuple[tuple[ExplanationStatus, ...], ...], ...]:
        """Per configuration, object and layer."""
        found, some = (self.queries >= 0).tolist(), (self.maps != 0).flatten(3).any(-1).tolist()
        return tuple(
            tuple(
                tuple(
                    (ExplanationStatus.OK if evidence else ExplanationStatus.NO_EVIDENCE)
                    if is_found
                    else ExplanationStatus.NOT_FOUND
                    for evidence in layers
                )
                for is_found, layers in zip(found_row, row, strict=True)
            )
            for found_row, row in zip(found, some, strict=True)
        )

    @property
    def box_shares(self) -> Tensor:
        """(C, O, M) float64: the share of the mass inside the object's box, 0..1; NaN where there is no mass.

        The box is the baseline's under every configuration; a token that it covers in part counts in part.
        """
        cover = torch.stack(
            [self._cover(box) for box in self.objects.boxes.double()] or [torch.zeros(self.grid)]
        )
        inside = (self.maps.double() * cover[: len(self.objects), None]).sum((-2, -1))
        return inside / self.masses.masked_fill(self.masses == 0, torch.nan)

    @property
    def peaks(self) -> Tensor:
        """(C, O, M, 2) float64: (x, y) in pixels of the original image, the middle of the token with the greatest
        relevance; NaN where there is no mass."""
        edges_y, edges_x = self._edges()
        middles_y, middles_x = (edges_y[1:] + edges_y[:-1]) / 2, (edges_x[1:] + edges_x[:-1]) / 2
        flat = self.maps.flatten(-2)
        index = flat.argmax(-1)
        columns = self.grid[1]
        peaks = torch.stack((middles_x[index % columns], middles_y[index // columns]), dim=-1)
        return peaks.masked_fill((self.masses == 0)[..., None], torch.nan)

    def scaled(self, per: Literal["map", "object", "sweep"] = "sweep") -> Tensor:
        """`maps` in 0..1, to be drawn.

        One scale for the whole `sweep` (or for each `object`, over configurations and layers): from 0 to the greatest
        relevance there is, so that a dying map looks dying. Per `map`, as the paper's notebook draws: from its own
        least to its own greatest relevance. What is constant becomes 0, never a picture of rounding errors.
        """
        if per not in ("map", "object", "sweep"):
            raise SettingError(f"maps cannot be scaled per {per!r}: use map, object or sweep")
        maps = self.maps
        if not maps.numel():
            return maps.clone()
        if per == "map":
            least, greatest = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
        else:
            dims = (0, 2, 3, 4) if per == "object" else (0, 1, 2, 3, 4)
            greatest = maps.amax(dims, keepdim=True)
            least = torch.zeros_like(greatest)
        span = greatest - least
        constant = span <= 4 * torch.finfo(maps.dtype).eps * greatest
        return ((maps - least) / span.masked_fill(constant, 1)).masked_fill(constant, 0)

    def as_dict(self) -> dict[str, Any]:
        """The numbers beside the maps, of types that JSON knows; NaN is None."""

        def plain(values: Tensor) -> Any:
            return _without_nan(values.tolist())

        return {
            "method": self.method,
            "target": list(self.target),
            "pick": self.pick,
            "zero_rows": self.zero_rows,
            "layers": list(self.layers),
            "grid": list(self.grid),
            "objects": self.objects.as_dict(),
            "configurations": [
                {"name": each.name, "configuration": each.text} for each in self.configurations
            ],
            "queries": plain(self.queries),
            "labels": plain(self.labels),
            "scores": plain(self.scores),
            "values": plain(self.values),
            "statuses": self.statuses,
            "masses": plain(self.masses),
            "box_shares": plain(self.box_shares),
            "peaks": plain(self.peaks),
            "decoder_identity_rows": plain(self.decoder_identity_rows),
            "encoder_identity_rows": plain(self.encoder_identity_rows),
            "reference_differs": self.reference_differs.tolist(),
        }

    def save(self, path: str | Path) -> Path:
        """Write to `path`, ending in .npz or .safetensors: every tensor, and labels of every axis as JSON.

        Arrays are named as the attributes. The JSON is the array `metadata` of an npz and the metadata entry
        `headoff` of a safetensors file. The file is whole or absent. Raises SettingError for
        another ending, OutputError where it cannot be written.
        """
        path = Path(path)
        tensors = {
            name: getattr(self, name).contiguous() for name in _TENSORS if getattr(self, name) is not None
        }
        tensors |= {f"objects.{name}": getattr(self.objects, name).contiguous() for name in _OBJECT_TENSORS}
        metadata = json.dumps(
            {
                "format": FORMAT,
                "axes": {
                    "maps": ["configuration", "object", "layer", "row", "column"],
                    **{name: list(labels) for name, labels in self.axes.items()},
                },
                "configurations": [[each.name, each.text] for each in self.configurations],
                "image_size": list(self.image_size),
                "class_names": list(self.objects.class_names),
                **{name: getattr(self, name) for name in _PLAIN},
            }
        )
        if path.suffix not in (".npz", ".safetensors"):
            raise SettingError(f"{path} has no known format: end its name in .npz or .safetensors")
        try:
            with written_atomically(path) as file:
                if path.suffix == ".npz":
                    np.savez_compressed(
                        file,
                        allow_pickle=False,
                        metadata=np.array(metadata),
                        **{k: v.numpy() for k, v in tensors.items()},
                    )
                else:
                    file.write(safetensors.torch.save(tensors, {"headoff": metadata}))
        except OSError as error:
            raise OutputError(
                f"{path} cannot be written ({error.strerror or error}): choose another place"
            ) from error
        return path

    def _edges(self) -> tuple[Tensor, Tensor]:
        """Edges of token rows (h + 1,) and columns (w + 1,) in pixels of the original image, cut at its border."""
        edges = []
        for count, side, original in zip(self.grid, self.resized, self.image_size, strict=True):
            edges.append((torch.arange(count + 1).double() * self.stride).clamp(max=side) * (original / side))
        return edges[0], edges[1]

    def _cover(self, box: Tensor) -> Tensor:
        """How much of each token `box` (left, top, right, bottom) covers: (h, w), 0..1."""
        shares = []
        for edges, low, high in zip(self._edges(), (box[1], box[0]), (box[3], box[2]), strict=True):
            inside = edges.clamp(float(low), float(high)).diff()
            width = edges.diff()
            shares.append(torch.where(width > 0, inside / width.clamp(min=1e-12), 0))
        return shares[0][:, None] * shares[1]


_TENSORS = (
    "maps", "queries", "labels", "values", "decoder_identity_rows", "encoder_identity_rows",
    "reference_differs", "logits", "boxes", "heads",
)  # fmt: skip
_OBJECT_TENSORS = ("queries", "labels", "scores", "boxes")
_PLAIN = ("layers", "stride", "resized", "method", "target", "pick", "zero_rows")


def load_explanation(path: str | Path) -> Explanation:
    """What `Explanation.save` wrote. Raises SettingError where `path` cannot be read as that."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                tensors = {
                    name: torch.from_numpy(archive[name]) for name in archive.files if name != "metadata"
                }
                metadata = json.loads(str(archive["metadata"]))
        else:
            from safetensors import safe_open

            with safe_open(path, "pt") as archive:
                tensors = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
                metadata = json.loads(archive.metadata()["headoff"])
        if metadata["format"] != FORMAT:
            raise ValueError(f"its format is {metadata['format']!r}")
        rest: dict[str, Any] = {name: tensors.get(name) for name in _TENSORS}
        rest |= {
            name: tuple(value) if isinstance(value := metadata[name], list) else value for name in _PLAIN
        }
        objects = Detections(
            **{name: tensors[f"objects.{name}"] for name in _OBJECT_TENSORS},
            image_size=tuple(metadata["image_size"]),
            class_names=tuple(metadata["class_names"]),
        )
        return Explanation(
            configurations=tuple(
                parse_configuration(text).named(name) for name, text in metadata["configurations"]
            ),
            objects=objects,
            **rest,
        )
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingError(
            f"{path} cannot be read as an explanation ({reason}): give a file that Explanation.save wrote"
        ) from error


def explain(
    detector: Detector,
    image: ImageSource,
    configurations: Iterable[Configuration | str] | None = None,
    queries: Iterable[int] | None = None,
    method: Method | str = "chefer",
    layers: Literal["all", "last"] | int | Iterable[int] = "all",
    *,
    target: TargetSpec | Sequence[TargetSpec] = "class",
    pick: Pick = "baseline",
    confidence: float = 0.5,
    heads: bool = False,
    zero_rows: ZeroRows = "identity",
    backward: Backward = "auto",
    kernels: Kernels = "auto",
    memory_budget: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Relevance maps of one image's objects under every configuration, after every decoder layer.

    Args:
        detector: see `headoff.load`.
        image: a path, a `PIL.Image` or an array; see `headoff.images.load_image`.
        configurations: any number of them, or their text. By default the cumulative sweep: nothing off, first 1 off,
            ..., all heads off, in every decoder layer.
        queries: the object queries to explain; by default those that find something with nothing off.
        method: `headoff.relevance.method_names()` says which there are.
        layers: decoder layers after which a map is wanted, from 0: `all`, `last`, a number or numbers.
        target: what is explained of a query: its `class` logit, a coordinate of its box (`cx`, `cy`, `w`, `h`), or a
            function of (logits, boxes); or one of these for each of the objects.
        pick: which query and class. `baseline`: those of the run with nothing off, for a sweep is to compare the same
            thing. `class`: the same query, its own likeliest class under each configuration. `object`: the query that
            finds the object under each configuration (`headoff.outcomes`), and its class.
        confidence: score above which a query's answer is a detection.
        heads: add the cross-attention weights of every head.
        zero_rows, backward, kernels, memory_budget: see `headoff.relevance.rules` and `RelevanceEngine`.
        progress: called with (configurations done, configurations in all).

    Under `with detector.autocasting(dtype):` the forward passes are in mixed precision, relevance in float32 all the
    same.

    Returns:
        An `Explanation`; one without objects where nothing is detected.

    Raises:
        ImageError, GateError, SettingError: for an image, a configuration, or anything else, that cannot be.
        NonFiniteError: where NaN or infinity appears; it says in which layer first.
        AttentionError: where a patched attention has no backward pass.
    """
    method = resolve_method(method)
    if pick not in PICKS:
        raise SettingError(f"pick cannot be {pick!r}: use one of {', '.join(PICKS)}")
    layout = detector.head_layout
    chosen_layers = _layers(layers, layout.decoder_layers)
    chosen = (
        cumulative(layout.heads)
        if configurations is None
        else tuple(c if isinstance(c, Configuration) else parse_configuration(c) for c in configurations)
    )
    gates = stack(chosen, layout)
    wanted = None if queries is None else _queries(queries, layout.queries)
    picture = load_image(image)
    image_size = (picture.height, picture.width)
    with torch.no_grad():
        pixels, _ = detector.preprocess([picture])
        features = detector.features(pixels)
    engine = RelevanceEngine(
        detector,
        features,
        method=method,
        zero_rows=zero_rows,
        backward=backward,
        kernels=kernels,
        memory_budget=memory_budget,
    )
    (baseline,) = engine.run(stack((none_off(),), layout), lambda *_: ())
    objects = _objects(baseline.logits, baseline.boxes, image_size, detector.class_names, confidence, wanted)
    specs = _specs(target, len(objects))
    picked_queries = torch.full((len(chosen), len(objects)), -1)
    picked_labels = picked_queries.clone()

    def targets(index: int, logits: Tensor, boxes: Tensor) -> list[Target | None]:
        picked = _pick(pick, objects, logits, boxes, confidence)
        for slot, one in enumerate(picked):
            if one is not None:
                picked_queries[index, slot], picked_labels[index, slot] = one
        return [
            None if one is None else make_target(spec, *one) for one, spec in zip(picked, specs, strict=True)
        ]

    count = len(chosen), len(objects), len(chosen_layers)
    dtype = torch.promote_types(detector.dtype, torch.float32)
    maps = torch.zeros(*count, *features.grid, dtype=dtype)
    values = torch.full(count[:2], torch.nan, dtype=torch.float64)
    decoder_zeros = torch.zeros(count, dtype=torch.long)
    encoder_zeros = torch.zeros(count[:2], dtype=torch.long)
    differs = torch.zeros(count, dtype=torch.bool)
    head_maps = torch.zeros(*count, layout.heads, *features.grid, dtype=dtype) if heads else None
    logits = baseline.logits.new_empty(len(chosen), *baseline.logits.shape)
    boxes = baseline.boxes.new_empty(len(chosen), *baseline.boxes.shape)
    for done, found in enumerate(engine.run(gates, targets, layers=chosen_layers, heads=heads), start=1):
        logits[found.index], boxes[found.index] = found.logits, found.boxes
        for slot, pair in enumerate(found.pairs):
            if pair is not None:
                maps[found.index, slot] = pair.rows.unflatten(-1, features.grid)
                values[found.index, slot] = pair.value
                decoder_zeros[found.index, slot] = pair.decoder_identity_rows
                encoder_zeros[found.index, slot] = pair.encoder_identity_rows
                differs[found.index, slot] = pair.reference_differs
        if head_maps is not None and found.heads is not None:
            head_maps[found.index] = found.heads.unflatten(-1, features.grid)
        if progress is not None:
            progress(done, len(chosen))
    return Explanation(
        configurations=chosen,
        objects=objects,
        layers=tuple(chosen_layers),
        maps=maps,
        queries=picked_queries,
        labels=picked_labels,
        values=values,
        decoder_identity_rows=decoder_zeros,
        encoder_identity_rows=encoder_zeros,
        reference_differs=differs,
        logits=logits,
        boxes=boxes,
        heads=head_maps,
        stride=detector.config.backbone.stride,
        resized=(pixels.shape[-2], pixels.shape[-1]),
        method=method.name,
        target=tuple(make_target(spec, 0, 0).name if callable(spec) else spec for spec in specs),
        pick=pick,
        zero_rows=zero_rows,
    )


def _layers(layers: Any, count: int) -> list[int]:
    if layers == "all":
        return list(range(count))
    if layers == "last":
        return [count - 1]
    try:
        chosen = [operator.index(each) for each in ([layers] if isinstance(layers, int) else layers)]
    except TypeError:
        chosen = []
    if not chosen or isinstance(layers, str):
        raise SettingError(f"layers cannot be {layers!r}: use 'all', 'last', a number or a list of numbers")
    for each in chosen:
        if not 0 <= each < count:
            raise SettingError(
                f"there is no decoder layer {each}: this detector's go from 0 to {count - 1}, use one of those"
            )
    if len(set(chosen)) < len(chosen):
        raise SettingError(f"the decoder layers {chosen} are not all different: name each once")
    return chosen


def _queries(queries: Iterable[int], count: int) -> list[int]:
    try:
        chosen = [operator.index(each) for each in queries]
    except TypeError:
        raise SettingError(f"queries cannot be {queries!r}: give a list of whole numbers") from None
    for each in chosen:
        if not 0 <= each < count:
            raise SettingError(
                f"there is no query {each}: this detector's go from 0 to {count - 1}, use one of those"
            )
    if len(set(chosen)) < len(chosen):
        raise SettingError(f"the queries {chosen} are not all different: name each once")
    return chosen


def _objects(
    logits: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    class_names: tuple[str, ...],
    confidence: float,
    queries: list[int] | None,
) -> Detections:
    """The baseline's detections, or, in the order asked for, what `queries` say, however unsure they are."""
    if queries is None:
        return detections_from(logits, boxes, image_size, class_names, confidence)
    everything = detections_from(logits, boxes, image_size, class_names, 0.0)
    places = [everything.queries.tolist().index(query) for query in queries]
    return Detections(
        everything.queries[places],
        everything.labels[places],
        everything.scores[places],
        everything.boxes[places],
        image_size,
        class_names,
    )


def _specs(target: TargetSpec | Sequence[TargetSpec], count: int) -> list[TargetSpec]:
    specs: list[TargetSpec] = (
        [target] * count if isinstance(target, str) or callable(target) else list(target)
    )
    if isinstance(target, str) or callable(target):
        make_target(target, 0, 0)  # a wrong name is one with no objects as well
    if len(specs) != count:
        raise SettingError(f"{len(specs)} targets were given for {count} objects: give one, or one for each")
    for spec in specs:
        make_target(spec, 0, 0)
    return specs


def _pick(
    pick: Pick, objects: Detections, logits: Tensor, boxes: Tensor, confidence: float
) -> list[tuple[int, int] | None]:
    """(query, class) of each object under the configuration that gave `logits` and `boxes`."""
    frozen = list(zip(objects.queries.tolist(), objects.labels.tolist(), strict=True))
    if pick == "baseline":
        return list(frozen)
    if pick == "class":
        likeliest = class_probabilities(logits)[:, :-1].argmax(-1).tolist()
        return [(query, likeliest[query]) for query, _ in frozen]
    detections = detections_from(logits, boxes, objects.image_size, objects.class_names, confidence)
    outcomes = outcomes_of(objects, detections, logits).outcomes
    return [
        (int(detections.queries[first]), int(detections.labels[first]))
        if (first := next(iter(outcome.detections), None)) is not None
        else None
        for outcome in outcomes
    ]


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(each) for each in values]
    return None if values != values else values
