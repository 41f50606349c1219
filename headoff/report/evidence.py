"""What an explanation shows, in sentences."""

import math

from headoff.figures.captions import title_of
from headoff.relevance.explanations import Explanation, ExplanationStatus
from headoff.report.story import verdict
from headoff.sweeps import SweepResult
from headoff.wording import counted

_NAMED = 4
"""Configurations named in a sentence; of more their number is enough."""


def evidence(explanation: Explanation) -> str:
    """Where the relevance is with nothing off, and under which configurations there is none."""
    objects = len(explanation.objects)
    if not objects:
        return "There is no object, hence nothing to explain."
    parts = []
    unharmed = next((i for i, each in enumerate(explanation.configurations) if not each.clauses), None)
    if unharmed is not None:
        inside = [each for each in explanation.box_shares[unharmed, :, -1].tolist() if not math.isnan(each)]
        if inside:
            whose = "its box" if objects == 1 else "their boxes"
            spread = f" ({min(inside):.0%} to {max(inside):.0%})" if len(inside) > 1 else ""
            parts.append(
                f"With nothing off {sum(inside) / len(inside):.0%} of the relevance after layer "
                f"{explanation.layers[-1]} is within {whose}{spread}."
            )
    without = [
        title_of(configuration)
        for configuration, statuses in zip(explanation.configurations, explanation.statuses, strict=True)
        if all(each[-1] is ExplanationStatus.NO_EVIDENCE for each in statuses)
    ]
    if without:
        named = ", ".join(without) if len(without) <= _NAMED else counted(len(without), "configuration")
        parts.append(f"No image evidence at all: {named}.")
    return " ".join(parts)


def headline(result: SweepResult, explanation: Explanation | None = None) -> str:
    """The verdict on the sweep; where its one configuration is nothing off, what an explanation says of that."""
    if explanation is None or len(result) != 1 or result.configurations[0].clauses:
        return verdict(result)
    if not len(explanation.objects):
        return evidence(explanation)
    return f"{counted(len(explanation.objects), 'object')} explained. {evidence(explanation)}"
