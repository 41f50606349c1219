"""What each suite says of an attention, in the process at hand: the checks that the suites' tests are made of."""

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
from headoff.harness.operator import (
    SIDE_EFFECTS,
    SIDE_EFFECTS_IN_ALL_DTYPES,
    operator_cases,
    operator_findings,
    reduced_cases,
    side_effect_findings,
    unsupported_reason,
)
from headoff.harness.reference.cases import Subject, names, subject
from headoff.harness.settings import Settings
from headoff.harness.torch_settings import watched_settings
from mutants.entries import ALL_DTYPES

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Judge:
    """The suites as they are run by default: float32 on the CPU, the bundled model.

    - `seed`: of random inputs
    - `scenes`: how many of the bundled scenes the model is tried on
    """

    seed: int = 0
    scenes: int = 1

    def suites(self) -> dict[str, Callable[[Attention], Iterator[Finding]]]:
        """By name, what a suite finds wrong with an attention; lazily, for often the first is enough."""
        return {
            "operator": self.operator,
            "calls": self.calls,
            "detections": lambda attention: self._in_model(detection_findings, attention),
            "relevance": lambda attention: self._in_model(relevance_findings, attention),
            "gradients": lambda attention: self._in_model(gradient_findings, attention),
        }

    def operator(self, attention: Attention) -> Iterator[Finding]:
        """Conduct first: a call that leaves another world behind is to be known before others are made in it."""
        for check in SIDE_EFFECTS:
            yield from side_effect_findings(attention, check, torch.float32, CPU, self.seed)
        for dtype in self.other_dtypes(attention):
            for check in SIDE_EFFECTS_IN_ALL_DTYPES:
                yield from side_effect_findings(attention, check, dtype, CPU, self.seed)
        yield from self.numbers(attention)

    def other_dtypes(self, attention: Attention) -> list[torch.dtype]:
        """Those that it takes."""
        return [
            dtype
            for dtype in ALL_DTYPES
            if dtype != torch.float32 and unsupported_reason(attention, dtype, CPU) is None
        ]

    def numbers(self, attention: Attention) -> Iterator[Finding]:
        """Of the operator suite, what is wrong with the numbers of single calls."""
        for case in operator_cases(torch.float32, self.seed):
            yield from operator_findings(attention, case, CPU)
        for dtype in self.other_dtypes(attention):
            for case in reduced_cases(dtype, self.seed):
                yield from operator_findings(attention, case, CPU)

    def calls(self, attention: Attention) -> Iterator[Finding]:
        with watched_settings():
            yield from fallback_findings(attention, model_calls(attention, CPU, torch.float32, self.seed))

    def subjects(self) -> list[Subject]:
        settings = Settings(seed=self.seed)
        return [subject(settings, name) for name in names(settings)[: self.scenes]]

    def _in_model(self, check: Callable[..., list[Finding]], attention: Attention) -> Iterator[Finding]:
        for each in self.subjects():
            with watched_settings():
                found = check(attention, each, CPU, torch.float32)
            yield from found
