"""Logits, boxes and detections of the model with the attention under test, compared with the float64 oracle's."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.detections import Detections
from headoff.detr.detector import Features
from headoff.gates import Configuration, Gates, stack
from headoff.harness.finding import Finding
from headoff.harness.model.patched import CallCount, counting_calls, features_on, findings_of_run, patched
from headoff.harness.reference.cache import Arrays, cached
from headoff.harness.reference.cases import CONFIDENCE, ReferenceCase
from headoff.harness.reference.implementations import machine, right_implementations
from headoff.harness.reference.pictures import draw_detections
from headoff.harness.tolerance import Tolerance
from headoff.sweeps import by_encoder_gate, decode_all

SHOWN = 3
"""Sentences in a message; how many more problems there are is counted."""

DRAWN = 2
"""Findings of one image that get a picture: the others look alike."""


@dataclass(frozen=True, eq=False)
class ModelOutput:
    """Logits (C, Q, K + 1) and boxes (C, Q, 4) in float64 on the CPU, and the attention calls they took."""

    logits: Tensor
    boxes: Tensor
    calls: CallCount


@dataclass(frozen=True)
class OutputTolerance:
    """What logits, boxes (fractions of the image) and probabilities may be off by, absolutely."""

    logits: Tolerance
    boxes: Tolerance
    probability: Tolerance


def detection_findings(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration] | None = None,
    pictures: Path | None = None,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where the model's output with `attention` is wrong: at most one finding for each configuration, and calls.

    Args:
        configurations: decoded as one batch, as in a sweep; by default those of the case.
        pictures: a folder for pictures; None draws none.
        calls: the calls at each site are added to these.
    """
    chosen = tuple(case.configurations if configurations is None else configurations)
    tolerance = output_tolerance(case, device, dtype)

    def compare(found: ModelOutput) -> list[Finding]:
        findings: list[Finding] = []
        for index, configuration in enumerate(chosen):
            folder = pictures if len(findings) < DRAWN else None
            findings += _compare(
                case, configuration, found.logits[index], found.boxes[index], tolerance, folder
            )
        return findings

    def run() -> ModelOutput:
        return output_with(attention, case, device, dtype, stack(chosen, case.layout))

    return findings_of_run("detections", f"detections of {case.name}", run, compare, calls)


def output_with(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    gates: Gates,
    features: Features | None = None,
) -> ModelOutput:
    """The output of the case's model with `attention`, from the oracle's features (or others) on."""
    features = features_on(case, device, dtype) if features is None else features
    times = len(by_encoder_gate(gates))
    with (
        patched(case, attention, device, dtype) as detector,
        counting_calls(detector, times, times) as calls,
        torch.no_grad(),
    ):
        output = decode_all(detector, features, gates, memory_budget=2**40)
    return ModelOutput(output.logits[:, 0].double().cpu(), output.boxes[:, 0].double().cpu(), calls)


@functools.cache
def output_tolerance(case: ReferenceCase, device: torch.device, dtype: torch.dtype) -> OutputTolerance:
    """By the largest errors of right implementations under any of the case's configurations.

    The floor is one rounding. Measured once on a machine, and cached.
    """
    expected = case.output

    def measure() -> Arrays:
        gates = stack(case.configurations, case.layout)
        found = [output_with(attention, case, device, dtype, gates) for attention in right_implementations()]
        return {
            "logits": _largest([(one.logits - expected.logits) for one in found]),
            "boxes": _largest([one.boxes - expected.boxes for one in found]),
            "probability": _largest([one.logits.softmax(-1) - expected.logits.softmax(-1) for one in found]),
        }

    measured = cached("output-rounding", {**case.inputs_of_all(), **machine(device, dtype)}, measure)
    unit = torch.finfo(dtype).eps
    return OutputTolerance(
        logits=Tolerance(float(measured["logits"]), unit * float(expected.logits.abs().max())),
        boxes=Tolerance(float(measured["boxes"]), unit),
        probability=Tolerance(float(measured["probability"]), unit),
    )


def detection_mismatches(
    expected: Detections, found: Detections, tolerance: OutputTolerance, ambiguous: Container[int] = ()
) -> list[str]:
    """What differs between the detections of one configuration, a sentence each.

    A detection whose score is within tolerance of the confidence may be there or not; one of an `ambiguous` query,
    whose two likeliest classes are within tolerance of each other, may be of either class.
    """
    # Detections are float32. A box's side is a centre plus half a width: off by 1.5 times as much as they are.
    size, unit = max(expected.image_size), torch.finfo(torch.float32).eps
    allowed_score = tolerance.probability.allowed + unit
    allowed_side = (1.5 * tolerance.boxes.allowed + unit) * size
    wanted = {detection.query: detection for detection in expected}
    got = {detection.query: detection for detection in found}
    problems = []
    for query in sorted(wanted.keys() | got.keys()):
        if query not in wanted or query not in got:
            detection = got.get(query) or wanted[query]
            if abs(detection.score - CONFIDENCE) > allowed_score:
                what = "is not expected" if query in got else "is missing"
                problems.append(f"query {query}: {detection.class_name} {detection.score:.6f} {what}")
            continue
        want, have = wanted[query], got[query]
        score_error = abs(have.score - want.score)
        side_error = max(abs(a - b) for a, b in zip(have.box, want.box, strict=True))
        if have.label != want.label and query not in ambiguous:
            problems.append(f"query {query}: found {have.class_name}, expected {want.class_name}")
        if score_error > allowed_score:
            problems.append(
                f"query {query}: score {have.score:.6f}, expected {want.score:.6f} "
                f"(off by {score_error:.1e}, allowed {allowed_score:.1e})"
            )
        if side_error > allowed_side:
            problems.append(
                f"query {query}: box {[round(side, 2) for side in have.box]}, expected "
                f"{[round(side, 2) for side in want.box]} (off by {side_error:.1e} px, allowed {allowed_side:.1e})"
            )
    return problems


def expected_detections(case: ReferenceCase, configuration: Configuration) -> Detections:
    """The oracle's."""
    (index,) = case.indices([configuration])
    return case.detections(case.output.logits[index], case.output.boxes[index])


def _compare(
    case: ReferenceCase,
    configuration: Configuration,
    logits: Tensor,
    boxes: Tensor,
    tolerance: OutputTolerance,
    pictures: Path | None,
) -> list[Finding]:
    (index,) = case.indices([configuration])
    expected_logits, expected_boxes = case.output.logits[index], case.output.boxes[index]
    problems: list[str] = []
    error, allowed = 0.0, tolerance.logits.allowed
    for what, found, expected, limit in (
        ("logits", logits, expected_logits, tolerance.logits.allowed),
        ("boxes", boxes, expected_boxes, tolerance.boxes.allowed),
    ):
        finite = found.isfinite().all(-1)
        if not finite.all():
            problems.append(f"{what} of {int((~finite).sum())} of {len(found)} queries are NaN or infinite")
            continue
        off = (found - expected).abs()
        worst = float(off.max())
        if worst > limit:
            place = divmod(int(off.argmax()), off.shape[1])
            problems.append(
                f"{what} are off by up to {worst:.1e} (allowed {limit:.1e}), most at query {place[0]}, "
                f"number {place[1]}: {float(found[place]):.6g}, expected {float(expected[place]):.6g}"
            )
            if worst / limit > error / allowed:
                error, allowed = worst, limit
    detections = None
    if logits.isfinite().all() and boxes.isfinite().all():
        detections = case.detections(logits, boxes)
        likeliest = expected_logits.softmax(-1)[:, :-1].topk(2).values
        close = likeliest[:, 0] - likeliest[:, 1] <= 2 * tolerance.probability.allowed
        problems += detection_mismatches(
            expected_detections(case, configuration),
            detections,
            tolerance,
            close.nonzero().flatten().tolist(),
        )
    if not problems:
        return []
    name = f"{case.name}, {configuration.name}"
    drawn: tuple[str, ...] = ()
    if pictures is not None and detections is not None:
        expected_objects = expected_detections(case, configuration)
        drawn = (str(draw_detections(case.image, expected_objects, detections, name, pictures)),)
    shown = problems[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
    return [
        Finding(
            "detections",
            f"{name}: " + "; ".join(shown),
            case=name,
            error=error or None,
            budget=allowed if error else None,
            configuration=configuration.name,
            pictures=drawn,
        )
    ]


def _largest(differences: Sequence[Tensor]) -> np.ndarray:
    return np.array(max(float(difference.abs().max()) for difference in differences))
