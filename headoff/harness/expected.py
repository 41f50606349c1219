"""Expected detections: what the float64 oracle finds, and whether a candidate finds the same.

A golden file holds the oracle's answer for one scene and all configurations, rounded to be read by people. It
does not depend on the device it was made on: float64 arithmetic differs between machines by some 1e-13, the file
keeps 6 decimals. A candidate may differ from it by a small factor of what eager attention in the candidate's own
dtype, on the candidate's own device, differs by; never by a constant that somebody chose.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from headoff.sweeps import SweepResult

SCORE_DECIMALS = 6
BOX_DECIMALS = 4
ERROR_FACTOR = 4.0
"""A candidate's rounding errors may be this much larger than eager's: another order of the same sums."""


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference of a score, and of a box's side in pixels."""

    score: float
    box: float


def expectation(result: SweepResult) -> dict[str, Any]:
    """The detections of a sweep, by configuration, as a golden file keeps them."""
    return {
        "confidence": result.confidence,
        "image_size": list(result.image_size),
        "configurations": {
            configuration.name: [
                {
                    "query": each.query,
                    "class": each.class_name,
                    "score": round(each.score, SCORE_DECIMALS),
                    "box": [round(side, BOX_DECIMALS) for side in each.box],
                }
                for each in detections
            ]
            for configuration, detections in zip(result.configurations, result.detections, strict=True)
        },
    }


def tolerance_from(truth: SweepResult, eager: SweepResult) -> Tolerance:
    """`ERROR_FACTOR` times the error of `eager` against `truth`, plus half a unit of the file's last decimal.

    The error is the largest over all queries and configurations: of a class probability, and of a box's side in
    pixels. float32 must hold the sums it was measured with, so its own resolution at 1 and at the image's size
    is the least that an error is taken to be.
    """
    resolution = torch.finfo(torch.float32).eps
    probabilities = [result.logits.double().softmax(-1) for result in (truth, eager)]
    score = (probabilities[0] - probabilities[1]).abs().max().item()
    size = max(truth.image_size)
    box = (truth.boxes.double() - eager.boxes.double()).abs().max().item() * 2 * size
    return Tolerance(
        score=ERROR_FACTOR * max(score, resolution) + 0.5 * 10**-SCORE_DECIMALS,
        box=ERROR_FACTOR * max(box, resolution * size) + 0.5 * 10**-BOX_DECIMALS,
    )


def mismatches(
    expected: Mapping[str, Any], result: SweepResult, configuration: str, tolerance: Tolerance
) -> list[str]:
    """What differs between the expected and the found detections of one configuration, a sentence each.

    A detection whose score is within tolerance of the confidence may be there or not.
    """
    index = [each.name for each in result.configurations].index(configuration)
    confidence = expected["confidence"]
    wanted = {each["query"]: each for each in expected["configurations"][configuration]}
    found = {each.query: each for each in result.detections[index]}
    problems = []
    for query in sorted(wanted.keys() | found.keys()):
        want, got = wanted.get(query), found.get(query)
        if want is None or got is None:
            score = got.score if got else want["score"] if want else 0.0
            if abs(score - confidence) > tolerance.score:
                what = f"{got.class_name} {score:.6f}" if got else f"{want['class']} {score:.6f}"  # type: ignore[index]
                problems.append(f"query {query}: {what} {'is not expected' if got else 'is missing'}")
            continue
        if got.class_name != want["class"]:
            problems.append(f"query {query}: found {got.class_name}, expected {want['class']}")
        score_error = abs(got.score - want["score"])
        if score_error > tolerance.score:
            problems.append(
                f"query {query}: score {got.score:.6f}, expected {want['score']:.6f} "
                f"(off by {score_error:.1e}, allowed {tolerance.score:.1e})"
            )
        box_error = max(abs(a - b) for a, b in zip(got.box, want["box"], strict=True))
        if box_error > tolerance.box:
            problems.append(
                f"query {query}: box {[round(side, 2) for side in got.box]}, expected {want['box']} "
                f"(off by {box_error:.1e} px, allowed {tolerance.box:.1e})"
            )
    return problems


def dump(expected: Mapping[str, Any]) -> str:
    """The text of a golden file: JSON with one detection a line, so that a difference reads well in a review."""
    lines = [
        "{",
        f' "confidence": {json.dumps(expected["confidence"])},',
        f' "image_size": {json.dumps(expected["image_size"])},',
        ' "configurations": {',
    ]
    names = list(expected["configurations"])
    for name in names:
        rows = [f"   {json.dumps(row)}" for row in expected["configurations"][name]]
        body = "[\n" + ",\n".join(rows) + "\n  ]" if rows else "[]"
        lines.append(f"  {json.dumps(name)}: {body}" + ("," if name != names[-1] else ""))
    return "\n".join([*lines, " }", "}"]) + "\n"
