"""Whether a mutant differs from what it was made of: results beyond rounding, or side effects.

By float64 truth on random calls that have nothing in common with those of the suites: other sizes, masks, gates,
strides and seeds. What the suites or their tolerances are is not asked here.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from headoff.attention import eager
from headoff.deformable import grid_sample_attention
from headoff.harness.operator.masks import unusual_mask

Contract = Literal["dense", "deformable"]

CALLS: dict[Contract, int] = {"dense": 32, "deformable": 20}
"""Random calls in each dtype."""

PADDED: dict[int, tuple[str, tuple[int, int, int, int]]] = {
    30: ("bool", (3, 2, 11, 45)),
    31: ("rows", (2, 5, 3, 70)),
}
"""Numbers of calls with padding as models have it, the second with an item of nothing else; and (B, H, Q, S)."""

SEED = 77_003

FACTOR = {torch.float64: 1000.0, torch.float32: 16.0}
"""Times the right implementation's error, plus a rounding of the largest number: what is beyond is no rounding."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call: `tensors` that gradients are asked of where they are `wanted`, and all others."""

    tensors: tuple[Tensor, ...]
    others: tuple[Any, ...]
    gate: Tensor | None
    grad: Tensor
    wanted: tuple[bool, ...]
    contract: Contract

    def run(self, attention: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> Tensor:
        if self.contract == "dense":
            return attention(*leaves, *self.others, head_gate=self.gate)
        value, locations, weights = leaves
        return attention(value, *self.others, locations, weights, head_gate=self.gate)

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return tuple(
            (x if dtype is None else x.to(dtype)).detach().requires_grad_(wanted)
            for x, wanted in zip(self.tensors, self.wanted, strict=True)
        )

    @property
    def memory(self) -> list[Tensor]:
        every = (*self.tensors, *self.others, self.gate, self.grad)
        return [x for x in every if isinstance(x, Tensor)]


Results = dict[str, Tensor]


def results(call: Call, attention: Callable[..., Tensor]) -> Results:
    """The context and the gradients that are wanted."""
    leaves = call.leaves()
    context = call.run(attention, leaves)
    found = {"context": context.detach()}
    inputs = {f"gradient {n}": leaf for n, leaf in enumerate(leaves) if leaf.requires_grad}
    if inputs and context.requires_grad:
        gradients = torch.autograd.grad(context, list(inputs.values()), call.grad, allow_unused=True)
        for (name, leaf), gradient in zip(inputs.items(), gradients, strict=True):
            found[name] = torch.zeros_like(leaf) if gradient is None else gradient
    elif inputs:
        found |= {name: torch.zeros_like(leaf) for name, leaf in inputs.items()}
    return found


def strided(x: Tensor, choose: Callable[[tuple[str, ...]], str]) -> Tensor:
    """The same numbers (first three of them for `expanded`) with some strides."""
    kind = choose(("plain", "plain", "axes 1 and 2", "last axis", "gaps", "offset"))
    if kind == "axes 1 and 2":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "last axis":
        return x.mT.contiguous().mT
    if kind == "gaps":
        wide = torch.stack([x, x + 1], -1)
        return wide[..., 0]
    if kind == "offset":
        return torch.cat([x[:, :, :1], x], 2)[:, :, 1:]
    return x.contiguous()


def dense_call(number: int, dtype: torch.dtype) -> Call:
    draw, generator = random.Random(f"{SEED} {number}"), torch.Generator().manual_seed(SEED + number)
    choose = draw.choice

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch, heads = draw.randint(1, 4), draw.randint(1, 7)
    queries, keys = draw.randint(1, 90), draw.randint(1, 180)
    channels = choose((4, 7, 12, 24, 31, 48))
    if number % 8 == 7:  # enough rows of heads that are off for them to be left out
        batch, heads, queries, keys, channels = 2, 8, 90, 350, 16
    elif number % 5 == 0:  # equal sizes
        batch = heads = queries = keys = draw.randint(2, 6)
        channels = choose((batch, 8))
    if number in PADDED:
        batch, heads, queries, keys = PADDED[number][1]
    query = normal(batch, heads, queries, channels) * choose((1, 1, 3, 10))
    key, value = normal(batch, heads, keys, channels), normal(batch, heads, keys, channels) * choose((1, 20))
    if draw.random() < 0.3:
        value = value + 5.0
    shape = tuple(n if draw.random() < 0.6 else 1 for n in (batch, heads, queries)) + (keys,)
    shape = shape[draw.choice((0, 0, 0, 1, 2)) :]
    kind = "none" if number == 0 else choose(("none", "none", "bool", "rows", "float", "bias", "both"))
    if number in PADDED:
        shape, kind = (batch, 1, 1, keys), PADDED[number][0]
    mask: Tensor | None = None
    if kind in ("bool", "rows", "float"):
        seen = torch.rand(shape, generator=generator) < choose((0.3, 0.8))
        if kind == "bool":
            seen[..., draw.randrange(keys)] = True
        elif draw.random() < 0.5:
            seen = seen & (torch.arange(keys) > keys // 2)
        if kind == "rows" and number in PADDED:
            seen[0] = False
        elif kind == "rows" and seen.dim() > 1:
            seen[..., : (seen.shape[-2] + 1) // 2, :] = False
        mask = seen
        if kind == "float":
            mask = torch.zeros(shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    elif kind in ("bias", "both"):
        mask = normal(*shape) * 3
        if kind == "both":
            mask = mask.masked_fill(torch.rand(shape, generator=generator) < 0.5, -torch.inf)
        mask = mask.to(dtype)
    if mask is not None and draw.random() < 0.3:
        mask = mask.expand(batch, heads, queries, keys)
    gate: Tensor | None = None
    if number and draw.random() < 0.75:
        by = tuple(n if draw.random() < 0.6 else 1 for n in (batch, heads, queries)) + (1,)
        if number % 8 == 7:
            by = (batch, heads, 1, 1)
        gate = torch.rand(by, generator=generator, dtype=torch.float64) * choose((1.0, 1.7))
        gate = gate.masked_fill(torch.rand(by, generator=generator) < 0.5, 0.0).to(dtype)
        if draw.random() < 0.3:
            gate = gate.expand(batch, heads, queries, 1)
    tensors = tuple(strided(x.to(dtype), choose) for x in (query, key, value))
    if draw.random() < 0.15:
        tensors = tuple(x[:1].expand(batch, -1, -1, -1) for x in tensors)
    grad = strided(normal(batch, heads, queries, channels).to(dtype), choose)
    if draw.random() < 0.2:
        grad = grad[..., :1, :1].expand(batch, heads, queries, channels)
    wanted = choose(
        ((True,) * 3, (True,) * 3, (True, False, False), (False, True, False), (False, False, True))
    )
    return Call(tensors, (mask,), gate, grad, wanted if number else (True,) * 3, "dense")


def deformable_call(number: int, dtype: torch.dtype) -> Call:
    draw, generator = random.Random(f"{SEED} {number}"), torch.Generator().manual_seed(SEED + number)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    batch, heads, queries = draw.randint(1, 4), draw.randint(1, 6), draw.randint(1, 40)
    points, channels = draw.randint(1, 6), draw.choice((3, 6, 9, 14))
    shapes = tuple((draw.randint(1, 14), draw.randint(1, 14)) for _ in range(draw.randint(1, 4)))
    tokens = sum(height * width for height, width in shapes)
    value = uniform(batch, tokens, heads, channels) * 4 - 1.5
    # Never within a fiftieth of a cell of the lines where the gradient of a location jumps.
    size = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]
    cells = (uniform(batch, queries, heads, len(shapes), points, 2) * 2 - 0.5) * size - 0.5
    locations = (cells.floor() + 0.02 + 0.96 * uniform(*cells.shape) + 0.5) / size
    weights = uniform(batch, queries, heads, len(shapes), points)
    if draw.random() < 0.5:
        weights = weights / weights.sum((-2, -1), keepdim=True)
    gate: Tensor | None = None
    if number and draw.random() < 0.75:
        by = tuple(n if draw.random() < 0.6 else 1 for n in (batch, queries, heads)) + (1,)
        gate = uniform(*by) * 1.5
        gate = gate.masked_fill(uniform(*by) < 0.4, 0.0).to(dtype)
    tensors = (value, locations, weights)
    laid = tuple(strided(x.to(dtype), draw.choice) for x in tensors)
    grad = strided((uniform(batch, queries, heads, channels) - 0.3).to(dtype), draw.choice)
    wanted = draw.choice(
        ((True,) * 3, (True,) * 3, (True, False, False), (False, True, False), (False, False, True))
    )
    return Call(laid, (shapes,), gate, grad, wanted if number else (True,) * 3, "deformable")


MAKERS: dict[Contract, Callable[[int, torch.dtype], Call]] = {
    "dense": dense_call,
    "deformable": deformable_call,
}


@functools.cache
def truth(contract: Contract, number: int, dtype: torch.dtype) -> Results:
    """Of the rounded inputs, by the oracle in float64."""
    call = MAKERS[contract](number, dtype)
    wide = Call(
        tuple(x.double() for x in call.tensors),
        tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.others),
        None if call.gate is None else call.gate.double(),
        call.grad.double(),
        call.wanted,
        contract,
    )
    return results(wide, eager if contract == "dense" else grid_sample_attention)


Error = dict[str, float]


def errors(found: Results, contract: Contract, number: int, dtype: torch.dtype) -> Error:
    """The largest difference of each result, infinite where what must be exactly zero is not."""
    largest = {}
    for name, true in truth(contract, number, dtype).items():
        difference = (found[name].double() - true).abs()
        if not bool(difference.isfinite().all()) or bool(difference[~true.any(-1)].any()):
            largest[name] = float("inf")
        else:
            largest[name] = float(difference.max())
    return largest


@functools.cache
def allowed(
    original: Callable[[], Callable[..., Tensor]], contract: Contract, number: int, dtype: torch.dtype
) -> Error:
    """What is still rounding, for mutants of what `original` makes."""
    right = errors(results(MAKERS[contract](number, dtype), original()), contract, number, dtype)
    eps = torch.finfo(dtype).eps
    return {
        name: FACTOR[dtype] * (right[name] + eps * float(true.abs().max()))
        for name, true in truth(contract, number, dtype).items()
    }


def crashes_at_once(make: Callable[[], Callable[..., Tensor]], contract: Contract) -> str | None:
    """What is raised on import, or by a first plain call, or by a first call with mask and gate."""
    first = MAKERS[contract](0, torch.float32)
    with_all = next(
        call
        for call in (MAKERS[contract](number, torch.float32) for number in range(1, 40))
        if call.gate is not None and all(x is not None for x in call.others) and all(call.wanted)
    )
    try:
        for call in (first, with_all):
            results(call, make())
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def difference(
    make: Callable[[], Callable[..., Tensor]],
    original: Callable[[], Callable[..., Tensor]],
    contract: Contract,
    unsupported: list[str] | None = None,
) -> tuple[torch.dtype, str] | None:
    """The dtype in which a mutant differs, float32 if it does there, and how; None where it is as right as `original`.

    One instance makes all calls, so that what it carries from call to call shows as well.

    Args:
        unsupported: takes what is raised for masks that no model makes. By the harness's contract an attention does not
            support these, which runs note and do not reject; without this list it is a difference.
    """
    for dtype in (torch.float32, torch.float64):
        used = make()
        for number in range(CALLS[contract]):
            try:
                if found := next(_differences(used, original, contract, number, dtype), None):
                    return dtype, f"call {number}: {found}"
            except Exception as error:
                raised = f"call {number}: raises {type(error).__name__}: {error}"[:200]
                mask = MAKERS[contract](number, dtype).others[0]
                if unsupported is None or contract != "dense" or unusual_mask(mask) is None:
                    return dtype, raised
                unsupported.append(raised)
    return None


def _differences(
    used: Callable[..., Tensor],
    original: Callable[[], Callable[..., Tensor]],
    contract: Contract,
    number: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    call = MAKERS[contract](number, dtype)
    before = [(x, x.clone(), x._version) for x in call.memory]
    found = results(call, used)
    for x, copy, version in before:
        if x._version != version or not torch.equal(x, copy):
            yield "an input is written into"
    shapes = {"context": call.grad.shape, **{f"gradient {n}": x.shape for n, x in enumerate(call.tensors)}}
    for name, result in found.items():
        if result.shape != shapes[name] or result.dtype != dtype:
            yield f"the {name} is of shape {tuple(result.shape)} and {result.dtype}"
    limits = allowed(original, contract, number, dtype)
    for name, error in errors(found, contract, number, dtype).items():
        if not error <= limits[name]:
            yield f"the {name} is off by {error:.1e}, {limits[name]:.1e} is rounding"
    if number % 3:
        return
    again = results(call, used)
    if not all(torch.equal(again[name], result) for name, result in found.items()):
        yield "the same call gives something else"
    with torch.no_grad():
        bare = call.run(used, call.leaves())
        kept = bare.clone()
        other = call.run(used, call.leaves())
    if bare.requires_grad or other.requires_grad:
        yield "the context requires a gradient where gradients are off"
    if not torch.equal(bare, kept):
        yield "a later call overwrites the context"
    if not float((bare - found["context"]).double().abs().max()) <= limits["context"]:
        yield "the context is another one without gradients"
    if any(bare.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for x in call.memory):
        yield "the context has the memory of an input"
    if any(n > 1 and s == 0 for n, s in zip(bare.shape, bare.stride(), strict=True)):
        yield "the context has several elements at one place"
    with torch.enable_grad():
        context = call.run(used, call.leaves())
        if not context.requires_grad:
            yield "the context requires no gradient"
