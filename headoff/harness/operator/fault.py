"""A known fault: one way for an attention to be wrong, with a faulty reference that gives its wrong answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from headoff.harness.finding import Property
from headoff.harness.operator.call import Results


@dataclass(frozen=True, eq=False)
class Fault(ABC):
    """One way to be wrong.

    Args:
        property: what of the attention is wrong.
        clause: what is wrong with it, after "property: ".
    """

    property: Property
    clause: str

    def __str__(self) -> str:
        return f"{self.property}: {self.clause}"

    def is_rounding(self) -> bool:
        """Whether it is a rounding to a smaller dtype, and nothing else."""
        return self.property == "precision"

    @abstractmethod
    def answer(self, tensors: Any, case: Any) -> Results:
        """Context, or gradients by name, float64 on the CPU, that a patch with this fault gives for `case`."""
