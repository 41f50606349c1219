"""Right implementations whose source is mutated, and how a mutant of one is made and drawn."""

from __future__ import annotations

import ast
import functools
import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from mutation.operators import CAST, Mutation, mutations

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Source:
    """A right implementation.

    Attributes:
        name: of this implementation.
        module: name of the module that it is in.
        scope: functions and classes of the module that are mutated.
        entry: an expression in the module's names that makes a new callable.
        contract: which of the two it meets.
    """

    name: str
    module: str
    scope: tuple[str, ...]
    entry: str
    contract: Literal["dense", "deformable"] = "dense"

    @property
    def path(self) -> Path:
        file = importlib.import_module(self.module).__file__
        assert file is not None
        return Path(file)

    @property
    def mutations(self) -> list[Mutation]:
        return _mutations(self)

    def make(self, mutation: Mutation | None = None) -> Callable[..., Tensor]:
        """A new callable of a fresh copy of the module; raises whatever a mutant that does not run raises."""
        tree = _tree(self.path) if mutation is None else mutation.applied(_tree(self.path))
        module = ModuleType(self.module)
        module.__file__ = str(self.path)
        setattr(module, CAST, in_bfloat16)
        exec(compile(tree, str(self.path), "exec"), vars(module))
        return eval(self.entry, {**vars(module), "module": module, "sdpa_with": sdpa_with})


@dataclass(frozen=True)
class Mutant:
    """One mutation of a source, `number` in its list."""

    source: Source
    number: int

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.number}"

    @property
    def mutation(self) -> Mutation:
        return self.source.mutations[self.number]

    def make(self) -> Callable[..., Tensor]:
        return self.source.make(self.mutation)

    @property
    def diff(self) -> str:
        """`eager.py:39: a + b -> a - b (operator)`"""
        change = self.mutation
        place = f"{self.source.path.name}:{change.line}"
        return f"{place}: {_short(change.before)} -> {_short(change.after)} ({change.operator})"


def _short(code: str) -> str:
    code = " ".join(code.split())
    return code if len(code) <= 110 else f"{code[:70]} ... {code[-35:]}"


def in_bfloat16(value: Any) -> Any:
    """`value` rounded to bfloat16 and back, where it is a tensor of floats."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.bfloat16).to(value.dtype)
    return value


def sdpa_with(skipping: ModuleType) -> Callable[..., Tensor]:
    """`headoff.attention.sdpa` that leaves heads out by another module's functions."""
    from headoff.attention import sdpa

    copied = Source("sdpa", "headoff.attention.sdpa", ("sdpa",), "module").make()
    vars(copied).update(plan_groups=skipping.plan_groups, attend_groups=skipping.attend_groups)
    assert copied.sdpa is not sdpa
    return copied.sdpa


@functools.cache
def _tree(path: Path) -> ast.Module:
    """Without the decorators that register attentions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if _name(d) not in ("right", "wrong")]
    return tree


def _name(decorator: ast.expr) -> str:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    return getattr(called, "id", "")


@functools.cache
def _mutations(source: Source) -> list[Mutation]:
    return mutations(_tree(source.path), source.scope)


def _styles(*makers: str, module: str = "mutants.right", **helpers: tuple[str, ...]) -> list[Source]:
    """Makers of `tests/mutants`, each with the `helpers` that are mutated with it."""
    return [Source(name, module, (name, *helpers.get(name, ())), f"{name}()") for name in makers]


REFERENCE = "headoff.harness.reference.implementations"
FORMULATIONS = {
    "softmax_by_hand": 'Formulation(normalize="first", gate="context", by_hand=True)',
    "logsumexp": 'Formulation(scale="scores", normalize="logsumexp")',
    "online_powers_of_2": "Formulation(key_block=16, powers_of_2=True)",
}

SOURCES: tuple[Source, ...] = (
    Source("eager", "headoff.attention.eager", ("eager", "_masked"), "eager"),
    Source("sdpa", "headoff.attention.sdpa", ("sdpa", "_attend"), "sdpa"),
    Source(
        "skipping",
        "headoff.attention.skipping",
        ("plan_groups", "group_streams", "attend_groups", "_group_mask"),
        "sdpa_with(module)",
    ),
    *(
        Source(name, REFERENCE, ("__call__", "_blocks"), entry)
        for name, entry in FORMULATIONS.items()
    ),
    Source("flash_reference", REFERENCE, ("flash", "_Flash"), "flash"),
    Source("steps", "mutants.parts", ("scale", "scores", "masked", "fully_masked", "filled", "softmax", "weights",
           "gated", "context", "start", "run", "_plain"), "plain()"),
    Source("steps_by_hand", "mutants.parts", ("ByHand", "gated_gradient", "dweights", "delta", "dscores", "dquery",
           "dkey", "dvalue"), "by_hand()"),
    *_styles(
        "eager_reordered", "einsum", "flash", "split_keys", "heads_selected", "heads_in_loop", "gate_in_value",
        "powers_of_2", "divided_last", "keys_padded", "queries_in_chunks", "tokens_first", "batched_products",
        "vmapped", "checkpointed", "workspace_kept", "apply_of_function", "delta_of_context",
        flash=("Flash",), split_keys=("Split",), batched_products=("opened", "closed", "additive"),
    ),
    *_styles(
        "tiled", "head_by_head", "packed", "without_products", module="mutants.right_kernels",
        tiled=("Tiled",), head_by_head=("HeadByHead",), packed=("Packed",),
    ),
    Source("gather", "headoff.deformable.gather", ("gather_attention", "corners", "corner_by_corner", "_cells"),
           "gather_attention", "deformable"),
    Source("embedding_bag", "headoff.deformable.embedding_bag", ("embedding_bag_attention",), "embedding_bag_attention",
           "deformable"),
    Source("grid_sample", "headoff.deformable.grid_sample", ("grid_sample_attention",), "grid_sample_attention",
           "deformable"),
    Source("sampler", "deformable_mutants", ("sampler",), "sampler()", "deformable"),
    Source("accumulated_in_float32", "deformable_mutants", ("accumulated_in_float32",), "accumulated_in_float32()",
           "deformable"),
    Source("deformable_by_hand", "deformable_mutants", ("by_hand", "ByHand"), "by_hand()", "deformable"),
)  # fmt: skip
"""From the package, from the harness's own references and from `tests/mutants`, in many styles."""

BY_NAME = {source.name: source for source in SOURCES}


def drawn(seed: int, count: int, without: frozenset[str] = frozenset()) -> list[Mutant]:
    """`count` mutants, spread over the sources by the root of how many each allows; the same for the same seed.

    Args:
        without: names of mutants that are not drawn.
    """
    piles: dict[str, list[Mutant]] = {}
    for source in SOURCES:
        pile = [Mutant(source, number) for number in range(len(source.mutations))]
        random.Random(f"{seed} {source.name}").shuffle(pile)
        piles[source.name] = [mutant for mutant in pile if mutant.name not in without]
    # The k-th of n mutants of a source comes at k / sqrt(n): long sources give more, and do not crowd out short ones.
    ranked = [
        ((place + 1) / len(source.mutations) ** 0.5, number, mutant)
        for number, source in enumerate(SOURCES)
        for place, mutant in enumerate(piles[source.name])
    ]
    return [mutant for _, _, mutant in sorted(ranked, key=lambda entry: entry[:2])[:count]]
