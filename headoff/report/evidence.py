"""The results of an explanation, in sentences."""

import math

from headoff.relevance.explanations import Explanation, ExplanationStatus
from headoff.report.story import verdict
from headoff.sweeps import SweepResult
from headoff.wording import counted

_MOST_NAMED = 4
"""Most configurations named in a sentence; more are counted."""


def evidence(explanation: Explanation) -> str:
    """How much relevance is in the boxes in the baseline, and which configurations have no relevance."""
    objects = len(explanation.objects)
    if not objects:
        return "There is no object, so there is nothing to explain."
    parts = []
    names = [configuration.text for configuration in explanation.configurations]
    if "none" in names:
        shares = explanation.box_shares[names.index("none"), :, -1].tolist()
        inside = [share for share in shares if not math.isnan(share)]
        if inside:
            whose = "its box" if objects == 1 else "their boxes"
            spread = f" ({min(inside):.0%} to {max(inside):.0%})" if len(inside) > 1 else ""
            parts.append(
                f"With none off {sum(inside) / len(inside):.0%} of the relevance after layer "
                f"{explanation.layers[-1]} is within {whose}{spread}."
            )
    without = [
        configuration.name
        for configuration, statuses in zip(explanation.configurations, explanation.statuses, strict=True)
        if all(layers[-1] is ExplanationStatus.NO_EVIDENCE for layers in statuses)
    ]
    if without:
        named = ", ".join(without) if len(without) <= _MOST_NAMED else counted(len(without), "configuration")
        parts.append(f"No image evidence at all: {named}.")
    return " ".join(parts)


def headline(result: SweepResult, explanation: Explanation | None = None) -> str:
    """The verdict on the sweep; or the sentences on an explanation, if its only configuration is the baseline."""
    if explanation is None or len(result) != 1 or result.configurations[0].clauses:
        return verdict(result)
    if not len(explanation.objects):
        return evidence(explanation)
    return f"{counted(len(explanation.objects), 'object')} explained. {evidence(explanation)}"
