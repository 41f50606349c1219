"""Which configurations share a decoder state, and up to which layer.

Two configurations whose gates agree in the first m layers have the same queries there, so the decoder computes them
once. The configurations "none off", "L5H0 off" and "L5H1 off", for example, are one run until layer 5. A cumulative
sweep shares only the first self-attention; a sweep over the 48 single heads shares 40% of its layer passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.detr.transfers import copy_to_device


@dataclass(frozen=True)
class LayerGates:
    """Gates of one attention call, for G distinct runs.

    Attributes:
        parent: (G,) int64, for every run the index of the run that it continues; None when no run splits.
        gate: (G, queries or 1, heads), or None when every head is on in every run.
        shares_attention: whether it is faster to attend without gates before the runs split, and to gate the contexts
            after that, than to attend for every run that splits what is on in it.
    """

    parent: Tensor | None
    gate: Tensor | None
    shares_attention: bool = False


@dataclass(frozen=True)
class SharingPlan:
    """The decoder's runs under C configurations.

    Attributes:
        self_attention, cross_attention: one `LayerGates` per decoder layer.
        member: (C,) int64, the final run of each configuration.
        runs: number of runs in each layer's cross-attention, for cost accounting.
    """

    self_attention: tuple[LayerGates, ...]
    cross_attention: tuple[LayerGates, ...]
    member: Tensor
    runs: tuple[int, ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> SharingPlan:
        """The plan on a device, with gates in `dtype`, by two copies for all layers together."""
        steps = (*self.self_attention, *self.cross_attention)
        *parents, member = _copy_optional([*(step.parent for step in steps), self.member], device)
        gates = _copy_optional([step.gate for step in steps], device, dtype)
        assert member is not None
        copies = tuple(
            LayerGates(parent, gate, step.shares_attention)
            for step, parent, gate in zip(steps, parents, gates, strict=True)
        )
        layers = len(self.self_attention)
        return SharingPlan(copies[:layers], copies[layers:], member, self.runs)


def _copy_optional(
    tensors: list[Tensor | None], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """`copy_to_device` for a list in which None stays None."""
    moved = iter(copy_to_device([tensor for tensor in tensors if tensor is not None], device, dtype))
    return [None if tensor is None else next(moved) for tensor in tensors]


def sharing_plan(self_gate: Tensor | None, cross_gate: Tensor | None, layers: int, count: int) -> SharingPlan:
    """Plan the distinct runs of `count` configurations through `layers` decoder layers.

    Args:
        self_gate, cross_gate: (count, layers, queries or 1, heads), or None where every head is on. They are read on
            the CPU, and should be there: reading them from a GPU would make the host wait.
        layers: decoder layers.
        count: configurations.
    """
    self_gate, cross_gate = (None if gate is None else gate.cpu() for gate in (self_gate, cross_gate))
    member = torch.zeros(count, dtype=torch.long)
    self_steps: list[LayerGates] = []
    cross_steps: list[LayerGates] = []
    runs: list[int] = []
    for layer in range(layers):
        for gate, steps in ((self_gate, self_steps), (cross_gate, cross_steps)):
            member, step = _split(member, None if gate is None else gate[:, layer])
            steps.append(step)
        runs.append(int(member.max()) + 1)
    return SharingPlan(tuple(self_steps), tuple(cross_steps), member, tuple(runs))


def separate_runs(
    self_gate: Tensor | None, cross_gate: Tensor | None, layers: int, count: int
) -> SharingPlan:
    """A plan without sharing, in which every configuration is a separate run from the first layer on.

    The gradients of a run are then those of one configuration. See `sharing_plan` for the arguments.
    """

    def steps(gate: Tensor | None, split: bool) -> tuple[LayerGates, ...]:
        parent = torch.zeros(count, dtype=torch.long)
        return tuple(
            LayerGates(parent if split and layer == 0 else None, None if gate is None else gate[:, layer])
            for layer in range(layers)
        )

    return SharingPlan(
        steps(self_gate, True), steps(cross_gate, False), torch.arange(count), (count,) * layers
    )


def _split(member: Tensor, gate: Tensor | None) -> tuple[Tensor, LayerGates]:
    """Split runs whose configurations differ in this call's `gate` (C, queries or 1, heads)."""
    if gate is None:
        return member, LayerGates(None, None)
    rows = torch.cat((member.unsqueeze(1).to(gate.dtype), gate.flatten(1)), dim=1)
    _, split_member = torch.unique(rows, dim=0, return_inverse=True)
    runs = int(split_member.max()) + 1
    # A run's gate is that of its first configuration.
    first = torch.full((runs,), len(member)).scatter_reduce(
        0, split_member, torch.arange(len(member)), reduce="amin", include_self=True
    )
    parent = member[first]
    before = int(member.max()) + 1
    run_gate = gate[first]
    is_gated = not bool((run_gate == 1).all())
    # Rows of heads that are off need no attention, see `headoff.attention.skipping`.
    on = float((run_gate != 0).double().mean()) * runs
    unchanged = runs == before and bool((parent == torch.arange(runs)).all())
    return split_member, LayerGates(
        None if unchanged else parent, run_gate if is_gated else None, is_gated and before <= on
    )
