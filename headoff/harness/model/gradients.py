"""End-to-end gradients of one target, through decoder and encoder, by plain autograd.

The relevance engine is not involved: the model's own graph is built with the attention under test, and traversed once.
The configurations are a batch of copies of one image, with a gate each, so that one backward pass gives the gradient
under every configuration by itself. ReLU masks are the oracle's (`headoff.harness.model.relu_masks`), so that two right
implementations differ by rounding alone.
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
from headoff.detector import DetectorOutput
from headoff.detr.detector import Detr, Features
from headoff.gates import Configuration, Gates, stack
from headoff.harness.finding import Finding
from headoff.harness.model.patched import CallCount, counting_calls, features_on, findings_of_run, patched
from headoff.harness.model.relevance import roundings
from headoff.harness.reference.cache import Arrays, cached
from headoff.harness.reference.cases import ReferenceCase
from headoff.harness.reference.implementations import machine, right_implementations
from headoff.harness.reference.oracle import batches, forward_batch
from headoff.harness.tolerance import Tolerance, relative_error
from headoff.images import load_image
from headoff.relevance import Target
from headoff.relevance.targets import box_coordinate, class_logit

PARTS = ("memory", "tokens", "pixels")
"""What a gradient is taken with respect to: the encoder's output, its input, and the image."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one target per configuration, float64 on the CPU, and the attention calls they took.

    Args:
        memory, tokens: (C, N, d), with respect to the encoder's output and input.
    """

    memory: Tensor
    tokens: Tensor
    calls: CallCount


def gradient_findings(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration] | None = None,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where end-to-end gradients with `attention` are wrong: at most one finding for each configuration, and calls.

    Args:
        configurations: by default those of the case.
        calls: the calls at each site are added to these.
    """
    chosen = tuple(case.configurations if configurations is None else configurations)
    allowed = gradient_tolerance(case, device, dtype).allowed

    def compare(found: Gradients) -> list[Finding]:
        errors = gradient_errors(case, chosen, found)
        findings = []
        for index, configuration in enumerate(chosen):
            at = {part: float(errors[part][index]) for part in PARTS if part in errors}
            wrong = {part: error for part, error in at.items() if error > allowed}
            if wrong:
                findings.append(_finding(case, configuration, wrong, allowed))
        return findings

    return findings_of_run(
        "gradients",
        f"gradients of {case.name}",
        lambda: gradients_with(attention, case, device, dtype, chosen),
        compare,
        calls,
    )


def target_of(case: ReferenceCase, configuration: Configuration) -> Target:
    """What is differentiated under a configuration: objects take turns, and so do class logits and boxes."""
    (index,) = case.indices([configuration])
    detection = case.objects[index % len(case.objects)]
    if index % 2:
        return box_coordinate(detection.query, ("cx", "cy", "w", "h")[index // 2 % 4])
    return class_logit(detection.query, detection.label)


def sum_of_targets(targets: Sequence[Target], output: DetectorOutput) -> Tensor:
    """One target per configuration, of the output of `forward_batch`: a scalar."""
    values = [
        target.value(output.logits[0, index], output.boxes[0, index]) for index, target in enumerate(targets)
    ]
    return torch.stack(values).sum()


def gradients_with(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration],
    gates: Gates | None = None,
) -> Gradients:
    """With `attention` in the case's model, from the oracle's features on and with its ReLU masks.

    Args:
        gates: others than those of the configurations, as many.
    """
    with patched(case, attention, device, dtype) as detector:
        return _gradients(detector, features_on(case, device, dtype), case, configurations, gates)


@functools.cache
def expected_gradients(case: ReferenceCase) -> dict[str, Tensor]:
    """The oracle's under all configurations (C, N, d), and those of the pixels (n, H * W, 3) of the first few."""

    def compute() -> Arrays:
        found = _gradients(case.detector, case.features, case, case.configurations)
        pixels = to_pixels(case, found.tokens[_with_pixels(case)])
        return {"memory": found.memory.numpy(), "tokens": found.tokens.numpy(), "pixels": pixels.numpy()}

    arrays = cached("gradients", case.inputs_of_all(), compute)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def gradient_errors(
    case: ReferenceCase, configurations: Sequence[Configuration], found: Gradients
) -> dict[str, NDArray[np.float64]]:
    """Per part and configuration the largest error of a token's (a pixel's) gradient, relative to the longest one.

    Pixels are compared for two of the case's configurations, where those are among `configurations`.
    """
    expected = expected_gradients(case)
    indices = case.indices(configurations)
    errors = {
        "memory": _errors(found.memory, expected["memory"][indices]),
        "tokens": _errors(found.tokens, expected["tokens"][indices]),
    }
    with_pixels = _with_pixels(case)
    places = [place for place, index in enumerate(indices) if index in with_pixels]
    if places:
        pixels = expected["pixels"][[with_pixels.index(indices[place]) for place in places]]
        errors["pixels"] = np.zeros(len(indices))
        errors["pixels"][places] = _errors(to_pixels(case, found.tokens[places]), pixels)
    return errors


@functools.cache
def gradient_tolerance(case: ReferenceCase, device: torch.device, dtype: torch.dtype) -> Tolerance:
    """By the largest error of right implementations in any part under any configuration.

    Measured once on a machine, and cached.
    """

    def measure() -> Arrays:
        chosen = case.configurations
        found = [
            gradients_with(attention, case, device, dtype, chosen) for attention in right_implementations()
        ]
        errors = [gradient_errors(case, chosen, gradients) for gradients in found]
        return {part: np.max([error[part] for error in errors], axis=0) for part in PARTS}

    errors = cached("gradient-rounding", {**case.inputs_of_all(), **machine(device, dtype)}, measure)
    largest = max(float(errors[part].max()) for part in PARTS)
    return Tolerance(largest, roundings(case) * torch.finfo(dtype).eps)


def to_pixels(case: ReferenceCase, grad_tokens: Tensor) -> Tensor:
    """Gradients of the encoder's input (n, N, d) through the oracle's backbone: (n, H * W, 3)."""
    tokens, pixels = _backbone(case)
    found = [
        torch.autograd.grad(tokens, pixels, grad[None], retain_graph=True)[0][0].flatten(1).T
        for grad in grad_tokens
    ]
    return torch.stack(found)


def _gradients(
    detector: Detr,
    features: Features,
    case: ReferenceCase,
    configurations: Sequence[Configuration],
    gates: Gates | None = None,
) -> Gradients:
    gates = stack(configurations, detector.head_layout) if gates is None else gates
    targets = [target_of(case, configuration) for configuration in configurations]
    parts = list(batches(detector, features, len(configurations)))
    grads = []
    with counting_calls(detector, encodes=len(parts), decodes=len(parts)) as calls:
        for members in parts:
            masks = case.masks_of([configurations[index] for index in members])
            with masks.pinned(detector), torch.enable_grad():
                output, memory, tokens = forward_batch(detector, features, gates[torch.tensor(members)])
                target = sum_of_targets([targets[index] for index in members], output)
                grads.append(torch.autograd.grad(target, (memory, tokens)))
    memory, tokens = (torch.cat(some).double().cpu() for some in zip(*grads, strict=True))
    return Gradients(memory, tokens, calls)


def _with_pixels(case: ReferenceCase) -> list[int]:
    """None off, and the middle of the cumulative configurations: a float64 pass through the backbone each."""
    return [0, len(case.cumulative) // 2]


@functools.cache
def _backbone(case: ReferenceCase) -> tuple[Tensor, Tensor]:
    """The oracle's tokens (1, N, d) with the graph that leads to its pixels (1, 3, H, W)."""
    pixels, _ = case.detector.preprocess([load_image(case.image)])
    pixels.requires_grad_()
    with torch.enable_grad():
        return case.detector.features(pixels).tokens, pixels


def _errors(found: Tensor, expected: Tensor) -> NDArray[np.float64]:
    """Per configuration, of gradients (C, N, d)."""
    difference = (found - expected).norm(dim=-1).amax(-1)
    return relative_error(difference, expected.norm(dim=-1).amax(-1)).numpy()


def _finding(
    case: ReferenceCase, configuration: Configuration, wrong: dict[str, float], allowed: float
) -> Finding:
    name = f"{case.name}, {configuration.name}"
    target = target_of(case, configuration)
    parts = ", ".join(
        f"of the {part} is off by {error:.1e} of the longest (allowed {allowed:.1e})"
        if np.isfinite(error)
        else f"of the {part} is NaN, infinite, or not zero where it must be"
        for part, error in wrong.items()
    )
    error = next(iter(wrong.values()))
    return Finding(
        "gradients",
        f"{name}: the gradient of query {target.query}'s {target.name} is wrong: that {parts}",
        case=name,
        error=error if np.isfinite(error) else None,
        budget=allowed,
        configuration=configuration.name,
    )
