"""Cases of a single attention call: sizes, dtype, gate, mask, inputs and their strides, and which gradients are wanted.

Cases combine several difficulties, so that few are enough; `headoff.harness.operator.variants` takes the difficulties
away again to find what a failure is due to. In addition to the chosen cases there are random combinations, others for
another seed, for faults that need two difficulties at once.
"""

from __future__ import annotations

import functools
import itertools
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor

from headoff.gates import Site
from headoff.harness.operator.gates import GATE_KINDS, GATES_BY_SHAPE
from headoff.harness.operator.inputs import CALL_LAYOUTS, INPUT_KINDS
from headoff.harness.operator.masks import MASK_KINDS, MASKS_BY_SHAPE, SQUARE_KINDS

Wanted = Literal[
    "all", "query", "key", "value", "query and key", "query and value", "key and value",
    "query is key", "query is value", "key is value", "all are one",
]  # fmt: skip
"""Which gradients are computed. `query is key`: all, and one tensor is both, as in self-attention without positions;
`key is value`: the same in cross-attention."""

GRADIENTS = {"query": "dq", "key": "dk", "value": "dv"}
"""What the gradient of each input is called."""

INPUTS = tuple(GRADIENTS)

SHARED: dict[Wanted, tuple[str, ...]] = {
    "query is key": ("query", "key"),
    "query is value": ("query", "value"),
    "key is value": ("key", "value"),
    "all are one": INPUTS,
}
"""Inputs that are one tensor."""

WANTED: dict[Wanted, tuple[str, ...]] = {
    wanted: INPUTS if wanted == "all" or wanted in SHARED else tuple(wanted.split(" and "))
    for wanted in get_args(Wanted)
}
"""Inputs that require a gradient."""

GRAD_CONTEXT_KINDS = (
    "random", "ones", "heads last", "every second", "one row",
    "expanded", "expanded over heads", "expanded over queries", "expanded over channels",
)  # fmt: skip
"""Kinds of gradients of the context: `ones` is that of a sum, of stride 0, the expanded ones are those of sums over one
dimension (`expanded` alone is over batch items); `one row` is zero except for one query. A case of its own has the kind
`small`: gradients as small as those of a mean loss."""

EQUAL_AND_DIFFERENT = (("equal", (5, 5, 5, 5, 8)), ("different", (2, 3, 4, 7, 8)))
"""Sizes where one dimension read as another still has the right size, and where every dimension has its own."""

CaseType = TypeVar("CaseType", bound="Case")

DRAWN = 24
"""Number of random combinations."""


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """One call of a callable under test: what cases of all contracts have.

    Attributes:
        name: without spaces, for pytest.
        batch, heads, queries, channels: B, H, Q, D.
        dtype: of all tensors that are not bool.
        gate, inputs: kinds of them.
        layout: strides of the inputs.
        grad_context: kind of the gradient of the context.
        wanted: which gradients are computed.
        site: where a detector attends with such sizes.
        seed: of the random numbers.
    """

    leading: ClassVar[str]
    """The input that the context has its dtype from."""

    name: str
    batch: int = 1
    heads: int = 8
    queries: int = 100
    channels: int = 32
    dtype: torch.dtype = torch.float32
    gate: str = "none"
    inputs: str = "normal"
    layout: str = "contiguous"
    grad_context: str = "random"
    wanted: str = "all"
    site: Site | None = None
    seed: int = 0

    @property
    @abstractmethod
    def weights(self) -> int:
        """Number of attention weights, which tells how large the case is."""

    @property
    @abstractmethod
    def context_shape(self) -> tuple[int, ...]: ...

    @property
    def largest_side(self) -> int:
        """Cells along the longest side of a level: a position is rounded in proportion. 1 where nothing is sampled."""
        return 1

    @property
    def may_be_rejected(self) -> str | None:
        """What a callable may raise on, where no model calls it so."""
        return None

    @abstractmethod
    def by_head(self, tensor: Tensor) -> Tensor:
        """The context or a gradient as (B, H, rows, columns): errors are averaged over the last two."""

    @abstractmethod
    def place(self, name: str, index: tuple[int, ...]) -> str:
        """In words, the place of an element of `by_head` of the result `name`."""


@dataclass(frozen=True, kw_only=True)
class OperatorCase(Case):
    """One attention call. `keys` is S; `mask` is the kind of the mask."""

    leading = "query"

    keys: int = 100
    mask: str = "none"
    wanted: Wanted = "all"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        text = f"{self.name}: {self.batch} x {self.heads} heads, {self.queries} queries x {self.keys} keys x "
        text += f"{self.channels} channels, {dtype}"
        for what, kind in (
            ("gate", self.gate),
            ("mask", self.mask),
            ("inputs", self.inputs),
            ("layout", self.layout),
            ("gradient of the context", self.grad_context),
            ("gradients", self.wanted),
        ):
            if kind not in ("none", "normal", "contiguous", "random", "all"):
                text += f", {what}: {kind}"
        return text

    @property
    def weights(self) -> int:
        """B * H * Q * S."""
        return self.batch * self.heads * self.queries * self.keys

    @property
    def context_shape(self) -> tuple[int, ...]:
        return self.batch, self.heads, self.queries, self.channels

    def by_head(self, tensor: Tensor) -> Tensor:
        return tensor

    def place(self, name: str, index: tuple[int, ...]) -> str:
        batch, head, row, column = index
        what = "key" if name in ("dk", "dv") else "query"
        return f"batch item {batch}, head {head}, {what} {row}, channel {column}"

    @property
    def gradient_names(self) -> dict[str, str]:
        """`dq`, `dk`, `dv` by input; that of a tensor which is several of them is named by the first.

        Query and key cannot be one tensor where there are not as many of both: they are two then.
        """
        shared = SHARED.get(self.wanted, ())
        if "query" in shared and self.queries != self.keys:
            shared = ()
        return {name: GRADIENTS[shared[0] if name in shared else name] for name in INPUTS}


Fields = dict[str, Any]
"""What a case has that differs from another one."""

Sizes = tuple[int, int, int, int, int]
"""(B, H, Q, S, D)"""


def _case(name: str, sizes: Sizes, **fields: Any) -> OperatorCase:
    """A case called `name`, with dashes for spaces."""
    by_name: Fields = dict(zip(("batch", "heads", "queries", "keys", "channels"), sizes, strict=True))
    return OperatorCase(name=name.replace(" ", "-"), **by_name, **fields)


def _detr() -> list[OperatorCase]:
    """DETR's sizes at 800 x 1066 pixels, in part with fewer heads, and nine configurations of a sweep end to end."""
    cross = {"layout": "heads last", "site": "decoder_cross"}
    return [
        _case("decoder_cross", (1, 4, 100, 850, 32), gate="first-3", **cross),
        _case("sweep", (1, 8, 225, 850, 32), gate="configurations", mask="padding", **cross),
        _case("encoder_self", (1, 2, 850, 850, 32), mask="padding", layout="heads last", site="encoder_self"),
        _case(
            "decoder_self",
            (3, 8, 100, 100, 32),
            gate="per item",
            layout="sequence first",
            site="decoder_self",
        ),
        _case("dilated", (1, 8, 7, 3350, 32), gate="full", mask="holes", site="decoder_cross"),
    ]


RAGGED = (
    ((1, 1), (1, 850), (100, 1), (2, 3), (17, 33), (31, 63), (65, 129), (127, 257), (33, 1023), (129, 40)),
    ((16, 16), (64, 64), (128, 256), (64, 520)),
)
"""Queries and keys: multiples of nothing, and multiples of block sizes."""


def _sizes() -> list[OperatorCase]:
    cases = [
        _case(
            f"sizes {queries}x{keys}",
            (1 + number % 2, 2, queries, keys, 32),
            gate=("none", "full")[number % 2],
            inputs=("normal", "spotlight")[number // 2 % 2],
        )
        for number, (queries, keys) in enumerate(itertools.chain(*RAGGED))
    ]
    for heads, channels in ((3, 16), (1, 32), (2, 40), (3, 64), (2, 128), (12, 20), (5, 8)):
        name = f"channels {channels} heads {heads}"
        cases.append(_case(name, (2, heads, 37, 45, channels), gate="full", mask="padding"))
    for channels in (1, 10, 33, 96, 256):
        cases.append(_case(f"channels {channels}", (1, 2, 9, 13, channels), gate="full", mask="padding"))
    return cases + [
        _case("one query masked", (2, 3, 1, 50, 32), gate="full", mask="padding"),
        _case("one query fully masked", (2, 3, 1, 50, 32), mask="fully masked item"),
        _case("one key fully masked", (2, 3, 20, 1, 32), gate="full", mask="fully masked item"),
        _case("one key additive", (2, 3, 20, 1, 32), mask="additive fully masked rows"),
        _case("many queries", (1, 1, 1100, 9, 16), gate="full", mask="rows"),
        # Sizes that are equal, so that one may be mistaken for another.
        _case("all sizes equal", (2, 8, 8, 8, 8), gate="full", mask="full"),
        _case("batch as heads", (8, 8, 8, 8, 16), gate="per item", mask="padding"),
        _case("queries as heads", (2, 8, 8, 50, 32), gate="per query", layout="heads last"),
        _case("square", (2, 3, 32, 32, 32), gate="full", mask="rows per item", layout="channels first"),
        _case("keys as heads", (3, 4, 24, 4, 16), gate="per item", mask="bias of keys"),
        # One large size and small others, which is cheap: more heads or items than a word has bits, partial last
        # blocks, grids that are too small.
        _case("odd batch", (5, 3, 9, 21, 32), gate="full", mask="full"),
        _case("many heads", (2, 12, 20, 300, 32), gate="first-9", inputs="spotlight"),
        _case("heads 17", (1, 17, 4, 6, 8), gate="first-1"),
        _case("heads 33", (1, 33, 4, 6, 8), gate="first-3"),
        _case("many items", (40, 2, 5, 6, 8), gate="per item", mask="padding"),
        _case("long keys", (1, 1, 5, 2000, 16), gate="full"),
        _case("long queries", (1, 1, 2000, 6, 16)),
        _case("keys 4200", (1, 1, 3, 4200, 8), inputs="spotlight"),
        _case("queries 33000", (1, 1, 33_000, 3, 8)),
        _case("heads of all items 65600", (8200, 8, 1, 2, 8)),
        # Gradients of query and key are differences of large numbers here: they are not compared.
        _case("sums over many keys", (1, 1, 11, 2000, 16), inputs="heavy-values", wanted="value"),
    ]


def _gates() -> list[OperatorCase]:
    kinds = [f"first-{k}" for k in range(9)] + ["only-0", "only-7", "without-5", *GATE_KINDS]
    cases = [
        _case(
            f"gate {kind}",
            (2, 8, 26, 41, 16),
            gate=kind,
            inputs=("spotlight", "normal")[number % 2],
            mask=("none", "padding", "bias")[number % 3],
        )
        for number, kind in enumerate(kinds)
    ]
    for kind, (which, sizes) in itertools.product(GATES_BY_SHAPE, EQUAL_AND_DIFFERENT):
        cases.append(_case(f"gate {kind} {which}", sizes, gate=kind, inputs="positive"))
    return cases


def _masks() -> list[OperatorCase]:
    cases = [
        _case(
            f"mask {name}",
            (4, 3, 24, 24, 16) if name in SQUARE_KINDS else (3, 4, 34, 150, 16),
            mask=name,
            gate=("none", "full", "per item")[number % 3],
            inputs=("normal", "positive")[number % 2],
        )
        for number, name in enumerate(MASK_KINDS)
    ]
    for name, (which, sizes) in itertools.product(MASKS_BY_SHAPE, EQUAL_AND_DIFFERENT):
        cases.append(_case(f"mask {name} {which}", sizes, mask=name))
    return cases


def _inputs() -> list[OperatorCase]:
    cases = [
        _case(
            f"inputs {kind}",
            (2, 4, 70, 139, 32),
            inputs=kind,
            gate=("full", "none")[number % 2],
            mask=("none", "padding")[number // 2 % 2],
        )
        for number, kind in enumerate(INPUT_KINDS)
    ]
    return cases + [
        _case("spotlight even", (1, 2, 64, 128, 64), inputs="spotlight", gate="fractions"),
        _case("spotlight padding", (2, 2, 75, 150, 40), inputs="spotlight", mask="holes", gate="per item"),
    ]


def _layouts() -> list[OperatorCase]:
    cases = []
    for kind in CALL_LAYOUTS:
        mask = "none" if kind == "contiguous" else "padding"
        cases.append(_case(f"layout {kind}", (3, 4, 25, 47, 32), layout=kind, gate="full", mask=mask))
    usual = {"gate": "full", "layout": "heads last", "inputs": "positive"}
    for kind in (*GRAD_CONTEXT_KINDS, "small"):
        cases.append(_case(f"grad-context {kind}", (2, 3, 40, 50, 32), grad_context=kind, **usual))
    for wanted in WANTED:
        name = f"wanted {wanted}"
        if wanted != "all":
            cases.append(_case(name, (2, 3, 35, 35, 32), wanted=wanted, gate="full", mask="padding"))
        if wanted not in SHARED:
            cases.append(_case(f"{name} of 70 keys", (1, 2, 19, 70, 32), wanted=wanted, gate="first-1"))
    return cases


CHOSEN: tuple[OperatorCase, ...] = tuple(_detr() + _sizes() + _gates() + _masks() + _inputs() + _layouts())

REDUCED = (
    "channels-40-heads-2",
    "gate-fractions",
    "gate-all-off",
    "mask-padding",
    "mask-left-padding",
    "mask-bias-and-padding",
    "mask-fully-masked-rows",
    "inputs-large",
    "inputs-spotlight",
    "inputs-tiny",
    "spotlight-padding",
    "layout-heads-last",
    "grad-context-ones",
    "long-keys",
)
"""Small cases of many kinds."""


def drawn(number: int, seed: int) -> OperatorCase:
    """A random combination; the same for the same seed on every machine."""
    choose = random.Random(f"{seed} {number}").choice
    keys = choose((1, 2, 5, 8, 16, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 200, 257))
    queries = choose((1, 2, 3, 8, 15, 16, 17, 32, 33, 50, 64, 65, 100))
    heads, batch = choose((1, 2, 3, 4, 5, 8)), choose((1, 2, 3))
    gates, masks = [kind for kind in GATE_KINDS if kind != "all off"], list(MASK_KINDS)
    # Now and then sizes are equal, so that one dimension read as another has the right size.
    alike = choose(("", "", "", "QS", "HQ", "BH", "BQ", "BHQS"))
    sizes = {"B": batch, "H": heads, "Q": queries, "S": keys}
    if alike:
        sizes |= dict.fromkeys(alike, heads if "H" in alike or "B" in alike else queries)
    return _case(
        f"drawn {number}",
        (*sizes.values(), choose((10, 16, 32, 32, 33, 40, 64))),  # type: ignore[arg-type]
        gate=choose(["none", *choose((gates, gates, list(GATES_BY_SHAPE)))]),
        mask=choose(["none", *choose((masks, masks, list(MASKS_BY_SHAPE)))]),
        inputs=choose(("normal", "normal", "positive", "spotlight", "large", "zero-rows", "great-values")),
        layout=choose(CALL_LAYOUTS),
        grad_context=choose(GRAD_CONTEXT_KINDS),
        seed=seed,
    )


def operator_cases(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[OperatorCase]:
    """All cases in `dtype`, chosen and random ones. Their names depend on neither argument."""
    chosen = [replace(case, dtype=dtype, seed=seed) for case in CHOSEN]
    return chosen + [replace(drawn(number, seed), dtype=dtype) for number in range(DRAWN)]


def reduced_cases(dtype: torch.dtype, seed: int = 0) -> list[OperatorCase]:
    """A few small cases, for dtypes that nobody asked for and for tests of the tolerance."""
    return [case for case in operator_cases(dtype, seed) if case.name in REDUCED]


def case_named(name: str, dtype: torch.dtype, seed: int) -> OperatorCase:
    """The case of `operator_cases` called `name`. Raises KeyError where there is none."""
    return _cases_by_name(dtype, seed)[name]


@functools.cache
def _cases_by_name(dtype: torch.dtype, seed: int) -> dict[str, OperatorCase]:
    return {case.name: case for case in operator_cases(dtype, seed)}


def case_of_text(text: str, seed: int) -> OperatorCase | None:
    """The case whose `str` is this text; None for any other text."""
    return case_in_text(text, lambda name, dtype: _cases_by_name(dtype, seed).get(name))


def case_in_text(text: str, named: Callable[[str, torch.dtype], CaseType | None]) -> CaseType | None:
    """The case whose `str` is this text, by its name and dtype; None for any other text."""
    name, _, rest = text.partition(": ")
    for word in rest.split(", "):
        dtype = getattr(torch, word, None)
        if isinstance(dtype, torch.dtype):
            return named(name, dtype)
    return None
