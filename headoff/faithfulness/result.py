"""What `headoff.faithfulness` found: numbers for each object, image and method, and their means with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from headoff.dataframes import dataframe
from headoff.errors import SettingError, did_you_mean
from headoff.faithfulness.measures import Measure, Quantity, Scores
from headoff.faithfulness.statistics import (
    Comparison,
    Estimate,
    all_draws,
    compare,
    estimates,
    quantiles,
)
from headoff.faithfulness.store import ImageRecord
from headoff.gates import Configuration
from headoff.wording import counted, markdown_table

if TYPE_CHECKING:
    import pandas

SIGNIFICANT = 0.05
"""p, corrected for all pairs of methods, below which two methods differ."""


@dataclass(frozen=True, eq=False)
class Curve:
    """The mean over images of the mean curve of their objects. Arrays are float64.

    Attributes:
        points: (P,) the x axis.
        mean, low, high: (P,), with pointwise 95% intervals of a bootstrap over images.
    """

    points: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Faithfulness:
    """Relevance methods by measures of faithfulness, over n images.

    Attributes:
        records: of the images.
        methods: relevance methods, then controls.
        measures: the measures.
        failures: why images were left out, by their names.
        configuration: the heads that were off.
        seed: of all random numbers.
    """

    records: tuple[ImageRecord, ...]
    methods: tuple[str, ...]
    measures: tuple[Measure, ...]
    failures: Mapping[str, str]
    configuration: Configuration
    seed: int

    def __repr__(self) -> str:
        return (
            f"<Faithfulness: {counted(len(self.methods), 'method')}, {counted(len(self.measures), 'measure')}, "
            f"{counted(len(self.records), 'image')}, {counted(self.objects, 'object')}>"
        )

    @property
    def objects(self) -> int:
        """How many objects there are in all images."""
        return sum(len(record.objects) for record in self.records)

    @property
    def columns(self) -> tuple[tuple[Measure, Quantity], ...]:
        """Every quantity of every measure."""
        return tuple((measure, quantity) for measure in self.measures for quantity in measure.quantities)

    def of(self, method: str, measure: str) -> dict[int, Scores]:
        """The scores of a method by a measure, by the number of the record; those of images with objects.

        Raises:
            SettingError: there is no such method or measure.
        """
        self.measure(measure)
        if method not in self.methods:
            raise SettingError(
                f"the method {method!r}{did_you_mean(method, self.methods)} was not measured: use one of "
                f"{', '.join(self.methods)}"
            )
        return {
            index: record.scores[method, measure]
            for index, record in enumerate(self.records)
            if (method, measure) in record.scores and record.objects
        }

    @cached_property
    def _estimates(self) -> dict[tuple[str, str], list[Estimate]]:
        found = {}
        for measure in self.measures:
            for method in self.methods:
                images = list(self.of(method, measure.name).values())
                nothing = Estimate(math.nan, math.nan, math.nan, 0, 0)
                found[method, measure.name] = (
                    estimates(measure, images) if images else [nothing] * len(measure.quantities)
                )
        return found

    def estimate(self, method: str, measure: str, quantity: str | None = None) -> Estimate:
        """A quantity of a method over all its images; by default the measure's first. Raises SettingError."""
        self.of(method, measure)
        return self._estimates[method, measure][self._place(measure, quantity)]

    def comparison(self, measure: str, quantity: str | None = None) -> Comparison:
        """All pairs of methods, by a quantity; by default the measure's first. Raises SettingError."""
        place = self._place(measure, quantity)
        key = measure, place
        if key not in self._comparisons:
            by_method = {method: self.of(method, measure) for method in self.methods}
            self._comparisons[key] = compare(self.measure(measure), by_method, place)
        return self._comparisons[key]

    @cached_property
    def _comparisons(self) -> dict[tuple[str, int], Comparison]:
        return {}

    def ranked(self, measure: str) -> tuple[str, ...]:
        """The methods that were measured on the same images, the most that any was; only these are compared for a rank.

        A mean over a few images (`most`) may be the highest by their choice alone. Raises SettingError.
        """
        images = {method: tuple(self.of(method, measure)) for method in self.methods}
        most = max(images.values(), key=len)
        return tuple(method for method in self.methods if images[method] == most)

    def ranking(self, measure: str, quantity: str | None = None) -> tuple[str, ...]:
        """The methods of `ranked` by a quantity, the best first; those without a value are left out.

        Raises:
            SettingError: there is no such measure or quantity, or neither a higher nor a lower one is better.
        """
        chosen = self.measure(measure).quantities[self._place(measure, quantity)]
        if chosen.direction == "neither":
            raise SettingError(
                f"{measure} {chosen.name} ranks nothing: neither more nor less of it is better"
            )
        values = {
            method: self.estimate(method, measure, chosen.name).value for method in self.ranked(measure)
        }
        known = [method for method in values if math.isfinite(values[method])]
        return tuple(sorted(known, key=lambda m: values[m], reverse=chosen.direction == "higher"))

    def best(self, measure: str, quantity: str | None = None) -> tuple[str, ...]:
        """The first method of the ranking, and all that do not differ from it significantly (`SIGNIFICANT`)."""
        ranking = self.ranking(measure, quantity)
        if not ranking:
            return ()
        found = self.comparison(measure, quantity)
        row = found.p[found.methods.index(ranking[0])]
        return tuple(
            method
            for method in ranking
            if method == ranking[0] or not row[found.methods.index(method)] < SIGNIFICANT
        )

    def curve(self, method: str, measure: str, quantity: str | None = None) -> Curve:
        """The mean curve of a method.

        Raises:
            SettingError: the measure has no curves, or there is no value.
        """
        found, place = self.measure(measure), self._place(measure, quantity)
        if found.points is None:
            raise SettingError(f"the measure {measure} has no curves")
        curves = []
        for scores in self.of(method, measure).values():
            if scores.curves is not None:
                curve = scores.curves[:, place]
                curves.append(curve[curve.isfinite().all(-1)].mean(0).numpy())
        curves = [curve for curve in curves if np.isfinite(curve).all()]
        if not curves:
            raise SettingError(f"there is no curve of {method} by {measure}: no object has one")
        stacked = np.stack(curves)
        low = high = np.full(stacked.shape[1], np.nan)
        if len(stacked) > 1:
            low, high = quantiles(all_draws(len(stacked)) @ stacked / len(stacked))
        return Curve(found.points.numpy(), stacked.mean(0), low, high)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each object, method and quantity, as in objects.csv."""
        for record in self.records:
            for measure in self.measures:
                for method in self.methods:
                    scores = record.scores.get((method, measure.name))
                    if scores is None:
                        continue
                    for number, (known, values) in enumerate(
                        zip(record.objects, scores.values.tolist(), strict=True)
                    ):
                        for quantity, value in zip(measure.quantities, values, strict=True):
                            yield {
                                "image": record.name,
                                "object": number,
                                "query": known["query"],
                                "class": known["class"],
                                "score": known["score"],
                                "truth": None if known["truth"] < 0 else known["truth"],
                                "method": method,
                                "measure": measure.name,
                                "quantity": quantity.name,
                                "value": None if math.isnan(value) else value,
                            }

    def to_dataframe(self) -> pandas.DataFrame:
        """`rows` as a DataFrame. Raises SettingError where pandas is missing."""
        return dataframe(self.rows())

    def table(self) -> str:
        """`tables` in Markdown."""
        lines: list[str] = []
        for measure, head, rows in self.tables():
            lines += [f"**{measure.name}**: {measure.summary}", "", *markdown_table(head, rows), ""]
        return "\n".join(lines)

    def tables(self) -> Iterator[tuple[Measure, list[str], list[list[str]]]]:
        """For each measure the head and the rows of a table: a row for each method, with values and 95% intervals.

        Between two asterisks on either side are the best and those that do not differ from it significantly. Methods
        that were measured on other images are not ranked.
        """
        for measure in self.measures:
            head = ["method"]
            for quantity in measure.quantities:
                better = {"higher": " ↑", "lower": " ↓", "neither": ""}[quantity.direction]
                head.append(f"{quantity.name.replace('_', ' ')}{better}")
            head.append("images, objects")
            rows = []
            best = {
                quantity.name: self.best(measure.name, quantity.name)
                for quantity in measure.quantities
                if quantity.direction != "neither"
            }
            ranked = self.ranked(measure.name)
            for method in self.methods:
                cells = [method]
                for quantity in measure.quantities:
                    found = self.estimate(method, measure.name, quantity.name)
                    text = estimate_text(found)
                    cells.append(f"**{text}**" if method in best.get(quantity.name, ()) else text)
                first = self._estimates[method, measure.name][0]
                other = "" if method in ranked or not first.images else ", not ranked"
                cells.append(f"{first.images:,}, {first.objects:,}{other}")
                rows.append(cells)
            yield measure, head, rows

    def as_dict(self) -> dict[str, Any]:
        """Everything but the objects' curves, as JSON types; NaN becomes None."""
        measures = []
        for measure in self.measures:
            quantities = []
            for quantity in measure.quantities:
                compared = self.comparison(measure.name, quantity.name)
                ranks = quantity.direction != "neither"
                curves = {}
                if measure.points is not None:
                    for method in self.methods:
                        if self.of(method, measure.name):
                            curve = self.curve(method, measure.name, quantity.name)
                            curves[method] = {
                                name: _plain(getattr(curve, name)) for name in ("mean", "low", "high")
                            }
                quantities.append(
                    {
                        "name": quantity.name,
                        "title": quantity.title,
                        "direction": quantity.direction,
                        "unit": quantity.unit,
                        "estimates": {
                            method: {
                                name: _plain(value)
                                for name, value in vars(
                                    self.estimate(method, measure.name, quantity.name)
                                ).items()
                            }
                            for method in self.methods
                        },
                        "ranking": list(self.ranking(measure.name, quantity.name)) if ranks else None,
                        "best": list(self.best(measure.name, quantity.name)) if ranks else None,
                        "test": compared.test,
                        "differences": _plain(compared.difference),
                        "p": _plain(compared.p),
                        "curves": curves,
                    }
                )
            points = measure.points
            measures.append(
                {
                    "name": measure.name,
                    "summary": measure.summary,
                    "settings": measure.settings,
                    "axis": measure.axis,
                    "points": None if points is None else points.tolist(),
                    "quantities": quantities,
                }
            )
        return {
            "methods": list(self.methods),
            "configuration": self.configuration.text,
            "seed": self.seed,
            "images": [record.name for record in self.records],
            "objects": self.objects,
            "failures": dict(self.failures),
            "measures": measures,
        }

    def measure(self, name: str) -> Measure:
        """The measure of that name. Raises SettingError."""
        for measure in self.measures:
            if measure.name == name:
                return measure
        names = [measure.name for measure in self.measures]
        raise SettingError(
            f"the measure {name!r}{did_you_mean(name, names)} was not computed: use one of {', '.join(names)}"
        )

    def _place(self, measure: str, quantity: str | None) -> int:
        names = [known.name for known in self.measure(measure).quantities]
        if quantity is None:
            return 0
        if quantity not in names:
            raise SettingError(
                f"the measure {measure} has no quantity {quantity!r}{did_you_mean(quantity, names)}: use one of "
                f"{', '.join(names)}"
            )
        return names.index(quantity)


def estimate_text(found: Estimate) -> str:
    """`0.412 (0.398..0.425)`."""
    if math.isnan(found.value):
        return "-"
    interval = "" if math.isnan(found.low) else f" ({found.low:.3f}..{found.high:.3f})"
    return f"{found.value:.3f}{interval}"


def _plain(values: Any) -> Any:
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, Sequence):
        return [_plain(value) for value in values]
    return None if values != values else values
