"""Checks of what a compiler makes of an attention: `torch.compile` and `torch.export`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from headoff.harness.checks.candidate import (
    Candidate,
    NotApplicable,
    Outcome,
    about,
    attend,
    check,
    copied,
    raised,
)
from headoff.harness.finding import Finding
from headoff.harness.operator.cases import Case
from headoff.wording import counted

GRAPHS = 2
"""Graphs that calls of all sizes may need with dynamic shapes: one, and another for a size that is special."""


@dataclass
class CountedGraphs:
    """A backend of `torch.compile` that counts graphs and runs them by `aot_eager`, which is quick."""

    graphs: int = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    """Nothing is kept of graphs that were compiled before, or that are compiled in the block."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch._dynamo.reset()


def has_compiler() -> bool:
    """Whether Inductor finds a C++ compiler for kernels on a CPU."""
    return any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@check("compile")
def compiles(candidate: Candidate) -> Outcome:
    """One graph for each static size, few for all sizes where they are dynamic, and the right numbers."""
    outcome = Outcome(candidate.wrong_alone([candidate.case(**fields) for fields in candidate.arguments]))
    for fields in candidate.arguments:
        outcome.findings = outcome.findings or _static(candidate, fields)
    outcome.findings = outcome.findings or _dynamic(candidate, outcome)
    if not outcome.findings:
        _by_inductor(candidate, outcome)
    return outcome


def _compiled_call(candidate: Candidate, compiled: Any, case: Case, when: str) -> list[Finding]:
    tensors = candidate.tensors(case)
    try:
        results = candidate.call(compiled, tensors)
    except Exception as error:
        return [raised("compile", when, error, case)]
    return about("compile", when, candidate.wrong(case, results))


def _static(candidate: Candidate, fields: Any) -> list[Finding]:
    when = "compiled by torch.compile(fullgraph=True) for static shapes"
    graphs = CountedGraphs()
    with _fresh_compiler():
        compiled = torch.compile(candidate.attention, fullgraph=True, dynamic=False, backend=graphs)
        for repeat in range(3):
            case = candidate.case(**{**fields, "seed": candidate.seed + repeat})
            if found := _compiled_call(candidate, compiled, case, when):
                return found
            if graphs.graphs > 1:
                message = f"{when}, it is compiled again for other numbers of the same sizes"
                return [Finding("compile", f"{message} (call {repeat + 1})", str(case))]
    return []


def _dynamic(candidate: Candidate, outcome: Outcome) -> list[Finding]:
    when = "compiled by torch.compile(fullgraph=True, dynamic=True)"
    graphs = CountedGraphs()
    with _fresh_compiler():
        compiled = torch.compile(candidate.attention, fullgraph=True, dynamic=True, backend=graphs)
        for sizes in candidate.sizes:
            case = candidate.case(**sizes)
            if found := _compiled_call(candidate, compiled, case, when):
                return found
            if graphs.graphs > GRAPHS:
                message = f"{when}, it is compiled {graphs.graphs} times for {candidate.sizes.index(sizes) + 1} sizes"
                return [
                    Finding(
                        "compile",
                        f"{message} (allowed {GRAPHS}): a size is a constant in its graph",
                        str(case),
                        error=graphs.graphs,
                        budget=GRAPHS,
                    )
                ]
    graphs_made = counted(graphs.graphs, "graph")
    outcome.remarks.append(f"compile: {graphs_made} for {len(candidate.sizes)} sizes with dynamic shapes")
    return []


def _by_inductor(candidate: Candidate, outcome: Outcome) -> None:
    """The numbers of the kernels that are made where nobody chooses a backend; one case, because it takes seconds."""
    if candidate.device.type == "cpu" and not has_compiler():
        outcome.remarks.append(
            "compile: by the backend aot_eager alone, for Inductor finds no C++ compiler here"
        )
        return
    case = candidate.case()
    when = "compiled by torch.compile(fullgraph=True) with Inductor"
    with _fresh_compiler():
        compiled = torch.compile(candidate.attention, fullgraph=True, backend="inductor")
        try:
            results = candidate.call(compiled, candidate.tensors(case))
        except Exception as error:
            # By aot_eager the same graph compiles: what is missing are Inductor's tools, or it has an error.
            first = str(error).splitlines()[:1] or [type(error).__name__]
            outcome.remarks.append(f"compile: Inductor failed and was left out ({first[0][:200]})")
            return
        outcome.findings = about("compile", when, candidate.wrong(case, results))
    outcome.remarks.append(
        "compile: graphs are counted with aot_eager, and Inductor's numbers compared in one case"
    )


class _Module(torch.nn.Module):
    """A module that calls an attention with tensors by name, and all else as it was."""

    def __init__(self, attention: Any, tensors: Any) -> None:
        super().__init__()
        self.attention, self.tensors = attention, tensors

    def forward(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return attend(self.attention, self.tensors, tensors)


@check("export")
def exports(candidate: Candidate) -> Outcome:
    """The exported program gives the right context, at the sizes it was made with and at others."""
    outcome = Outcome()
    for fields in candidate.arguments:
        cases = [candidate.case(**{**fields, **sizes}) for sizes in ({}, *candidate.sizes[-2:])]
        outcome.findings = outcome.findings or candidate.wrong_alone(cases[:1])
        for dynamic in (False, True):
            outcome.findings = outcome.findings or _exported(
                candidate, cases if dynamic else cases[:1], dynamic
            )
    if not outcome.findings:
        outcome.remarks.append(
            "export: one program for all sizes of batch and sequences; the forward pass alone"
        )
    return outcome


def _exported(candidate: Candidate, cases: list[Case], dynamic: bool) -> list[Finding]:
    when = f"exported by torch.export.export with {'dynamic' if dynamic else 'static'} shapes"
    first = copied(candidate.tensors(cases[0]))
    shapes = _dynamic_dimensions(candidate, cases) if dynamic else None
    module = _Module(candidate.attention, candidate.tensors(cases[0]))
    with _fresh_compiler(), torch.no_grad():
        try:
            program = torch.export.export(module, (first,), dynamic_shapes=shapes, strict=False).module()
        except Exception as error:
            return [raised("export", when, error, cases[0])]
        for number, case in enumerate(cases):
            # Numbers that the program was not made with.
            case = replace(case, seed=candidate.seed + number + 1)
            try:
                context = program(copied(candidate.tensors(case)))
            except Exception as error:
                return [raised("export", when, error, case)]
            if found := candidate.wrong(case, {"context": context}):
                return about("export", when, found)
    return []


def _dynamic_dimensions(candidate: Candidate, cases: list[Case]) -> Any:
    """The dimensions in which the tensors of the cases differ: those of batch and sequences."""
    calls = [copied(candidate.tensors(case)) for case in cases]
    dimensions = {}
    for name, tensor in calls[0].items():
        others = [other[name] for other in calls[1:]]
        differ = [
            dim for dim in range(tensor.dim()) if any(o.shape[dim] != tensor.shape[dim] for o in others)
        ]
        dimensions[name] = dict.fromkeys(differ, torch.export.Dim.DYNAMIC)
    if not any(dimensions.values()):
        raise NotApplicable("its tensors have no size that varies")
    return (dimensions,)
