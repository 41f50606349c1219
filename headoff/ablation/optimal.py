"""Optimal constants: what a head can contribute, the same in every image, so that its removal changes least.

Li and Janson, "Optimal ablation for interpretability", NeurIPS 2024, arXiv 2409.09951. They minimise the expected loss
of the model; here, without labels, it is the mean squared change of a value of the baseline's objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headoff.ablation.references import References, fingerprint_of, hash_of_image
from headoff.calls import Attend, AttentionCall
from headoff.choices import DEFAULT_SITE, Site
from headoff.detections import detections_from
from headoff.detector import Detector
from headoff.errors import SettingError
from headoff.gates import Gates
from headoff.images import ImageSource, load_image
from headoff.values import Objects, Value, ValueSpec, resolve_value

STEPS = 200
LEARNING_RATE = 0.1
"""Of Adam, relative to the standard deviation of the head's sampled contexts."""


def fit_optimal(
    detector: Detector,
    images: Sequence[ImageSource],
    references: References,
    *,
    site: Site = DEFAULT_SITE,
    value: ValueSpec = "probability",
    steps: int = STEPS,
    confidence: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> References:
    """The reference set with optimal constants for the heads of a site.

    Every head has one constant (D) for all queries, or for all tokens of the encoder, fitted with that head alone
    switched off: all heads together, by Adam, from the mean contexts on, one image a step. What is minimised is the
    mean over objects of the squared change of `value` compared with nothing off. At `encoder_self` a step runs the
    encoder once for each head.

    Args:
        detector: the detector; its weights are not changed.
        images: those of the reference set, or some of them. `optimal` is never used on an image of the set.
        references: `gather_references` of the same detector.
        site: where the heads are.
        value: a differentiable value, see `headoff.values`.
        steps: of Adam; the learning rate falls to 0 along a cosine.
        confidence: score above which a query's prediction is an object.
        progress: called with (number of finished steps, number of steps).

    Raises:
        SettingError: an image is not of the set, none has an object, the value has no gradient, or the reference set
            has nothing at the site.
    """
    chosen = resolve_value(value)
    if not chosen.differentiable:
        raise SettingError(f"the value {chosen.name!r} has no gradient: fit another, such as 'probability'")
    if fingerprint_of(detector) != references.fingerprint:
        raise SettingError("the reference set was gathered with another model: gather one with this model")
    if any(hash_of_image(image) not in references.images for image in images):
        raise SettingError(
            "an image is not of the reference set: fit on the images that it was gathered from"
        )

    if site not in references.mean:
        raise SettingError(
            f"the reference set has nothing at {site}: name one of {', '.join(references.mean)}"
        )

    @functools.cache
    def game(index: int) -> _Game:
        return _Game.of(detector, images[index], chosen, confidence)

    def games() -> Iterator[_Game]:
        """Those of images with objects, over and over."""
        while True:
            with_objects = 0
            for index in range(len(images)):
                if len(game(index).objects):
                    with_objects += 1
                    yield game(index)
            if not with_objects:
                raise SettingError(
                    "no reference image has a detection to fit optimal constants for: lower the confidence"
                )

    start = references.mean[site].mean(2, keepdim=True).to(detector.device, detector.dtype)
    scale = references.samples[site].float().std((0, 3), keepdim=True)[0].to(start)
    offset = torch.zeros_like(start, requires_grad=True)  # in units of `scale`
    optimizer = torch.optim.Adam([offset], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    single_heads_off = _encoder_heads_off if site == "encoder_self" else _decoder_heads_off
    with torch.enable_grad():
        for step, one in zip(range(steps), games(), strict=False):
            offset.grad = torch.zeros_like(offset)
            for logits, boxes in single_heads_off(detector, one, site, lambda: start + offset * scale):
                change = chosen(one.objects, logits, boxes) - one.baseline
                # By the mean over objects and the sum over heads: the gradient of a head does not depend on the others.
                offset.grad += torch.autograd.grad(change.square().mean(1).sum(), offset)[0]
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step + 1, steps)
    fitted = (start + offset.detach() * scale).float().cpu()
    return replace(
        references,
        optimal={**references.optimal, site: fitted},
        provenance={**references.provenance, f"optimal at {site}": f"{chosen.name}, {steps} steps"},
    )


@dataclass(frozen=True, eq=False)
class _Game:
    """An image, its objects, and their value (1, O) with nothing off."""

    features: Any
    memory: Any
    objects: Objects
    baseline: Tensor

    @classmethod
    def of(cls, detector: Detector, image: ImageSource, value: Value, confidence: float) -> _Game:
        picture = load_image(image)
        with torch.no_grad():
            features = detector.features(detector.preprocess([picture])[0])
            memory = detector.encode_features(features)
            output = detector.decode(memory)
        logits, boxes = output.logits[0, 0], output.boxes[0, 0]
        size = (picture.height, picture.width)
        found = detections_from(logits, boxes, size, detector.class_names, confidence, detector.scoring)
        objects = Objects.of(found, boxes, confidence)
        return cls(features, memory, objects, value(objects, logits[None], boxes[None]))


def _decoder_heads_off(
    detector: Detector, game: _Game, site: Site, constants: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and boxes with each head of a decoder site off alone, in batches; it contributes its constant."""
    contributed = constants()  # (layers, H, 1, D)
    layers, heads = contributed.shape[:2]

    def constant(call: AttentionCall) -> Tensor:
        if call.address.site != site:
            return call.value[..., :1, :] * 0
        return contributed[call.address.layer][None]

    off = 1 - torch.eye(layers * heads).view(-1, layers, 1, heads)
    with detector.replacing(constant):
        output = detector.decode(game.memory, Gates(tuple(map(str, range(len(off)))), **{str(site): off}))
    yield output.logits[:, 0], output.boxes[:, 0]


def _encoder_heads_off(
    detector: Detector, game: _Game, site: Site, constants: Callable[[], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same for the encoder, a layer at a time: with copies of the image, in each of which another head is off."""
    features = game.features
    layers, heads, _, _ = constants().shape
    copies = features.filled(
        torch.ones(heads, *features.grid, dtype=torch.bool, device=detector.device), "zero"
    )
    own = torch.eye(heads, dtype=torch.bool, device=detector.device)[:, :, None, None]
    for layer in range(layers):
        contributed = constants()[layer]  # anew: its graph ends with the layer's gradient

        def contribute(call: AttentionCall, proceed: Attend, layer=layer, contributed=contributed) -> Tensor:
            context = proceed(call)
            if call.address != (site, layer):
                return context
            return torch.where(own, contributed.to(context.dtype), context)

        with detector.intercepting(contribute):
            memory = detector.encode_features(copies)
        output = detector.decode(memory)
        yield output.logits[0], output.boxes[0]
