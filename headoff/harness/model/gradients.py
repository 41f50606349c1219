"""The gradient level: end-to-end gradients of one target, through decoder and encoder, by plain autograd.

Nothing of the relevance engine is in it: the model's own graph is made with the attention under test, and gone back
through once. The configurations are a batch of images, all of them the same, each with its own gates: so one backward
pass gives the gradient under each configuration by itself. ReLUs decide as the oracle's do
(`headoff.harness.model.relu_masks`), so that there is nothing but rounding between two right implementations.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from headoff.attention import Attention
from headoff.detr.detector import Detector, Features
from headoff.detr.transformer import Attend, AttentionCall
from headoff.gates import Configuration, Gates, stack
from headoff.harness.finding import Finding
from headoff.harness.model.call_count import CallCount
from headoff.harness.model.patched import failures_as, features_on, patched
from headoff.harness.model.relevance import roundings
from headoff.harness.reference.cache import Arrays, kept
from headoff.harness.reference.cases import Subject
from headoff.harness.reference.implementations import machine, right_implementations
from headoff.harness.reference.maps import ERROR_FACTOR
from headoff.images import load_image
from headoff.relevance import Target
from headoff.relevance.targets import box_coordinate, class_logit

MEMORY = 2**30
"""Bytes that one backward graph may take, about."""

PIXEL_CONFIGURATIONS = 2
"""Configurations whose gradients are sent on to the pixels: a pass through the backbone each, in float64."""

PARTS = ("memory", "tokens", "pixels")
"""What a gradient is taken with respect to: the encoder's output, its input, and the image."""


@dataclass(frozen=True, eq=False)
class FoundGradients:
    """Gradients of one target per configuration, float64 on the CPU, and the calls that they took.

    - `memory`, `tokens` (C, N, d): with respect to the encoder's output and input
    - `batches`: how many forward and backward passes it were
    """

    memory: Tensor
    tokens: Tensor
    calls: CallCount
    batches: int


def gradient_findings(
    attention: Attention,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration] | None = None,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where end-to-end gradients with `attention` are wrong: at most one finding for each configuration, and calls.

    Of all the subject's `configurations` unless told. The calls at each site are added to `calls`.
    """
    chosen = tuple(subject.configurations if configurations is None else configurations)
    case = f"gradients of {subject.name}"
    budget = gradient_budget(subject, device, dtype)
    findings: list[Finding] = []
    found = None
    with failures_as(findings, "gradients", case):
        found = found_gradients(attention, subject, device, dtype, chosen)
    if found is None:
        return findings
    findings += found.calls.findings(case, found.batches, found.batches)
    if calls is not None:
        calls.update(found.calls.by_site)
    errors = gradient_errors(subject, chosen, found)
    wrong = {
        index: parts
        for index in range(len(chosen))
        if (parts := [part for part in PARTS if part in errors and errors[part][index] > budget])
    }
    return findings + [
        _finding(subject, chosen[index], index, parts, errors, budget) for index, parts in wrong.items()
    ]


def target_of(subject: Subject, configuration: Configuration) -> Target:
    """What is differentiated under a configuration: objects take turns, and so do class logits and boxes."""
    index = subject.configurations.index(configuration)
    found = subject.objects[index % len(subject.objects)]
    if index % 2:
        return box_coordinate(found.query, ("cx", "cy", "w", "h")[index // 2 % 4])
    return class_logit(found.query, found.label)


def found_gradients(
    attention: Attention,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration],
    gates: Gates | None = None,
) -> FoundGradients:
    """With `attention` in the subject's model, from the oracle's features on.

    `gates`: others than those of the configurations, as many.
    """
    features = features_on(subject, device, dtype)
    with patched(subject, attention, device, dtype) as detector, CallCount(detector) as calls:
        memory, tokens, batches = _gradients(detector, features, subject, configurations, gates)
    return FoundGradients(memory, tokens, calls, batches)


def true_gradients(subject: Subject) -> dict[str, Tensor]:
    """The oracle's under all configurations, and those of the pixels (n, 3 * H * W) of the first few."""
    return _truth(subject)


def gradient_errors(
    subject: Subject, configurations: Sequence[Configuration], found: FoundGradients
) -> dict[str, NDArray[np.float64]]:
    """Per part and configuration the largest error of a token's (a pixel's) gradient, relative to the longest true one.

    A gradient that is truly zero must be exactly zero. Pixels are looked at for the first of the subject's
    configurations only, where they are among `configurations`.
    """
    truth = true_gradients(subject)
    at = [subject.configurations.index(each) for each in configurations]
    errors = {
        "memory": _errors(found.memory, truth["memory"][at]),
        "tokens": _errors(found.tokens, truth["tokens"][at]),
    }
    pixels = [place for place, index in enumerate(at) if index in _pixel_indices(subject)]
    if pixels:
        through = to_pixels(subject, found.tokens[pixels])
        true = truth["pixels"][[_pixel_indices(subject).index(at[place]) for place in pixels]]
        errors["pixels"] = np.zeros(len(at))
        errors["pixels"][pixels] = _errors(through, true)
    return errors


@functools.cache
def gradient_budget(subject: Subject, device: torch.device, dtype: torch.dtype) -> float:
    """What a candidate may be off by, in any part under any configuration: as much as several right implementations.

    Measured once on a machine, and kept.
    """

    def measure() -> Arrays:
        errors = [
            gradient_errors(
                subject,
                subject.configurations,
                found_gradients(each, subject, device, dtype, subject.configurations),
            )
            for each in right_implementations()
        ]
        return {part: np.max([each[part] for each in errors], axis=0) for part in PARTS}

    about = {**_about(subject), **machine(device, dtype)}
    errors = kept("gradient-rounding", about, measure)
    largest = max(float(errors[part].max()) for part in PARTS)
    return ERROR_FACTOR * largest + roundings(subject) * torch.finfo(dtype).eps


def to_pixels(subject: Subject, of_tokens: Tensor) -> Tensor:
    """Gradients of the encoder's input (n, N, d) sent through the oracle's backbone: (n, H * W, 3)."""
    tokens, pixels = _backbone(subject)
    found = [
        torch.autograd.grad(tokens, pixels, each[None], retain_graph=True)[0][0].flatten(1).T
        for each in of_tokens
    ]
    return torch.stack(found)


def _gradients(
    detector: Detector,
    features: Features,
    subject: Subject,
    configurations: Sequence[Configuration],
    gates: Gates | None = None,
) -> tuple[Tensor, Tensor, int]:
    gates = stack(configurations, detector.head_layout) if gates is None else gates
    at = [subject.configurations.index(each) for each in configurations]
    of_memory, of_tokens = [], []
    batches = torch.arange(len(at)).split(_at_once(detector, features))
    for batch in batches:
        members = [at[index] for index in batch.tolist()]
        targets = [target_of(subject, configurations[index]) for index in batch.tolist()]
        with subject.decisions[members].imposed_on(detector, boxes=True):
            memory, tokens = backward(detector, features, gates[batch], targets)
        of_memory.append(memory.double().cpu())
        of_tokens.append(tokens.double().cpu())
    return torch.cat(of_memory), torch.cat(of_tokens), len(batches)


def backward(
    detector: Detector, features: Features, gates: Gates, targets: Sequence[Target]
) -> tuple[Tensor, Tensor]:
    """Gradients of one target per configuration with respect to memory and tokens, (C, N, d) each."""
    with torch.enable_grad():
        value, memory, tokens = forward(detector, features, gates, targets)
        of_memory, of_tokens = torch.autograd.grad(value, (memory, tokens))
    return of_memory, of_tokens


def forward(
    detector: Detector, features: Features, gates: Gates, targets: Sequence[Target]
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of one target per configuration, and the memory and the tokens (C, N, d) that it comes from.

    `features` are of one image; the configurations are laid out as a batch of C images, gated item by item, so that no
    target has a gradient in another's item.
    """
    attend = gated_items(detector.attend, gates)
    count = len(gates)
    tokens = features.tokens.expand(count, -1, -1).clone().requires_grad_()
    positions = features.positions.expand(count, -1, -1)
    memory = detector.encoder(tokens, positions, attend, features.attn_mask)
    queries = detector.query_embedding.weight
    states = detector.decoder(
        queries.new_zeros(count, 1, *queries.shape),
        queries,
        memory,
        positions,
        attend,
        features.attn_mask,
        every_layer=False,
    )
    output = detector.heads(states[-1])
    values = [
        target.value(output.logits[0, index], output.boxes[0, index]) for index, target in enumerate(targets)
    ]
    return torch.stack(values).sum(), memory, tokens


def gated_items(attend: Attend, gates: Gates) -> Attend:
    """`attend` with a gate of its own for each item of the batch, whatever gate it is given."""

    def gated(call: AttentionCall) -> Tensor:
        by_site = gates.site(call.address.site)
        if by_site is not None:
            head_gate = by_site[:, call.address.layer].transpose(1, 2).unsqueeze(-1)
            call = call._replace(head_gate=head_gate.to(call.query))
        return attend(call)

    return gated


@functools.cache
def _truth(subject: Subject) -> dict[str, Tensor]:
    def make() -> Arrays:
        memory, tokens, _ = _gradients(subject.detector, subject.features, subject, subject.configurations)
        pixels = to_pixels(subject, tokens[_pixel_indices(subject)])
        return {"memory": memory.numpy(), "tokens": tokens.numpy(), "pixels": pixels.numpy()}

    return {name: torch.from_numpy(each) for name, each in kept("gradients", _about(subject), make).items()}


def _about(subject: Subject) -> dict[str, str]:
    return {
        **subject.inputs(subject.configurations[0]),
        "configuration": "; ".join(each.text for each in subject.configurations),
        "objects": ", ".join(subject.object_names),
    }


def _pixel_indices(subject: Subject) -> list[int]:
    """Nothing off, and the one in the middle of the cumulative ones."""
    return [0, len(subject.cumulative) // 2][:PIXEL_CONFIGURATIONS]


@functools.cache
def _backbone(subject: Subject) -> tuple[Tensor, Tensor]:
    """The oracle's tokens (1, N, d) with the graph that leads to its pixels (1, 3, H, W)."""
    detector = subject.detector
    pixels, _ = detector.preprocess([load_image(subject.image)])
    pixels.requires_grad_()
    with torch.enable_grad():
        return detector.features(pixels).tokens, pixels


def _errors(found: Tensor, true: Tensor) -> NDArray[np.float64]:
    """Per configuration, of gradients (C, N, d)."""
    off = (found - true).norm(dim=-1).amax(-1)
    longest = true.norm(dim=-1).amax(-1)
    relative = torch.where(off == 0, 0.0, off / longest)
    return torch.where(relative.isfinite(), relative, torch.inf).numpy()


def _at_once(detector: Detector, features: Features) -> int:
    config, tokens = detector.config, features.tokens.shape[1]
    weights = (
        3 * config.heads * tokens * (config.encoder_layers * tokens + config.decoder_layers * config.queries)
    )
    hidden = config.encoder_layers * tokens * (2 * config.feedforward + 12 * config.width)
    return max(1, MEMORY // ((weights + hidden) * features.tokens.element_size()))


def _finding(
    subject: Subject,
    configuration: Configuration,
    index: int,
    parts: list[str],
    errors: dict[str, NDArray[np.float64]],
    budget: float,
) -> Finding:
    case = f"{subject.name}, {configuration.name}"
    target = target_of(subject, configuration)
    said = ", ".join(
        f"of the {part} is off by {errors[part][index]:.1e} of the longest (allowed {budget:.1e})"
        if np.isfinite(errors[part][index])
        else f"of the {part} is NaN, infinite, or not zero where it must be"
        for part in parts
    )
    error = float(errors[parts[0]][index])
    return Finding(
        "gradients",
        f"{case}: the gradient of query {target.query}'s {target.name} is wrong: that {said}",
        case=case,
        error=error if np.isfinite(error) else None,
        budget=budget,
        configuration=configuration.name,
    )
