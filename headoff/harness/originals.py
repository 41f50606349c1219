"""The functions that times and verdicts rest on, as they were before the attention under test was imported.

An attention that runs in this process can replace any of them: the clock, the baseline, what compares results. So they
are written down when this module's user is imported (`headoff.bench.pytest_runner`, before any attention), and compared
by identity afterwards. Attributes that appear later, as lazy imports do, are no change; code that is exchanged inside
a function is one.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from headoff.harness.torch_settings import read_settings

MODULES = (
    *("gc", "random", "secrets", "statistics", "time"),
    *("torch", "torch.autograd", "torch.cuda", "torch.nn.functional"),
)
"""Modules whose functions and classes are watched; of torch itself, functions and tensors alone."""

PACKAGES = ("headoff", "pytest_benchmark")
"""Packages of which every module is watched that is imported."""

IMPORTED = (
    "headoff.bench.deformable",
    "headoff.bench.model_workloads",
    "headoff.relevance",
    "headoff.sweeps",
    "pytest_benchmark.fixture",
    "pytest_benchmark.stats",
)
"""Imported first, so that they are among them."""

OPERATORS = (
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::scaled_dot_product_attention",
    "aten::_softmax",
    "aten::baddbmm",
    "aten::bmm",
    "aten::grid_sampler_2d",
    "aten::mm",
)
"""Operators of torch that baselines are made of; `torch.library` can replace their kernels."""

REPLACED_BY_OTHERS = ("manual_seed", "excepthook")
"""What torch.compile replaces when it is first used, and what pytest replaces in every run (`threading.excepthook`)."""

Key = tuple[str, Any, str]
"""A name for people, the module or class, and the attribute."""


@dataclass(frozen=True)
class Originals:
    """Functions by place, kernels by operator, and torch's settings, at one moment."""

    functions: dict[tuple[int, str], tuple[Key, tuple[Any, ...]]]
    kernels: dict[str, str]
    settings: dict[str, Any]

    @classmethod
    def now(cls) -> Originals:
        for name in IMPORTED:
            if importlib.util.find_spec(name.partition(".")[0]):
                importlib.import_module(name)
        found = {(id(key[1]), key[2]): (key, identity(value)) for key, value in _functions()}
        return cls(found, _kernels(), read_settings())

    def replaced(self) -> list[str]:
        """What has been replaced since, by name."""
        missing = object()
        names = []
        for key, before in self.functions.values():
            name, owner, attribute = key
            now = identity(_attribute(owner, attribute, missing))
            if len(now) != len(before) or any(
                one is not other for one, other in zip(now, before, strict=True)
            ):
                names.append(name)
        kernels = _kernels()
        names += [f"torch's operator {name}" for name, text in self.kernels.items() if kernels[name] != text]
        return sorted(set(names))


def identity(value: Any) -> tuple[Any, ...]:
    """Objects that stay the same ones as long as a function does the same."""
    if isinstance(value, property):
        return value, *(part for get in (value.fget, value.fset) for part in identity(get))
    inner = getattr(value, "__func__", value)
    code = getattr(inner, "__code__", None)
    return value, code, getattr(inner, "__defaults__", None), getattr(inner, "__kwdefaults__", None)


def _functions() -> Iterator[tuple[Key, Any]]:
    own = [
        module
        for name, module in sorted(sys.modules.items())
        if isinstance(module, ModuleType) and name.partition(".")[0] in PACKAGES
    ]
    for module in [*(sys.modules[name] for name in MODULES if name in sys.modules), *own]:
        for attribute, value in sorted(vars(module).items()):
            if isinstance(value, type) and value.__module__ == module.__name__ and module in own:
                yield from _methods(value, vars(value))
            if callable(value) and attribute not in REPLACED_BY_OTHERS:
                yield (f"{module.__name__}.{attribute}", module, attribute), value
    # What they inherit as well: they can be given a method in the place of their base's.
    for kind in (random.Random, torch.Tensor, torch.cuda.Event, torch.cuda.Stream):
        yield from _methods(kind, dir(kind))


def _methods(kind: type, attributes: Iterable[str]) -> Iterator[tuple[Key, Any]]:
    for attribute in attributes:
        value = _attribute(kind, attribute, None)
        if callable(value) or isinstance(value, (property, staticmethod, classmethod)):
            yield (f"{kind.__module__}.{kind.__qualname__}.{attribute}", kind, attribute), value


def _attribute(owner: Any, attribute: str, missing: Any) -> Any:
    """As it is stored, without binding it or calling a property."""
    if isinstance(owner, type):
        return next((vars(base)[attribute] for base in owner.__mro__ if attribute in vars(base)), missing)
    return vars(owner).get(attribute, missing)


def _kernels() -> dict[str, str]:
    return {name: torch._C._dispatch_dump(name) for name in OPERATORS}
