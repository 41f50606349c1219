"""The tensors of a case, the same on every machine; and one attention call with its backward pass."""

from __future__ import annotations

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from headoff.attention.contract import Attention
from headoff.harness.operator.cases import GRADIENTS, WANTED, OperatorCase
from headoff.harness.operator.gates import gate_values
from headoff.harness.operator.inputs import (
    GRAD_CONTEXT_LAYOUTS,
    LARGEST_OF_HALF,
    LAYOUTS,
    input_values,
    layouts_of,
)
from headoff.harness.operator.masks import NEARLY_MASKED, mask_values


class Tensors(ABC):
    """The tensors of a call: what those of all contracts have.

    `gate` is as the contract has it, or None; `grad_context` is the gradient of the context, in its shape.
    """

    gradient_names: ClassVar[Mapping[str, str]]
    """What the gradient of each differentiable input is called."""

    wanted_inputs: ClassVar[Mapping[Any, tuple[str, ...]]]
    """By the case's `wanted`: the inputs that require a gradient."""

    value: Tensor
    gate: Tensor | None
    grad_context: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Those that a gradient may be wanted of."""
        return tuple(getattr(self, name) for name in self.gradient_names)

    @abstractmethod
    def attend(self, attention: Any, inputs: Iterable[Tensor]) -> Tensor:
        """The context of these inputs, with all else as it is here."""

    @abstractmethod
    def double(self) -> Tensors:
        """The same numbers in float64, contiguous and on the CPU; a bool mask stays bool."""

    def named(self) -> dict[str, Tensor]:
        """All tensors that are not None."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, Tensor)}

    def on(self, device: torch.device | str) -> Self:
        """Copies on `device` with the same strides. What is one tensor stays one."""
        tensors = {id(tensor): tensor for tensor in self.named().values()}
        copies = {key: moved(tensor, tensor.dtype, device) for key, tensor in tensors.items()}
        return type(self)(
            **{**vars(self), **{name: copies[id(tensor)] for name, tensor in self.named().items()}}
        )


@dataclass(frozen=True, eq=False)
class CallTensors(Tensors):
    """The tensors of an attention call. `mask` is as the contract has it, or None."""

    gradient_names = GRADIENTS
    wanted_inputs = WANTED

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    gate: Tensor | None
    grad_context: Tensor

    def attend(self, attention: Attention, inputs: Iterable[Tensor]) -> Tensor:
        query, key, value = inputs
        return attention(query, key, value, self.mask, head_gate=self.gate)

    def double(self) -> CallTensors:
        mask = self.mask
        if mask is not None:
            mask = mask.cpu() if mask.dtype == torch.bool else mask.cpu().double()
        gate = None if self.gate is None else self.gate.cpu().double()
        query, key, value, grad_context = (
            tensor.cpu().double().contiguous()
            for tensor in (self.query, self.key, self.value, self.grad_context)
        )
        return CallTensors(query, key, value, mask, gate, grad_context)


@functools.singledispatch
def tensors_of(case: Any, device: torch.device | str = "cpu") -> Any:
    """New tensors at each call, made on the CPU and then moved to `device`; none requires a gradient."""
    raise NotImplementedError(type(case))


@tensors_of.register
def _(case: OperatorCase, device: torch.device | str = "cpu") -> CallTensors:
    query, key, value, mask, gate, grad_context = _values_of(case)
    # By the name of the gradient: inputs that share one are one tensor.
    made: dict[str, Tensor] = {}
    for of, values, layout in zip(
        case.gradient_names.values(), (query, key, value), layouts_of(case.layout), strict=True
    ):
        if of not in made:
            made[of] = LAYOUTS[layout](_copy(values, case.dtype, device))
    query, key, value = (made[of] for of in case.gradient_names.values())
    if mask is not None:
        mask = moved(mask, torch.bool if mask.dtype == torch.bool else case.dtype, device)
    if gate is not None:
        gate = moved(gate, case.dtype, device)
    grad_layout = GRAD_CONTEXT_LAYOUTS.get(case.grad_context, LAYOUTS["contiguous"])
    return CallTensors(query, key, value, mask, gate, grad_layout(_copy(grad_context, case.dtype, device)))


@functools.lru_cache(maxsize=2)
def _values_of(case: OperatorCase) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Query, key, value, mask, gate, gradient of the context; float64, cached because a case is used several times."""
    # The seed comes from a text by CRC, because Python's own hash differs from process to process.
    # A flipped mask has the lengths of the one that is not.
    plain = replace(case, dtype=torch.float64, mask=case.mask.removesuffix(" flipped"))
    generator = torch.Generator().manual_seed(zlib.crc32(repr(plain).encode()))
    sizes = (case.batch, case.heads, case.queries, case.keys, case.channels)
    query, key, value = input_values(case.inputs, generator, sizes)
    if case.dtype == torch.float16:
        value = value * (LARGEST_OF_HALF / max(LARGEST_OF_HALF, float(value.abs().max())))
    mask = mask_values(case.mask, generator, sizes[:4])
    if mask is not None and mask.dtype != torch.bool:
        mask = _with_strides(mask, lambda memory: _resolved(memory, case.dtype))
    gate = gate_values(case.gate, generator, case.batch, case.heads, case.queries)
    grad_context = _grad_context(case, generator)
    if mask is not None and len(set(case.gradient_names.values())) == 3:
        key, value = _fill_masked(case, query, key, value, mask)
    return query, key, value, mask, gate, grad_context


def _copy(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Never the tensor itself: it is cached, and a patch may write into what it gets."""
    return tensor.to(dtype=dtype, copy=True).to(device)


def moved(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """In `dtype` on `device`, with the same strides, offset and memory between the elements."""
    return _with_strides(tensor, lambda memory: _copy(memory, dtype, device))


def _with_strides(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change` of all of a tensor's memory, seen with the same shape, strides and offset."""
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
    return change(memory).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _resolved(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Biases no deeper than `dtype` resolves to a fraction of 1; those that stand for -inf stay."""
    return torch.where(bias > NEARLY_MASKED, bias.clamp(min=-0.25 / torch.finfo(dtype).eps), bias)


def _grad_context(case: OperatorCase, generator: torch.Generator) -> Tensor:
    shape = (case.batch, case.heads, case.queries, case.channels)
    grad_context = torch.randn(shape, generator=generator, dtype=torch.float64)
    if case.grad_context == "ones":
        return torch.ones_like(grad_context)
    if case.grad_context == "small":
        return grad_context * 1e-6
    if case.grad_context == "one row":
        return grad_context * (torch.arange(case.queries)[:, None] == case.queries // 2)
    return grad_context


def _fill_masked(
    case: OperatorCase, query: Tensor, key: Tensor, value: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Large numbers in keys and values that no query may attend to: the largest scores of all, if they leaked.

    As large as float16 admits without overflow of the products, and much larger in other dtypes.
    """
    mask = mask if mask.dtype == torch.bool else mask != -torch.inf
    seen = mask[(None,) * (4 - mask.dim())].any(-2, keepdim=True).expand(case.batch, case.heads, 1, case.keys)
    if "expanded" in case.layout:  # the same memory for all items, or for all heads
        seen = seen.any(1 if "heads" in case.layout else 0, keepdim=True)
    unseen = ~seen.mT
    largest = float(query.norm(dim=-1).max() * key.norm(dim=-1).max())
    if largest == 0:  # inputs of zeros: there are no scores to be large
        return key, torch.where(unseen, value * 30, value)
    room = (2e4, 1e3) if case.dtype == torch.float16 else (1e6, 1e6)
    factor = max(1.0, min(room[0] / largest, room[1] / float(key.abs().max())))
    large = value * 30
    if case.dtype == torch.float16:
        large = large.clamp(-LARGEST_OF_HALF, LARGEST_OF_HALF)
    return torch.where(unseen, key * factor, key), torch.where(unseen, large, value)


Results = dict[str, Tensor]
"""`context`, and those gradients that were wanted: `dq`, `dk`, `dv`."""


def leaves_of(tensors: Tensors, wanted: str) -> dict[str, Tensor]:
    """The inputs by name: detached, of the same memory, requiring a gradient where one is wanted.

    Where two of `tensors` are one tensor, their leaves are, too.
    """
    made: dict[int, Tensor] = {}
    leaves = {}
    for name in tensors.gradient_names:
        tensor = getattr(tensors, name)
        if id(tensor) not in made:
            made[id(tensor)] = tensor.detach().requires_grad_(name in tensors.wanted_inputs[wanted])
        leaves[name] = made[id(tensor)]
    return leaves


def call(attention: Any, tensors: Tensors, wanted: str = "all") -> Results:
    """Context and gradients. Gradients of inputs that the context does not depend on are zeros."""
    leaves = leaves_of(tensors, wanted)
    context = tensors.attend(attention, leaves.values())
    return {"context": context, **gradients(context, leaves, tensors)}


def context_alone(attention: Any, tensors: Tensors) -> Tensor:
    """The context under `torch.no_grad`."""
    with torch.no_grad():
        return tensors.attend(attention, tensors.inputs)


def gradients(
    context: Tensor, leaves: dict[str, Tensor], tensors: Tensors, *, retain_graph: bool = False
) -> Results:
    """The gradients of those `leaves` of `tensors` that require one."""
    # A tensor that is several inputs is named after the first.
    inputs = {
        id(leaf): (tensors.gradient_names[name], leaf)
        for name, leaf in reversed(leaves.items())
        if leaf.requires_grad
    }
    named = dict(inputs.values())
    if not context.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in named.items()}
    found = torch.autograd.grad(
        context, list(named.values()), tensors.grad_context, retain_graph=retain_graph, allow_unused=True
    )
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(named.items(), found, strict=True)
    }
