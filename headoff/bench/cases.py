"""The attention calls that are timed: shapes of DETR, head gates, padding, forward and forward with backward."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from headoff.attention import Attention
from headoff.bench.workloads import AttentionCall, Output
from headoff.gates import HeadLayout, all_subsets, cumulative, stack
from headoff.harness.finding import Property
from headoff.timing.calls import TimedCall

Scale = Literal["quick", "standard", "full"]
SCALES: tuple[Scale, ...] = get_args(Scale)

Direction = Literal["forward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)

HEADS, CHANNELS = 8, 32


@dataclass(frozen=True)
class Shape:
    """One attention call of a decoder or encoder. Shapes (batch, HEADS, rows, CHANNELS) and (batch, HEADS, keys, ...).

    - `configurations`: laid end to end along the rows (cross-attention) where `folded`, else as batch items
    - `padded`: a quarter of the keys is padding
    """

    name: str
    queries: int
    keys: int
    configurations: int = 1
    folded: bool = True
    padded: bool = False

    @property
    def batch(self) -> int:
        return 1 if self.folded else self.configurations

    @property
    def rows(self) -> int:
        return self.queries * self.configurations if self.folded else self.queries


QUICK = (
    Shape("cross, 9 x 25 queries, 221 keys", 25, 221, 9),
    Shape("cross, 9 x 25 queries, 221 keys, padded", 25, 221, 9, padded=True),
)
STANDARD = (
    Shape("cross R50, 9 x 100 queries, 850 keys", 100, 850, 9),
    Shape("cross R50, 9 x 100 queries, 850 keys, padded", 100, 850, 9, padded=True),
    Shape("cross R50, 256 x 100 queries, 850 keys", 100, 850, 256),
    Shape("cross DC5, 9 x 100 queries, 3,400 keys", 100, 3400, 9),
    Shape("decoder self, 9 x (100 queries, 100 keys)", 100, 100, 9, folded=False),
)
FULL = (
    *STANDARD,
    Shape("cross DC5, 256 x 100 queries, 3,400 keys", 100, 3400, 256),
    Shape("encoder self R50, 850 queries, 850 keys", 850, 850),
    Shape("encoder self DC5, 3,400 queries, 3,400 keys", 3400, 3400),
)
SHAPES: dict[Scale, tuple[Shape, ...]] = {"quick": QUICK, "standard": STANDARD, "full": FULL}


def gates_of(shape: Shape) -> dict[str, Tensor | None]:
    """By name, the gates that a shape is timed with: (batch, HEADS, rows, 1) float32, or None for nothing off.

    With 0, 4 and 8 heads off in all rows; and, where there are 9 or 256 configurations, each its own: the cumulative
    sweep, all subsets.
    """
    gates: dict[str, Tensor | None] = {"0 heads off": None}
    for off in (4, 8):
        gate = torch.ones(shape.batch, HEADS, shape.rows, 1)
        gate[:, :off] = 0
        gates[f"{off} heads off"] = gate
    sweeps = {
        HEADS + 1: ("cumulative", lambda: cumulative(HEADS)),
        2**HEADS: ("all subsets", lambda: all_subsets(HEADS)),
    }
    if shape.configurations in sweeps:
        name, configurations = sweeps[shape.configurations]
        stacked = stack(configurations(), HeadLayout(1, 1, HEADS, shape.queries)).decoder_cross
        assert stacked is not None
        each = stacked[:, 0].expand(-1, shape.queries, -1)  # (configurations, queries, heads)
        each = each.flatten(0, 1).T[None] if shape.folded else each.transpose(1, 2)
        gates[name] = each.unsqueeze(-1).contiguous()
    return gates


@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionCase(AttentionCall):
    """One attention call, as a workload of `headoff.timing`: timed by contestants, checked by the oracle.

    - `attn_mask` (1, 1, 1, S) bool, or None
    """

    shape: Shape
    gate_name: str
    direction: Direction
    attn_mask: Tensor | None

    @classmethod
    def of(
        cls,
        shape: Shape,
        gate_name: str,
        head_gate: Tensor | None,
        direction: Direction,
        device: torch.device,
        dtype: torch.dtype,
    ) -> AttentionCase:
        """Random inputs, in the layout of the model's projections: (B, T, H, D), seen as (B, H, T, D)."""
        generator = torch.Generator().manual_seed(zlib.crc32(shape.name.encode()))

        def random(length: int) -> Tensor:
            made = torch.randn(shape.batch, length, HEADS, CHANNELS, generator=generator)
            return made.to(device, dtype).transpose(1, 2)

        mask = None
        if shape.padded:
            mask = (torch.arange(shape.keys, device=device) < shape.keys * 3 // 4)[None, None, None]
        return cls(
            shape=shape,
            gate_name=gate_name,
            direction=direction,
            query=random(shape.rows),
            key=random(shape.keys),
            value=random(shape.keys),
            d_context=random(shape.rows),
            head_gate=None if head_gate is None else head_gate.to(device, dtype),
            attn_mask=mask,
        )

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.gate_name}, {self.direction}"

    def side(self, attention: Attention) -> TimedCall:
        if self.direction == "forward":
            return TimedCall(self._forward(attention))
        query, key, value = self.leaves()

        def both() -> tuple[Tensor, ...]:
            context = attention(query, key, value, self.attn_mask, head_gate=self.head_gate)
            return context.detach(), *torch.autograd.grad(context, (query, key, value), self.d_context)

        return TimedCall(both)

    def _forward(self, attention: Attention) -> Callable[[], tuple[Tensor, ...]]:
        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (
                    attention(self.query, self.key, self.value, self.attn_mask, head_gate=self.head_gate),
                )

        return forward

    def outputs(self, result: tuple[Tensor, ...]) -> dict[str, Output]:
        names: tuple[Property, ...] = ("context", "dq", "dk", "dv")
        return {
            str(name): Output(found.flatten(0, 1).flatten(1), name)
            for name, found in zip(names, result, strict=False)
        }


def attention_cases(scale: Scale, device: torch.device, dtype: torch.dtype) -> Iterator[AttentionCase]:
    """One after the other: those of a batch of 256 are not to be held all at once."""
    for shape in SHAPES[scale]:
        # Padding and gates do not meet in a kernel: one gate will do, the most mixed.
        for gate_name, gate in list(gates_of(shape).items())[-1 if shape.padded else 0 :]:
            for direction in DIRECTIONS:
                yield AttentionCase.of(shape, gate_name, gate, direction, device, dtype)
