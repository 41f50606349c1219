"""Which configurations share a decoder state, and up to which layer.

Two configurations whose gates agree in the first m layers have the same queries there, so the decoder computes
them once. Nothing off, L5H0 off and L5H1 off, for example, are one run until layer 5. In a cumulative sweep only
the first self-attention is shared; in a sweep over the 48 single heads it is 4 of every 10 layer passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headoff.detr.transfers import sent


@dataclass(frozen=True)
class LayerGates:
    """Gates of one attention call, for G distinct runs.

    Attributes:
        parent: (G,) int64, the run before this call that each run continues; None when nothing splits.
        gate: (G, queries or 1, heads), or None when every head is on in every run.
    """

    parent: Tensor | None
    gate: Tensor | None


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
        """The plan where a decoder runs, gates in its dtype: two copies, whatever the number of layers."""
        steps = (*self.self_attention, *self.cross_attention)
        *parents, member = _sent_in_place([*(step.parent for step in steps), self.member], device)
        gates = _sent_in_place([step.gate for step in steps], device, dtype)
        assert member is not None
        there = tuple(LayerGates(parent, gate) for parent, gate in zip(parents, gates, strict=True))
        layers = len(self.self_attention)
        return SharingPlan(there[:layers], there[layers:], member, self.runs)


def _sent_in_place(
    tensors: list[Tensor | None], device: torch.device, dtype: torch.dtype | None = None
) -> list[Tensor | None]:
    """Those that are there, sent; None where there is none."""
    moved = iter(sent([tensor for tensor in tensors if tensor is not None], device, dtype))
    return [None if tensor is None else next(moved) for tensor in tensors]


def sharing_plan(self_gate: Tensor | None, cross_gate: Tensor | None, layers: int, count: int) -> SharingPlan:
    """Plan the distinct runs of `count` configurations through `layers` decoder layers.

    Args:
        self_gate, cross_gate: (count, layers, queries or 1, heads) of the decoder's two sites, or None for all on.
            Read on the CPU, where they should be: the plan is made before any kernel is launched.
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
    """A plan that shares nothing: each of `count` configurations is a run of its own from the first layer on.

    Each run's gradients are then those of one configuration. Arguments as of `sharing_plan`.
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
    # The first configuration of each run stands for it.
    first = torch.full((runs,), len(member)).scatter_reduce(
        0, split_member, torch.arange(len(member)), reduce="amin", include_self=True
    )
    parent = member[first]
    unchanged = runs == int(member.max()) + 1 and bool((parent == torch.arange(runs)).all())
    run_gate = gate[first]
    return split_member, LayerGates(
        None if unchanged else parent, None if bool((run_gate == 1).all()) else run_gate
    )
