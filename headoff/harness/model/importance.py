"""What heads contribute with the attention under test, compared with the float64 oracle's scores."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.choices import Site
from headoff.harness.finding import Finding
from headoff.harness.model.patched import (
    CallCount,
    counting_calls,
    features_on,
    findings_of_run,
    patched,
)
from headoff.harness.reference.cache import Arrays, cached
from headoff.harness.reference.cases import CONFIDENCE, ReferenceCase
from headoff.harness.reference.implementations import machine, right_implementations
from headoff.harness.tolerance import Tolerance
from headoff.importance.games import Game
from headoff.importance.measures import resolve_measure, score_all
from headoff.values import Objects, resolve_value

MEASURES = ("removal", "removal_columns")
"""Leaving a head out, in its layer and in all layers: 57 coalitions of a detector of 6 x 8 heads, one batch."""

SITE: Site = "decoder_cross"

VALUE = "logit"
"""Probabilities near 1 hide what a head contributes."""


@dataclass(frozen=True)
class ScoresFound:
    """Scores (objects, L or 1, H) by measure, float64 on the CPU, and the attention calls they took."""

    scores: dict[str, Tensor]
    calls: CallCount


def importance_with(
    attention: Attention, case: ReferenceCase, device: torch.device, dtype: torch.dtype
) -> ScoresFound:
    """The scores of all heads of cross-attention for the case's objects, by the class logit."""
    none_off = case.output.boxes[0]
    objects = Objects.of(case.objects, none_off, CONFIDENCE)
    with (
        patched(case, attention, device, dtype) as detector,
        counting_calls(detector, 1, 1) as calls,
    ):
        game = Game(
            detector,
            features_on(case, device, dtype),
            SITE,
            objects,
            (resolve_value(VALUE),),
            memory_budget=2**40,
        )
        results = score_all([resolve_measure(name) for name in MEASURES], game)
    scores = {name: found[0].scores for name, found in results.items() if found[0] is not None}
    return ScoresFound(scores, calls)


@functools.cache
def expected_importance(case: ReferenceCase) -> dict[str, Tensor]:
    """The oracle's."""
    detector = case.detector
    return importance_with(detector.attention, case, detector.device, detector.dtype).scores


@functools.cache
def importance_tolerance(case: ReferenceCase, device: torch.device, dtype: torch.dtype) -> Tolerance:
    """By the largest error of right implementations; the floor is one rounding of a logit."""
    expected = expected_importance(case)

    def measure() -> Arrays:
        largest = 0.0
        for attention in right_implementations():
            found = importance_with(attention, case, device, dtype).scores
            largest = max(largest, *(float((found[m] - expected[m]).abs().max()) for m in MEASURES))
        return {"score": np.array(largest)}

    measured = cached("importance-rounding", {**case.inputs_of_all(), **machine(device, dtype)}, measure)
    unit = torch.finfo(dtype).eps * float(case.output.logits[0].abs().max())
    return Tolerance(float(measured["score"]), unit)


def importance_findings(
    attention: Attention,
    case: ReferenceCase,
    device: torch.device,
    dtype: torch.dtype,
    calls: Counter[str] | None = None,
) -> list[Finding]:
    """Where scores with `attention` are wrong: at most one finding for each measure, and calls.

    Args:
        calls: the calls at each site are added to these.
    """
    tolerance = importance_tolerance(case, device, dtype)
    expected = expected_importance(case)

    def compare(found: ScoresFound) -> list[Finding]:
        findings = []
        for measure in MEASURES:
            off = (found.scores[measure] - expected[measure]).abs()
            worst = float(off.max())
            if not worst <= tolerance.allowed:
                number, layer, head = np.unravel_index(int(off.argmax()), off.shape)
                where = f"L{layer}H{head}" if off.shape[1] > 1 else f"H{head} of all layers"
                findings.append(
                    Finding(
                        "detections",
                        f"{case.name}: what the removal of {where} costs {case.object_names[number]} is "
                        f"{float(found.scores[measure][number, layer, head]):.6f}, expected "
                        f"{float(expected[measure][number, layer, head]):.6f} (off by {worst:.1e}, allowed "
                        f"{tolerance.allowed:.1e})",
                        case=case.name,
                        error=worst,
                        budget=tolerance.allowed,
                        site=SITE,
                        layer=int(layer) if off.shape[1] > 1 else None,
                        head=int(head),
                    )
                )
        return findings

    def run() -> ScoresFound:
        return importance_with(attention, case, device, dtype)

    return findings_of_run("detections", f"importance of heads in {case.name}", run, compare, calls)
