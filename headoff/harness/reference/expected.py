"""Expected detections: what the float64 oracle finds, and whether a candidate finds the same.

A golden file holds the oracle's answer for one scene and all configurations, rounded to be read by people. It
does not depend on the device it was made on: float64 arithmetic differs between machines by some 1e-13, the file
keeps 6 decimals. What a candidate may differ by is measured (`headoff.harness.model.detections`), never a constant that
somebody chose.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headoff.detections import Detections

SCORE_DECIMALS = 6
BOX_DECIMALS = 4


@dataclass(frozen=True)
class Tolerance:
    """Largest accepted difference of a score, and of a box's side in pixels."""

    score: float
    box: float

    @classmethod
    def of(cls, score: float, box: float) -> Tolerance:
        """For a candidate that may be off by so much, compared with what a file has rounded."""
        return cls(score + 0.5 * 10**-SCORE_DECIMALS, box + 0.5 * 10**-BOX_DECIMALS)


def expected_rows(detections: Detections) -> list[dict[str, Any]]:
    """Detections as a golden file keeps them."""
    return [
        {
            "query": each.query,
            "class": each.class_name,
            "score": round(each.score, SCORE_DECIMALS),
            "box": [round(side, BOX_DECIMALS) for side in each.box],
        }
        for each in detections
    ]


def expectation(
    confidence: float, image_size: tuple[int, int], detections: Mapping[str, Detections]
) -> dict[str, Any]:
    """The detections under each configuration, by its name, as a golden file keeps them."""
    return {
        "confidence": confidence,
        "image_size": list(image_size),
        "configurations": {name: expected_rows(each) for name, each in detections.items()},
    }


def mismatches(
    expected: Sequence[Mapping[str, Any]],
    detections: Detections,
    confidence: float,
    tolerance: Tolerance,
    ambiguous: Container[int] = (),
) -> list[str]:
    """What differs between the expected and the found detections of one configuration, a sentence each.

    A detection whose score is within tolerance of the confidence may be there or not; one of an `ambiguous` query,
    whose two likeliest classes are within tolerance of each other, may be of either.
    """
    wanted = {each["query"]: each for each in expected}
    found = {each.query: each for each in detections}
    problems = []
    for query in sorted(wanted.keys() | found.keys()):
        want, got = wanted.get(query), found.get(query)
        if want is None or got is None:
            score = got.score if got else want["score"] if want else 0.0
            if abs(score - confidence) > tolerance.score:
                what = f"{got.class_name} {score:.6f}" if got else f"{want['class']} {score:.6f}"  # type: ignore[index]
                problems.append(f"query {query}: {what} {'is not expected' if got else 'is missing'}")
            continue
        score_error = abs(got.score - want["score"])
        if got.class_name != want["class"] and query not in ambiguous:
            problems.append(f"query {query}: found {got.class_name}, expected {want['class']}")
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
