"""What `headoff.heads` costs, relative to one plain forward pass of the detector."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from headoff.bench.cases import Case, Provider
from headoff.bench.models import BenchmarkModel, Size, with_attention
from headoff.importance import HeadImportance, heads
from headoff.timing import TimedCall

OBJECTS = 5
"""Objects that heads are scored for. Random weights detect nothing, so these are the most confident queries."""

MEASURES = ("removal", "gradient", "shapley_columns", "shapley_layers")
TOLERANCE = 2e-3
"""Of scores in float32, relative to the largest: rounding errors of two decodes that are subtracted."""


def importance_cases(size: Size, model: BenchmarkModel, one_forward: Provider) -> Iterator[Case]:
    """One case with all measures, by torch's SDPA."""

    def providers() -> list[Provider]:
        confidence = confidence_of_objects(model)
        found = [_provider(model, confidence, measure) for measure in MEASURES]
        return [one_forward, *found]

    yield Case("importance", f"{model.name}, {OBJECTS} objects", providers, {one_forward.name})


def _provider(model: BenchmarkModel, confidence: float, measure: str) -> Provider:
    detector = with_attention(model.detector, "sdpa")

    def score(detector=detector) -> HeadImportance:
        return heads(
            detector,
            model.image,
            measures=measure,
            values="probability",
            ablations="zero",
            confidence=confidence,
        )

    return Provider.of(f"heads, {measure}", TimedCall(score), partial(_check, model, score, measure))


def _check(model: BenchmarkModel, score, measure: str, found: HeadImportance) -> str | None:
    """Against the efficiency axiom where all coalitions are known, else against float64."""
    scores, totals = found.get().scores, found.totals["zero", "probability"]
    if measure.startswith("shapley"):
        error = 0.0
        if measure == "shapley_columns":
            error = float((scores.sum((1, 2)) - (totals.on - totals.off)).abs().max())
        what = "scores do not sum to the value of all heads less that of none"
    else:
        exact = score(with_attention(model.in_dtype(torch.float64).detector, "sdpa")).get().scores
        error = float((scores - exact).abs().max())
        what = "scores differ from those in float64"
    largest = float(scores.abs().max())
    if not (largest > 0 and error <= TOLERANCE * largest):
        return f"{what}: by {error:.1e}, where the largest score is {largest:.1e}"
    return None


def confidence_of_objects(model: BenchmarkModel) -> float:
    """A confidence that `OBJECTS` queries exceed."""
    detector = with_attention(model.detector, "sdpa")
    with torch.inference_mode():
        logits = detector.decode(detector.encode_features(model.features)).logits[0, 0]
    best = logits.softmax(-1)[:, :-1].amax(-1).double().sort(descending=True).values
    last = min(OBJECTS, len(best) - 1)
    return float((best[last - 1] + best[last]) / 2)
