"""What each suite finds wrong with an attention, in this process: the checks that the suites' tests are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from headoff.attention import Attention
from headoff.harness.fallback import fallback_findings, model_calls
from headoff.harness.finding import Finding
from headoff.harness.model.detections import detection_findings
from headoff.harness.model.gradients import gradient_findings
from headoff.harness.model.relevance import relevance_findings
from headoff.harness.operator import SIDE_EFFECTS, operator_cases, operator_findings, side_effect_findings
from headoff.harness.reference.cases import ReferenceCase, case_names, reference_case
from headoff.harness.settings import Settings
from headoff.harness.torch_settings import watched_settings

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Judge:
    """The suites with the bundled model on the CPU, as `pytest -k heads_off --dtype ...` runs them.

    Attributes:
        seed: of random inputs.
        scenes: how many of the bundled scenes the model is tried on.
        dtype: the dtype asked for; a fault that is in half precision alone needs that one.
    """

    seed: int = 0
    scenes: int = 1
    dtype: torch.dtype = torch.float32

    def suites(self) -> dict[str, Callable[[Attention], Iterator[Finding]]]:
        """By name, a function that yields what a suite finds wrong; lazily, for often the first finding is enough."""
        return {
            "operator": self.operator,
            "calls": self.calls,
            "detections": lambda attention: self._in_model(detection_findings, attention),
            "relevance": lambda attention: self._in_model(relevance_findings, attention),
            "gradients": lambda attention: self._in_model(gradient_findings, attention),
        }

    def operator(self, attention: Attention) -> Iterator[Finding]:
        """Side effects first: an attention that changes settings is known before other calls depend on them."""
        yield from self.side_effects(attention)
        yield from self.numbers(attention)

    def side_effects(self, attention: Attention) -> Iterator[Finding]:
        """What the operator suite finds wrong apart from the numbers of single calls."""
        for check in SIDE_EFFECTS:
            yield from side_effect_findings(attention, check, self.dtype, CPU, self.seed)

    def numbers(self, attention: Attention) -> Iterator[Finding]:
        """What the operator suite finds wrong with the numbers of single calls, the cheapest cases first."""
        for case in sorted(operator_cases(self.dtype, self.seed), key=lambda case: case.weights):
            yield from operator_findings(attention, case, CPU)

    def calls(self, attention: Attention) -> Iterator[Finding]:
        with watched_settings():
            yield from fallback_findings(attention, model_calls(attention, CPU, self.dtype, self.seed))

    def cases(self) -> list[ReferenceCase]:
        settings = Settings(seed=self.seed)
        return [reference_case(settings, name) for name in case_names(settings)[: self.scenes]]

    def _in_model(self, check: Callable[..., list[Finding]], attention: Attention) -> Iterator[Finding]:
        for case in self.cases():
            with watched_settings():
                found = check(attention, case, CPU, self.dtype)
            yield from found
