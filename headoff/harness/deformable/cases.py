"""Cases of a single call of deformable attention: levels, sizes, where points lie, weights, gates, strides.

The gradient of a sampling location jumps where its point crosses the line between two cells' centres, and right
implementations that round differently may come out on different sides. So points keep away from these lines (see
`locations`), except in one case that leaves that gradient out. In half precision levels are small: at 80 columns
bfloat16 resolves a third of a cell, and what is computed from it is arbitrary.
"""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from headoff.deformable import Shapes
from headoff.harness.deformable.inputs import LAYOUTS, LOCATION_KINDS, WEIGHT_KINDS
from headoff.harness.operator.cases import Case, case_in_text
from headoff.harness.operator.gates import GATE_KINDS, GATES_BY_SHAPE

Wanted = Literal[
    "all", "value", "locations", "weights", "value and locations", "value and weights", "locations and weights"
]  # fmt: skip
"""Which gradients are computed."""

GRADIENTS = {"value": "dv", "sampling_locations": "dlocations", "attention_weights": "dweights"}
"""What the gradient of each input is called."""

_BY_WORD = {"value": "value", "locations": "sampling_locations", "weights": "attention_weights"}

WANTED: dict[Wanted, tuple[str, ...]] = {
    wanted: tuple(GRADIENTS) if wanted == "all" else tuple(_BY_WORD[word] for word in wanted.split(" and "))
    for wanted in get_args(Wanted)
}
"""Inputs that require a gradient."""

GRAD_CONTEXT_KINDS = ("random", "ones", "one row", "small", "heads first", "every second", "expanded")

LARGEST_IN_HALF = 10
"""Rows and columns of a level in half precision."""

DRAWN = 16
"""Number of random combinations."""

THREE: Shapes = ((8, 6), (4, 3), (2, 2))


@dataclass(frozen=True, kw_only=True)
class DeformableCase(Case):
    """One call of deformable attention.

    Attributes:
        shapes: (h, w) of each level.
        points: P.
        inputs: where the points lie, of `LOCATION_KINDS`.
        weight_kind: of the attention weights, of `WEIGHT_KINDS`.
    """

    leading = "value"

    queries: int = 20
    heads: int = 4
    channels: int = 16
    shapes: Shapes = THREE
    points: int = 4
    weight_kind: str = "softmax"
    wanted: Wanted = "all"

    def __str__(self) -> str:
        levels = " + ".join(f"{height}x{width}" for height, width in self.shapes)
        text = f"{self.name}: {self.batch} x {self.queries} queries x {self.heads} heads x {self.channels} channels, "
        text += f"levels {levels} x {self.points} points, {str(self.dtype).removeprefix('torch.')}"
        for what, kind in (
            ("gate", self.gate),
            ("locations", self.inputs),
            ("weights", self.weight_kind),
            ("layout", self.layout),
            ("gradient of the context", self.grad_context),
            ("gradients", self.wanted),
        ):
            if kind not in ("none", "normal", "softmax", "contiguous", "random", "all"):
                text += f", {what}: {kind}"
        return text

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.shapes)

    @property
    def weights(self) -> int:
        """B * Q * H * L * P."""
        return self.batch * self.queries * self.heads * len(self.shapes) * self.points

    @property
    def largest_side(self) -> int:
        return max(map(max, self.shapes))

    @property
    def context_shape(self) -> tuple[int, ...]:
        return self.batch, self.queries, self.heads, self.channels

    @property
    def may_be_rejected(self) -> str | None:
        return None if self.queries else "a call without queries"

    def by_head(self, tensor: Tensor) -> Tensor:
        """(B, T, H, ...) as (B, H, T, all else)."""
        tensor = tensor.transpose(1, 2)
        return tensor.reshape(*tensor.shape[:3], tensor[0, 0, 0].numel() if tensor.numel() else 0)

    def place(self, name: str, index: tuple[int, ...]) -> str:
        batch, head, row, column = index
        if name == "dv":
            return f"batch item {batch}, head {head}, {self._cell(row)}, channel {column}"
        where = f"batch item {batch}, head {head}, query {row}, "
        if name == "context":
            return f"{where}channel {column}"
        point, axis = divmod(column, 2) if name == "dlocations" else (column, None)
        level, point = divmod(point, self.points)
        along = "" if axis is None else f", {'xy'[axis]}"
        return f"{where}level {level}, point {point}{along}"

    def _cell(self, token: int) -> str:
        """`token 50 (level 1, row 0, column 2)`"""
        rest = token
        for level, (height, width) in enumerate(self.shapes):
            if rest < height * width:
                row, column = divmod(rest, width)
                return f"token {token} (level {level}, row {row}, column {column})"
            rest -= height * width
        raise IndexError(token)


def _case(name: str, shapes: Shapes = THREE, **fields: Any) -> DeformableCase:
    """A case called `name`, with dashes for spaces."""
    return DeformableCase(name=name.replace(" ", "-"), shapes=shapes, **fields)


def _detectors() -> list[DeformableCase]:
    """Layers, heads, levels and points of known detectors, on small images."""
    levels = ((10, 8), (5, 4), (3, 2), (2, 1))
    tokens = sum(height * width for height, width in levels)
    return [
        _case(
            "rt-detr decoder", ((10, 10), (5, 5), (3, 3)), heads=8, queries=40, channels=32, gate="first-3"
        ),
        _case("deformable detr encoder", levels, batch=2, heads=8, queries=tokens, channels=32),
        _case("rf-detr decoder", ((9, 9),), heads=16, queries=25, points=2, gate="per query"),
        _case("grounding dino decoder", levels, heads=8, queries=30, channels=32, gate="configurations"),
        # Levels of other numbers of points, filled up with points of weight 0, as in D-FINE.
        _case("d-fine decoder", ((10, 10), (5, 5), (3, 3)), heads=8, points=6, weight_kind="filled up"),
    ]


def _sizes() -> list[DeformableCase]:
    flat, tall = ((2, 9), (1, 7), (3, 5)), ((9, 2), (7, 1), (5, 3))
    return [
        _case("flat levels", flat, gate="fractions"),
        _case("tall levels", tall, gate="fractions"),
        _case("levels of one pixel", ((1, 1), (3, 4), (1, 1), (6, 1), (1, 5)), batch=2),
        _case("one pixel", ((1, 1),), points=1, queries=9),
        _case("growing levels", ((2, 2), (4, 3), (8, 7)), gate="full"),
        _case("eight levels", tuple((9 - level, 8 - level % 3) for level in range(8)), points=2, gate="full"),
        *(_case(f"points {points}", points=points, gate="full", batch=2) for points in (1, 2, 3, 8, 17, 40)),
        *(_case(f"channels {channels}", channels=channels, queries=7) for channels in (1, 3, 8, 33, 64, 128)),
        _case("channels 300", ((4, 4), (2, 2)), channels=300, heads=2, queries=5),
        *(_case(f"heads {heads}", heads=heads, queries=9, gate="full") for heads in (1, 3, 5, 12, 33)),
        *(
            _case(f"queries {queries}", queries=queries, gate="full", batch=2)
            for queries in (0, 1, 2, 33, 65)
        ),
        _case("many queries", queries=1300, heads=2, channels=4),
        _case("batch 5", batch=5, gate="per item"),
        _case("batch 67", ((3, 2), (1, 2)), batch=67, heads=2, queries=3, channels=4, gate="per item"),
        # Sizes that are equal, so that one may be mistaken for another.
        _case("all sizes equal", ((2, 2),) * 4, batch=4, heads=4, queries=4, channels=4, gate="full"),
        _case("square levels", ((4, 4), (4, 4), (4, 4)), batch=3, heads=3, queries=48, points=3, gate="full"),
        _case("queries as heads", queries=4, batch=2, gate="per query"),
        _case("large level", ((80, 80), (40, 40), (20, 20)), heads=2, queries=30),
        _case("tokens 70000", ((250, 280),), heads=1, queries=9, channels=4),
    ]


def _gates() -> list[DeformableCase]:
    kinds = [*(f"first-{k}" for k in (0, 1, 4, 8)), "only-7", "without-5", *GATE_KINDS]
    cases = [
        _case(f"gate {kind}", batch=2, heads=8, queries=19, channels=8, points=2, gate=kind) for kind in kinds
    ]
    return cases + [
        _case(f"gate {kind} equal", ((3, 3), (2, 2)), batch=5, heads=5, queries=5, channels=4, gate=kind)
        for kind in GATES_BY_SHAPE
    ]


def _inputs() -> list[DeformableCase]:
    cases = [
        _case(f"locations {kind}", batch=2, inputs=kind, gate=("none", "full")[number % 2])
        for number, kind in enumerate(LOCATION_KINDS)
        if kind != "cell centres"
    ]
    cases += [_case(f"weights {kind}", batch=2, weight_kind=kind, gate="full") for kind in WEIGHT_KINDS]
    # Points on the lines: all but the gradient of the locations is continuous there. Powers of 2, so that all
    # implementations compute positions without rounding.
    exact = ((4, 8), (2, 4), (1, 2))
    return [*cases, _case("locations cell centres", exact, inputs="cell centres", wanted="value and weights")]


def _layouts() -> list[DeformableCase]:
    cases = [_case(f"layout {kind}", batch=3, layout=kind, gate="full") for kind in LAYOUTS]
    for kind in GRAD_CONTEXT_KINDS:
        cases.append(_case(f"grad-context {kind}", batch=2, grad_context=kind, gate="full"))
    for wanted in WANTED:
        cases.append(_case(f"wanted {wanted}", wanted=wanted, gate="full", batch=2))
    return cases


CHOSEN: tuple[DeformableCase, ...] = tuple(_detectors() + _sizes() + _gates() + _inputs() + _layouts())

REDUCED = (
    "rf-detr-decoder",
    "flat-levels",
    "levels-of-one-pixel",
    "points-3",
    "all-sizes-equal",
    "gate-fractions",
    "gate-all-off",
    "gate-per-query",
    "locations-borders",
    "locations-outside",
    "weights-any",
    "layout-reversed",
    "grad-context-ones",
)
"""Small cases of many kinds."""


def drawn(number: int, seed: int) -> DeformableCase:
    """A random combination; the same for the same seed on every machine."""
    choose = random.Random(f"deformable {seed} {number}").choice
    side = (1, 2, 3, 4, 5, 7, 8, 9, 10)
    return _case(
        f"drawn {number}",
        tuple((choose(side), choose(side)) for _ in range(choose((1, 2, 3, 4)))),
        batch=choose((1, 2, 3)),
        heads=choose((1, 2, 4, 5, 8)),
        queries=choose((1, 3, 8, 16, 17, 30)),
        channels=choose((4, 8, 10, 16, 32)),
        points=choose((1, 2, 3, 4, 8)),
        gate=choose(["none", *GATE_KINDS, *GATES_BY_SHAPE]),
        inputs=choose([kind for kind in LOCATION_KINDS if kind != "cell centres"]),
        weight_kind=choose(list(WEIGHT_KINDS)),
        layout=choose(list(LAYOUTS)),
        grad_context=choose(GRAD_CONTEXT_KINDS),
        seed=seed,
    )


def deformable_cases(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[DeformableCase]:
    """All cases in `dtype`, chosen and random ones. Their names do not depend on the seed.

    In half precision those with large levels are left out.
    """
    chosen = [replace(case, dtype=dtype, seed=seed) for case in CHOSEN]
    cases = chosen + [replace(drawn(number, seed), dtype=dtype) for number in range(DRAWN)]
    if dtype.itemsize > 2:
        return cases
    return [case for case in cases if max(itertools.chain(*case.shapes)) <= LARGEST_IN_HALF]


def reduced_cases(dtype: torch.dtype, seed: int = 0) -> list[DeformableCase]:
    """A few small cases, for dtypes that nobody asked for and for tests of the tolerance."""
    return [case for case in deformable_cases(dtype, seed) if case.name in REDUCED]


def case_named(name: str, dtype: torch.dtype, seed: int) -> DeformableCase | None:
    """The case of `deformable_cases` called `name`; None where there is none in this dtype."""
    return _cases_by_name(dtype, seed).get(name)


def case_of_text(text: str, seed: int) -> DeformableCase | None:
    """The case whose `str` is this text; None for any other text."""
    return case_in_text(text, lambda name, dtype: case_named(name, dtype, seed))


@functools.cache
def _cases_by_name(dtype: torch.dtype, seed: int) -> dict[str, DeformableCase]:
    return {case.name: case for case in deformable_cases(dtype, seed)}
