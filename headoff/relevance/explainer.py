"""`explain`: a relevance map for each configuration, object and decoder layer of one image."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headoff.ablation import Ablation, References, make_ablation
from headoff.choices import PICKS, AblationKind, Pick
from headoff.detections import Detections, class_probabilities, detections_from, predictions_of
from headoff.detector import Detector
from headoff.encoded import EncodedImage
from headoff.errors import SettingError
from headoff.gates import Configuration, cumulative, none_off, read_configurations, stack
from headoff.images import ImageSource
from headoff.outcomes import outcomes_of
from headoff.relevance.d_rise import DRiseEngine
from headoff.relevance.engine import Backward
from headoff.relevance.engines import make_engine
from headoff.relevance.explanations import Explanation
from headoff.relevance.kernels import Kernels
from headoff.relevance.methods import Method, resolve_method
from headoff.relevance.rules import ZeroRows
from headoff.relevance.targets import Target, TargetSpec, make_target
from headoff.sweeps import for_queries_of


def explain(
    detector: Detector,
    image: ImageSource | EncodedImage,
    configurations: Configuration | str | Iterable[Configuration | str] | None = None,
    queries: Iterable[int] | Detections | None = None,
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
    ablation: AblationKind | Ablation = "zero",
    references: References | str | Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Explanation:
    """Relevance maps of one image's objects under every configuration, after every decoder layer.

    Args:
        detector: see `headoff.load`.
        image: a path, a `PIL.Image` or an array (see `headoff.images.load_image`), or an `EncodedImage`.
        configurations: configurations, or their text. By default the cumulative sweep: none off, first 1 off, ..., all
            heads off, in every decoder layer.
        queries: the object queries to explain, with the most likely class of each; or objects, the detections of a
            baseline such as `SweepResult.baseline`. By default the objects of the baseline.
        method: one of `headoff.relevance.method_names()`, `best` (`headoff.choices.BEST_METHOD`), or a `Method`.
        layers: decoder layers after which maps are computed, counted from 0: `all`, `last`, a number or several.
        target: the scalar that is explained: the `class` logit of the query, a coordinate of its box (`cx`, `cy`, `w`,
            `h`), or a function of (logits, boxes); or a list with one of these for each object.
        pick: the query and class that are explained under each configuration. `baseline`: those of the baseline, so
            that a sweep compares the same scalar. `class`: the same query, and its most likely class.
            `object`: the query that detects the object (`headoff.outcomes`), and its class.
        confidence: a query counts as a detection if its score exceeds this.
        heads: whether to return the cross-attention weights of every head.
        zero_rows, backward, kernels, memory_budget: see `headoff.relevance.rules` and `RelevanceEngine`.
        ablation, references: what heads that are off contribute, as for `headoff.sweep`. It is held constant: what
            replaces a head carries no relevance.
        progress: called with (number of finished steps, number of steps): configurations and, before them, the masked
            images of D-RISE.

    Under `with detector.autocasting(dtype):` only the forward passes use mixed precision; relevance is float32.

    Returns:
        An `Explanation`, which has no objects if nothing is detected.

    Raises:
        ImageError: the image cannot be read.
        GateError: a configuration does not fit the detector.
        SettingError: another argument is invalid.
        NonFiniteError: NaN or infinity appears; the message names the first layer.
        AttentionError: a patched attention has no backward pass.

    Example:
        >>> explanation = explain(load("scenes"), sample_image(0), ["none", "first 4"])
        >>> explanation.maps.shape  # configurations, objects, decoder layers, rows and columns of tokens
    """
    method = resolve_method(method)
    if pick not in PICKS:
        raise SettingError(f"pick cannot be {pick!r}: use one of {', '.join(PICKS)}")
    layout = detector.head_layout
    chosen_layers = _layers(layers, layout.decoder_layers)
    chosen = cumulative(layout.heads) if configurations is None else read_configurations(configurations)
    for configuration in chosen:
        configuration.check(layout)
    given = queries if isinstance(queries, Detections) else None
    wanted = None if queries is None or isinstance(queries, Detections) else _queries(queries, layout.queries)
    encoded = image if isinstance(image, EncodedImage) else EncodedImage.of(detector, image)
    picture, features = encoded.picture, encoded.features
    image_size = (picture.height, picture.width)
    engine = make_engine(
        detector,
        features,
        method=method,
        zero_rows=zero_rows,
        backward=backward,
        kernels=kernels,
        memory_budget=memory_budget,
        picture=picture,
    )
    (baseline,) = engine.run(stack((none_off(),), layout), lambda *_: ())
    if any(configuration.names_objects for configuration in chosen):
        detected = _objects(baseline.logits, baseline.boxes, image_size, detector, confidence, None)
        chosen = for_queries_of(detected, chosen)
    gates = stack(chosen, layout)
    if given is not None:
        _queries(dict.fromkeys(given.queries.tolist()), layout.queries)
        objects = given
    else:
        objects = _objects(baseline.logits, baseline.boxes, image_size, detector, confidence, wanted)
    specs = _specs(target, len(objects))
    object_boxes = (objects.boxes.double() / torch.tensor(objects.image_size).flip(0).repeat(2)).tolist()
    picked_queries = torch.full((len(chosen), len(objects)), -1)
    picked_labels = picked_queries.clone()

    def targets(index: int, logits: Tensor, boxes: Tensor) -> list[Target | None]:
        picked = _pick(pick, objects, logits, boxes, confidence)
        for slot, query_and_label in enumerate(picked):
            if query_and_label is not None:
                picked_queries[index, slot], picked_labels[index, slot] = query_and_label
        return [
            None if query_and_label is None else replace(make_target(spec, *query_and_label), box=tuple(box))
            for query_and_label, spec, box in zip(picked, specs, object_boxes, strict=True)
        ]

    count = len(chosen), len(objects), len(chosen_layers)
    dtype = torch.promote_types(detector.dtype, torch.float32)
    maps = torch.zeros(*count, *features.grid, dtype=dtype)
    values = torch.full(count[:2], torch.nan, dtype=torch.float64)
    decoder_zeros = torch.zeros(count, dtype=torch.long)
    encoder_zeros = torch.zeros(count[:2], dtype=torch.long)
    differs = torch.zeros(count, dtype=torch.bool)
    several = len(features.shapes) > 1
    tokens = torch.zeros(*count, sum(h * w for h, w in features.shapes), dtype=dtype) if several else None
    head_maps = torch.zeros(*count, layout.heads, *features.grid, dtype=dtype) if heads else None
    points: Tensor | None = None
    logits = baseline.logits.new_empty(len(chosen), *baseline.logits.shape)
    boxes = baseline.boxes.new_empty(len(chosen), *baseline.boxes.shape)
    before = 0

    def prepared(done: int, steps: int) -> None:
        nonlocal before
        before = steps
        if progress is not None:
            progress(done, steps + len(chosen))

    if isinstance(engine, DRiseEngine):
        engine.progress = prepared
    with make_ablation(ablation, detector, references, picture).applied_to(detector):
        for done, found in enumerate(engine.run(gates, targets, layers=chosen_layers, heads=heads), start=1):
            logits[found.index], boxes[found.index] = found.logits, found.boxes
            for slot, pair in enumerate(found.pairs):
                if pair is not None:
                    maps[found.index, slot] = features.to_grid(pair.rows)
                    if tokens is not None:
                        tokens[found.index, slot] = pair.rows
                    values[found.index, slot] = pair.value
                    decoder_zeros[found.index, slot] = pair.decoder_identity_rows
                    encoder_zeros[found.index, slot] = pair.encoder_identity_rows
                    differs[found.index, slot] = pair.reference_differs
            if head_maps is not None and found.heads is not None:
                head_maps[found.index] = features.to_grid(found.heads)
            if found.points is not None:
                if points is None:
                    points = torch.zeros(len(chosen), *found.points.shape, dtype=dtype)
                points[found.index] = found.points
            if progress is not None:
                progress(before + done, before + len(chosen))
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
        points=points,
        tokens=tokens,
        shapes=tuple(features.shapes),
        through_encoder=detector.encoder_is_attention,
        stride=detector.stride(features),
        resized=encoded.resized,
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
        chosen = [operator.index(layer) for layer in ([layers] if isinstance(layers, int) else layers)]
    except TypeError:
        chosen = []
    if not chosen or isinstance(layers, str):
        raise SettingError(f"layers cannot be {layers!r}: use 'all', 'last', a number or a list of numbers")
    for layer in chosen:
        if not 0 <= layer < count:
            raise SettingError(
                f"there is no decoder layer {layer}: this detector's go from 0 to {count - 1}, use one of those"
            )
    if len(set(chosen)) < len(chosen):
        raise SettingError(f"the decoder layers {chosen} are not all different: name each only once")
    return chosen


def _queries(queries: Iterable[int], count: int) -> list[int]:
    try:
        chosen = [operator.index(query) for query in queries]
    except TypeError:
        raise SettingError(f"queries cannot be {queries!r}: give a list of whole numbers") from None
    for query in chosen:
        if not 0 <= query < count:
            raise SettingError(
                f"there is no query {query}: this detector's go from 0 to {count - 1}, use one of those"
            )
    if len(set(chosen)) < len(chosen):
        raise SettingError(f"the queries {chosen} are not all different: name each only once")
    return chosen


def _objects(
    logits: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    detector: Detector,
    confidence: float,
    queries: list[int] | None,
) -> Detections:
    """The baseline's detections; or the predictions of `queries`, in that order, whatever their confidence."""
    names, scoring = detector.class_names, detector.scoring
    if queries is None:
        return detections_from(logits, boxes, image_size, names, confidence, scoring)
    return predictions_of(queries, logits, boxes, image_size, names, scoring)


def _specs(target: TargetSpec | Sequence[TargetSpec], count: int) -> list[TargetSpec]:
    specs: list[TargetSpec] = (
        [target] * count if isinstance(target, str) or callable(target) else list(target)
    )
    if isinstance(target, str) or callable(target):
        make_target(target, 0, 0)  # a wrong name is an error even if there are no objects
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
        likeliest = class_probabilities(logits, objects.scoring).argmax(-1).tolist()
        return [(query, likeliest[query]) for query, _ in frozen]
    detections = detections_from(
        logits, boxes, objects.image_size, objects.class_names, confidence, objects.scoring
    )
    outcomes = outcomes_of(objects, detections, logits).outcomes
    return [
        (int(detections.queries[first]), int(detections.labels[first]))
        if (first := next(iter(outcome.detections), None)) is not None
        else None
        for outcome in outcomes
    ]
