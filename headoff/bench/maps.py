"""What relevance maps of a whole sweep cost beside the notebooks' way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from headoff.bench.cases import Scale
from headoff.bench.contests import Bench, Contestant, tried
from headoff.bench.levels import NOTEBOOK, OWN_ATTENTIONS, Job, configurations_of, judged
from headoff.bench.models import BenchmarkModel, with_attention
from headoff.bench.notebook import Notebook
from headoff.bench.outputs import Expected, row_errors, truth_of
from headoff.bench.records import Row
from headoff.bench.relus import ReluSides
from headoff.bench.workloads import RelevanceWorkload
from headoff.gates import Configuration, none_off
from headoff.relevance import explain
from headoff.timing.calls import TimedCall
from headoff.timing.comparison import SpeedComparison
from headoff.timing.interleaving import compare


@dataclass(frozen=True)
class Extrapolated:
    """The notebooks' way for C configurations and n objects of each, from two parts of it that were timed.

    It takes C times the two forward passes of a configuration and C n times the map of an object. Of both parts the
    time beside the package's whole is known, `forwards` and `a_map`, and so is the ratio of the wholes. Its interval
    is where both of theirs hold: 98% where each is of 99%.
    """

    configurations: int
    objects: int
    forwards: SpeedComparison
    a_map: SpeedComparison

    def ratio(self, forwards: float, a_map: float) -> float:
        """Time of the package by that of the notebooks, by its times beside either part."""
        return 1 / (self.configurations / forwards + self.configurations * self.objects / a_map)

    @property
    def ratios(self) -> dict[str, float]:
        return {
            name: self.ratio(getattr(self.forwards, name), getattr(self.a_map, name))
            for name in ("ratio", "low", "high")
        }

    @property
    def seconds(self) -> float:
        """Of the notebooks' whole."""
        return self.configurations * (
            self.forwards.baseline_seconds + self.objects * self.a_map.baseline_seconds
        )


def relevance_jobs(bench: Bench, scale: Scale, subject: BenchmarkModel) -> Iterator[Job]:
    """From the picture to the maps of all objects after every decoder layer.

    The notebooks' way is too slow to be made in whole: parts of it are timed, and multiplied.
    """
    objects = 2 if scale == "quick" else 5
    for name, configurations in configurations_of("relevance", scale).items():
        case = f"{subject.name}, {name} x {objects} objects"
        yield Job(case, partial(_relevance, bench, subject, configurations, objects, case))


def _relevance(
    bench: Bench, subject: BenchmarkModel, configurations: tuple[Configuration, ...], objects: int, case: str
) -> list[Row]:
    base: dict[str, Any] = {"level": "relevance", "case": case, "dtype": bench.dtype_name}
    workload = RelevanceWorkload.of(subject, configurations, objects)
    notebook = Notebook(subject.detector, subject.picture)
    nothing_off = (none_off(),)
    query = workload.queries[0]
    label = int(notebook.detect(nothing_off).logits[0, 0, query, :-1].argmax())
    one = replace(workload, configurations=nothing_off, queries=(query,))
    by_notebook = Contestant(
        NOTEBOOK,
        TimedCall(lambda: _with_sides(notebook, query, label)),
        partial(_map_is_wrong, one, Expected(one)),
    )
    if failure := tried(by_notebook):
        return [Row(contestant=NOTEBOOK, status=failure[0], note=failure[1], **base)]

    forwards = TimedCall(lambda: (notebook.detect(nothing_off), notebook.detect(nothing_off)))
    a_map = TimedCall(lambda: notebook.explain(none_off(), query, label))
    expected = Expected(workload)
    rows: list[Row] = []
    of_notebook: Extrapolated | None = None
    for name, attention in OWN_ATTENTIONS.items():
        detector = with_attention(subject.detector, attention)
        side = TimedCall(partial(explain, detector, subject.picture, configurations, workload.queries))
        if failure := tried(Contestant(name, side, judged(workload, expected, attention))):
            rows.append(Row(contestant=name, status=failure[0], note=failure[1], **base))
            continue
        beside = partial(compare, side, device=bench.device, seconds=bench.seconds, clock=bench.clock)
        of_notebook = Extrapolated(len(configurations), objects, beside(forwards), beside(a_map))
        rows.append(
            Row(
                contestant=name,
                status="timed",
                reference=NOTEBOOK,
                seconds=of_notebook.a_map.patch_seconds,
                memory=of_notebook.a_map.patch_memory,
                **{**base, **of_notebook.ratios},
            )
        )
    if of_notebook is not None:
        rows.insert(
            0,
            Row(
                contestant=NOTEBOOK,
                status="reference",
                reference=NOTEBOOK,
                ratio=1.0,
                seconds=of_notebook.seconds,
                memory=of_notebook.a_map.baseline_memory,
                note=f"extrapolated from one configuration and one of {len(configurations) * objects} maps",
                **base,
            ),
        )
    return rows


def _with_sides(notebook: Notebook, query: int, label: int) -> tuple[torch.Tensor, ReluSides]:
    """A map by the notebook, and the sides its ReLUs took, in as many calls as the oracle is going to make.

    `explain` decodes for the objects, decodes to explain them, and calls the heads once more for the target.
    """
    sides = ReluSides()
    with sides.noted(notebook.detector):
        for _ in range(3):
            maps = notebook.explain(none_off(), query, label)
    return maps, sides


def _map_is_wrong(
    workload: RelevanceWorkload, expected: Expected, found: tuple[torch.Tensor, ReluSides]
) -> str | None:
    maps, sides = found
    truth = truth_of(workload, sides)["maps"].rows
    error, allowed = float(row_errors(truth, maps).amax()), expected.allowed("maps")
    if error <= allowed:
        return None
    return f"its maps are off by {error:.1e} of their peaks, allowed are {allowed:.1e}"
