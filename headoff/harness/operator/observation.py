"""What a patch does on a case: results that can be compared, and how they compare with the truth."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from headoff.harness.operator.call import Results, call, context_alone, tensors_of
from headoff.harness.operator.cases import Case
from headoff.harness.operator.compare import NAMES, Comparison, comparisons, misshapen
from headoff.harness.torch_settings import watched_settings


@dataclass
class Observation:
    """One call of a patch.

    Args:
        case: what it was called with.
        tensors: those of the case, on the CPU.
        results: context and gradients by name, float64 on the CPU.
        comparisons: of the results with the truth.
    """

    case: Any
    tensors: Any
    results: Results
    comparisons: dict[str, Comparison]

    @functools.cached_property
    def rounded(self) -> Any:
        """The tensors in float64, changed by about one rounding."""
        generator = torch.Generator().manual_seed(0)
        exact = self.tensors.double()
        changed = {}
        for name in (*exact.gradient_names, "grad_context"):
            tensor = getattr(exact, name)
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            changed[name] = tensor * (1 + torch.finfo(self.case.dtype).eps * noise)
        return replace(exact, **changed)

    def fails(self, outputs: Iterable[str] = NAMES) -> bool:
        """Whether any of these `outputs` is wrong."""
        return any(name in self.comparisons and not self.comparisons[name].is_right for name in outputs)


def results_of(attention: Any, tensors: Any, case: Case, without_gradients: bool) -> Results:
    """Results on the CPU in float64; none where the patch raises, or gives something of another shape.

    Args:
        without_gradients: whether to ask for the context alone, under `torch.no_grad`.
    """
    try:
        with watched_settings():
            if without_gradients:
                results = {"context": context_alone(attention, tensors)}
            else:
                results = call(attention, tensors, case.wanted)
    except Exception:
        return {}
    if misshapen(results["context"], case):
        return {}
    return {name: tensor.detach().cpu().double() for name, tensor in results.items()}


def observed(attention: Any, case: Case, device: torch.device, without_gradients: bool) -> Observation | None:
    """A call of the case; None where it gives nothing that can be compared."""
    results = results_of(attention, tensors_of(case, device), case, without_gradients)
    if not results:
        return None
    compared = {item.name: item for item in comparisons(results, case, device)}
    return Observation(case, tensors_of(case), results, compared)
