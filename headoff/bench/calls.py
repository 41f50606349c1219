"""Single attention calls with random inputs, as workloads."""

from __future__ import annotations

import random
import zlib
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.bench.models import BenchmarkModel
from headoff.bench.workloads import Direction, Output, Workload
from headoff.gates import Site
from headoff.harness.finding import Property
from headoff.timing import TimedCall

CONFIGURATIONS = 9
"""Of the cumulative sweep. As many are decoded together, end to end in cross-attention, as batch items elsewhere."""


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call: query (batch, heads, queries, channels), key and value (batch, heads, keys, ...).

    `padded`: a quarter of the keys is padding.
    """

    name: str
    batch: int
    queries: int
    keys: int
    heads: int = 8
    channels: int = 32
    padded: bool = False


def site_shape(
    model: BenchmarkModel, site: Site, configurations: int = CONFIGURATIONS, *, padded: bool = False
) -> AttentionShape:
    """The attention call that a sweep of so many configurations makes at a site of the model."""
    config = model.detector.config
    batch, queries, keys = {
        "encoder_self": (1, model.tokens, model.tokens),
        "decoder_self": (configurations, config.queries, config.queries),
        "decoder_cross": (1, configurations * config.queries, model.tokens),
    }[site]
    return AttentionShape(site, batch, queries, keys, config.heads, config.width // config.heads, padded)


class CallWorkload(Workload):
    """One call of an attention with random inputs.

    For `backward` the graph is made in the setup, and only the `gradients` of the inputs are timed. `grad_context` is
    the gradient of the context; all tensors are as in the attention's contract.
    """

    title: str
    direction: Direction
    grad_context: Tensor
    gradients: tuple[Property, ...]

    @property
    @abstractmethod
    def inputs(self) -> dict[Property, Tensor]:
        """Those that gradients are wanted of, by the name of the gradient."""

    @abstractmethod
    def attend(self, attention: Any, *inputs: Tensor) -> Tensor:
        """The context of these inputs, with all else as it is here."""

    def rows(self, tensor: Tensor) -> Tensor:
        """Context or gradient with a row for each head of each batch item."""
        return tensor.flatten(0, 1).flatten(1)

    @property
    def name(self) -> str:
        return self.title

    @property
    def dtype(self) -> torch.dtype:
        return self.grad_context.dtype

    def timed_call(self, attention: Any) -> TimedCall:
        wanted = () if self.direction == "forward" else self.gradients
        leaves = [
            tensor.detach().clone().requires_grad_(name in wanted) for name, tensor in self.inputs.items()
        ]
        inputs = [tensor for tensor in leaves if tensor.requires_grad]
        grad_context = self.grad_context.clone()

        def fill(contents: CallWorkload) -> None:
            with torch.no_grad():
                grad_context.copy_(contents.grad_context)
                for leaf, tensor in zip(leaves, contents.inputs.values(), strict=True):
                    leaf.copy_(tensor)

        def forward() -> Tensor:
            return self.attend(attention, *leaves)

        def without_gradients() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (forward(),)

        def backward(context: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(context, inputs, grad_context, allow_unused=True)

        def both() -> tuple[Tensor | None, ...]:
            context = forward()
            return (context.detach(), *backward(context))

        if self.direction == "forward":
            return TimedCall(without_gradients, fill=fill)
        if self.direction == "backward":
            return TimedCall(backward, lambda: (forward(),), fill)
        return TimedCall(both, fill=fill)

    def outputs(self, result: tuple[Tensor | None, ...]) -> dict[str, Output]:
        of = {name: self.inputs[name] for name in self.gradients}
        if self.direction != "backward":
            of = {"context": self.grad_context, **of}
        found = {}
        for tensor, (name, like) in zip(result, of.items(), strict=False):
            # An attention that left an input out of its graph says that its gradient is zero.
            found[str(name)] = Output(self.rows(torch.zeros_like(like) if tensor is None else tensor), name)
        return found


@dataclass(frozen=True, eq=False)
class AttentionWorkload(CallWorkload):
    """One attention call."""

    title: str
    direction: Direction
    query: Tensor
    key: Tensor
    value: Tensor
    grad_context: Tensor
    attn_mask: Tensor | None
    head_gate: Tensor | None
    gradients: tuple[Property, ...] = ("dq", "dk", "dv")

    @classmethod
    def of(
        cls,
        shape: AttentionShape,
        direction: Direction,
        head_gate: Tensor | None,
        gate_name: str,
        device: torch.device,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> AttentionWorkload:
        """Random inputs in the memory layout of the model's projections: (B, T, H, D), viewed as (B, H, T, D)."""
        # crc32, because Python's own hash of a text differs between processes.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{shape.name} {seed}".encode()))

        def random(length: int) -> Tensor:
            made = torch.randn(shape.batch, length, shape.heads, shape.channels, generator=generator)
            return made.to(device, dtype).transpose(1, 2)

        mask = (torch.arange(shape.keys, device=device) < shape.keys * 3 // 4)[None, None, None]
        return cls(
            f"{shape.name}, {gate_name}, {direction}",
            direction,
            random(shape.queries),
            random(shape.keys),
            random(shape.keys),
            random(shape.queries),
            mask if shape.padded else None,
            None if head_gate is None else head_gate.to(device, dtype),
        )

    @property
    def inputs(self) -> dict[Property, Tensor]:
        return {"dq": self.query, "dk": self.key, "dv": self.value}

    def attend(self, attention: Attention, *inputs: Tensor) -> Tensor:
        query, key, value = inputs
        return attention(query, key, value, self.attn_mask, head_gate=self.head_gate)

    def in_dtype(self, dtype: torch.dtype) -> Self:
        tensors = ("query", "key", "value", "grad_context")
        gate = None if self.head_gate is None else self.head_gate.to(dtype)
        return replace(self, head_gate=gate, **{name: getattr(self, name).to(dtype) for name in tensors})

    def varied(self, number: int) -> Self:
        chosen = random.Random(number)
        tensors = ("query", "key", "value", "grad_context")[: 3 if self.direction == "forward" else 4]
        changed: dict[str, Any] = {name: mixed(getattr(self, name), 2, chosen) for name in tensors}
        return replace(self, **changed)


def mixed(tensor: Tensor, dim: int, chosen: random.Random) -> Tensor:
    """Every number mixed with another one along `dim`: independent normal numbers stay that, with the same variance."""
    angle = torch.tensor(chosen.uniform(0.1, 1.4) + chosen.randrange(4) * torch.pi / 2)
    other = tensor.roll(chosen.randrange(tensor.shape[dim]), dim)
    return torch.add(tensor * angle.cos().item(), other, alpha=angle.sin().item())
