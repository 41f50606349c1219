"""A mutant through everything: whether it runs and differs, how much in DETR, what suites and diagnosis say."""

from __future__ import annotations

import functools
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import deformable_mutants
import torch
from mutants import RIGHT
from mutants.judging import CPU, Judge

from headoff.attention import resolve_attention
from headoff.deformable import conform
from headoff.harness import deformable, operator
from headoff.harness.contracts import CONTRACTS
from headoff.harness.deformable.diagnosis import DeformableExperiments
from headoff.harness.finding import Finding
from headoff.harness.model.attention_calls import largest_excess
from headoff.harness.operator import SIDE_EFFECTS, operator_cases, side_effect_findings
from headoff.harness.operator.call import call, tensors_of
from headoff.harness.operator.compare import comparisons, operator_findings
from headoff.harness.operator.diagnosis import OperatorExperiments
from headoff.harness.operator.experiments import Diagnosis, Experiments
from headoff.harness.plugin.diagnosis import UNSTEADY, failing_cases, side_effects_of
from headoff.harness.settings import Settings
from headoff.harness.torch_settings import watched_settings
from mutation.differences import crashes_at_once, difference
from mutation.sources import SOURCES, Mutant, Source

SECONDS, SECONDS_OF_SUITES = 60, 600
"""For all of a mutant's calls that say whether it differs, what takes longer hangs; and for the suites."""

SUITES: dict[str, Any] = {"dense": operator, "deformable": deformable}
EXPERIMENTS: dict[str, type[Experiments]] = {
    "dense": OperatorExperiments,
    "deformable": DeformableExperiments,
}
"""Those of single calls, by contract."""

EXPLAINED = 24
"""Failing cases that a diagnosis gets."""

SITES = ("rt-detr-decoder", "deformable-detr-encoder", "grounding-dino-decoder")
"""Deformable cases of detectors' calls; tried with a seed of their own."""

SITE_SEED = 90_001


class Hangs(BaseException):
    """Raised where a mutant has taken too long; no `except Exception` of a suite may take it."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judged(mutant: Mutant, seed: int = 0) -> dict[str, Any]:
    """One line of results. `status` is one of crashes, hangs, equivalent, unsupported, differs."""
    started = time.perf_counter()
    row: dict[str, Any] = {"mutant": mutant.name, "operator": mutant.mutation.operator, "diff": mutant.diff}
    try:
        with watched_settings():
            with time_limit(SECONDS):
                row |= _compared(mutant)
            if row["status"] == "differs":
                with time_limit(SECONDS_OF_SUITES):
                    excess = min(excess_in_detr(mutant), 1e300)
                    dtype = getattr(torch, row["dtype"])
                    row |= {"excess": excess, "caught": caught(mutant.source, mutant.make, dtype, seed)}
    except Hangs:
        row["status"] = "hangs"
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def _compared(mutant: Mutant) -> dict[str, Any]:
    source = mutant.source
    if raised := crashes_at_once(mutant.make, source.contract):
        return {"status": "crashes", "how": raised}
    unsupported: list[str] = []
    differs = difference(mutant.make, source.make, source.contract, unsupported)
    if differs is None:
        return {"status": "unsupported", "how": unsupported[0]} if unsupported else {"status": "equivalent"}
    dtype, how = differs
    return {"status": "differs", "how": how, "dtype": str(dtype).removeprefix("torch.")}


def excess_in_detr(mutant: Mutant) -> float:
    """The largest error of a DETR's calls in float32, in multiples of the tolerance."""
    if mutant.source.contract == "dense":
        case = Judge().cases()[0]
        chosen = [case.cumulative[0], case.cumulative[3]]
        return largest_excess(mutant.make(), case, chosen, CPU, torch.float32)
    largest = 0.0
    for name in SITES:
        site = deformable.case_named(name, torch.float32, 0)
        assert site is not None
        site = replace(site, seed=SITE_SEED)
        try:
            results = call(mutant.make(), tensors_of(site))
            largest = max(largest, *(one.excess for one in comparisons(results, site, CPU)))
        except Exception:
            return float("inf")
    return largest


def caught(source: Source, make: Callable[[], Any], dtype: torch.dtype, seed: int) -> dict[str, str]:
    """The first suite that finds something wrong, and what."""
    return dict(itertools.islice(_rejections(suites(source.contract, dtype, seed), make), 1))


def _rejections(
    checks: Mapping[str, Callable[[Any], Iterator[Finding]]], make: Callable[[], Any]
) -> Iterator[tuple[str, str]]:
    """Each suite that finds something wrong, and what it finds first."""
    for name, check in checks.items():
        with watched_settings():
            first = next(check(make()), None)
        if first is not None:
            yield name, f"{first.property}: {first.message}"


def suites(contract: str, dtype: torch.dtype, seed: int) -> dict[str, Callable[[Any], Iterator[Finding]]]:
    """The suites that judge a contract, numbers of single calls first, because they are the quickest."""
    if contract == "deformable":
        return {
            "deformable": lambda attention: _deformable_numbers(attention, dtype, seed),
            "side effects": lambda attention: _deformable_side_effects(attention, dtype, seed),
        }
    judge = Judge(seed, dtype=dtype)
    checks = judge.suites()
    del checks["operator"]
    own = {"operator": judge.numbers, "side effects": judge.side_effects}
    return {name: _resolved(check) for name, check in (own | checks).items()}


def _resolved(check: Callable[[Any], Iterator[Finding]]) -> Callable[[Any], Iterator[Finding]]:
    return lambda attention: check(resolve_attention(attention))


@functools.cache
def _cheapest_first(dtype: torch.dtype, seed: int) -> tuple[deformable.DeformableCase, ...]:
    return tuple(sorted(deformable.deformable_cases(dtype, seed), key=lambda case: case.weights))


def _deformable_numbers(attention: Any, dtype: torch.dtype, seed: int) -> Iterator[Finding]:
    attention = conform(attention, "mutant")
    for case in _cheapest_first(dtype, seed):
        yield from operator_findings(attention, case, CPU)


def _deformable_side_effects(attention: Any, dtype: torch.dtype, seed: int) -> Iterator[Finding]:
    attention = conform(attention, "mutant")
    for check in deformable.SIDE_EFFECTS:
        yield from deformable.side_effect_findings(attention, check, dtype, CPU, seed)


PARTS = {"dense": 6, "deformable": 2}
"""Parts of a seed's checks that are judged by themselves, by contract."""


def false_alarms(contract: str, suite: str, seed: int, part: int) -> dict[str, Any]:
    """What a part of the single calls of a seed says against all right implementations.

    Each check tries all of them, because inputs, truth and tolerances of a case are the same for all.

    Args:
        suite: `numbers` or `side effects`.

    Returns:
        Numbers of `implementations` and of `checks`, and what was `caught`: the first finding by name.
    """
    attentions = {name: make() for name, make in _right(contract).items()}
    checks = _single_calls(contract, suite, seed)[part :: PARTS[contract]]
    caught: dict[str, str] = {}
    for check in checks:
        for name, attention in attentions.items():
            with watched_settings():
                for finding in check(attention)[:1]:
                    caught.setdefault(name, f"{finding.property}: {finding.message}")
    return {"implementations": len(attentions), "checks": len(checks), "caught": caught}


def _right(contract: str) -> dict[str, Callable[[], Any]]:
    """Makers of all right implementations that run here and need no compilation, as callables that suites take."""
    sources = {source.name: source.make for source in SOURCES if source.contract == contract}
    if contract == "deformable":
        makers = {**deformable_mutants.RIGHT, **sources}
        return {name: lambda make=make: conform(make(), "right") for name, make in makers.items()}
    others = {name: entry.make for name, entry in RIGHT.items() if not entry.slow and not entry.missing()}
    return {name: lambda make=make: resolve_attention(make()) for name, make in {**others, **sources}.items()}


def _single_calls(contract: str, suite: str, seed: int) -> list[Callable[[Any], list[Finding]]]:
    """The checks of an attention that a suite has, calls of similar sizes next to each other."""
    dtype, is_dense = torch.float32, contract == "dense"
    if suite == "numbers":
        cases = (operator_cases if is_dense else deformable.deformable_cases)(dtype, seed)
        ordered = sorted(cases, key=lambda case: case.weights)
        return [functools.partial(operator_findings, case=case, device=CPU) for case in ordered]
    checks, findings = (
        (SIDE_EFFECTS, side_effect_findings)
        if is_dense
        else (deformable.SIDE_EFFECTS, deformable.side_effect_findings)
    )
    return [functools.partial(findings, name=name, dtype=dtype, device=CPU, seed=seed) for name in checks]


@dataclass(frozen=True)
class Explanation:
    """What a run would say first of an attention.

    Attributes:
        finding: None where nothing is wrong.
        diagnosis: of wrong numbers, where these are said first.
        seconds_to_find, seconds: what the checks took, and what the diagnosis.
    """

    finding: Finding | None
    diagnosis: Diagnosis | None
    seconds_to_find: float
    seconds: float

    def __str__(self) -> str:
        """The property, and what a diagnosis says before its details."""
        return f"{self.finding.property}: {self.finding.message.split('; ')[0]}" if self.finding else ""


def explanation(
    make: Callable[[], Any], contract: str, dtype: torch.dtype, seed: int = 0, failing: int = EXPLAINED
) -> Explanation:
    """Found as in a run: side effects, then `failing` cases, of which there is a diagnosis, then all else."""
    started = time.perf_counter()
    settings = Settings(seed=seed, contract=contract)
    with watched_settings():
        attention = CONTRACTS[contract].resolve(make())
        found = _findings(attention, contract, dtype, seed, failing)
        experiments = EXPERIMENTS[contract](attention, CPU)
        tried = time.perf_counter()
        side_effects = side_effects_of(found)
        if side_effects:
            first: Finding | None = side_effects[0]
        else:
            first = experiments.explain(failing_cases(found, settings)) or next(iter(found), None)
    return Explanation(first, experiments.diagnosis, tried - started, time.perf_counter() - tried)


def _findings(attention: Any, contract: str, dtype: torch.dtype, seed: int, failing: int) -> list[Finding]:
    found: list[Finding] = []
    suite = SUITES[contract]
    for check in suite.SIDE_EFFECTS:
        found += suite.side_effect_findings(attention, check, dtype, CPU, seed)
        if any(finding.property in UNSTEADY for finding in found):
            return found
    (_, numbers), _, *others = suites(contract, dtype, seed).items()
    crashes, wrong = [], []
    for finding in numbers(attention):
        (crashes if finding.property == "crash" else wrong).append(finding)
        if len(wrong) == failing:
            break
    found += wrong
    for name, check in others:
        if name == "calls" or not found:
            found += check(attention)
    return found + crashes
