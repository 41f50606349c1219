"""How far a candidate may be from a case's truth: measured, in the case's dtype on the candidate's device.

An error is the difference from the truth in units of eps(dtype) times the element's scale (`truth`). Of each tensor
two numbers are looked at: the largest error, and the largest root mean square over the elements of one head of one
item, where a bias shows that is too small for any single element to give away. A candidate may have a small factor
times what eager attention has, the same numbers taken over eager with the case's inputs and with inputs that
differ from them by a rounding here and there; plus a floor of a few roundings, for eager may be exact by luck.
`proofs` shows that this is little enough.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headoff.attention.eager import eager
from headoff.harness.operator.call import Results, call
from headoff.harness.operator.cases import OperatorCase
from headoff.harness.operator.reference import truth_of
from headoff.harness.operator.tensors import CallTensors, tensors_of
from headoff.harness.reference.maps import ERROR_FACTOR

FLOOR_LARGEST = 2.0
FLOOR_MEAN = 0.5
"""Roundings, in units of eps times the scale, that are allowed even where eager makes none."""

PERTURBED = 2
"""Calls of eager with perturbed inputs, beside the plain one."""

LARGE = 2_000_000
"""Weights from which on a case has elements enough to measure eager by its one plain call."""


@dataclass(frozen=True)
class Errors:
    """Of one tensor: the `largest` error, and the largest `mean` (root mean square) of any head of any item."""

    largest: float
    mean: float


def normalised(found: Tensor, true: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """|found - true| in units of eps(dtype) * scale; infinite where the scale is 0 and the difference is not, and
    where anything is not finite. All (B, H, T, D); float64."""
    difference = (found.detach().cpu().double() - true).abs()
    error = torch.where(difference == 0, 0.0, difference / (scale * torch.finfo(dtype).eps))
    return error.nan_to_num(nan=torch.inf, posinf=torch.inf)


def errors_of(error: Tensor) -> Errors:
    """The two numbers of errors (B, H, T, D)."""
    return Errors(float(error.max()), float(error.square().mean((-2, -1)).max().sqrt()))


@functools.lru_cache(maxsize=1024)
def allowed_for(case: OperatorCase, device: torch.device) -> dict[str, Errors]:
    """What a candidate may be off by, for each tensor that the case wants."""
    measured = [
        {name: Errors(0.0, 0.0) for name in truth_of(case).values},
        *(_errors_of_results(results, case) for results in _eager_results(case, device)),
    ]
    return {
        name: Errors(
            ERROR_FACTOR * max(each[name].largest for each in measured) + FLOOR_LARGEST,
            ERROR_FACTOR * max(each[name].mean for each in measured) + FLOOR_MEAN,
        )
        for name in measured[0]
    }


def _errors_of_results(results: Results, case: OperatorCase) -> dict[str, Errors]:
    truth = truth_of(case)
    return {
        name: errors_of(normalised(results[name], true, truth.scales[name], case.dtype))
        for name, true in truth.values.items()
    }


def _eager_results(case: OperatorCase, device: torch.device) -> list[Results]:
    tensors = tensors_of(case, device)
    results = [call(eager, tensors, case.wanted)]
    if case.weights < LARGE:
        generator = torch.Generator().manual_seed(case.seed)
        results += [call(eager, _perturbed(tensors, generator), case.wanted) for _ in range(PERTURBED)]
    return results


def _perturbed(tensors: CallTensors, generator: torch.Generator) -> CallTensors:
    """Every fourth number of query and key a unit in the last place larger, and every fourth one smaller.

    As if they had been scaled and rounded, which is what implementations do that fold 1 / sqrt(D) into them.
    """

    def nudged(tensor: Tensor) -> Tensor:
        draw = torch.rand(tensor.shape, generator=generator)
        units = (draw < 0.25).double() - (draw > 0.75).double()
        return tensor * (1 + torch.finfo(tensor.dtype).eps * units).to(tensor)

    query = nudged(tensors.query)
    key = query if tensors.key is tensors.query else nudged(tensors.key)
    value = {id(tensors.query): query, id(tensors.key): key}.get(id(tensors.value), tensors.value)
    return replace(tensors, query=query, key=key, value=value)
