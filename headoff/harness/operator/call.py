"""One call of an attention and its backward pass; and where the fault is when that raises."""

from __future__ import annotations

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.harness.operator.cases import GRADIENTS, INPUTS, WANTED, Wanted
from headoff.harness.operator.tensors import CallTensors

Results = dict[str, Tensor]
"""`context`, `dq`, `dk`, `dv`, or those of them that were wanted."""


def leaves_of(tensors: CallTensors, wanted: Wanted) -> dict[str, Tensor]:
    """`query`, `key`, `value` detached, of the same memory, and requiring a gradient where one is wanted.

    Where two of `tensors` are one, their leaves are one, too.
    """
    made: dict[int, Tensor] = {}
    leaves = {}
    for name in INPUTS:
        tensor = getattr(tensors, name)
        if id(tensor) not in made:
            made[id(tensor)] = tensor.detach().requires_grad_(name in WANTED[wanted])
        leaves[name] = made[id(tensor)]
    return leaves


def call(attention: Attention, tensors: CallTensors, wanted: Wanted = "all") -> Results:
    """Context and gradients. Those of inputs that the context does not depend on are zeros."""
    leaves = leaves_of(tensors, wanted)
    context = attention(leaves["query"], leaves["key"], leaves["value"], tensors.mask, head_gate=tensors.gate)
    return {"context": context, **gradients(context, leaves, tensors.gradient)}


def context_alone(attention: Attention, tensors: CallTensors) -> Tensor:
    """The context where no gradient is asked for."""
    with torch.no_grad():
        return attention(tensors.query, tensors.key, tensors.value, tensors.mask, head_gate=tensors.gate)


def gradients(
    context: Tensor, leaves: dict[str, Tensor], gradient: Tensor, *, retain_graph: bool = False
) -> Results:
    """`dq`, `dk`, `dv` of those `leaves` that require one."""
    # A tensor that is query and key, or key and value, is named by the first.
    inputs = {
        id(leaf): (GRADIENTS[name], leaf) for name, leaf in reversed(leaves.items()) if leaf.requires_grad
    }
    named = dict(inputs.values())
    if not context.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    found = torch.autograd.grad(
        context, list(named.values()), gradient, retain_graph=retain_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if each is None else each
        for (name, leaf), each in zip(named.items(), found, strict=True)
    }
