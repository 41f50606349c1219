"""How class logits become scores: softmax with a "no object" class, or one sigmoid per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """How the scores of a detector's queries are computed from its class logits.

    Attributes:
        kind: `softmax`: the last logit is "no object", and a query finds its most likely class or nothing. `sigmoid`:
            every class has a probability of its own, and a query may find several classes.
        most: with `sigmoid`, how many pairs of query and class can be detections in an image: those with the highest
            probabilities. None for no limit.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    most: int | None = None

    def columns(self, classes: int) -> int:
        """The number of logits of a query."""
        return classes + (self.kind == "softmax")

    def probabilities(self, logits: Tensor) -> Tensor:
        """(..., K) of the K classes, without "no object", from logits (..., columns)."""
        return logits.softmax(-1)[..., :-1] if self.kind == "softmax" else logits.sigmoid()

    def detected(self, probabilities: Tensor, confidence: float) -> Tensor:
        """bool (..., Q, K), True where a query detects a class, from `probabilities` (..., Q, K)."""
        exceeds = probabilities > confidence
        if self.kind == "softmax":
            first = probabilities.argmax(-1, keepdim=True)
            return exceeds & (exceeds.new_zeros(exceeds.shape).scatter_(-1, first, True))
        flat = probabilities.flatten(-2)
        if self.most is None or self.most >= flat.shape[-1]:
            return exceeds
        chosen = flat.topk(self.most, dim=-1).indices
        among = exceeds.new_zeros(flat.shape).scatter_(-1, chosen, True)
        return exceeds & among.view(exceeds.shape)


SOFTMAX = Scoring()
