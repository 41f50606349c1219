"""What every relevance method costs, relative to one plain forward pass of the detector."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from headoff.attention import sdpa
from headoff.bench.cases import Case, Provider
from headoff.bench.model_workloads import RelevanceWorkload
from headoff.bench.models import BenchmarkModel, Size
from headoff.gates import none_off
from headoff.relevance import Explanation, Method, d_rise, integrated_gradients, method_names
from headoff.relevance.d_rise import MASKS
from headoff.relevance.gradient_engine import STEPS

TIMED: dict[str, tuple[Callable[[int], Method], int, int, str]] = {
    "d_rise": (d_rise, 8, MASKS, "masks"),
    "integrated_gradients": (integrated_gradients, 2, STEPS, "steps"),
}
"""Methods that take minutes: how to make one of another size, the size that is timed, the default, and of what."""


def methods_cases(
    size: Size, model: BenchmarkModel, one_forward: Provider, check: Callable[[Any], str | None]
) -> Iterator[Case]:
    """One case with all methods: none off, all decoder layers, by torch's SDPA. `check` is that of the detections."""
    objects = 2 if size == "scenes" else 5

    def providers() -> list[Provider]:
        workload = RelevanceWorkload.of(model, (none_off(),), objects)

        def provider(name: str) -> Provider:
            if name not in TIMED:
                return Provider.of(name, workload.explain_call(sdpa, method=name), partial(_check, check))
            make, timed, default, what = TIMED[name]
            call = workload.explain_call(sdpa, method=make(timed))
            note = f"{default // timed} times its time for {timed} of {default} {what}"
            return Provider(name, ((call, default // timed),), lambda: _check(check, call()), note)

        return [one_forward, *map(provider, method_names())]

    yield Case("methods", f"{model.name}, {objects} objects", providers, {one_forward.name})


def _check(detections: Callable[[Any], str | None], found: Explanation) -> str | None:
    """Detections against the oracle's; maps are compared with theirs by tests."""
    if not bool(found.maps.isfinite().all()):
        return "maps are not finite"
    if not bool(found.maps.flatten(2).any(-1).all()):
        return "a map is zero"
    return detections(found)
