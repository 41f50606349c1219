"""The detector level: logits, boxes and detections with the attention under test, against the float64 oracle's."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.detr.detector import Features
from headoff.gates import Configuration, Gates, stack
from headoff.harness.finding import Finding
from headoff.harness.model.call_count import CallCount
from headoff.harness.model.patched import failures_as, features_on, patched
from headoff.harness.reference.box_pictures import draw_detections
from headoff.harness.reference.cases import CONFIDENCE, Subject
from headoff.harness.reference.expected import Tolerance, expected_rows, mismatches
from headoff.harness.reference.implementations import right_implementations
from headoff.harness.reference.maps import ERROR_FACTOR
from headoff.sweeps import by_encoder_gate, decode_all

SHOWN = 3
"""Sentences in a message; what else is wrong is counted."""

DRAWN = 2
"""Findings of one image that get a picture: the others look alike."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Logits (C, Q, K + 1) and boxes (C, Q, 4) in float64 on the CPU, and the calls that they took."""

    logits: Tensor
    boxes: Tensor
    calls: CallCount


@dataclass(frozen=True)
class AnswerBudget:
    """How far logits and boxes (fractions of the image) may be from the truth, and probabilities."""

    logits: float
    boxes: float
    probability: float


def detection_findings(
    attention: Attention,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    configurations: Sequence[Configuration] | None = None,
    pictures: Path | None = None,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where the model's answers with `attention` are wrong: at most one finding for each configuration, and calls.

    All `configurations` (by default the subject's) are decoded as one batch, as a sweep does. `pictures`: a folder,
    None to draw none. The calls at each site are added to `calls`.
    """
    chosen = tuple(subject.configurations if configurations is None else configurations)
    case = f"detections of {subject.name}"
    gates = stack(chosen, subject.layout)
    budget = answer_budget(subject, device, dtype)
    findings: list[Finding] = []
    answer = None
    with failures_as(findings, "detections", case):
        answer = answer_of(attention, subject, device, dtype, gates)
    if answer is None:
        return findings
    batches = len(by_encoder_gate(gates))
    findings += answer.calls.findings(case, batches, batches)
    if calls is not None:
        calls.update(answer.calls.by_site)
    for index, configuration in enumerate(chosen):
        draw = pictures if len(findings) < DRAWN else None
        finding = _judge(subject, configuration, answer.logits[index], answer.boxes[index], budget, draw)
        if finding is not None:
            findings.append(finding)
    return findings


def answer_of(
    attention: Attention,
    subject: Subject,
    device: torch.device,
    dtype: torch.dtype,
    gates: Gates,
    features: Features | None = None,
) -> Answer:
    """What the subject's model answers with `attention` under all `gates`, from the oracle's features on, or others."""
    features = features_on(subject, device, dtype) if features is None else features
    with patched(subject, attention, device, dtype) as detector, torch.no_grad():
        with CallCount(detector) as calls:
            output = decode_all(detector, features, gates, memory_budget=2**40)
    return Answer(output.logits[:, 0].double().cpu(), output.boxes[:, 0].double().cpu(), calls)


@functools.cache
def answer_budget(subject: Subject, device: torch.device, dtype: torch.dtype) -> AnswerBudget:
    """`ERROR_FACTOR` times the largest error of right implementations under any of the subject's configurations.

    Plus one rounding, for all of them may be exact by luck.
    """
    gates = stack(subject.configurations, subject.layout)
    truth = subject.answers
    logits = boxes = probability = 0.0
    for attention in right_implementations():
        found = answer_of(attention, subject, device, dtype, gates)
        logits = max(logits, _off(found.logits, truth.logits))
        boxes = max(boxes, _off(found.boxes, truth.boxes))
        probability = max(probability, _off(found.logits.softmax(-1), truth.logits.softmax(-1)))
    floor = torch.finfo(dtype).eps
    return AnswerBudget(
        logits=ERROR_FACTOR * logits + floor * float(truth.logits.abs().max()),
        boxes=ERROR_FACTOR * boxes + floor,
        probability=ERROR_FACTOR * probability + floor,
    )


def tolerance_of(subject: Subject, budget: AnswerBudget) -> Tolerance:
    """The same for detections, as a golden file has them: rounded, boxes by their sides in pixels."""
    # A side is a centre plus half a width: off by 1.5 times as much as they are.
    return Tolerance.of(budget.probability, 1.5 * budget.boxes * max(subject.image_size))


def _judge(
    subject: Subject,
    configuration: Configuration,
    logits: Tensor,
    boxes: Tensor,
    budget: AnswerBudget,
    pictures: Path | None,
) -> Finding | None:
    index = subject.configurations.index(configuration)
    truth = subject.answers
    true_logits, true_boxes = truth.logits[index], truth.boxes[index]
    problems: list[str] = []
    error, allowed = 0.0, budget.logits
    for what, found, true, limit in (
        ("logits", logits, true_logits, budget.logits),
        ("boxes", boxes, true_boxes, budget.boxes),
    ):
        if not bool(found.isfinite().all()):
            bad = int((~found.isfinite()).any(-1).sum())
            problems.append(f"{what} of {bad} of {len(found)} queries are NaN or infinite")
            continue
        off = (found - true).abs()
        worst = float(off.max())
        if worst > limit:
            place = divmod(int(off.argmax()), off.shape[1])
            problems.append(
                f"{what} are off by up to {worst:.1e} (allowed {limit:.1e}), most at query {place[0]}, "
                f"number {place[1]}: "
                f"{float(found[place]):.6g}, expected {float(true[place]):.6g}"
            )
            if worst / limit > error / allowed:
                error, allowed = worst, limit
    expected = expected_rows_of(subject, configuration)
    finite = bool(logits.isfinite().all() and boxes.isfinite().all())
    detections = subject.detections(logits, boxes) if finite else None
    if detections is not None:
        tolerance = tolerance_of(subject, budget)
        likeliest = true_logits.softmax(-1)[:, :-1].topk(2).values
        ambiguous = (likeliest[:, 0] - likeliest[:, 1] <= 2 * tolerance.score).nonzero().flatten().tolist()
        problems += mismatches(expected, detections, CONFIDENCE, tolerance, ambiguous)
    if not problems:
        return None
    case = f"{subject.name}, {configuration.name}"
    drawn: tuple[str, ...] = ()
    if pictures is not None and detections is not None:
        right = subject.detections(true_logits, true_boxes)
        drawn = (str(draw_detections(subject.image, right, detections, case, pictures)),)
    shown = problems[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
    return Finding(
        "detections",
        f"{case}: " + "; ".join(shown),
        case=case,
        error=error or None,
        budget=allowed if error else None,
        configuration=configuration.name,
        pictures=drawn,
    )


def expected_rows_of(subject: Subject, configuration: Configuration) -> list[dict]:
    """The expected detections as a golden file has them: of the file, where there is one, or of the oracle."""
    golden = _golden(subject)
    if golden is not None and configuration.name in golden["configurations"]:
        return golden["configurations"][configuration.name]
    index = subject.configurations.index(configuration)
    return expected_rows(subject.detections(subject.answers.logits[index], subject.answers.boxes[index]))


@functools.cache
def _golden(subject: Subject) -> dict | None:
    if subject.golden is None:
        return None
    path = subject.golden / "test_heads_off_detections" / f"test_oracle[{subject.name}].json"
    return json.loads(path.read_text()) if path.is_file() else None


def _off(found: Tensor, true: Tensor) -> float:
    return float((found - true).abs().max())
