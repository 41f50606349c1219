"""The relevance level: maps made through the backward pass of the attention under test, against those of the oracle."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from headoff.attention import Attention, attention_label
from headoff.detr.detector import Detector, Features
from headoff.gates import Configuration, Gates, stack
from headoff.harness.finding import Finding
from headoff.harness.model.call_count import CallCount
from headoff.harness.model.patched import failures_as, features_on, patched
from headoff.harness.model.relu_masks import Decisions
from headoff.harness.reference.cache import Arrays, kept
from headoff.harness.reference.cases import METHOD, Subject
from headoff.harness.reference.implementations import machine, more_implementations, right_implementations
from headoff.harness.reference.map_pictures import write_triptych
from headoff.harness.reference.maps import Budget, CaseMaps, map_errors, mismatches
from headoff.relevance import RelevanceEngine, Target
from headoff.relevance.engine import Backward

MEMORY = 2**32
"""Bytes for the engine: enough that all configurations of a cumulative sweep are decoded together."""

MORE_DRAWS = 6
"""Right implementations that the map with the largest rounding errors is made by, beside those that make all."""

SECOND_LOOKS = 24
"""Right implementations that a map is made by again where a candidate's is off by more than is allowed, but not far."""

DRAWN = 2
"""Findings of one image that get a picture: the others look alike."""


@dataclass(frozen=True, eq=False)
class FoundMaps:
    """Maps (C, O, M, h, w) in float64, logits (C, Q, K + 1) and boxes (C, Q, 4), and the calls that they took."""

    maps: NDArray[np.float64]
    logits: torch.Tensor
    boxes: torch.Tensor
    calls: CallCount


def relevance_findings(
    attention: Attention,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration] | None = None,
    pictures: Path | None = None,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where relevance maps made with `attention` are wrong: at most one finding for each configuration, and calls.

    Of the cumulative `configurations` unless told. Gradients pass the attention by its own backward pass. `pictures`: a
    folder, None to draw none. The calls at each site are added to `calls`.
    """
    chosen = tuple(subject.cumulative if configurations is None else configurations)
    label = f"{attention_label(attention)} in {_name(dtype)} on {device}"
    findings: list[Finding] = []
    found = None
    with failures_as(findings, "relevance", f"relevance of {subject.name}"):
        found = found_maps(attention, subject, device, dtype, chosen)
    if found is None:
        return findings
    # Once for encoding and for decoding, and again for backward passes, which repeat the forward pass.
    findings += found.calls.findings(f"relevance of {subject.name}", 1, 1, at_least=True)
    if calls is not None:
        calls.update(found.calls.by_site)
    return findings + map_findings(subject, chosen, found.maps, device, dtype, label, pictures)


def found_maps(
    attention: Attention,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration],
    *,
    backward: Backward = "callable",
    gates: Gates | None = None,
    objects: Sequence[int] | None = None,
) -> FoundMaps:
    """With `attention` in the subject's model, from the oracle's features and its ReLUs' decisions on.

    Args:
        gates: others than those of the configurations, as many.
        objects: indices of the subject's objects that are explained; all of them where None.
    """
    at = [subject.configurations.index(each) for each in configurations]
    gates = stack(configurations, subject.layout) if gates is None else gates
    targets = subject.targets if objects is None else [subject.targets[index] for index in objects]
    features = features_on(subject, device, dtype)
    with patched(subject, attention, device, dtype) as detector:
        return maps_by(detector, features, gates, targets, subject.decisions[at], backward)


def maps_by(
    detector: Detector,
    features: Features,
    gates: Gates,
    targets: Sequence[Target],
    decisions: Decisions,
    backward: Backward = "callable",
) -> FoundMaps:
    """By `RelevanceEngine`, under all `gates` and with the ReLUs' `decisions` under each of them."""
    with decisions.imposed_on(detector), CallCount(detector) as calls:
        engine = RelevanceEngine(
            detector,
            features,
            method=METHOD,
            backward=backward,
            # Not by headoff's own fused kernels, where there are: they are no part of what is judged.
            kernels="tiles" if features.tokens.device.type == "cpu" else "torch",
            memory_budget=MEMORY,
        )
        results = sorted(engine.run(gates, lambda *_: targets), key=lambda each: each.index)
    maps = [torch.stack([pair.rows for pair in each.pairs if pair is not None]) for each in results]
    return FoundMaps(
        torch.stack(maps).unflatten(-1, features.grid).double().numpy(),
        torch.stack([each.logits for each in results]),
        torch.stack([each.boxes for each in results]),
        calls,
    )


def case_of(
    subject: Subject, configuration: Configuration, maps: NDArray[np.float64], budget: Budget, found_by: str
) -> CaseMaps:
    """The maps of one configuration (O, M, h, w), with all that they are to be compared by."""
    return CaseMaps(
        case=f"{subject.name}, {configuration.name}",
        maps=maps,
        objects=subject.object_names,
        inputs=subject.inputs(configuration),
        budget=budget,
        found_by=found_by,
    )


def map_findings(
    subject: Subject,
    configurations: Sequence[Configuration],
    maps: NDArray[np.float64],
    device: torch.device,
    dtype: torch.dtype,
    found_by: str,
    pictures: Path | None = None,
) -> list[Finding]:
    """Where `maps` (C, O, M, h, w), made in `dtype` on `device`, are wrong: at most one finding a configuration."""
    budget = relevance_budget(subject, device, dtype)
    truth = subject.maps(configurations)
    findings: list[Finding] = []
    for index, configuration in enumerate(configurations):
        case = case_of(subject, configuration, maps[index], budget, found_by)
        # Looking again takes seconds. An attention with a map that stays wrong is wrong.
        if not findings and (doubtful := _doubtful(truth[index], case)):
            reached = error_reached(subject, configuration, doubtful, device, dtype)
            case = replace(case, budget=budget.raised(reached))
        draw = pictures if len(findings) < DRAWN else None
        if (finding := _judge(subject, configuration, truth[index], case, draw)) is not None:
            findings.append(finding)
    return findings


def _doubtful(truth: NDArray[np.float64], found: CaseMaps) -> tuple[int, ...]:
    """Objects with a map that is off by more than is allowed, if none is by more than could be."""
    errors = map_errors(truth, found.maps).max(1)
    if errors.max() > found.budget.limit:
        return ()
    return tuple(np.flatnonzero(errors > found.budget.allowed).tolist())


def _judge(
    subject: Subject,
    configuration: Configuration,
    truth: NDArray[np.float64],
    found: CaseMaps,
    pictures: Path | None = None,
) -> Finding | None:
    """A finding where the maps of one configuration are wrong."""
    expected = case_of(subject, configuration, truth, found.budget, "the float64 oracle")
    problems = mismatches(expected, found)
    if not problems:
        return None
    drawn = () if pictures is None else (str(write_triptych(expected, found, pictures)),)
    error = float(map_errors(expected.maps, found.maps).max())
    return Finding(
        "relevance",
        "\n".join(problems),
        case=found.case,
        error=error if np.isfinite(error) else None,
        budget=found.budget.allowed,
        configuration=configuration.name,
        pictures=drawn,
    )


@functools.cache
def relevance_budget(subject: Subject, device: torch.device, dtype: torch.dtype) -> Budget:
    """What a candidate may be off by on this image: by the largest error of right implementations on any of its maps.

    Measured once on a machine, and kept.
    """

    def measure() -> Arrays:
        chosen = subject.cumulative
        truth = subject.maps(chosen)
        errors = np.max(
            [
                map_errors(truth, found_maps(each, subject, device, dtype, chosen).maps)
                for each in right_implementations()
            ],
            axis=0,
        )
        # Where a map hangs on a difference of large numbers its errors are large, and spread widely. A few more draws
        # of the worst say how far they reach.
        worst, one = np.unravel_index(errors.max(-1).argmax(), errors.shape[:2])
        for each in more_implementations(MORE_DRAWS, first_seed=2):
            again = found_maps(each, subject, device, dtype, [chosen[worst]], objects=[int(one)]).maps[0, 0]
            errors[worst, one] = np.maximum(errors[worst, one], map_errors(truth[worst, one], again))
        return {"errors": errors.max(0)}

    about = {**subject.inputs(subject.cumulative[-1]), **machine(device, dtype)}
    errors = kept("relevance-rounding", about, measure)["errors"]
    return Budget.measured(errors, roundings(subject), dtype=dtype, measured_in=dtype)


@functools.cache
def error_reached(
    subject: Subject,
    configuration: Configuration,
    objects: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> float:
    """The largest error of many right implementations in the maps of these objects under the configuration.

    Some maps hang on a single difference of large numbers, often a row of R - I that nearly sums to zero and is then
    divided by its sum. The error of such a map is one random number times a large factor, and of the few
    implementations that `relevance_budget` asks all may have come out near the truth. Measured once on a machine, and
    kept.
    """

    def measure() -> Arrays:
        truth = subject.maps([configuration])[:, list(objects)]
        return {
            "errors": np.array(
                [
                    map_errors(
                        truth, found_maps(each, subject, device, dtype, [configuration], objects=objects).maps
                    ).max()
                    for each in more_implementations(SECOND_LOOKS, first_seed=2 + MORE_DRAWS)
                ]
            )
        }

    about = {
        **subject.inputs(configuration),
        **machine(device, dtype),
        "objects": str(objects),
        "implementations": str(SECOND_LOOKS),
    }
    return float(kept("relevance-second-look", about, measure)["errors"].max())


def roundings(subject: Subject) -> float:
    """Rounding errors of all attention layers (one in an encoder layer, two in a decoder layer), in units of one.

    They add up as a random walk does. Nobody can be asked to be closer than that.
    """
    return (subject.layout.encoder_layers + 2 * subject.layout.decoder_layers) ** 0.5


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
