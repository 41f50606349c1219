"""Calls in which faults have an effect, with their features, their truth and the errors that are allowed.

The features of a case (`gate by query`, `fully masked row`, `strided input`) are computed from its tensors. A wrong
attention registers the features that its fault needs; in cases that lack one of them it must be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from headoff.attention import Attention, eager
from mutants.parts import FORWARD, run, start

ERROR_FACTOR = 4.0
"""An error may be this many times eager's in the same dtype, because sums may have another order."""

ROUNDINGS = 1
"""Allowed in addition, in units of the last place of the summands (`natural_scales`): eager may be exact by chance."""

PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Call:
    """The tensors of one call, and the gradient of its context for the backward pass."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    head_gate: Tensor | None
    gradient: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        every = (self.query, self.key, self.value, self.attn_mask, self.head_gate, self.gradient)
        return tuple(x for x in every if x is not None)

    def run(self, attention: Attention) -> Tensor:
        return attention(self.query, self.key, self.value, self.attn_mask, head_gate=self.head_gate)


@dataclass(frozen=True)
class Case:
    """One call, made from a seed.

    Attributes:
        sizes: (B, H, Q, S, D).
        gate, mask: functions of a random generator and sizes that return a tensor, or None.
        arrange: a function that returns an equal tensor with other strides.
        arrange_value, arrange_gradient: the same for the value, and for the gradient of the context.
        logits: factor of query and key.
        mean, spread: of the values.
        value_is_key: whether the value shares the memory of the key.
        gradients: factor of the gradient of the context.
        wanted: the inputs that require a gradient.
    """

    name: str
    sizes: tuple[int, int, int, int, int] = (2, 3, 7, 21, 16)
    dtype: torch.dtype = torch.float32
    gate: Callable[..., Tensor] | None = None
    mask: Callable[..., Tensor] | None = None
    arrange: Callable[[Tensor], Tensor] = lambda x: x
    arrange_value: Callable[[Tensor], Tensor] | None = None
    arrange_gradient: Callable[[Tensor], Tensor] = lambda x: x
    logits: float = 1.0
    mean: float = 0.0
    spread: float = 1.0
    value_is_key: bool = False
    gradients: float = 1.0
    wanted: tuple[str, ...] = ("query", "key", "value")
    seed: int = 0
    device: str = field(default="cpu", kw_only=True)

    def call(self, seed: int = 0, sizes: tuple[int, int, int, int, int] | None = None) -> Call:
        """The tensors of the case, for a random `seed` and other `sizes` if given."""
        batch, heads, queries, keys, channels = sizes = sizes or self.sizes
        generator = torch.Generator().manual_seed(self.seed + 1000 * seed)

        def made(
            length: int, factor: float, arrange: Callable[[Tensor], Tensor], mean: float = 0.0
        ) -> Tensor:
            x = torch.randn(batch, heads, length, channels, generator=generator, dtype=torch.float64)
            return arrange((x * factor + mean).to(self.device, self.dtype))

        query = made(queries, self.logits, self.arrange)
        key = made(keys, self.logits, self.arrange)
        value = made(keys, self.spread, self.arrange_value or self.arrange, self.mean)
        if self.value_is_key:
            value = key.detach()
        gradient = made(queries, self.gradients, self.arrange_gradient)
        mask = None if self.mask is None else self.mask(generator, *sizes).to(self.device)
        gate = (
            None if self.gate is None else in_dtype(self.gate(generator, *sizes), self.dtype).to(self.device)
        )
        for name, x in (("query", query), ("key", key), ("value", value)):
            x.requires_grad_(name in self.wanted)
        return Call(query, key, value, mask, gate, gradient)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        return numbers(self.call(), eager, torch.float64)

    @cached_property
    def allowed(self) -> dict[str, float]:
        """The largest allowed difference from the truth."""
        call = self.call()
        found, scales = numbers(call, eager, self.dtype), natural_scales(call)
        unit = torch.finfo(self.dtype).eps
        return {
            name: ERROR_FACTOR * distance(found[name], truth) + ROUNDINGS * unit * scales[name]
            for name, truth in self.truth.items()
        }

    @cached_property
    def features(self) -> frozenset[str]:
        call = self.call()
        return frozenset(name for name, has in FEATURES.items() if has(self, call))


def in_dtype(gate: Tensor, dtype: torch.dtype) -> Tensor:
    """The gate in the query's dtype, with its strides and the memory between its elements."""
    memory = gate.as_strided((gate.untyped_storage().nbytes() // gate.element_size(),), (1,), 0).to(dtype)
    return memory.as_strided(gate.shape, gate.stride(), gate.storage_offset())


def numbers(call: Call, attention: Attention, dtype: torch.dtype) -> dict[str, Tensor]:
    """Context and gradients by `attention` of a copy of the call in `dtype`."""
    wanted = {"dq": call.query, "dk": call.key, "dv": call.value}
    leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in wanted.values()]
    mask = call.attn_mask
    if mask is not None and mask.is_floating_point() and dtype == torch.float64:
        mask = mask.to(call.query.dtype).double()
    context = attention(*leaves, mask, head_gate=call.head_gate)
    found = {"context": context.detach()}
    asked = {name: leaf for name, leaf in zip(wanted, leaves, strict=True) if leaf.requires_grad}
    found |= zip(
        asked, torch.autograd.grad(context, list(asked.values()), call.gradient.to(dtype)), strict=True
    )
    return found


def natural_scales(call: Call) -> dict[str, float]:
    """The size of the summands of context and gradients, to which rounding errors are proportional.

    An error of a score is a relative error of its weight, so all sizes grow with the largest score.
    """
    s = start(*(x.detach().double() for x in inputs(call)), call.attn_mask, call.head_gate)
    run(FORWARD, s)
    mask = 0.0 if s.mask is None or s.mask.dtype == torch.bool else s.mask.abs().nan_to_num(posinf=0.0)
    size = 1 + float((s.query.abs() @ s.key.abs().mT * s.scale + mask).max())
    gradient = call.gradient.double().abs() * s.gate.abs()
    grad_weights = gradient @ s.value.abs().mT
    grad_scores = s.weights * (grad_weights + (s.weights * grad_weights).sum(-1, keepdim=True))
    sums = {
        "context": s.gated.abs() @ s.value.abs(),
        "dq": grad_scores @ s.key.abs() * s.scale,
        "dk": grad_scores.mT @ s.query.abs() * s.scale,
        "dv": s.weights.mT @ gradient,
    }
    return {name: size * float(x.max()) for name, x in sums.items()}


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest difference; infinite where something is not finite."""
    difference = float((found.detach().double() - truth.double()).abs().max())
    return difference if math.isfinite(difference) else math.inf


def four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def varies(x: Tensor | None, dim: int) -> bool:
    """Whether `x` has different numbers along this dimension of four."""
    if x is None:
        return False
    x = four(x)
    return bool((x != x.narrow(dim, 0, 1)).any())


def expanded(x: Tensor | None) -> bool:
    return x is not None and any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))


def has_gaps(x: Tensor) -> bool:
    """Whether the memory between the elements belongs to other tensors."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return not expanded(x) and last + 1 > x.numel()


def is_narrow_causal(mask: Tensor) -> bool:
    """Whether a square mask attends to the diagonal, to nothing above it, and not to all keys below it."""
    if mask.dtype != torch.bool or mask.shape[-1] != mask.shape[-2]:
        return False
    causal = torch.ones_like(mask).tril()
    diagonal = bool(mask.diagonal(dim1=-2, dim2=-1).all())
    return diagonal and not bool((mask & ~causal).any()) and not torch.equal(mask, causal)


def has_padding_first(call: Call) -> bool:
    """Whether the mask depends on keys only, and is right padding for the first item but not for all others."""
    mask = call.attn_mask
    if mask is None or mask.dtype != torch.bool or mask.dim() < 4 or mask.shape[1:3] != (1, 1):
        return False
    falls = mask[:, 0, 0].cummin(-1).values == mask[:, 0, 0]
    return bool(falls[0].all()) and not bool(falls.all())


def inputs(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    return call.query, call.key, call.value


def full_mask(call: Call) -> Tensor | None:
    """(B, H, Q, S): True where attended."""
    mask = call.attn_mask
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask != -math.inf
    return mask.expand(*call.query.shape[:3], call.key.shape[2])


def scores_of(call: Call) -> Tensor:
    scores = (call.query @ call.key.mT).detach().float() / math.sqrt(call.query.shape[-1])
    mask = call.attn_mask
    return scores if mask is None or mask.dtype == torch.bool else scores + mask.clamp_min(-1e4)


def has_holes(call: Call) -> bool:
    mask = full_mask(call)
    return mask is not None and bool((mask[..., 1:] & ~mask[..., :-1]).any())


def on_gate(has: Callable[[Tensor], Tensor | bool]) -> Callable[[Case, Call], bool]:
    return lambda case, call: call.head_gate is not None and bool(has(call.head_gate))


def on_mask(has: Callable[[Tensor], Tensor | bool]) -> Callable[[Case, Call], bool]:
    return lambda case, call: call.attn_mask is not None and bool(has(call.attn_mask))


FEATURES: dict[str, Callable[[Case, Call], bool]] = {
    "gate": lambda case, call: call.head_gate is not None,
    "gate zero": on_gate(lambda gate: (gate == 0).any()),
    "head off": lambda case, call: (
        call.head_gate is not None and bool((four(call.head_gate) == 0).all(2).any())
    ),
    "all off": on_gate(lambda gate: not gate.any()),
    "small gate": on_gate(lambda gate: ((gate != 0) & (gate.double().abs() < 0.01)).any()),
    "gate nearly 1": on_gate(lambda gate: (gate != 1).any() and ((gate.double() - 1).abs() < 0.01).all()),
    "gate with gaps": on_gate(lambda gate: has_gaps(gate)),
    "as many gates as heads": lambda case, call: (
        call.head_gate is not None
        and call.head_gate.numel() == call.query.shape[1] > 1
        and not varies(call.head_gate, 1)
    ),
    "fraction": on_gate(lambda gate: ((gate != 0) & (gate != 1)).any()),
    "gate above 1": on_gate(lambda gate: (gate > 1).any()),
    "gate by head": lambda case, call: varies(call.head_gate, 1),
    "gate by query": lambda case, call: varies(call.head_gate, 2),
    "gate by item": lambda case, call: varies(call.head_gate, 0),
    "expanded gate": lambda case, call: expanded(call.head_gate),
    "no gate": lambda case, call: call.head_gate is None,
    "no mask": lambda case, call: call.attn_mask is None,
    "mask": lambda case, call: call.attn_mask is not None,
    "bool mask": on_mask(lambda mask: mask.dtype == torch.bool),
    "float mask": on_mask(lambda mask: mask.is_floating_point()),
    "bias": on_mask(lambda mask: mask.is_floating_point() and (mask.isfinite() & (mask != 0)).any()),
    "mask by item": lambda case, call: varies(call.attn_mask, 0),
    "mask by head": lambda case, call: varies(call.attn_mask, 1),
    "mask by query": lambda case, call: varies(call.attn_mask, 2),
    "mask of fewer dimensions": on_mask(lambda mask: mask.dim() < 4),
    "hole in mask": lambda case, call: has_holes(call),
    "fully masked row": lambda case, call: (
        call.attn_mask is not None and bool((~full_mask(call)).all(-1).any())
    ),
    "right padding first": lambda case, call: has_padding_first(call),
    "mask of one row": on_mask(lambda mask: mask.dim() == 4 and mask.shape[2] == 1),
    "mask of one key": on_mask(lambda mask: mask.shape[-1] == 1),
    "narrow causal mask": on_mask(lambda mask: is_narrow_causal(mask)),
    "mask of rows as items": lambda case, call: (
        call.attn_mask is not None and call.attn_mask.dim() == 2 and len(call.attn_mask) == case.sizes[0] > 1
    ),
    "mask of heads as items": lambda case, call: (
        call.attn_mask is not None and call.attn_mask.dim() == 3 and len(call.attn_mask) == case.sizes[0] > 1
    ),
    "mask with gaps": on_mask(lambda mask: has_gaps(mask)),
    "turned mask": on_mask(lambda mask: mask.stride(-1) > mask.stride(-2) == 1),
    "bias never positive": on_mask(
        lambda mask: mask.is_floating_point() and (mask <= 0).all() and (mask.isfinite() & (mask != 0)).any()
    ),
    "bias above 90": on_mask(lambda mask: mask.is_floating_point() and (mask > 90).any()),
    "bias below -10000": on_mask(
        lambda mask: mask.is_floating_point() and (mask.isfinite() & (mask < -1e4)).any()
    ),
    "low row": on_mask(
        lambda mask: mask.is_floating_point() and (mask.isfinite().all(-1) & (mask < -1100).all(-1)).any()
    ),
    "expanded mask": lambda case, call: expanded(call.attn_mask),
    "large logits": lambda case, call: float(scores_of(call).abs().max()) > 20,
    "huge logits": lambda case, call: float(scores_of(call).abs().max()) > 100,
    "batch": lambda case, call: case.sizes[0] > 1,
    "heads": lambda case, call: case.sizes[1] > 1,
    "B > 32": lambda case, call: case.sizes[0] > 32,
    "H > 16": lambda case, call: case.sizes[1] > 16,
    "H > 8": lambda case, call: case.sizes[1] > 8,
    "Q = 1": lambda case, call: case.sizes[2] == 1,
    "Q > 1": lambda case, call: case.sizes[2] > 1,
    "Q > 16": lambda case, call: case.sizes[2] > 16,
    "Q > 512": lambda case, call: case.sizes[2] > 512,
    "Q > 32768": lambda case, call: case.sizes[2] > 2**15,
    "Q ragged": lambda case, call: case.sizes[2] % 16 > 0,
    "Q = H": lambda case, call: case.sizes[2] == case.sizes[1],
    "Q = S": lambda case, call: case.sizes[2] == case.sizes[3],
    "S > Q": lambda case, call: case.sizes[3] > case.sizes[2],
    "S = 1": lambda case, call: case.sizes[3] == 1,
    "S > 1": lambda case, call: case.sizes[3] > 1,
    "S > 16": lambda case, call: case.sizes[3] > 16,
    "S > 64": lambda case, call: case.sizes[3] > 64,
    "S > 512": lambda case, call: case.sizes[3] > 512,
    "S > 1024": lambda case, call: case.sizes[3] > 1024,
    "S > 4096": lambda case, call: case.sizes[3] > 4096,
    "S ragged": lambda case, call: case.sizes[3] % 16 > 0,
    "S not D": lambda case, call: case.sizes[3] != case.sizes[4],
    "D not 16": lambda case, call: case.sizes[4] != 16,
    "D not 64": lambda case, call: case.sizes[4] != 64,
    "D > 64": lambda case, call: case.sizes[4] > 64,
    "64 < D < 128": lambda case, call: 64 < case.sizes[4] < 128,
    "D > 128": lambda case, call: case.sizes[4] > 128,
    "D no multiple of 4": lambda case, call: case.sizes[4] % 4 > 0,
    "D ragged": lambda case, call: case.sizes[4] % 16 > 0,
    "D no power of 2": lambda case, call: not math.log2(case.sizes[4]).is_integer(),
    "D no power of 4": lambda case, call: not math.log(case.sizes[4], 4).is_integer(),
    "strided input": lambda case, call: not all(x.is_contiguous() for x in inputs(call)),
    "strided channels": lambda case, call: any(x.stride(-1) != 1 for x in inputs(call)),
    "storage offset": lambda case, call: any(x.storage_offset() for x in inputs(call)),
    "expanded batch": lambda case, call: any(x.shape[0] > 1 and x.stride(0) == 0 for x in inputs(call)),
    "expanded heads": lambda case, call: any(x.shape[1] > 1 and x.stride(1) == 0 for x in inputs(call)),
    "key is value": lambda case, call: call.key.data_ptr() == call.value.data_ptr(),
    "zero key": lambda case, call: bool((call.key == 0).all(-1).any()),
    "great value": lambda case, call: float(call.value.detach().abs().max()) > 65504,
    "heavy sums": lambda case, call: float(call.value.detach().sum(2, dtype=torch.float64).abs().max()) > 1e6,
    "all expanded": lambda case, call: all(x.shape[0] > 1 and x.stride(0) == 0 for x in inputs(call)),
    "dense query": lambda case, call: not expanded(call.query),
    "value unlike key": lambda case, call: call.value.stride() != call.key.stride(),
    "strided gradient": lambda case, call: not call.gradient.is_contiguous(),
    "large gradient": lambda case, call: float(call.gradient.abs().max()) > 1,
    "small gradient": lambda case, call: float(call.gradient.abs().min()) < 1e-6,
    "query without gradient": lambda case, call: not call.query.requires_grad,
    "gradient expanded in one dimension": lambda case, call: (
        expanded(call.gradient) and bool((call.gradient != call.gradient.flatten()[0]).any())
    ),
    "value alone": lambda case, call: not call.query.requires_grad and not call.key.requires_grad,
    "query and value alone": lambda case, call: (
        call.query.requires_grad and not call.key.requires_grad and call.value.requires_grad
    ),
    "query alone": lambda case, call: not call.key.requires_grad,
    "full precision": lambda case, call: case.dtype in PRECISE,
    "half precision": lambda case, call: case.dtype not in PRECISE,
    "float16": lambda case, call: case.dtype == torch.float16,
    "float64": lambda case, call: case.dtype == torch.float64,
    "not float64": lambda case, call: case.dtype != torch.float64,
    "bfloat16": lambda case, call: case.dtype == torch.bfloat16,
    "not bfloat16": lambda case, call: case.dtype != torch.bfloat16,
    "not float16": lambda case, call: case.dtype != torch.float16,
}

OFF = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0])
"""An off vector that changes when it is reversed, rotated or inverted."""


def heads_off(generator, batch, heads, queries, keys, channels) -> Tensor:
    return 1.0 - OFF.repeat(2)[:heads].view(1, heads, 1, 1)


def fractions(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.tensor([0.3, 1.0, 0.007, 0.0, 0.77, 0.55, 0.123, 0.9])[:heads].view(1, heads, 1, 1)


def fractions_by_row(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.rand(batch, heads, queries, 1, generator=generator)


def on_by_row(generator, batch, heads, queries, keys, channels) -> Tensor:
    return (torch.rand(batch, heads, queries, 1, generator=generator) > 0.4).float()


def on_by_query(generator, batch, heads, queries, keys, channels) -> Tensor:
    return (torch.rand(1, heads, queries, 1, generator=generator) > 0.4).float()


def fractions_by_item(generator, batch, heads, queries, keys, channels) -> Tensor:
    gate = torch.rand(batch, heads, 1, 1, generator=generator)
    gate[0, 0] = 0
    return gate


def above_1(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.linspace(0.5, 2, heads).view(1, heads, 1, 1)


def padding(generator, batch, heads, queries, keys, channels) -> Tensor:
    lengths = torch.linspace(keys - 1, keys // 3, batch).long().clamp_min(1).view(batch, 1, 1, 1)
    return torch.arange(keys) < lengths


def scattered(generator, batch, heads, queries, keys, channels) -> Tensor:
    mask = torch.rand(queries, keys, generator=generator) > 0.5
    mask[:, 0] |= ~mask.any(-1)
    return mask


def by_head(generator, batch, heads, queries, keys, channels) -> Tensor:
    mask = torch.rand(batch, heads, 1, keys, generator=generator) > 0.5
    mask[..., 1] = True
    return mask


def expanded_padding(generator, batch, heads, queries, keys, channels) -> Tensor:
    return padding(generator, batch, heads, queries, keys, channels).expand(batch, heads, queries, keys)


def biases(generator, batch, heads, queries, keys, channels) -> Tensor:
    return 2 * torch.randn(1, heads, queries, keys, generator=generator)


def biases_and_rows(generator, batch, heads, queries, keys, channels) -> Tensor:
    mask = torch.randn(batch, 1, queries, keys, generator=generator)
    mask[torch.rand(mask.shape, generator=generator) < 0.3] = -math.inf
    mask[:, :, :: max(2, queries // 2)] = -math.inf
    return mask


def fully_masked_rows(generator, batch, heads, queries, keys, channels) -> Tensor:
    return (
        scattered(generator, batch, heads, queries, keys, channels) & (torch.arange(queries) % 3 > 0)[:, None]
    )


def shifted_rows(generator, batch, heads, queries, keys, channels) -> Tensor:
    """The same bias for all keys of a row, which does not change the softmax."""
    return (
        torch.tensor([-300.0, 0.0, 300.0, -150.0])
        .repeat(queries)[:queries]
        .view(1, 1, queries, 1)
        .repeat(1, 1, 1, keys)
    )


def small_gates(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.tensor([0.5, 0.007, -0.008, 0.9])[:heads].view(1, heads, 1, 1)


def gates_near_1(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.tensor([1.0, 0.993, 1.007, 0.998])[:heads].view(1, heads, 1, 1)


def by_query_alone(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.rand(1, 1, queries, 1, generator=generator)


def from_a_table(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.rand(heads, 6, generator=generator)[None, :, 2, None, None]


def mixed_padding(generator, batch, heads, queries, keys, channels) -> Tensor:
    """Right padding, left padding and holes, in turn."""
    right = torch.arange(keys) < keys // 2
    holes = torch.arange(keys) % 3 > 0
    return torch.stack([(right, right.flip(0), holes)[item % 3] for item in range(batch)])[:, None, None]


def rows_alone(generator, batch, heads, queries, keys, channels) -> Tensor:
    """(1, 1, Q, 1): every third row has no keys."""
    return (torch.arange(queries) % 3 > 0).view(1, 1, queries, 1)


def window(generator, batch, heads, queries, keys, channels) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool).tril().triu(-2)


def by_distance(generator, batch, heads, queries, keys, channels) -> Tensor:
    return -0.3 * (torch.arange(queries)[:, None] - torch.arange(keys)).abs()


def low_rows(depth: float) -> Callable[..., Tensor]:
    """A random bias, and a large negative one in every second row."""
    return lambda generator, batch, heads, queries, keys, channels: (
        torch.randn(queries, keys, generator=generator) - depth * (torch.arange(queries) % 2)[:, None]
    )


def hundreds(generator, batch, heads, queries, keys, channels) -> Tensor:
    """Biases that differ much between rows, but little within a row."""
    return 120.0 * (1 - torch.arange(queries) % 3)[:, None] + torch.randn(queries, keys, generator=generator)


def with_gaps(mask: Tensor) -> Tensor:
    return torch.cat([mask, ~mask], -1)[..., : mask.shape[-1]]


def of_3_heads(generator, batch, heads, queries, keys, channels) -> Tensor:
    return scattered(generator, batch, heads, heads * queries, keys, channels).view(heads, queries, keys)


def one_head(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


def one_row(x: Tensor) -> Tensor:
    return x[:, :, :1].expand_as(x)


def some_zero(x: Tensor) -> Tensor:
    return x * (torch.arange(x.shape[2], device=x.device) % 3 > 0)[:, None]


def token_major(x: Tensor) -> Tensor:
    """(B, T, H, D) in memory, as projections make it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_strided(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def sliced(x: Tensor) -> Tensor:
    """The middle third of a buffer, as one projection for query, key and value makes it."""
    return torch.cat([x.roll(1, 2), x, x.roll(2, 2)], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def one_item(x: Tensor) -> Tensor:
    return x[:1].expand_as(x)


def one_number(x: Tensor) -> Tensor:
    return x.flatten()[0].clone().expand_as(x)


def then(make: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A function that applies `change` to what `make` returns."""
    return lambda *arguments: change(make(*arguments))


WIDE = (1, 8, 20, 70, 16)

CASES = (
    Case("plain", (2, 4, 10, 23, 24)),
    Case("no multiples missing", (1, 4, 16, 32, 16)),
    Case("one head", (2, 1, 5, 18, 32)),
    Case("64 channels", (1, 2, 5, 18, 64)),
    Case("heads off", WIDE, gate=heads_off),
    Case("fractions", WIDE, gate=fractions),
    Case("fractions by row", (2, 3, 20, 70, 16), gate=fractions_by_row),
    Case("on by row", (2, 4, 33, 19, 16), gate=on_by_row),
    Case("on by query", (2, 4, 33, 19, 16), gate=on_by_query),
    Case("fractions by item", (3, 2, 7, 19, 32), gate=fractions_by_item),
    Case("all off", gate=then(fractions, torch.zeros_like)),
    Case("gate of ones", gate=then(heads_off, torch.ones_like)),
    Case("gate above 1", gate=above_1),
    Case("gate expanded", gate=lambda *a: fractions_by_item(*a).expand(a[1], a[2], a[3], 1)),
    Case("padding", (3, 2, 6, 37, 16), mask=padding, gate=fractions_by_item),
    Case("scattered mask", (2, 3, 9, 40, 16), mask=scattered),
    Case("square mask", (2, 3, 12, 12, 16), mask=scattered),
    Case("mask by head", (2, 3, 5, 21, 16), mask=by_head, gate=fractions),
    Case("mask expanded", (2, 3, 5, 21, 16), mask=expanded_padding),
    Case("biases", (2, 3, 7, 21, 24), mask=biases),
    Case("biases, -inf and fully masked rows", (2, 3, 9, 37, 16), mask=biases_and_rows, gate=on_by_row),
    Case("fully masked rows", (2, 2, 9, 33, 16), mask=fully_masked_rows),
    Case("large logits", (1, 2, 12, 40, 16), logits=3.0, mask=padding),
    Case("huge logits", (2, 2, 12, 40, 16), logits=25.0, mask=padding),
    Case("enormous logits", (2, 2, 12, 40, 16), logits=150.0, mask=padding),
    Case("rows shifted", (1, 2, 12, 24, 16), mask=shifted_rows),
    Case("one query", (2, 2, 1, 19, 16), mask=padding, gate=fractions_by_item),
    Case("one key", (2, 3, 5, 1, 16)),
    Case("one key, gated and masked", (2, 3, 5, 1, 16), gate=on_by_row, mask=fully_masked_rows),
    Case("queries as heads", (2, 8, 8, 20, 16), gate=on_by_row),
    Case("all alike", (1, 4, 4, 4, 16), gate=fractions_by_row, mask=scattered),
    Case("token-major", (2, 3, 6, 20, 16), arrange=token_major, arrange_gradient=token_major),
    Case("channels strided", (2, 3, 6, 20, 16), arrange=channels_strided),
    Case("sliced", (2, 3, 6, 20, 16), arrange=sliced, arrange_value=token_major),
    Case("batch expanded", (3, 2, 6, 20, 16), arrange=one_item, gate=heads_off),
    Case("keys expanded", (3, 2, 6, 20, 16), arrange_value=one_item, gate=fractions_by_item),
    Case("gradient of a sum", (2, 2, 6, 20, 16), arrange_gradient=one_number, gate=fractions),
    Case("long", (1, 2, 6, 600, 16), gate=fractions),
    Case("many queries", (1, 2, 530, 20, 16), gate=fractions_by_row),
    Case("12 heads", (1, 12, 5, 20, 16), gate=heads_off),
    Case("128 channels", (1, 2, 9, 30, 128), mask=scattered),
    Case("40 channels", (1, 2, 9, 30, 40), mask=scattered, gate=fractions),
    Case("key and value alone", (2, 2, 9, 30, 16), wanted=("key", "value")),
    Case("query alone", (2, 2, 9, 30, 16), wanted=("query",)),
    Case("small gradients", (2, 2, 9, 30, 16), gradients=1e-6),
    Case("float64", (2, 3, 7, 37, 16), torch.float64, fractions, padding),
    Case("bfloat16", (2, 3, 7, 37, 16), torch.bfloat16, fractions, padding),
    Case("bfloat16, long", (1, 1, 4, 1500, 16), torch.bfloat16, mean=1.0, logits=0.1),
    Case("bfloat16, huge logits", (1, 2, 12, 40, 16), torch.bfloat16, logits=150.0),
    Case("float16", (2, 3, 7, 37, 16), torch.float16, fractions, biases),
    Case("float16, 24 channels", (2, 3, 7, 37, 24), torch.float16),
    Case("gates nearly 0", (2, 4, 7, 21, 16), gate=small_gates),
    Case("gates nearly 1", (2, 4, 7, 21, 16), gate=gates_near_1),
    Case("as many rows as heads", (2, 3, 3, 21, 16), gate=by_query_alone),
    Case("gate from a table", gate=from_a_table),
    Case("17 heads", (1, 17, 5, 20, 16), gate=lambda *a: torch.rand(1, a[2], 1, 1, generator=a[0])),
    Case("mixed padding", (3, 2, 6, 37, 16), mask=mixed_padding),
    Case("rows alone", mask=rows_alone),
    Case("window", (2, 3, 12, 12, 16), mask=window),
    Case("as many rows as items", (12, 3, 12, 12, 16), mask=scattered),
    Case("as many heads as items", (3, 3, 5, 21, 16), mask=of_3_heads),
    Case("mask with gaps", (2, 3, 9, 40, 16), mask=then(scattered, with_gaps)),
    Case("mask turned", (2, 3, 12, 12, 16), mask=then(scattered, channels_strided)),
    Case("bias by distance", mask=by_distance),
    Case("rows at -2000", (1, 2, 12, 24, 16), mask=low_rows(2e3)),
    Case("rows at -12000", (1, 2, 12, 24, 16), mask=low_rows(1.2e4)),
    Case("bias of hundreds", (1, 2, 12, 24, 16), mask=hundreds),
    Case("heads expanded", (2, 4, 6, 20, 16), arrange=one_head),
    Case("gradient of a sum over rows", (2, 2, 6, 20, 16), arrange_gradient=one_row, gate=fractions),
    Case("key is value", (2, 2, 9, 30, 16), value_is_key=True),
    Case("value alone", (2, 2, 9, 30, 16), wanted=("value",)),
    Case("query and value alone", (2, 2, 9, 30, 16), wanted=("query", "value")),
    Case("query alone, 70 keys", (2, 2, 9, 70, 16), wanted=("query",)),
    Case("10 channels", (1, 2, 9, 30, 10)),
    Case("96 channels", (1, 2, 9, 30, 96)),
    Case("256 channels", (1, 2, 9, 30, 256)),
    Case("40 items", (40, 2, 5, 8, 16), mask=padding),
    Case("very long", (1, 1, 3, 4200, 16)),
    Case("very many queries", (1, 1, 33_000, 3, 8)),
    Case("zero keys", (2, 2, 9, 30, 16), arrange=some_zero),
    Case("great values", (2, 2, 9, 30, 16), spread=1e6),
    Case(
        "float16, heavy sums", (1, 1, 4, 4000, 16), torch.float16, mean=300.0, logits=0.1, wanted=("value",)
    ),
    Case("float64, long", (1, 1, 5, 1200, 16), torch.float64),
)

ACROSS_CALLS = Case("across calls", (2, 3, 18, 40, 16), gate=on_by_row, mask=fully_masked_rows)
"""The case in which calls are repeated, where it has the features that a fault needs."""
