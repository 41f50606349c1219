"""Checks that what is timed is right: a fast wrong answer is worth nothing.

The output of the timed call is compared with what eager attention computes in float64 from the same inputs. The allowed
error is a small factor of what correct implementations are off by in the benchmarked dtype, as everywhere in the
harness, plus one rounding of that dtype for every attention layer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.bench.workloads import Output, Workload
from headoff.harness.finding import Finding
from headoff.harness.model.relu_masks import ReluMasks
from headoff.harness.tolerance import ERROR_FACTOR, allowed_error, peak_error


class ExpectedOutputs:
    """What a workload's outputs must be, and how far off they may be."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        unit = torch.finfo(workload.dtype).eps
        # In float64 the oracle itself has no error to measure: float32's is scaled by the ratio of the units.
        measured_in = torch.float32 if workload.dtype == torch.float64 else workload.dtype
        rounded = workload if measured_in == workload.dtype else workload.in_dtype(measured_in)
        scale = unit / torch.finfo(measured_in).eps
        self._truth: dict[str, Output] | None = None
        self.floor = workload.roundings * unit
        self.measured_errors: dict[str, float] = {}
        for attention in workload.implementations():
            found, masks = outputs_and_masks(rounded, attention)
            for name, truth in self.truth(masks, rounded).items():
                error = float(peak_error(found[name].rows, truth.rows).amax()) * scale
                self.measured_errors[name] = max(error, self.measured_errors.get(name, 0.0))

    def of_first(self, workload: Workload) -> ExpectedOutputs:
        """Those of `workload`, which is the first configuration of this one alone; not for gradients."""
        other = copy.copy(self)
        other.workload = workload
        other._truth = {
            name: replace(one, rows=one.rows[:1]) for name, one in self.truth(ReluMasks()).items()
        }
        return other

    def allowed(self, name: str) -> float:
        """The largest error of an output, relative to each row's peak."""
        return allowed_error(self.measured_errors[name], self.floor)

    def truth(self, masks: ReluMasks, rounded: Workload | None = None) -> dict[str, Output]:
        """The oracle's outputs; its ReLUs follow `masks` where rounding decides (see `ReluMasks.pinned`)."""
        if self._truth is None or self.workload.relu_detector is not None:
            self._truth = truth_of(rounded or self.workload, masks)
        return self._truth

    def findings(self, result: Any, attention: Attention) -> list[Finding]:
        """What is wrong with the result of the timed call of `attention`: the worst row of each wrong output."""
        return self.findings_of(self.workload.outputs(result), attention)

    def findings_of(self, outputs: Mapping[str, Output], attention: Attention) -> list[Finding]:
        """The same for the outputs that the timed call of `attention` had."""
        masks = ReluMasks()
        if self.workload.relu_detector is not None:
            masks = outputs_and_masks(self.workload, attention)[1]
        return self.findings_in(outputs, masks)

    def findings_in(self, outputs: Mapping[str, Output], masks: ReluMasks) -> list[Finding]:
        """What is wrong with the outputs of a run that had these ReLU activation masks."""
        wrong = (self._finding(name, truth, outputs[name].rows) for name, truth in self.truth(masks).items())
        return [finding for finding in wrong if finding is not None]

    def _finding(self, name: str, truth: Output, found: Tensor) -> Finding | None:
        allowed = self.allowed(name)
        if found.shape != truth.rows.shape:
            error = torch.inf
            problem = f"has shape {tuple(found.shape)} instead of {tuple(truth.rows.shape)}"
        else:
            errors = peak_error(found, truth.rows)
            error = float(errors.amax())
            problem = (
                f"is off by {error:.1e} of its peak in row {int(errors.argmax())} of {len(errors)}; allowed is "
                f"{allowed:.1e}, {ERROR_FACTOR:g} times the {self.measured_errors[name]:.1e} that correct "
                f"implementations are off by, plus {self.floor:.1e}"
            )
        if error <= allowed:
            return None
        case = self.workload.name
        message = f"{case}: the output of the timed call is wrong: its {name} {problem}"
        return Finding(truth.property, message, case, error, allowed)


def truth_of(workload: Workload, masks: ReluMasks) -> dict[str, Output]:
    """The oracle's outputs in float64; see `ExpectedOutputs.truth`."""
    exact = workload.in_dtype(torch.float64)
    if (detector := exact.relu_detector) is None:
        return exact.outputs_of(exact.oracle)
    # A hidden unit is a sum of `width` products, whose errors add up like a random walk, after those of all layers.
    resolution = workload.roundings * torch.finfo(workload.dtype).eps * detector.config.width**0.5
    with masks.pinned(detector, resolution=resolution):
        return exact.outputs_of(exact.oracle)


def outputs_and_masks(workload: Workload, attention: Attention) -> tuple[dict[str, Output], ReluMasks]:
    """The outputs by an attention, and the ReLU activation masks, where gradients depend on them."""
    masks = ReluMasks()
    if workload.relu_detector is None:
        return workload.outputs_of(attention), masks
    with masks.recording(workload.relu_detector):
        return workload.outputs_of(attention), masks
