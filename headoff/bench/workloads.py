"""What `headoff bench` and pytest's benchmarks compute: a workload makes a `TimedCall` for any attention.

It names the tensors that the call returns, so that they can be compared with the float64 oracle's. All attentions get
the same inputs. Each call has its own copy of them, which can be filled with other contents between two runs
(`Workload.varied`). Single calls are in `calls`, decoder, sweep and relevance in `model_workloads`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from headoff.attention import Attention, eager
from headoff.detr.detector import Detr
from headoff.harness.finding import Property
from headoff.harness.reference.implementations import right_implementations
from headoff.timing import TimedCall

Direction = Literal["forward", "backward", "forward + backward"]


@dataclass(frozen=True)
class Output:
    """A tensor that a call returned.

    Attributes:
        rows: (n, m). Every row is compared relative to its own peak, so that small rows must be right as well.
        property: what is wrong with an attention that gets it wrong.
    """

    rows: Tensor
    property: Property


class Workload(ABC):
    """Something to compute with an attention."""

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the attention's inputs."""

    @property
    def roundings(self) -> int:
        """Attention layers that an output passes through; each rounds at least once."""
        return 1

    @property
    def relu_detector(self) -> Detr | None:
        """The detector whose ReLUs the gradients pass through, where an output depends on gradients."""
        return None

    @property
    def oracle(self) -> Any:
        """The attention that gives the truth in float64."""
        return eager

    def implementations(self) -> Iterable[Any]:
        """Correct attentions, whose errors set the tolerance."""
        return right_implementations()

    @abstractmethod
    def timed_call(self, attention: Any) -> TimedCall:
        """The computation with this attention."""

    @abstractmethod
    def outputs(self, result: Any) -> dict[str, Output]:
        """What the timed call returned, by name."""

    def outputs_of(self, attention: Attention) -> dict[str, Output]:
        """The same outputs for the oracle, which need not compute all that is timed."""
        return self.outputs(self.timed_call(attention)())

    @abstractmethod
    def in_dtype(self, dtype: torch.dtype) -> Self:
        """The same inputs, as rounded to the present dtype, in another."""

    @abstractmethod
    def varied(self, number: int) -> Self:
        """The same computation of other inputs, of the same sizes; `number` says which.

        `TimedCall.fill` of a call of this workload takes what this returns. The sizes of all numbers in it are about
        those of this one, for the tolerance is measured for one number and not for every one.
        """
