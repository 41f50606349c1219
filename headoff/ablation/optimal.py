"""Optimal constants: what a head can contribute, the same in every image, so that its removal changes least.

Li and Janson, "Optimal ablation for interpretability", NeurIPS 2024, arXiv 2409.09951. They minimise the expected loss
of the model; here, without labels, it is the mean squared change of a value of the baseline's objects.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headoff.ablation.references import References, fingerprint_of, hash_of_image
from headoff.choices import DEFAULT_SITE, Site
from headoff.detections import detections_from
from headoff.detector import AttentionCall, Detector
from headoff.detr.detector import Memory
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
    """The reference set with optimal constants for the heads of a decoder site.

    Every head has one constant (D) for all queries, fitted with that head alone switched off: all heads together, by
    Adam, from the mean contexts on, one image a step. What is minimised is the mean over objects of the squared
    change of `value` compared with nothing off.

    Args:
        detector: the detector; its weights are not changed.
        images: those of the reference set, or some of them. `optimal` is never used on an image of the set.
        references: `gather_references` of the same detector.
        site: `decoder_cross` or `decoder_self`.
        value: a differentiable value, see `headoff.values`.
        steps: of Adam; the learning rate falls to 0 along a cosine.
        confidence: score above which a query's prediction is an object.
        progress: called with (number of finished steps, number of steps).

    Raises:
        SettingError: an image is not of the set, none has an object, the value has no gradient, or the site is that
            of the encoder.
    """
    chosen = resolve_value(value)
    if not chosen.differentiable:
        raise SettingError(f"the value {chosen.name!r} has no gradient: fit another, such as 'probability'")
    if site == "encoder_self":
        raise SettingError(
            "optimal constants are not fitted at encoder_self, where every step would run the encoder "
            "once for each head: use mean or uniform ablation there"
        )
    if fingerprint_of(detector) != references.fingerprint:
        raise SettingError("the reference set was gathered with another model: gather one with this model")
    if any(hash_of_image(image) not in references.images for image in images):
        raise SettingError(
            "an image is not of the reference set: fit on the images that it was gathered from"
        )

    @functools.cache
    def game(index: int) -> tuple[Memory, Objects, Tensor]:
        return _game(detector, images[index], chosen, confidence)

    def games() -> Iterator[tuple[Memory, Objects, Tensor]]:
        """Those of images with objects, over and over."""
        while True:
            with_objects = 0
            for index in range(len(images)):
                if len(game(index)[1]):
                    with_objects += 1
                    yield game(index)
            if not with_objects:
                raise SettingError(
                    "no reference image has a detection to fit optimal constants for: lower the confidence"
                )

    start = references.mean[site].mean(2, keepdim=True).to(detector.device, detector.dtype)
    scale = references.samples[site].float().std((0, 3), keepdim=True)[0].to(start)
    offset = torch.zeros_like(start, requires_grad=True)  # in units of `scale`
    layers, heads = start.shape[:2]
    off = 1 - torch.eye(layers * heads).view(-1, layers, 1, heads)
    plan = detector.plan(Gates(tuple(map(str, range(len(off)))), **{site: off}))
    optimizer = torch.optim.Adam([offset], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def constant(call: AttentionCall) -> Tensor:
        if call.address.site != site:
            return call.value[..., :1, :] * 0
        layer = call.address.layer
        return (start[layer] + offset[layer] * scale[layer])[None]

    with torch.enable_grad(), detector.replacing(constant):
        for step, (memory, objects, baseline) in zip(range(steps), games(), strict=False):
            output = detector.decode(memory, plan)
            change = chosen(objects, output.logits[:, 0], output.boxes[:, 0]) - baseline
            # By the mean over objects and the sum over heads: the gradient of a head does not depend on the others.
            loss = change.square().mean(1).sum()
            (offset.grad,) = torch.autograd.grad(loss, offset)
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


def _game(
    detector: Detector, image: ImageSource, value: Value, confidence: float
) -> tuple[Memory, Objects, Tensor]:
    """Memory and objects of an image, and their value (1, O) with nothing off."""
    picture = load_image(image)
    with torch.no_grad():
        pixels, _ = detector.preprocess([picture])
        memory = detector.encode(pixels)
        output = detector.decode(memory)
    logits, boxes = output.logits[0, 0], output.boxes[0, 0]
    found = detections_from(
        logits, boxes, (picture.height, picture.width), detector.class_names, confidence, detector.scoring
    )
    objects = Objects.of(found, boxes, confidence)
    return memory, objects, value(objects, logits[None], boxes[None])
