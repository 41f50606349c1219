"""The tensors of a case: made on the CPU from its seed, then moved, so that they are the same on every machine."""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.harness.operator.cases import GRADIENTS, INPUTS, WANTED, OperatorCase, Wanted
from headoff.harness.operator.gates import gate_values
from headoff.harness.operator.inputs import (
    GRADIENT_LAYOUTS,
    LARGEST_OF_HALF,
    LAYOUTS,
    input_values,
    layouts_of,
)
from headoff.harness.operator.masks import DRAWN_ALIKE, mask_values


@dataclass(frozen=True, eq=False)
class CallTensors:
    """What an attention call is made with: `query`, `key`, `value`, `mask` or None, `gate` or None; and the `gradient`
    of the context (B, H, Q, D) that its backward pass begins with."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    gate: Tensor | None
    gradient: Tensor

    def named(self) -> dict[str, Tensor]:
        """Those that are there."""
        return {
            each.name: getattr(self, each.name)
            for each in fields(self)
            if getattr(self, each.name) is not None
        }

    def double(self) -> CallTensors:
        """The same numbers in float64, contiguous and on the CPU; a bool mask stays bool."""
        mask = self.mask
        if mask is not None:
            mask = mask.cpu() if mask.dtype == torch.bool else mask.cpu().double()
        gate = None if self.gate is None else self.gate.cpu().double()
        query, key, value, gradient = (
            tensor.cpu().double().contiguous() for tensor in (self.query, self.key, self.value, self.gradient)
        )
        return CallTensors(query, key, value, mask, gate, gradient)


def tensors_of(case: OperatorCase, device: torch.device | str = "cpu") -> CallTensors:
    """New tensors at each call; none requires a gradient."""
    query, key, value, mask, gate, gradient = _values_of(case)
    # By the name of its gradient: inputs that share one are one tensor.
    made: dict[str, Tensor] = {}
    for of, values, layout in zip(
        case.gradient_names.values(), (query, key, value), layouts_of(case.layout), strict=True
    ):
        if of not in made:
            made[of] = LAYOUTS[layout](_copy(values, case.dtype, device))
    query, key, value = (made[of] for of in case.gradient_names.values())
    if mask is not None:
        mask = _moved(mask, torch.bool if mask.dtype == torch.bool else case.dtype, device)
    if gate is not None:
        gate = _moved(gate, case.gate_dtype or case.dtype, device)
    return CallTensors(
        query, key, value, mask, gate, _in_layout(_copy(gradient, case.dtype, device), case.gradient)
    )


@functools.lru_cache(maxsize=2)
def _values_of(case: OperatorCase) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Query, key, value, mask, gate and gradient in float64; kept while one case is looked at in several ways."""
    # Of a text, because Python's own hash of one changes from process to process.
    plain = replace(case, dtype=torch.float64, mask=DRAWN_ALIKE.get(case.mask, case.mask))
    generator = torch.Generator().manual_seed(zlib.crc32(repr(plain).encode()))
    sizes = (case.batch, case.heads, case.queries, case.keys, case.channels)
    query, key, value = input_values(case.inputs, generator, sizes)
    if case.dtype == torch.float16:
        value = value * (LARGEST_OF_HALF / max(LARGEST_OF_HALF, float(value.abs().max())))
    mask = mask_values(case.mask, generator, case.batch, case.heads, case.queries, case.keys)
    gate = gate_values(case.gate, generator, case.batch, case.heads, case.queries)
    gradient = _gradient(case, generator)
    if mask is not None and len(set(case.gradient_names.values())) == 3:
        key, value = _fill_masked(case, query, key, value, mask)
    return query, key, value, mask, gate, gradient


def _copy(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Never the tensor itself, which is kept and must not be what a patch may write into."""
    return tensor.to(dtype=dtype, copy=True).to(device)


def _moved(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """In `dtype`, on `device`, and all of its memory with it: strides, offset and what lies between stay."""
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return _copy(memory, dtype, device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _gradient(case: OperatorCase, generator: torch.Generator) -> Tensor:
    shape = (case.batch, case.heads, case.queries, case.channels)
    gradient = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.gradient == "ones":
        return torch.ones_like(gradient)
    if case.gradient == "one row":
        row = torch.arange(case.queries)[:, None] == case.queries // 2
        return gradient * row
    return gradient


def _in_layout(gradient: Tensor, kind: str) -> Tensor:
    return GRADIENT_LAYOUTS.get(kind, LAYOUTS["contiguous"])(gradient)


def _fill_masked(
    case: OperatorCase, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Large numbers into keys and values that no query may attend to: the largest scores of all, if they leaked.

    As large as float16 stands without overflow of the products, and much larger where there is room.
    """
    mask = mask if mask.dtype == torch.bool else mask != -torch.inf
    seen = mask[(None,) * (4 - mask.dim())].any(-2, keepdim=True).expand(case.batch, case.heads, 1, case.keys)
    if "expanded" in case.layout:  # one memory for all items, or for all heads
        seen = seen.any(1 if "heads" in case.layout else 0, keepdim=True)
    unseen = ~seen.mT
    largest = float(query.norm(dim=-1).max() * key.norm(dim=-1).max())
    if largest == 0:  # inputs of zeros: there are no scores to be large
        return key, torch.where(unseen, value * 30, value)
    room = (2e4, 1e3) if case.dtype == torch.float16 else (1e6, 1e6)
    factor = max(1.0, min(room[0] / largest, room[1] / float(key.abs().max())))
    return torch.where(unseen, key * factor, key), torch.where(unseen, value * 30, value)


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
