"""Relevance maps that pass through the backward pass of the attention under test, compared with the oracle's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from headoff.attention import Attention, attention_label
from headoff.detr.detector import Detr, Features
from headoff.gates import Configuration, Gates, stack
from headoff.harness.finding import Finding
from headoff.harness.model.patched import CallCount, counting_calls, features_on, findings_of_run, patched
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.reference.cache import Arrays, cached
from headoff.harness.reference.cases import METHOD, ReferenceCase
from headoff.harness.reference.implementations import machine, more_implementations, right_implementations
from headoff.harness.reference.maps import CaseMaps, map_errors, map_tolerance, mismatches
from headoff.harness.reference.pictures import draw_maps
from headoff.harness.tolerance import Tolerance
from headoff.relevance import RelevanceEngine, Target
from headoff.relevance.engine import Backward

MEMORY = 2**32
"""Bytes for the engine: enough that all configurations of a cumulative sweep are decoded together."""

MORE_DRAWS = 6
"""Further implementations that compute the map with the largest rounding errors."""

SECOND_LOOKS = 24
"""Further implementations that compute a map where a candidate's is off by more than is allowed, but not by far."""

DRAWN = 2
"""Findings of one image that get a picture: the others look alike."""


@dataclass(frozen=True, eq=False)
class FoundMaps:
    """Maps (C, O, M, h, w) in float64, logits (C, Q, K + 1) and boxes (C, Q, 4), and the attention calls they took."""

    maps: NDArray[np.float64]
    logits: torch.Tensor
    boxes: torch.Tensor
    calls: CallCount


def relevance_findings(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration] | None = None,
    pictures: Path | None = None,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where relevance maps made with `attention` are wrong: at most one finding for each configuration, and calls.

    Gradients pass the attention by its own backward pass.

    Args:
        configurations: by default the cumulative ones.
        pictures: a folder for pictures; None draws none.
        calls: the calls at each site are added to these.
    """
    chosen = tuple(case.cumulative if configurations is None else configurations)
    label = f"{attention_label(attention)} in {str(dtype).removeprefix('torch.')} on {device}"
    return findings_of_run(
        "relevance",
        f"relevance of {case.name}",
        lambda: maps_with(attention, case, device, dtype, chosen),
        lambda found: map_findings(case, chosen, found.maps, device, dtype, label, pictures),
        calls,
    )


def maps_with(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration],
    *,
    backward: Backward = "callable",
    gates: Gates | None = None,
    objects: Sequence[int] | None = None,
) -> FoundMaps:
    """With `attention` in the case's model, from the oracle's features on and with its ReLU masks.

    Args:
        gates: others than those of the configurations, as many.
        objects: indices of the case's objects that are explained; all of them where None.
    """
    gates = stack(configurations, case.layout) if gates is None else gates
    targets = case.targets if objects is None else [case.targets[index] for index in objects]
    with patched(case, attention, device, dtype) as detector:
        features = features_on(case, device, dtype)
        return maps_by(detector, features, gates, targets, case.masks_of(configurations), backward)


def maps_by(
    detector: Detr,
    features: Features,
    gates: Gates,
    targets: Sequence[Target],
    masks: ReluMasks,
    backward: Backward = "callable",
) -> FoundMaps:
    """By `RelevanceEngine`, under all `gates` and with the ReLU masks of each of them."""
    # Encoding and decoding once, and again for backward passes, which repeat the forward pass.
    with (
        masks.pinned(detector, box_head=False),
        counting_calls(detector, encodes=1, decodes=1, at_least=True) as calls,
    ):
        engine = RelevanceEngine(
            detector,
            features,
            method=METHOD,
            backward=backward,
            # Not by headoff's own fused kernels, where there are: they are no part of what is tested.
            kernels="tiles" if features.tokens.device.type == "cpu" else "torch",
            memory_budget=MEMORY,
        )
        results = sorted(engine.run(gates, lambda *_: targets), key=lambda result: result.index)
    maps = [torch.stack([pair.rows for pair in result.pairs if pair is not None]) for result in results]
    return FoundMaps(
        torch.stack(maps).unflatten(-1, features.grid).double().numpy(),
        torch.stack([result.logits for result in results]),
        torch.stack([result.boxes for result in results]),
        calls,
    )


def case_maps(
    case: ReferenceCase,
    configuration: Configuration,
    maps: NDArray[np.float64],
    tolerance: Tolerance,
    found_by: str = "the float64 oracle",
) -> CaseMaps:
    """The maps of one configuration (O, M, h, w), with all that they are to be compared by."""
    return CaseMaps(
        case=f"{case.name}, {configuration.name}",
        maps=maps,
        objects=case.object_names,
        inputs=case.inputs(configuration),
        tolerance=tolerance,
        found_by=found_by,
    )


def map_findings(
    case: ReferenceCase,
    configurations: Sequence[Configuration],
    maps: NDArray[np.float64],
    device: torch.device,
    dtype: torch.dtype,
    found_by: str,
    pictures: Path | None = None,
) -> list[Finding]:
    """Where `maps` (C, O, M, h, w), computed in `dtype` on `device`, are wrong: at most one finding a configuration."""
    tolerance = relevance_tolerance(case, device, dtype)
    expected_maps = case.maps(configurations)
    findings: list[Finding] = []
    for index, configuration in enumerate(configurations):
        found = case_maps(case, configuration, maps[index], tolerance, found_by)
        errors = map_errors(expected_maps[index], found.maps)
        # A second look takes seconds. An attention with a map that stays wrong is wrong.
        if not findings and tolerance.allowed < errors.max() <= tolerance.limit:
            objects = tuple(np.flatnonzero(errors.max(1) > tolerance.allowed).tolist())
            largest = largest_error(case, configuration, objects, device, dtype)
            found = replace(found, tolerance=tolerance.raised(largest))
        expected = case_maps(case, configuration, expected_maps[index], found.tolerance)
        if problems := mismatches(expected, found):
            draw = pictures is not None and len(findings) < DRAWN
            error = float(errors.max())
            findings.append(
                Finding(
                    "relevance",
                    "\n".join(problems),
                    case=found.case,
                    error=error if np.isfinite(error) else None,
                    budget=found.tolerance.allowed,
                    configuration=configuration.name,
                    pictures=(str(draw_maps(expected, found, pictures)),) if draw and pictures else (),
                )
            )
    return findings


@functools.cache
def relevance_tolerance(case: ReferenceCase, device: torch.device, dtype: torch.dtype) -> Tolerance:
    """By the largest error of right implementations in any map of this image.

    Measured once on a machine, and cached.
    """

    def measure() -> Arrays:
        chosen = case.cumulative
        errors = _errors(right_implementations(), case, device, dtype, chosen)
        # Where a map depends on a difference of large numbers its errors are large, and spread widely. A few more draws
        # of the worst one say how far they reach.
        worst, one = np.unravel_index(errors.max(-1).argmax(), errors.shape[:2])
        more = more_implementations(MORE_DRAWS, first_seed=2)
        again = _errors(more, case, device, dtype, [chosen[worst]], [int(one)])
        errors[worst, one] = np.maximum(errors[worst, one], again[0, 0])
        return {"errors": errors.max(0)}

    errors = cached("relevance-rounding", {**case.inputs_of_all(), **machine(device, dtype)}, measure)[
        "errors"
    ]
    return map_tolerance(errors, roundings(case), dtype)


@functools.cache
def largest_error(
    case: ReferenceCase,
    configuration: Configuration,
    objects: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """Of many right implementations, in the maps of these objects under the configuration.

    Some maps depend on a single difference of large numbers, often a row of R - I that nearly sums to zero and is then
    divided by its sum. The error of such a map is one random number times a large factor, and the few implementations
    that `relevance_tolerance` is measured on may all be close by luck. Measured once on a machine, and cached.
    """

    def measure() -> Arrays:
        many = more_implementations(SECOND_LOOKS, first_seed=2 + MORE_DRAWS)
        return {"errors": _errors(many, case, device, dtype, [configuration], objects)}

    key = {
        **case.inputs(configuration),
        **machine(device, dtype),
        "objects": str(objects),
        "draws": str(SECOND_LOOKS),
    }
    return float(cached("relevance-second-look", key, measure)["errors"].max())


def roundings(case: ReferenceCase) -> float:
    """Rounding errors of all attention layers (one in an encoder layer, two in a decoder layer), in units of eps.

    They add up as a random walk does. No implementation can be closer than that.
    """
    return (case.layout.encoder_layers + 2 * case.layout.decoder_layers) ** 0.5


def _errors(
    implementations: Iterable[Attention],
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration],
    objects: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """The largest error of the implementations in each map: (C, O, M)."""
    expected = case.maps(configurations)
    expected = expected if objects is None else expected[:, list(objects)]
    return np.max(
        [
            map_errors(
                expected, maps_with(attention, case, device, dtype, configurations, objects=objects).maps
            )
            for attention in implementations
        ],
        axis=0,
    )
