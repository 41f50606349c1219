"""The suites' checks of an attention, run in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from headoff.attention import Attention
from headoff.harness.fallback import fallbacks, model_calls
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
        scenes: number of bundled scenes that the model runs on.
        dtype: the dtype of the run; a fault in half precision only needs that one.
    """

    seed: int = 0
    scenes: int = 1
    dtype: torch.dtype = torch.float32

    def suites(self) -> dict[str, Callable[[Attention], Iterator[Finding]]]:
        """Functions that yield the findings of each suite, by its name; lazily, as the first finding often suffices."""
        return {
            "operator": self.operator,
            "calls": self.calls,
            "detections": lambda attention: self._in_model(detection_findings, attention),
            "relevance": lambda attention: self._in_model(relevance_findings, attention),
            "gradients": lambda attention: self._in_model(gradient_findings, attention),
        }

    def operator(self, attention: Attention) -> Iterator[Finding]:
        """Side effects first, so that changed settings are found before other calls depend on them."""
        yield from self.side_effects(attention)
        yield from self.numbers(attention)

    def side_effects(self, attention: Attention) -> Iterator[Finding]:
        """The operator suite's findings other than wrong values of single calls."""
        for check in SIDE_EFFECTS:
            yield from side_effect_findings(attention, check, self.dtype, CPU, self.seed)

    def numbers(self, attention: Attention) -> Iterator[Finding]:
        """The operator suite's findings of wrong values of single calls, the cheapest cases first."""
        for case in sorted(operator_cases(self.dtype, self.seed), key=lambda case: case.weights):
            yield from operator_findings(attention, case, CPU)

    def calls(self, attention: Attention) -> Iterator[Finding]:
        with watched_settings():
            calls = model_calls(attention, CPU, self.dtype, self.seed)
            yield from (fallback.finding for fallback in fallbacks(attention, calls))

    def cases(self) -> list[ReferenceCase]:
        settings = Settings(seed=self.seed)
        return [reference_case(settings, name) for name in case_names(settings)[: self.scenes]]

    def _in_model(self, check: Callable[..., list[Finding]], attention: Attention) -> Iterator[Finding]:
        for case in self.cases():
            with watched_settings():
                found = check(attention, case, CPU, self.dtype)
            yield from found
